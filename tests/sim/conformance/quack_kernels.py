"""QuACK's kernels: GEMMs for sm_100 (tcgen05) and sm_90 (wgmma), RMSNorm and softmax.

QuACK's own host code chooses the arguments: it is called with CPU tensors, and what it passes to the compiled kernel is
simulated. QuACK changes CuTe DSL when it is imported (indexing sugar, argument conversion), so these cases run in a
process of their own. QUACK_ARCH and CUTE_DSL_ARCH say what is compiled.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from conformance import packages, references
from conformance.driver import Call, Case, device, empty, nested_tensors, recorded

ARCH = os.environ.get("CUTE_DSL_ARCH", "sm_100a")
BF16 = torch.bfloat16


def _host(name: str) -> Any:
    os.environ["QUACK_ARCH"] = ARCH.rstrip("a")
    os.environ["QUACK_CACHE_ENABLED"] = "0"
    packages.use("quack")
    importlib.import_module("quack")
    importlib.import_module(f"quack.{name}")
    # quack.rmsnorm is also the name of a function.
    return sys.modules[f"quack.{name}"]


def _call(
    host: Callable[[], object],
    check: Callable[[], None],
    outputs: tuple[torch.Tensor, ...],
    memory: tuple[torch.Tensor, ...] = (),
    constant: tuple[torch.Tensor, ...] = (),
) -> Call:
    """The one call that `host` makes of a compiled kernel; `memory`: tensors of which it passes bare pointers."""
    _host("gemm")  # imported before anything of CuTe DSL is replaced for the call
    ((compiled, args),) = recorded(host)
    tensors = list(memory)
    args = tuple(nested_tensors(arg, tensors) for arg in args)
    return Call(compiled, args, check, outputs, tuple(tensors), constant)


def _random(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return device(rng.standard_normal(shape), BF16)


def _values(tensor: torch.Tensor) -> references.Floats:
    return tensor.double().numpy()


Shape = tuple[int, int, int, int]


def prepare_gemm(seed: int, nightly: bool, shape: Shape, **options: Any) -> Call:
    """D = A B^T in BF16, ragged in M, N and K, two batches."""
    rng = np.random.default_rng(seed)
    m, n, k = (1000, 520, 1032) if nightly else (328, 264, 200)
    a, b, d = _random(rng, 2, m, k), _random(rng, 2, n, k), empty(2, m, n, dtype=BF16)
    counted = ARCH.startswith("sm_90") and options.get("is_dynamic_persistent")
    semaphore = device(np.zeros(1, np.int32)) if counted else None

    def check() -> None:
        for batch in range(2):
            references.assert_rounded(d[batch], references.matmul(_values(a[batch]), _values(b[batch])))

    def host() -> None:
        _host("gemm").gemm(a, b, d, None, semaphore, *shape, **options)

    return _call(host, check, (d,), () if semaphore is None else (semaphore,))


def prepare_epilogue(seed: int, nightly: bool, shape: Shape) -> Call:
    """D = alpha A B^T + beta C + bias of a column."""
    rng = np.random.default_rng(seed)
    m, n, k = (1000, 520, 1032) if nightly else (200, 264, 136)
    a, b, c, d = _random(rng, 1, m, k), _random(rng, 1, n, k), _random(rng, 1, m, n), empty(1, m, n, dtype=BF16)
    bias = device(rng.standard_normal((1, n)).astype(np.float32))

    def check() -> None:
        product = references.matmul(_values(a[0]), _values(b[0])).scaled(2.0)
        references.assert_rounded(d[0], product.plus(0.5 * _values(c[0])).plus(_values(bias)))

    def host() -> None:
        _host("gemm").gemm(a, b, d, c, None, *shape, rowvec_bias=bias, alpha=2.0, beta=0.5)

    return _call(host, check, (d,))


def prepare_gather(seed: int, nightly: bool, shape: Shape, **options: Any) -> Call:
    """Rows of A are gathered; groups of rows have weights of their own; one group is empty."""
    rng = np.random.default_rng(seed)
    ends, n, k = ([0, 300, 300, 900], 512, 512) if nightly else ([0, 70, 70, 203], 136, 136)
    a, b, d = _random(rng, 250, k), _random(rng, 3, n, k), empty(ends[-1], n, dtype=BF16)
    index = rng.integers(0, 250, ends[-1]).astype(np.int32)
    rows, offsets = device(index), device(np.array(ends, np.int32))

    def check() -> None:
        for group in range(3):
            part = slice(ends[group], ends[group + 1])
            references.assert_rounded(d[part], references.matmul(_values(a)[index[part]], _values(b[group])))

    def host() -> None:
        _host("gemm").gemm(a, b, d, None, None, *shape, cu_seqlens_m=offsets, A_idx=rows, **options)

    # Which rows are gathered it finds out before griddepcontrol.wait: what makes these tables must have ended.
    return _call(host, check, (d,), constant=(offsets, rows))


def prepare_split_k(seed: int, nightly: bool, shape: Shape) -> Call:
    """K is split over two CTAs, which add in turn: a semaphore in global memory orders them."""
    rng = np.random.default_rng(seed)
    m, n, k = (1000, 520, 2048) if nightly else (200, 136, 512)
    a, b, d = _random(rng, 1, m, k), _random(rng, 1, n, k), empty(1, m, n, dtype=BF16)

    def check() -> None:
        references.assert_rounded(d[0], references.matmul(_values(a[0]), _values(b[0])))

    return _call(lambda: _host("gemm").gemm(a, b, d, None, None, *shape, split_k=2), check, (d,))


# Formats of block-scaled operands: random matrix, dtype of the elements, dtype of the scales.
_FORMATS: dict[str, tuple[Callable[..., references.Scaled], torch.dtype, torch.dtype]] = {
    "nvfp4": (references.random_nvfp4, torch.float4_e2m1fn_x2, torch.float8_e4m3fn),
    "mxfp4": (references.random_mxfp4, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu),
    "mxfp8_e4m3": (references.random_mxfp8, torch.float8_e4m3fn, torch.float8_e8m0fnu),
}


def prepare_scaled(seed: int, nightly: bool, shape: Shape, form: str) -> Call:
    """A block-scaled GEMM."""
    rng = np.random.default_rng(seed)
    m, n, k = (1000, 520, 2048) if nightly else (328, 264, 512)
    make, elements, scales = _FORMATS[form]
    sides = [make(rng, rows, k) for rows in (m, n)]
    a, b = (device(side.elements[None], elements) for side in sides)
    a_scales, b_scales = (device(side.blocked[None], scales) for side in sides)
    d = empty(1, m, n, dtype=BF16)

    def check() -> None:
        references.assert_rounded(d[0], references.matmul(sides[0].values, sides[1].values))

    def host() -> None:
        formats = {"bs_format_a": form, "bs_format_b": form}
        _host("gemm").gemm(a, b, d, None, None, *shape, SFA=a_scales, SFB=b_scales, **formats)

    return _call(host, check, (d,))


def prepare_rmsnorm(seed: int, nightly: bool, columns: int) -> Call:
    """Many columns make it a reduction across a cluster."""
    rng = np.random.default_rng(seed)
    rows = 8 if nightly else 4  # whole CTAs: beyond the last row QuACK reads shared memory that nothing wrote
    x, weight = _random(rng, rows, columns), device(rng.random(columns).astype(np.float32))
    out = empty(rows, columns, dtype=BF16)

    def check() -> None:
        values = _values(x)
        exact = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6) * _values(weight)
        references.assert_rounded(out, references.Exact(exact, np.abs(exact) * 2.0**-20))

    return _call(lambda: _host("rmsnorm")._rmsnorm_fwd._init_fn(x, weight, out), check, (out,))


def prepare_softmax(seed: int, nightly: bool, columns: int) -> Call:
    """The maximum and the sum are reduced online; approximate exp2."""
    rng = np.random.default_rng(seed)
    rows = 8 if nightly else 4  # see prepare_rmsnorm
    x = device(rng.standard_normal((rows, columns)) * 3, BF16)
    out = empty(rows, columns, dtype=BF16)

    def check() -> None:
        values = _values(x)
        exact = np.exp(values - values.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
        references.assert_rounded(out, references.Exact(exact, np.abs(exact) * 2.0**-16))

    return _call(lambda: _host("softmax")._softmax_fwd._init_fn(x, out), check, (out,))


def _case(
    arch: str,
    name: str,
    prepare: Any,
    *args: Any,
    nightly_only: bool = False,
    **options: Any,
) -> Case:
    def call(seed: int, nightly: bool) -> Call:
        return prepare(seed, nightly, *args, **options)

    return Case(f"{name}-{arch.rstrip('a')}", "quack", arch, call, nightly_only)


BLACKWELL = (
    _case("sm_100a", "gemm-1cta", prepare_gemm, (128, 128, 1, 1), nightly_only=True),
    _case("sm_100a", "gemm-2cta", prepare_gemm, (256, 128, 2, 1)),
    _case("sm_100a", "gemm-clc", prepare_gemm, (256, 128, 2, 1), is_dynamic_persistent=True),
    _case("sm_100a", "gemm-multicast", prepare_gemm, (128, 128, 2, 2), nightly_only=True),
    _case("sm_100a", "epilogue", prepare_epilogue, (128, 128, 1, 1), nightly_only=True),
    _case("sm_100a", "gather", prepare_gather, (128, 128, 1, 1)),
    _case("sm_100a", "gather-tma", prepare_gather, (128, 128, 1, 1), nightly_only=True, use_tma_gather=True),
    _case("sm_100a", "split-k", prepare_split_k, (128, 128, 1, 1)),
    _case("sm_100a", "nvfp4-1cta", prepare_scaled, (128, 128, 1, 1), "nvfp4", nightly_only=True),
    _case("sm_100a", "nvfp4-2cta", prepare_scaled, (256, 256, 2, 1), "nvfp4"),
    _case("sm_100a", "mxfp8", prepare_scaled, (256, 128, 2, 1), "mxfp8_e4m3"),
    _case("sm_100a", "mxfp4", prepare_scaled, (128, 128, 1, 1), "mxfp4", nightly_only=True),
    _case("sm_100a", "rmsnorm", prepare_rmsnorm, 1024),
    _case("sm_100a", "rmsnorm-cluster", prepare_rmsnorm, 32768, nightly_only=True),
    _case("sm_100a", "softmax", prepare_softmax, 1024),
    _case("sm_100a", "softmax-cluster", prepare_softmax, 65536, nightly_only=True),
)
HOPPER = (
    _case("sm_90a", "gemm", prepare_gemm, (128, 128, 1, 1), nightly_only=True),
    _case("sm_90a", "gemm-pingpong", prepare_gemm, (128, 128, 2, 1), pingpong=True),
    _case("sm_90a", "gemm-dynamic", prepare_gemm, (128, 192, 1, 2), is_dynamic_persistent=True),
    _case("sm_90a", "epilogue", prepare_epilogue, (128, 128, 1, 1), nightly_only=True),
    _case("sm_90a", "gather", prepare_gather, (128, 128, 1, 1), nightly_only=True),
    _case("sm_90a", "split-k", prepare_split_k, (128, 128, 1, 1), nightly_only=True),
    _case("sm_90a", "softmax", prepare_softmax, 1024, nightly_only=True),
)
CASES = HOPPER if ARCH.startswith("sm_90") else BLACKWELL
