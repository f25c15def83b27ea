"""A parallel layout as vLLM understands it: which of a model's parts are cut, and into how many."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_nvfp4 import architecture


@dataclass(frozen=True)
class Layout:
    """Sizes of vLLM's flags --tensor-parallel-size, --data-parallel-size, --pipeline-parallel-size; ep is a switch."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: bool = False

    @property
    def num_gpus(self) -> int:
        """tp * dp * pp."""
        return self.tp * self.dp * self.pp

    @property
    def expert_ranks(self) -> int:
        """tp * dp: over how many ranks routed experts are spread, whole (ep) or cut (not ep)."""
        return self.tp * self.dp

    @property
    def shared_tp(self) -> int:
        """Into how many parts a shared expert is cut.

        Where the tokens of a layer are already spread over the tensor-parallel ranks (dp > 1 with ep), vLLM keeps it whole.
        """
        return 1 if self.ep and self.tp > 1 and self.dp > 1 and self.pp == 1 else self.tp

    @property
    def label(self) -> str:
        """Short form: tp8, dp8+ep8, tp4+dp2+ep8."""
        sizes = [("tp", self.tp), ("dp", self.dp), ("pp", self.pp), ("ep", self.expert_ranks if self.ep else 1)]
        return "+".join(f"{name}{size}" for name, size in sizes if size > 1) or "tp1"

    @property
    def flags(self) -> str:
        """vLLM's command line flags for it."""
        named = [("tensor", self.tp), ("data", self.dp), ("pipeline", self.pp)]
        flags = [f"--{name}-parallel-size {size}" for name, size in named if size > 1]
        return " ".join([*flags, *(["--enable-expert-parallel"] if self.ep else [])])

    def check(self, config: Any) -> None:
        """Refuse a layout that some matrix, or the number of layers, cannot be cut by.

        Raises: ValueError - names the flag, the field and its value.
        """
        for name in ("tp", "dp", "pp"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        architecture.check_parallel(config, self.tp, self.ep)
        ranks, intermediate = self.expert_ranks, config.moe_intermediate_size
        if self.ep and config.n_routed_experts % ranks:
            raise ValueError(
                f"{self.label}: n_routed_experts is {config.n_routed_experts}, not a multiple of tp * dp = {ranks}"
            )
        if not self.ep and intermediate % (ranks * architecture.BLOCK_SIZE):
            raise ValueError(
                f"{self.label}: moe_intermediate_size is {intermediate}, not a multiple of tp * dp * "
                f"{architecture.BLOCK_SIZE} = {ranks * architecture.BLOCK_SIZE}; use expert parallelism or fewer ranks"
            )
        if self.pp > config.num_hidden_layers:
            raise ValueError(f"--pipeline-parallel-size {self.pp} is more than {config.num_hidden_layers} layers")

    def stages(self, num_layers: int) -> list[range]:
        """The layers of each pipeline stage; a remainder goes to the stages before the last, from the back, as in vLLM."""
        counts = [num_layers // self.pp] * self.pp
        for i in range(2, num_layers % self.pp + 2):
            counts[-i] += 1
        starts = [sum(counts[:i]) for i in range(self.pp)]
        return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def candidates(config: Any, num_gpus: int, nvlink_domain: int) -> Iterator[Layout]:
    """The layouts on `num_gpus` that vLLM can cut this model into: plain TP, TP with EP, and DP attention with EP."""
    for tp in (2**i for i in range(num_gpus.bit_length())):
        if num_gpus % tp or tp > nvlink_domain:
            continue
        dp = num_gpus // tp
        for ep in (False, True) if dp == 1 else (True,):
            layout = Layout(tp=tp, dp=dp, ep=ep and num_gpus > 1)
            if ep and num_gpus == 1:
                continue
            try:
                layout.check(config)
            except ValueError:
                continue
            yield layout
