"""FlashInfer's grouped GEMMs for experts: gather + activation + NVFP4 output, scatter-add, and the final reduction."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from conformance import packages, references
from conformance.driver import CLUSTERS, Call, Case, device, empty, pointer, stand_in_device, stream

MODULES = "flashinfer.fused_moe.cute_dsl.blackwell."
TOP_K = 2


@functools.cache
def compile_act(tile: tuple[int, int], cluster: tuple[int, int], quantize: bool) -> Any:
    """Gather, GEMM, SwiGLU; with or without NVFP4 output."""
    packages.use("flashinfer")
    import cutlass.cute as cute

    module = importlib.import_module(MODULES + "blockscaled_contiguous_gather_grouped_gemm_act_fusion")
    gemm = module.BlockScaledContiguousGatherGroupedGemmKernel(
        sf_vec_size=16, mma_tiler_mn=tile, cluster_shape_mn=cluster, vectorized_f32=True, topk=TOP_K
    )
    with stand_in_device():
        return cute.compile(
            gemm.wrapper,
            *_act_pointers((None,) * 12, quantize),
            None,
            *(256, 256, 512, 256, 4),
            tile_size=tile[0],
            scaling_vector_size=16,
            max_active_clusters=CLUSTERS,
            stream=stream(),
        )


def _act_pointers(tensors: tuple[torch.Tensor | None, ...], quantize: bool) -> list[Any]:
    import cutlass

    fp4, e4m3, int32, fp32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Int32, cutlass.Float32
    types = [(fp4, 32), (fp4, 32), (e4m3, 16), (e4m3, 16), (fp4 if quantize else cutlass.BFloat16, 32), (e4m3, 16)]
    types += [(fp32, 4), (int32, 4), (int32, 4), (int32, 4), (int32, 4), (fp32, 4)]
    pointers = [pointer(dtype, tensor, align) for (dtype, align), tensor in zip(types, tensors, strict=True)]
    if not quantize:
        pointers[5] = pointers[11] = None
    return pointers


@dataclass(frozen=True)
class Routing:
    """Which token goes to which row of which expert.

    Attributes:
        rows: permuted row -> token * TOP_K + slot, -1 for padding.
        tile_expert: tile -> expert.
        tile_limit: tile -> end of its valid rows.
        valid: the rows that are not padding.
    """

    rows: npt.NDArray[np.int32]
    tile_expert: npt.NDArray[np.int32]
    tile_limit: npt.NDArray[np.int32]

    @property
    def valid(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self.rows >= 0)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tile to expert, tile to limit, rows, number of tiles."""
        count = np.array([len(self.tile_expert)], np.int32)
        return device(self.tile_expert), device(self.tile_limit), device(self.rows), device(count)


