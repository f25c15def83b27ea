"""FlashInfer's kernels that go over rows: NVFP4 quantization, RMSNorm, and RMSNorm with NVFP4 output.

They exercise loads and stores, shuffles, packed conversions, TMA loads without an MMA and reductions across a cluster.
"""

import functools
import importlib
from typing import Any

import numpy as np
import torch

from conformance import packages, references
from conformance.driver import Call, Case, device, empty, stand_in_device

GLOBAL_SCALE = 1.5


def _module(name: str) -> Any:
    packages.use("flashinfer")
    return importlib.import_module(f"flashinfer.{name}")


@functools.cache
def compile_quantize(columns: int, kind: str) -> Any:
    """The quantizer."""
    module = _module("quantization.kernels.nvfp4_quantize")
    with stand_in_device():
        if kind == "tma":
            return module._get_compiled_kernel_nvfp4_tma("bfloat16", columns, module.SF_LAYOUT_128x4, True)[0]
        layout = module.SF_LAYOUT_LINEAR if kind == "linear" else module.SF_LAYOUT_128x4
        return module._get_compiled_kernel_nvfp4("bfloat16", columns, layout, True, silu_and_mul=kind == "silu")[0]


def prepare_quantize(seed: int, nightly: bool, kind: str) -> Call:
    """BF16 rows to NVFP4; `silu` first multiplies the second half of a row by silu of the first."""
    rng = np.random.default_rng(seed)
    rows, columns = (600, 2048) if nightly else (70, 512)
    wide = rng.standard_normal((rows, columns * (2 if kind == "silu" else 1))) * 3
    source = device(wide, torch.bfloat16)
    packed = empty(rows, columns // 2, dtype=torch.uint8)
    padded = rows if kind == "linear" else -(-rows // 128) * 128
    scales = empty(padded * columns // 16, dtype=torch.uint8)
    scale = device(np.array([GLOBAL_SCALE], np.float32))

    values = source.double().numpy()
    exact = references.Exact(values, np.zeros_like(values))
    if kind == "silu":
        gate, up = exact[:, :columns], exact[:, columns:]
        exact = references.silu_gate(up, gate)
        # It is rounded to BF16 before it is quantized.
        exact = references.Exact(exact.value, exact.slack + references.half_unit(np.abs(exact.value), 7))

    def check() -> None:
        flat = scales.numpy()
        plain = flat.reshape(rows, -1) if kind == "linear" else references.from_blocked(flat, rows, columns // 16)
        references.assert_quantized(packed.numpy(), plain, exact, GLOBAL_SCALE)

    compiled = compile_quantize(columns, kind)
    total = rows * columns // 16 if kind == "linear" else padded
    # Two CTAs: both go over several rows.
    args: tuple[Any, ...] = (source, packed, scales, rows, total, 2, scale)
    if kind in ("swizzled", "silu"):
        args = (*args, source[0, :columns])  # pre-quantization scale: not read in this configuration
    return Call(compiled, args, check, (packed, scales), (source, scale))


@functools.cache
def compile_rmsnorm(columns: int, cluster: int) -> Any:
    """RMSNorm; the shared memory that the device pretends to have decides how many CTAs share a row."""
    module = _module("norm.kernels.rmsnorm")
    with stand_in_device(shared_bytes=232448 if cluster == 1 else 4 * columns * 2 // cluster + 1024):
        return module._get_compiled_rmsnorm_kernel.__wrapped__("bfloat16", columns, 0.0, True, 100)


def _rms(values: Any) -> Any:
    return 1 / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6)


def prepare_rmsnorm(seed: int, nightly: bool, cluster: int) -> Call:
    """y = x / rms(x) * weight in BF16.

    The number of rows is a multiple of those of a CTA: beyond the last row the kernel reads shared memory that nothing
    wrote, and drops what it read, which is a finding all the same.
    """
    rng = np.random.default_rng(seed)
    rows, columns = (36, 8192) if nightly else (8, 1024)
    x, weight = (
        device(rng.standard_normal((rows, columns)), torch.bfloat16),
        device(rng.random(columns), torch.bfloat16),
    )
    y = empty(rows, columns, dtype=torch.bfloat16)

    def check() -> None:
        values = x.double().numpy()
        exact = values * _rms(values) * weight.double().numpy()
        references.assert_rounded(y, references.Exact(exact, np.abs(exact) * 2.0**-20))

    return Call(compile_rmsnorm(columns, cluster), (x, weight, y, rows, 1e-6), check, (y,), (x, weight))


@functools.cache
def compile_rmsnorm_fp4(columns: int, cluster: int) -> Any:
    """RMSNorm with NVFP4 output and swizzled scales."""
    module = _module("cute_dsl.rmsnorm_fp4quant")
    with stand_in_device(shared_bytes=232448 if cluster == 1 else 4 * columns * 2 // cluster + 1024):
        function = module._get_compiled_kernel.__wrapped__(columns, 16, False, 100, "e4m3", True, True)
    # The function passes tensors on; the kernel itself is in its closure.
    return function.__closure__[function.__code__.co_freevars.index("compiled_kernel")].cell_contents


def prepare_rmsnorm_fp4(seed: int, nightly: bool, cluster: int) -> Call:
    """The product with the weight is rounded to BF16, then scaled and quantized. For the rows see prepare_rmsnorm."""
    rng = np.random.default_rng(seed)
    rows, columns = (132, 8192) if nightly else (8, 1024)
    x, weight = (
        device(rng.standard_normal((rows, columns)), torch.bfloat16),
        device(rng.random(columns), torch.bfloat16),
    )
    packed = empty(rows, columns // 2, dtype=torch.uint8)
    scales = device(np.zeros(-(-rows // 128) * 128 * columns // 16, np.uint8))
    scale = device(np.array([GLOBAL_SCALE], np.float32))

    def check() -> None:
        values = x.double().numpy()
        exact = (x * weight).double().numpy() * _rms(values)
        plain = references.from_blocked(scales.numpy(), rows, columns // 16)
        references.assert_quantized(
            packed.numpy(), plain, references.Exact(exact, np.abs(exact) * 2.0**-20), GLOBAL_SCALE
        )

    # Scales of rows that pad to 128 stay as they are.
    args = (x, weight, packed, scales, scale, rows, 1e-6)
    return Call(compile_rmsnorm_fp4(columns, cluster), args, check, (packed,), (x, weight, scales, scale))


def _case(name: str, prepare: Any, *args: Any, nightly_only: bool = False) -> Case:
    return Case(name, "flashinfer", "sm_100a", lambda seed, nightly: prepare(seed, nightly, *args), nightly_only)


CASES = (
    _case("quantize-linear", prepare_quantize, "linear"),
    _case("quantize-swizzled", prepare_quantize, "swizzled"),
    _case("quantize-silu", prepare_quantize, "silu"),
    _case("quantize-tma", prepare_quantize, "tma"),
    _case("rmsnorm", prepare_rmsnorm, 1),
    _case("rmsnorm-cluster", prepare_rmsnorm, 4),
    _case("rmsnorm-fp4", prepare_rmsnorm_fp4, 1),
    _case("rmsnorm-fp4-cluster", prepare_rmsnorm_fp4, 2),
)
