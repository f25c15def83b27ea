"""Linears of an attention layer that read the same input, as one: it is quantized once, and there is one GEMM.

Upstream multiplies a layer's hidden state by up to four matrices, on as many streams. Those of them that are NVFP4 are rows
of one matrix here, each with its own alpha. The hard part is memory: the parameters become views of one tensor before
weights are loaded into them, so that nothing is ever copied behind the load.

Activations in NVFP4 need one `input_scale` for all, which linears with the same input have from any calibration (ModelOpt
0.47 exports them so). Where a checkpoint has others, every linear gets a runner of its own, and quantizes for itself.

wq_b and the indexer's wq_b read the query latent together. One matrix of them would be multiplied as a whole also where
short contexts leave the indexer's part out, so that they share the quantization only (`SharedQuery`).

Where the reference serves, nothing is joined or shared: it launches nothing, and its sums keep their order.
"""

import functools
import logging
from typing import Any

import torch

from cutedsl.ops.linear import linear as linear_op
from cutedsl.ops.quantized_linear import linear_of_quantized, quantize_input
from cutedsl.runners import BF16
from cutedsl.runners.linear import LinearRunner
from vllm_nvfp4 import dump, platform, selection
from vllm_nvfp4.linear import Nvfp4RunnerLinearKernel

logger = logging.getLogger("vllm.nvfp4")

# Upstream's kernels read their part of a row in pieces of 16 bytes.
ROW_MULTIPLE = 8
LEAVES = ("weight", "weight_scale")
# How linears with a common input are reported, beside themselves.
JOINED, SEPARATE = "joined_input", "separate_input"


class SharedInput:
    """Several linears of one layer as one. After the load their parameters are all the same tensors, those of the runner.

    Args:
        name: of the runner.
        linears: by their place in upstream's order; each served by our kernel, and not loaded yet.

    Attributes:
        places: of the linears, in the order of their rows.
    """

    def __init__(self, name: str, linears: dict[int, Any]) -> None:
        self.name, self.places, self.linears = name, tuple(linears), tuple(linears.values())
        self._runner_id = 0
        self.sizes = [len(linear.weight) for linear in self.linears]
        self._whole = {leaf: self._join(leaf) for leaf in LEAVES}
        for linear in self.linears:
            linear.nvfp4_is_joined = True

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each linear's x @ W.T, for x (M, K): views of one (M, N) tensor."""
        return linear_op(x, self._runner_id).split(self.sizes, dim=1)

    def finish(self) -> LinearRunner | None:
        """After the load: the runner of all rows; None where input scales differ, and each linear has a runner of its own.

        Raises: RuntimeError - a parameter is no longer where it was loaded; ValueError - what LinearRunner refuses.
        """
        self._check_in_place()
        whole, self._whole = self._whole, {}
        scales = torch.cat([linear.input_scale.data for linear in self.linears])
        activations, backend = platform.activations(), platform.backend()
        assert backend is not None  # the linears have our kernel, which needs one
        if activations != BF16 and not bool((scales == scales[0]).all()):
            if all(choice.kind != SEPARATE for choice in selection.choices()):
                logger.warning(
                    "%s: input_scale differs (%s), so that %d linears quantize their common input each for itself, here and "
                    "maybe in other layers; export one input_scale for linears with the same input, as ModelOpt 0.47 does",
                    self.name, ", ".join(f"{scale:.6g}" for scale in scales.tolist()), len(self.linears),
                )  # fmt: skip
            selection.record(self.name, SEPARATE, f"cutedsl {backend}", reason="input_scale differs")
            for linear in self.linears:
                linear.quant_method.kernel.build_runner(linear)
            return None
        runner = LinearRunner(
            self.name,
            whole["weight"],
            whole["weight_scale"],
            torch.cat([linear.weight_scale_2.data for linear in self.linears]),
            scales,
            [size for linear in self.linears for size in linear.logical_widths],
            backend=backend,
            activations=activations,
        )
        selection.record(self.name, JOINED, f"cutedsl {backend}")
        dump.watch(runner)
        self._runner_id = runner.runner_id
        # A runner that had to pad has tensors of its own: what was loaded must not stay beside them.
        held = runner.chain.groups[0].spans[0][-1] if hasattr(runner, "chain") else runner.matrix
        for linear in self.linears:
            for leaf in LEAVES:
                getattr(linear, leaf).data = getattr(held, leaf)
        return runner

    def _join(self, leaf: str) -> torch.Tensor:
        """One tensor of all rows; the linears' parameters become views of it."""
        params = [getattr(linear, leaf) for linear in self.linears]
        # As bytes: not every device joins every 8-bit type.
        whole = torch.cat([param.data.view(torch.uint8) for param in params]).view(params[0].dtype)
        for param, rows in zip(params, whole.split(self.sizes), strict=True):
            param.data = rows
        return whole

    def _check_in_place(self) -> None:
        for leaf, whole in self._whole.items():
            for linear, rows in zip(self.linears, whole.split(self.sizes), strict=True):
                if getattr(linear, leaf).data_ptr() != rows.data_ptr():
                    raise RuntimeError(
                        f"{linear.prefix}.{leaf} was replaced or moved after the model was built, but its rows are served "
                        f"as part of {self.name}; offloading and reloading of weights are not supported here"
                    )