def route(rng: np.random.Generator, groups: tuple[int, ...], tile: int) -> Routing:
    """Each (token, slot) goes to one expert; experts have `groups` rows, padded to the tile."""
    order = rng.permutation(sum(groups)).astype(np.int32)
    rows: list[npt.NDArray[np.int32]] = []
    experts: list[int] = []
    limits: list[int] = []
    start = 0
    for expert, size in enumerate(groups):
        padded = -(-size // tile) * tile
        base = len(experts) * tile
        part = np.full(padded, -1, np.int32)
        part[:size] = order[start : start + size]
        rows.append(part)
        experts += [expert] * (padded // tile)
        limits += [base + min(size, end) for end in range(tile, padded + 1, tile)]
        start += size
    return Routing(np.concatenate(rows), np.array(experts, np.int32), np.array(limits, np.int32))


def _weights(
    rng: np.random.Generator, experts: int, n: int, k: int
) -> tuple[list[references.Scaled], torch.Tensor, torch.Tensor]:
    weights = [references.random_nvfp4(rng, n, k) for _ in range(experts)]
    elements = device(np.stack([w.elements for w in weights]))
    return weights, elements, device(np.stack([w.blocked for w in weights]))


def prepare_act(
    seed: int, nightly: bool, tile: tuple[int, int], cluster: tuple[int, int], quantize: bool = True
) -> Call:
    """Inputs and reference of the gather kernel."""
    rng = np.random.default_rng(seed)
    groups, n, k = ((300, 36, 0, 132), 512, 1024) if nightly else ((70, 0, 130), 256, 256)
    tokens = sum(groups) // TOP_K
    routing = route(rng, groups, tile[0])
    permuted, width = len(routing.rows), n // 2
    a = references.random_nvfp4(rng, tokens, k)
    weights, b, b_scales = _weights(rng, len(groups), n, k)
    alpha = rng.uniform(0.5, 1.5, len(groups)).astype(np.float32) / np.float32(8 * np.sqrt(k))
    norm = np.float32(1.5)

    inputs = (device(a.elements), b, device(a.scales), b_scales)
    out = empty(permuted, width // 2, dtype=torch.uint8) if quantize else empty(permuted, width, dtype=torch.bfloat16)
    out_scales = empty(permuted * width // 16, dtype=torch.uint8)
    rest = (device(alpha), *routing.tensors(), device(np.array([norm])))

    def check() -> None:
        packed = out.numpy() if quantize else None
        scales = references.from_blocked(out_scales.numpy(), permuted, width // 16)
        for expert, weight in enumerate(weights):
            rows = routing.valid[np.repeat(routing.tile_expert, tile[0])[routing.valid] == expert]
            gathered = a.values[routing.rows[rows] // TOP_K]
            product = references.matmul(gathered, weight.values).scaled(float(alpha[expert]))
            # Columns alternate: 64 of the up projection, 64 of the gate.
            columns = np.arange(n).reshape(-1, 2, 64)
            up, gate = columns[:, 0].ravel(), columns[:, 1].ravel()
            exact = references.silu_gate(product[:, up], product[:, gate])
            if packed is not None:
                references.assert_quantized(packed[rows], scales[rows], exact, float(norm))
            else:
                references.assert_rounded(out[rows], exact)

    args = _act_pointers((*inputs, out, out_scales, *rest), quantize)
    outputs = (out, out_scales) if quantize else (out,)
    return Call(
        compile_act(tile, cluster, quantize),
        (*args, None, tokens, permuted, n, k, len(groups), stream()),
        check,
        outputs,
        (*inputs, *rest),
    )


@functools.cache
def compile_finalize(tile: tuple[int, int], cluster: tuple[int, int], fused: bool) -> Any:
    """GEMM with a scatter-add of the scaled rows, or (not fused) plain rows in expanded order."""
    packages.use("flashinfer")
    import cutlass.cute as cute

    module = importlib.import_module(MODULES + "blockscaled_contiguous_grouped_gemm_finalize_fusion")
    gemm = module.Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel(
        sf_vec_size=16, mma_tiler_mn=tile, cluster_shape_mn=cluster, use_fused_finalize=fused
    )
    with stand_in_device():
        return cute.compile(
            gemm.wrapper,
            *_finalize_pointers((None,) * 11),
            None,
            *(256, 256, 256, 4, 128, TOP_K),
            tile_size=tile[0],
            scaling_vector_size=16,
            max_active_clusters=CLUSTERS,
            stream=stream(),
        )


def _finalize_pointers(tensors: tuple[torch.Tensor | None, ...]) -> list[Any]:
    import cutlass

    fp4, e4m3, int32, fp32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Int32, cutlass.Float32
    types = [(fp4, 32), (fp4, 32), (e4m3, 16), (e4m3, 16), (cutlass.BFloat16, 16), (fp32, 4), (int32, 4), (int32, 4)]
    types += [(int32, 4), (int32, 4), (fp32, 4)]
    return [pointer(dtype, tensor, align) for (dtype, align), tensor in zip(types, tensors, strict=True)]


def prepare_finalize(
    seed: int, nightly: bool, tile: tuple[int, int], cluster: tuple[int, int], fused: bool = True
) -> Call:
    """Inputs and reference of the scatter-add kernel."""
    rng = np.random.default_rng(seed)
    groups, n, k = ((300, 36, 0, 132), 512, 1024) if nightly else ((70, 0, 130), 256, 256)
    tokens = sum(groups) // TOP_K
    routing = route(rng, groups, tile[0])
    permuted = len(routing.rows)
    a = references.random_nvfp4(rng, permuted, k)
    weights, b, b_scales = _weights(rng, len(groups), n, k)
    alpha = rng.uniform(0.5, 1.5, len(groups)).astype(np.float32) / np.float32(np.sqrt(k))
    token_scales = rng.uniform(0.1, 1, (tokens, TOP_K)).astype(np.float32)

    inputs = (device(a.elements), b, device(a.blocked), b_scales)
    out = device(np.zeros((tokens if fused else tokens * TOP_K, n)), torch.bfloat16)
    rest = (device(alpha), *routing.tensors(), device(token_scales))

    def check() -> None:
        value, slack = np.zeros((tokens * TOP_K, n)), np.zeros((tokens * TOP_K, n))
        for expert, weight in enumerate(weights):
            rows = routing.valid[np.repeat(routing.tile_expert, tile[0])[routing.valid] == expert]
            target = routing.rows[rows]
            factor = float(alpha[expert]) * (token_scales.ravel()[target, None].astype(np.float64) if fused else 1.0)
            product = references.matmul(a.values[rows], weight.values).scaled(factor)
            value[target], slack[target] = product.value, product.slack
        if not fused:
            references.assert_rounded(out, references.Exact(value, slack))
            return
        # Each row is rounded to BF16, then added to BF16 memory: first to 0, which is exact, then to the other row.
        parts, slacks = value.reshape(tokens, TOP_K, n), slack.reshape(tokens, TOP_K, n)
        rounding = references.half_unit(np.abs(parts) + slacks, 7).sum(axis=1)
        references.assert_rounded(out, references.Exact(parts.sum(axis=1), slacks.sum(axis=1) + rounding))

    args = _finalize_pointers((*inputs, out, *rest))
    return Call(
        compile_finalize(tile, cluster, fused),
        (*args, None, permuted, n, k, len(groups), tokens, TOP_K, stream()),
        check,
        () if fused else (out,),
        (*inputs, *rest, out),
    )


@functools.cache
def compile_reduce(width: int) -> Any:
    """The reduction of expanded rows to tokens."""
    packages.use("flashinfer")
    import cutlass
    import cutlass.cute as cute

    module = importlib.import_module(MODULES + "moe_finalize")
    kernel = module._MoeFinalizeKernel(width, TOP_K, 32, False, False, 1)
    types = ((cutlass.BFloat16, 16), (cutlass.BFloat16, 16), (cutlass.Int32, 4), (cutlass.Float32, 4))
    with stand_in_device():
        return cute.compile(kernel, *(pointer(dtype, None, align) for dtype, align in types), 8, stream())


def prepare_reduce(seed: int, nightly: bool) -> Call:
    """Inputs and reference of the reduction; a negative index leaves a row out."""
    import cutlass

    rng = np.random.default_rng(seed)
    tokens, width = (64, 4096) if nightly else (5, 256)
    rows = torch.from_numpy(rng.standard_normal((tokens * TOP_K + 3, width))).to(torch.bfloat16)
    index = rng.permutation(tokens * TOP_K).astype(np.int32).reshape(tokens, TOP_K)
    index[1, 0] = -1
    scales = rng.uniform(0.1, 1, (tokens, TOP_K)).astype(np.float32)
    tensors = (device(rows), empty(tokens, width, dtype=torch.bfloat16), device(index), device(scales))
    types = ((cutlass.BFloat16, 16), (cutlass.BFloat16, 16), (cutlass.Int32, 4), (cutlass.Float32, 4))

    def check() -> None:
        parts = rows.double().numpy()[index] * (scales * (index >= 0))[..., None].astype(np.float64)
        slack = np.abs(parts).sum(axis=1) * 2.0**-22
        references.assert_rounded(tensors[1], references.Exact(parts.sum(axis=1), slack))

    pointers = [pointer(dtype, tensor, align) for (dtype, align), tensor in zip(types, tensors, strict=True)]
    return Call(compile_reduce(width), (*pointers, tokens, stream()), check, (tensors[1],), tensors)


def _case(name: str, prepare: Any, *args: Any, nightly_only: bool = False) -> Case:
    return Case(name, "flashinfer", "sm_100a", lambda seed, nightly: prepare(seed, nightly, *args), nightly_only)


CASES = (
    _case("act-1cta", prepare_act, (128, 128), (1, 1)),
    _case("act-2cta", prepare_act, (256, 128), (2, 1)),
    _case("act-1cta-n256", prepare_act, (128, 256), (1, 1), nightly_only=True),
    _case("act-1cta-bf16", prepare_act, (128, 128), (1, 1), False, nightly_only=True),
    _case("scatter-1cta", prepare_finalize, (128, 128), (1, 1)),
    _case("scatter-2cta", prepare_finalize, (256, 128), (2, 1)),
    _case("expanded-1cta", prepare_finalize, (128, 128), (1, 1), False, nightly_only=True),
    _case("moe-reduce", prepare_reduce),
)
