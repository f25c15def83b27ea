"""Bytes of parameters on one GPU, by class, for a parallel layout: what vLLM holds once a checkpoint is loaded.

The hard part is what is cut and what every rank holds whole: tensor parallelism cuts wq_b, wo_a, wo_b, shared experts and the
vocabulary, but not wq_a, wkv, the compressors, the indexer or the router; experts are cut or dealt out over tp * dp ranks.
vLLM keeps norms, router and embeddings in BF16 whatever the checkpoint has, and hyper-connections, biases, sinks in FP32.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_nvfp4 import architecture, names
from vllm_nvfp4.doctor.layout import Layout
from vllm_nvfp4.inventory import Format

CLASSES = (
    "routed_experts",
    "shared_experts",
    "attention",
    "wo_a",
    "compressor_indexer",
    "embeddings_head",
    "router_norms_hc",
    "mtp",
)
# DeepSeek's own experts; no checkpoint that this overlay serves has them, but a published config.json may mean them.
MXFP4 = "MXFP4 blocks of 32"
FP8_BLOCK = 128
# FlashMLA on NVIDIA pads a rank's heads to one of these.
PADDED_HEADS = (64, 128)
VOCAB_PADDING = 64
FIRST, LAST, EVERY = "first", "last", "every"


@dataclass(frozen=True)
class Part:
    """Tensors that are alike: where they live (a layer, or FIRST, LAST, EVERY stage), their class, shape and format."""

    scope: int | str
    cls: str
    name: str
    shape: tuple[int, ...]
    format: Format | str | int  # an int is the itemsize of a tensor that no format packs
    count: int = 1


def matrix_bytes(form: Format | str, n: int, k: int) -> int:
    """Bytes of an (n, k) matrix with its scales.

    NVFP4: n k / 2 + n k / 16 + 8; MXFP4: n k / 2 + n k / 32; FP8: n k + one byte for each 128 x 128; else 2 n k.
    """
    if form is Format.NVFP4:
        return n * k // 2 + n * k // architecture.BLOCK_SIZE + 8
    if form == MXFP4:
        return n * k // 2 + n * k // 32
    if form is Format.FP8_BLOCK:
        return n * k + -(-n // FP8_BLOCK) * -(-k // FP8_BLOCK)
    return 2 * n * k


def assumed_formats(config: Any, assume: str = "config") -> tuple[dict[str, Format | str], str]:
    """Formats where there is no checkpoint to read them from, and in words what was assumed.

    Args: assume: "nvfp4" - as ModelOpt exports all linears (wo_a stays BF16); "config" - what quantization_config says:
        DeepSeek's FP8 means FP8 linears and experts in MXFP4 (NVFP4 with moe_quant_algo, FP8 with expert_dtype); anything
        else means "nvfp4".
    """
    quantization = getattr(config, "quantization_config", None) or {}
    is_fp8 = assume == "config" and "fp8" in str(quantization.get("quant_method", "")).lower()
    if not is_fp8:
        return {}, "every linear in NVFP4, wo_a, embeddings, head and router in BF16, as ModelOpt exports"
    experts: Format | str = MXFP4
    if str(quantization.get("moe_quant_algo") or "").upper() == "NVFP4":
        experts = Format.NVFP4
    elif "fp8" in str(getattr(config, "expert_dtype", "") or "").lower():
        experts = Format.FP8_BLOCK
    text = f"linears in FP8, compressors in BF16, experts in {experts}: config.json says fp8"
    return {
        "*": Format.FP8_BLOCK,
        ".ffn.experts": experts,
        "compressor.": Format.HIGH,
        ".weights_proj": Format.HIGH,
    }, text


def _assumed(rules: Mapping[str, Format | str], module: str) -> Format | str:
    """The format of a module under assumed_formats' rules: the last rule whose key is in the name."""
    found: Format | str = Format.HIGH if not rules and module.endswith(".wo_a") else Format.NVFP4
    for key, form in rules.items():
        if key == "*" or key in module:
            found = form
    return found


