"""Runners own the packed weights and scales of one layer and run its operator; here is what all of them check.

The hard part is to fail at load and not in a sentence a user reads: a scale that was never loaded is NaN, zero or
infinite, a shard cut in the middle of a block has a K that is no multiple of 16, and both must stop the load with the
layer's name. A runner holds the very tensors it was given, never copies (sm100 and sm90 permute them in place, and copy
what must be padded); the products of scales (alpha) are formed once, at construction, so a scale must not be changed
afterwards.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cutedsl.formats import NVFP4
from cutedsl.reference.linear import PackedMatrix, ScaleGroup

# How activations enter a GEMM: quantized (W4A4), or as they are (W4A16).
BF16 = "bf16"
ACTIVATIONS = (NVFP4.name, BF16)
_NAN_BYTE = 0x7F
# Source: CUDA driver API, cuTensorMapEncodeTiled.
_ALIGNMENT_BYTES = 16


def select_backend(name: str, backend: str, backends: Mapping[str, Callable]) -> Callable:
    """Returns backends[backend]: a function that takes the runner, checked and complete, and returns its forward function.

    Raises:
        ValueError: the backend is not known; the message lists the known ones. There is no fallback.
    """
    if backend not in backends:
        raise ValueError(f"{name}: unknown backend {backend!r}; known: {', '.join(sorted(backends))}")
    return backends[backend]


def import_chains(name: str, backend: str) -> Any:
    """Returns cutedsl.runners.<backend>, imported when asked for: it needs the kernel compiler.

    Raises:
        ImportError: it cannot be imported.
    """
    try:
        return importlib.import_module(f"cutedsl.runners.{backend}")
    except ImportError as error:
        raise ImportError(
            f"{name}: the {backend} backend cannot be imported ({error}); install nvidia-cutlass-dsl, or use another backend"
        ) from error


def check_activations(name: str, activations: str, backend: str) -> str:
    """Returns how activations enter the GEMMs.

    Raises:
        ValueError: it is not in ACTIVATIONS, or the backend cannot do it.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"{name}: unknown activations {activations!r}; known: {', '.join(ACTIVATIONS)}")
    if activations == BF16 and backend == "sm100":
        raise ValueError(
            f"{name}: the sm100 backend has no activations in BF16: Blackwell's tensor core multiplies NVFP4 by NVFP4 here; "
            f"use activations={NVFP4.name!r}, or another backend"
        )
    return activations


