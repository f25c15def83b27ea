"""FlashInfer's dense GEMMs: mm_fp4, the masked batch, the low-latency kernel for few columns, and BF16 times FP4."""

import functools
import importlib
from typing import Any

import numpy as np
import torch

from conformance import packages, references
from conformance.driver import CLUSTERS, POLICIES, Call, Case, device, empty, pointer, stand_in_device, stream

Pair = tuple[int, int]
Policies = tuple[str, ...]


@functools.cache
def compile_mm_fp4(tile: Pair, cluster: Pair, prefetch: bool, swap: bool) -> Any:
    """The GEMM behind mm_fp4, for a TVM-FFI call."""
    packages.use("flashinfer")
    import cutlass

    host = importlib.import_module("flashinfer.gemm.gemm_mm_fp4_cute_dsl")
    module = importlib.import_module("flashinfer.gemm.kernels.dense_blockscaled_gemm_sm100")
    gemm = module.Sm100BlockScaledPersistentDenseGemmKernel(16, tile, cluster, prefetch)
    with stand_in_device():
        return host._make_blockscaled_gemm_compile_fn(
            gemm, cutlass.Uint8, cutlass.Float8E4M3FN, cutlass.BFloat16, 32, swap, 1, 1, 4, 1, CLUSTERS
        )()