class SharedQuery:
    """One quantization of the query latent for two linears.

    Args:
        runners: of the two, with the same `quantized_row` and input_scale.
        max_tokens: the most that are quantized together; with more, each linear quantizes for itself.
    """

    def __init__(self, runners: tuple[LinearRunner, LinearRunner], max_tokens: int) -> None:
        runner, _ = runners
        assert runner.quantized_row is not None
        self._runner_id, self._max_tokens, self._sf_shape = runner.runner_id, max_tokens, runner.quantized_row.sf_shape
        self._sf = _block_scales(self._sf_shape(max_tokens), runner.device)

    def __call__(self, qr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """qr (M, K) -> what `multiply` takes; qr itself and None where it is too long."""
        if qr.shape[0] > self._max_tokens:
            return qr, None
        num_rows, _ = self._sf_shape(qr.shape[0])
        sf = self._sf[:num_rows]
        return quantize_input(qr, sf, self._runner_id), sf


def multiply(linear: Any, a: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    """linear(x), for the a and sf that SharedQuery made of x."""
    return linear_of_quantized(a, sf, linear.nvfp4_runner.runner_id)


@functools.cache
def _block_scales(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Where block scales of the query latent lie, of one layer after the other; zeros, as padding must be numbers."""
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def share_query(first: Any, second: Any, max_tokens: int) -> SharedQuery | None:
    """One quantization for two linears that are loaded, or None: not both are ours, or they do not quantize alike."""
    if platform.backend() not in platform.CAPABILITY_OF or not (_is_ours(first) and _is_ours(second)):
        return None
    runners = first.nvfp4_runner, second.nvfp4_runner
    rows = {runner.quantized_row for runner in runners}
    scales = {float(runner.input_scale[0]) for runner in runners}
    return SharedQuery(runners, max_tokens) if len(rows) == 1 and None not in rows and len(scales) == 1 else None


def join(name: str, linears: list[Any]) -> SharedInput | None:
    """The linears that can be one, as one; None if there are not two. Called once, before weights are loaded.

    Args:
        linears: that read the same input, in upstream's order; None where the layer has none.
    """
    if platform.backend() not in platform.CAPABILITY_OF:
        return None
    ours = {place: linear for place, linear in enumerate(linears) if linear is not None and _is_ours(linear)}
    return SharedInput(name, ours) if len(ours) > 1 else None


def _is_ours(linear: Any) -> bool:
    kernel = getattr(linear.quant_method, "kernel", None)
    return isinstance(kernel, Nvfp4RunnerLinearKernel) and len(linear.weight) % ROW_MULTIPLE == 0