def check_packed(
    name: str, label: str, weight: torch.Tensor, weight_scale: torch.Tensor, leading: tuple[int, ...]
) -> int:
    """Checks a packed weight and its block scales.

    Args:
        name: of the runner, for the message.
        label: of the matrix, for the message.
        weight: (*leading, K/2) uint8.
        weight_scale: (*leading, K/16) e4m3.
        leading: the sizes before K.

    Returns:
        K.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape is wrong, K is not a multiple of 16, a tensor is not contiguous, the devices differ, or a
            block scale is NaN or negative.

    Numerics: none. Reads one flag back to the host; a load-time function.
    """
    if weight.dtype != torch.uint8:
        raise TypeError(f"{name}: {label} weight is {weight.dtype}, expected torch.uint8 (two e2m1 codes a byte)")
    if weight_scale.dtype != NVFP4.scale_dtype:
        raise TypeError(f"{name}: {label} weight_scale is {weight_scale.dtype}, expected {NVFP4.scale_dtype}")
    if weight.ndim != len(leading) + 1 or tuple(weight.shape[:-1]) != leading or weight.numel() == 0:
        raise ValueError(
            f"{name}: {label} weight has shape {tuple(weight.shape)}, expected ({', '.join(map(str, leading))}, K/2)"
        )
    k = weight.shape[-1] * NVFP4.codes_per_byte
    if k % NVFP4.block_size:
        raise ValueError(
            f"{name}: {label} has K = {k} on this rank, expected a multiple of {NVFP4.block_size}; "
            "use a tensor-parallel size that does not cut a block"
        )
    if tuple(weight_scale.shape) != (*leading, k // NVFP4.block_size):
        raise ValueError(
            f"{name}: {label} weight_scale has shape {tuple(weight_scale.shape)}, expected "
            f"{(*leading, k // NVFP4.block_size)} for a weight of shape {tuple(weight.shape)}; pass it unswizzled"
        )
    if not (weight.is_contiguous() and weight_scale.is_contiguous()):
        raise ValueError(f"{name}: {label} weight and weight_scale must be contiguous; call .contiguous() at load")
    if weight.device != weight_scale.device:
        raise ValueError(f"{name}: {label} weight is on {weight.device}, its weight_scale on {weight_scale.device}")
    # As bytes, NaN is 0x7f and everything above has the sign bit. A maximum needs no tensor of flags.
    if int(weight_scale.view(torch.uint8).amax()) >= _NAN_BYTE:
        raise ValueError(f"{name}: {label} weight_scale holds NaN or negative values; was it loaded?")
    return k


def check_scale(
    name: str, label: str, scale: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Checks tensor scales and returns them with the expected shape (a view).

    Args:
        name: of the runner, for the message.
        label: of the scale, for the message.
        scale: shape fp32; () and (1,) stand for each other.
        shape: expected.
        device: expected.

    Returns:
        The scale viewed as `shape`.

    Raises:
        TypeError: not fp32.
        ValueError: wrong shape or device, or a value that is not finite and positive.

    Numerics: none. Reads one flag back to the host; a load-time function.
    """
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: {label} is {scale.dtype}, expected torch.float32")
    if tuple(scale.shape) != shape and not {tuple(scale.shape), shape} <= {(), (1,)}:
        raise ValueError(f"{name}: {label} has shape {tuple(scale.shape)}, expected {shape}")
    if scale.device != device:
        raise ValueError(f"{name}: {label} is on {scale.device}, expected {device} as its weight")
    bad = ~(torch.isfinite(scale) & (scale > 0)).flatten()
    if bad.any():
        raise ValueError(
            f"{name}: {label} has {int(bad.sum())} of {bad.numel()} values that are not finite and positive, the first "
            f"is {float(scale.flatten()[bad][0])}; a scale that is missing from the checkpoint stays NaN"
        )
    return scale.view(shape)


def check_gpu(name: str, device: torch.device, capability: tuple[int, int], backend: str) -> None:
    """Checks that a backend's kernels run on the device: a GPU they are compiled for, or a CPU, where they are simulated.

    Raises:
        ValueError: another GPU.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != capability:
        raise ValueError(
            f"{name}: {device} has compute capability {torch.cuda.get_device_capability(device)}, expected {capability} "
            f"for the {backend} backend; use another backend"
        )


def check_alignment(name: str, label: str, *tensors: torch.Tensor, backend: str) -> None:
    """Checks that a matrix starts where TMA and wide loads can start.

    Raises:
        ValueError: a tensor's first byte is at no multiple of 16.
    """
    for tensor in tensors:
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            raise ValueError(
                f"{name}: {label} has a tensor that starts at {tensor.data_ptr():#x}, expected a multiple of "
                f"{_ALIGNMENT_BYTES} bytes for the {backend} backend; copy it at load"
            )


def check_one_scale(name: str, input_scale: torch.Tensor, backend: str) -> None:
    """Checks (E, 2) input scales of gates and ups: both come from one quantization of the activation.

    Raises:
        ValueError: an expert has two different ones.
    """
    different = (input_scale[:, 0] != input_scale[:, 1]).nonzero().flatten().tolist()
    if different:
        first = different[0]
        raise ValueError(
            f"{name}: gate and up of {len(different)} of {len(input_scale)} experts have different input_scale, the first "
            f"is expert {first} with {input_scale[first].tolist()}; the {backend} backend quantizes their common input "
            "once: export with one input_scale for both, as ModelOpt does, or use another backend"
        )


def check_swiglu_limit(name: str, limit: float | None) -> float | None:
    """Returns the limit.

    Raises:
        ValueError: it is neither None nor finite and positive.
    """
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"{name}: swiglu_limit is {limit}, expected a finite positive number, or None for no clamp")
    return limit


def pack_matrix(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor,
    shard_sizes: Sequence[int],
    activations: str = NVFP4.name,
) -> PackedMatrix:
    """alpha[n] = input_scale[s] * weight_scale_2[s] for row n of shard s; shards grouped by equal input_scale.

    With activations "bf16", alpha[n] = weight_scale_2[s], and there are no groups: input_scale plays no part.

    Args:
        weight: (N, K/2) uint8 - checked.
        weight_scale: (N, K/16) e4m3 - checked.
        weight_scale_2: (num_shards,) fp32 - checked.
        input_scale: (num_shards,) fp32 - checked.
        shard_sizes: rows of each shard, sum N.
        activations: of ACTIVATIONS - checked.

    Returns:
        PackedMatrix that holds `weight` and `weight_scale` themselves.

    Numerics: the product in fp32. Reads the input scales back to the host; a load-time function.
    """
    sizes = torch.tensor(list(shard_sizes), dtype=torch.int64, device=weight.device)
    if activations == BF16:
        return PackedMatrix(weight, weight_scale, torch.repeat_interleave(weight_scale_2, sizes), ())
    alpha = torch.repeat_interleave(input_scale * weight_scale_2, sizes)
    first_shard: dict[float, int] = {}
    spans: dict[float, list[tuple[int, int]]] = {}
    start = 0
    for shard, (scale, size) in enumerate(zip(input_scale.tolist(), shard_sizes, strict=True)):
        first_shard.setdefault(scale, shard)
        runs = spans.setdefault(scale, [])
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + size)
        else:
            runs.append((start, start + size))
        start += size
    groups = tuple(ScaleGroup(input_scale[first_shard[scale]], tuple(runs)) for scale, runs in spans.items())
    return PackedMatrix(weight, weight_scale, alpha, groups)