def prepare_mm_fp4(
    seed: int, nightly: bool, tile: Pair, cluster: Pair, prefetch: bool = False, swap: bool = False
) -> Call:
    """C = alpha * A B^T with ragged M, N and K."""
    import cutlass

    rng = np.random.default_rng(seed)
    m, n, k = (1000, 1024, 2016) if nightly else (330, 264, 480)
    a, b = references.random_nvfp4(rng, m, k), references.random_nvfp4(rng, n, k)
    alpha = np.array([0.03125], np.float32)
    # With `swap` C is stored with M contiguous; the host code passes it with strides that say so, in the other order.
    c = empty(n, m, dtype=torch.bfloat16) if swap else empty(m, n, dtype=torch.bfloat16)
    tensors = (device(a.elements), device(b.elements), device(a.blocked), device(b.blocked), device(alpha))

    def check() -> None:
        product = references.matmul(a.values, b.values).scaled(float(alpha[0]))
        references.assert_rounded(c.T if swap else c, product)

    scales = [pointer(cutlass.Float8E4M3FN, tensor) for tensor in tensors[2:4]]
    sizes = (-(-m // 128), -(-n // 128), -(-k // 64))
    args = (*tensors[:2], c.as_strided(c.shape, (1, n)) if swap else c, *sizes, *scales, tensors[4])
    return Call(compile_mm_fp4(tile, cluster, prefetch, swap), args, check, (c,), tensors, constant=tensors[4:])


def _masked_pointers(tensors: tuple[torch.Tensor | None, ...]) -> list[Any]:
    import cutlass

    fp4, e4m3 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
    types = (fp4, fp4, e4m3, e4m3, cutlass.BFloat16, cutlass.Int32, cutlass.Float32)
    pointers = [pointer(dtype, tensor) for dtype, tensor in zip(types, tensors, strict=True)]
    return [*pointers[:6], None, pointers[6], *[None] * 6]


@functools.cache
def compile_masked(m: int, n: int, k: int, groups: int, tile: Pair, cluster: Pair) -> Any:
    """The masked batch; its sizes are compiled in."""
    packages.use("flashinfer")
    import cutlass
    import cutlass.cute as cute

    module = importlib.import_module("flashinfer.gemm.kernels.grouped_gemm_masked_blackwell")
    with stand_in_device():
        kernel = module.MaskedBatchedMatmulCuteDSL(
            m=m,
            n=n,
            k=k,
            l=groups,
            a_major="k",
            b_major="k",
            c_major="n",
            ab_dtype=cutlass.Float4E2M1FN,
            sf_dtype=cutlass.Float8E4M3FN,
            c_dtype=cutlass.BFloat16,
            alpha_dtype=cutlass.Float32,
            sf_vec_size=16,
            mma_tiler_mn=tile,
            cluster_shape_mn=cluster,
            sm_count=4,
            sm_version="sm_100",
        )
        return cute.compile(kernel, *_masked_pointers((None,) * 7), stream())


def prepare_masked(seed: int, nightly: bool, tile: Pair, cluster: Pair) -> Call:
    """Batches of which only the first rows count."""
    rng = np.random.default_rng(seed)
    m, n, k = (512, 512, 1024) if nightly else (256, 256, 256)
    rows = (130, 0, 256, 1)[: 4 if nightly else 3]
    a = [references.random_nvfp4(rng, m, k) for _ in rows]
    b = [references.random_nvfp4(rng, n, k) for _ in rows]
    alpha = rng.uniform(0.5, 1.5, len(rows)).astype(np.float32)
    c = device(np.zeros((len(rows), m, n)), torch.bfloat16)
    inputs = [device(np.stack([x.elements for x in side])) for side in (a, b)]
    inputs += [device(np.stack([x.blocked for x in side])) for side in (a, b)]
    rest = (device(np.array(rows, np.int32)), device(alpha))

    def check() -> None:
        for group, count in enumerate(rows):
            exact = references.matmul(a[group].values[:count], b[group].values).scaled(float(alpha[group]))
            references.assert_rounded(c[group, :count], exact)

    args = (*_masked_pointers((*inputs, c, *rest)), stream())
    compiled = compile_masked(m, n, k, len(rows), tile, cluster)
    return Call(compiled, args, check, (), (*inputs, c, *rest))


# Formats of the low-latency kernel: elements of A and B, scales, K tile.
_LOW_LATENCY = {
    "nvfp4": ("Float4E2M1FN", "Float4E2M1FN", "Float8E4M3FN", 16, 256),
    "mxfp8": ("Float8E4M3FN", "Float8E4M3FN", "Float8E8M0FNU", 32, 128),
    "mxfp8-mxfp4": ("Float8E4M3FN", "Float4E2M1FN", "Float8E8M0FNU", 32, 128),
}
_RANDOM = {
    ("Float4E2M1FN", 16): references.random_nvfp4,
    ("Float8E4M3FN", 32): references.random_mxfp8,
    ("Float4E2M1FN", 32): references.random_mxfp4,
}


def _low_latency_pointers(form: str, tensors: tuple[torch.Tensor | None, ...]) -> list[Any]:
    import cutlass

    a, b, scale, _, _ = _LOW_LATENCY[form]
    types = [(a, 16), (scale, 32), (b, 16), (scale, 16), ("BFloat16", 16), ("Float32", 4), ("BFloat16", 2)]
    return [pointer(getattr(cutlass, t), tensor, align) for (t, align), tensor in zip(types, tensors, strict=True)]


@functools.cache
def compile_low_latency(form: str, columns: int, split_k: int, through_registers: bool) -> Any:
    """A tall, thin GEMM; `through_registers`: B's scales go to tensor memory by tcgen05.st instead of tcgen05.cp."""
    packages.use("flashinfer")
    import cutlass
    import cutlass.cute as cute

    module = importlib.import_module("flashinfer.gemm.kernels.cute_dsl.low_latency_blockscaled_gemm")
    _, _, _, block, tile_k = _LOW_LATENCY[form]
    gemm = module.LowLatencyBlockscaledGemmKernel(
        mma_tiler_mnk=(128, columns, tile_k),
        num_ab_stage=4,
        num_sfb_tmem_stage=2,
        sf_vec_size=block,
        use_pdl=True,
        split_k=split_k,
        sfb_tmem_store=through_registers,
        use_scale=True,
        use_bias=True,
    )
    sizes = tuple(cutlass.Int32(size) for size in (256, 8, 512, 1))
    with stand_in_device():
        return cute.compile(gemm, *_low_latency_pointers(form, (None,) * 7), sizes, stream())


def prepare_low_latency(
    seed: int, nightly: bool, form: str, columns: int = 8, split_k: int = 1, through_registers: bool = False
) -> Call:
    """C = scale * A B^T + bias, C stored with M contiguous."""
    import cutlass

    rng = np.random.default_rng(seed)
    m, n, k = (1024, columns, 4096) if nightly else (256, columns, 1024)
    a_type, b_type, _, block, _ = _LOW_LATENCY[form]
    a, b = _RANDOM[a_type, block](rng, m, k), _RANDOM[b_type, block](rng, n, k)
    scale = np.array([0.03125], np.float32)
    bias = device(rng.integers(-8, 9, m), torch.bfloat16)
    c = empty(n, m, dtype=torch.bfloat16)
    b_scales = device(b.scales if through_registers else b.blocked)
    tensors = (device(a.elements), device(a.blocked), device(b.elements), b_scales)
    rest = (device(scale), bias)

    def check() -> None:
        product = references.matmul(a.values, b.values).scaled(float(scale[0]))
        exact = product.plus(bias.double().numpy()[:, None])
        references.assert_rounded(c.T, exact)

    sizes = tuple(cutlass.Int32(size) for size in (m, n, k, 1))
    args = (*_low_latency_pointers(form, (*tensors, c, *rest)), sizes, stream())
    compiled = compile_low_latency(form, columns, split_k, through_registers)
    return Call(compiled, args, check, (c,), (*tensors, *rest), constant=(*tensors[:2], rest[0]))


def _mixed_pointers(tensors: tuple[torch.Tensor | None, ...]) -> list[Any]:
    import cutlass

    types = [(cutlass.Float4E2M1FN, 32), (cutlass.Float8E4M3FN, 16), (cutlass.BFloat16, 32), (cutlass.Float32, 16)]
    types.append((cutlass.BFloat16, 32))
    return [pointer(dtype, tensor, align) for (dtype, align), tensor in zip(types, tensors, strict=True)]


@functools.cache
def compile_bf16_fp4(tile: tuple[int, int, int], cluster: Pair) -> Any:
    """Weights are decoded to BF16 on the way; the MMA is a BF16 one."""
    packages.use("flashinfer")
    import cutlass
    import cutlass.cute as cute

    module = importlib.import_module("flashinfer.gemm.kernels.cute_dsl.dense_gemm_bf16_fp4_sm100")
    kernel = module.Sm100DenseGemmBf16Fp4Kernel(
        acc_dtype=cutlass.Float32,
        use_2cta_instrs=tile[0] == 256,
        mma_tiler_mnk=tile,
        cluster_shape_mn=cluster,
        enable_pdl=True,
        raster_along_m=True,
        transform_fragment_size=32,
    )
    pointers = _mixed_pointers((None,) * 5)
    sizes = (256, 128, 512)
    with stand_in_device():
        return cute.compile(kernel.wrapper, *pointers, *sizes, max_active_clusters=CLUSTERS, stream=stream())


def prepare_bf16_fp4(seed: int, nightly: bool, tile: tuple[int, int, int], cluster: Pair) -> Call:
    """C [tokens, N] = alpha * activations W^T."""
    rng = np.random.default_rng(seed)
    n, tokens, k = (1024, 200, 2048) if nightly else (256, 70, 512)
    weight = references.random_nvfp4(rng, n, k)
    activation = device(rng.standard_normal((tokens, k)), torch.bfloat16)
    alpha = np.array([0.0625], np.float32)
    out = empty(tokens, n, dtype=torch.bfloat16)
    inputs = (device(weight.elements), device(weight.blocked), activation, device(alpha))

    def check() -> None:
        exact = references.matmul(activation.double().numpy(), weight.values).scaled(float(alpha[0]))
        references.assert_rounded(out, exact)

    args = (*_mixed_pointers((*inputs, out)), n, tokens, k, stream())
    return Call(compile_bf16_fp4(tile, cluster), args, check, (out,), inputs, constant=(*inputs[:2], inputs[3]))


def _case(name: str, prepare: Any, *args: Any, nightly_only: bool = False, policies: Policies = POLICIES) -> Case:
    def call(seed: int, nightly: bool) -> Call:
        return prepare(seed, nightly, *args)

    return Case(name, "flashinfer", "sm_100a", call, nightly_only, policies=policies)


# The low-latency kernel has a race. Its MMA warp arrives at the barrier of the tensor memory allocation, does not wait for
# that phase, arrives again when it is through, and waits for the next phase to deallocate. If the epilogue warps have not
# arrived by then, its second arrival counts for the first phase and it deallocates under them. With split K the eager
# policy gets there: test_conformance.py checks that the race is found. The other policies are late enough.
LATE: Policies = ("lazy",)
CASES = (
    _case("mm-fp4-1cta", prepare_mm_fp4, (128, 128), (1, 1)),
    _case("mm-fp4-2cta", prepare_mm_fp4, (256, 256), (2, 1), True),
    _case("mm-fp4-n192", prepare_mm_fp4, (256, 192), (2, 1)),
    _case("mm-fp4-n64", prepare_mm_fp4, (128, 64), (1, 2)),
    _case("mm-fp4-swapped", prepare_mm_fp4, (128, 128), (2, 1), False, True, nightly_only=True),
    _case("masked-1cta", prepare_masked, (128, 128), (1, 1)),
    _case("masked-2cta", prepare_masked, (256, 128), (2, 1), nightly_only=True),
    _case("low-latency", prepare_low_latency, "nvfp4"),
    _case("low-latency-split-k", prepare_low_latency, "nvfp4", 8, 2, policies=LATE),
    _case("low-latency-registers", prepare_low_latency, "nvfp4", 8, 1, True),
    _case("low-latency-mxfp8", prepare_low_latency, "mxfp8"),
    _case("low-latency-mixed", prepare_low_latency, "mxfp8-mxfp4", nightly_only=True),
    _case("bf16-fp4-1cta", prepare_bf16_fp4, (128, 64, 128), (1, 1)),
    _case("bf16-fp4-2cta", prepare_bf16_fp4, (256, 128, 128), (2, 1), nightly_only=True),
)