class Table:
    """Every tensor of a model as Parts, experts of a layer as one; built once, evaluated for many layouts.

    Args:
        config: DeepSeek-V4 configuration with vLLM's field names.
        formats: canonical module -> Format, as inventory.Inventory.formats; None assumes them.
        mtp_layers: MTP layers that are loaded, 0 unless speculative decoding is on.
        assume: as assumed_formats. wo_a_nvfp4: a BF16 wo_a is quantized at load (NVFP4_WO_A=1).
    Raises: ValueError - the configuration lacks a field, or `formats` lacks a module.
    """

    def __init__(
        self,
        config: Any,
        formats: Mapping[str, Format] | None,
        mtp_layers: int = 0,
        assume: str = "config",
        wo_a_nvfp4: bool = False,
    ) -> None:
        expected = architecture.expected(config, mtp_layers)
        self.config = config
        self.assumption = ""
        rules: Mapping[str, Format | str] = {}
        if formats is None:
            rules, self.assumption = assumed_formats(config, assume)
        counts: Counter[tuple[str, tuple[int, int]]] = Counter()
        for module, shape in expected.linears.items():
            expert = names.parse_expert(f"{module}.weight")
            key = f"{expert.layer}.ffn.experts.{expert.projection}" if expert else module
            counts[key, shape] += 1
        self.parts = []
        for (module, shape), count in counts.items():
            scope, cls = _place(module)
            owner = module.rpartition(".")[0] if ".ffn.experts." in module else module
            if formats is not None and owner not in formats:
                raise ValueError(f"no format is known for {owner}; pass the formats of the whole checkpoint")
            form = _assumed(rules, module) if formats is None else formats[owner]
            if wo_a_nvfp4 and form is Format.HIGH and module.endswith(".wo_a"):
                form = Format.NVFP4
            self.parts.append(Part(scope, cls, module, shape, form, count))
        for name, dims in expected.tensors.items():
            if name not in expected.optional or name == "lm_head.weight":
                self.parts.append(Part(*_place(name), name, dims, _itemsize(name)))

    def stages(self, layout: Layout) -> list[dict[str, int]]:
        """Bytes by class of one rank of each pipeline stage."""
        sizes = [dict.fromkeys(CLASSES, 0) for _ in range(layout.pp)]
        ranges = layout.stages(self.config.num_hidden_layers)
        for part in self.parts:
            size = _part_bytes(part, layout)
            for i, layers in enumerate(ranges):
                here = part.scope in layers if isinstance(part.scope, int) else part.scope == EVERY
                if here or (part.scope == FIRST and i == 0) or (part.scope == LAST and i == layout.pp - 1):
                    sizes[i][part.cls] += size
        return sizes

    @property
    def total_bytes(self) -> int:
        """Of the whole model on one GPU."""
        return sum(self.stages(Layout())[0].values())


def _place(name: str) -> tuple[int | str, str]:
    """Scope and class of a canonical module or tensor."""
    if name.startswith("mtp."):
        return LAST, "mtp"
    if name.startswith(("lm_head", "model.embed_tokens")):
        return (LAST if name.startswith("lm_head") else FIRST), "embeddings_head"
    if not name.startswith("model.layers."):
        return (EVERY if "hc_head" in name else LAST), "router_norms_hc"
    scope = int(name.split(".")[2])
    if ".ffn.experts." in name:
        return scope, "routed_experts"
    if ".ffn.shared_experts." in name:
        return scope, "shared_experts"
    if ".compressor." in name or ".indexer." in name:
        return scope, "compressor_indexer"
    if name.endswith(".wo_a"):
        return scope, "wo_a"
    return scope, "attention" if name.rpartition(".")[2] in ("wq_a", "wkv", "wq_b", "wo_b") else "router_norms_hc"


def _itemsize(name: str) -> int:
    """Bytes of an element once loaded: FP32 and int32 for a few, BF16 for the rest."""
    leaf = name.rpartition(".")[2]
    wide = leaf.startswith("hc_") or leaf in ("attn_sink", "ape", "e_score_correction_bias", "tid2eid")
    return 4 if wide else 2


def _part_bytes(part: Part, layout: Layout) -> int:
    """Bytes of a part on one rank."""
    if isinstance(part.format, int):
        return _tensor_bytes(part, layout) * part.count
    n, k = part.shape
    count, leaf = part.count, part.name.rpartition(".")[2]
    if ".ffn.experts." in part.name:
        if layout.ep:
            count //= layout.expert_ranks
        elif leaf == "w2":
            k //= layout.expert_ranks
        else:
            n //= layout.expert_ranks
    elif ".ffn.shared_experts." in part.name:
        width = k if leaf == "down_proj" else n
        step = FP8_BLOCK if part.format is Format.FP8_BLOCK else 1
        local = -(-width // (step * layout.shared_tp)) * step
        n, k = (n, local) if leaf == "down_proj" else (local, k)
    elif ".indexer." not in part.name and leaf in ("wq_b", "wo_a"):
        n //= layout.tp
    elif leaf == "wo_b":
        k //= layout.tp
    return matrix_bytes(part.format, n, k) * count


def _tensor_bytes(part: Part, layout: Layout) -> int:
    """Bytes of a tensor that no format packs, on one rank."""
    shape = list(part.shape)
    if part.cls == "embeddings_head":
        shape[0] = -(-shape[0] // VOCAB_PADDING) * VOCAB_PADDING // layout.tp
    elif part.name.endswith(".attn_sink"):
        shape[0] = padded_heads(shape[0] // layout.tp)
    size = int(part.format)
    for dim in shape:
        size *= dim
    return size


def padded_heads(num_heads: int) -> int:
    """The number of query heads that FlashMLA's buffers have for `num_heads`."""
    return next((p for p in PADDED_HEADS if num_heads <= p), num_heads)
