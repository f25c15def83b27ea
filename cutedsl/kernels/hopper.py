"""What kernels for Hopper share: the machine's limits, steps of decoding NVFP4, and how launches overlap.

The hard part of decoding is that a weight must take about two instructions: see `grouped_gemm_sm90` for the layouts that
allow it.

Launches overlap (programmatic dependent launch): a kernel may begin before the one before it in the stream has ended, so
that its launch, its prologue and the loads of its weights cost no time of their own. The hard part is that nothing else of
the stream's order is left until the kernel waits:

    launch_dependents       first thing in every kernel: the next one may begin
    ... prologue            registers, shared memory, barriers, prefetches of tensor maps
    ... constants           loads of what no kernel of the stream writes: weights and their scales, tables of equal groups
    wait_for_prerequisites  every thread that goes on to touch global memory, before anything else of it
    ... all the rest        reads and writes alike: buffers are used again from layer to layer

What this rests on. The wait returns when the kernels that this one was launched behind have ended and their memory
operations can be seen. Some thread of every CTA of every kernel here waits, so that a kernel ends only after the ones
before it have: behind its wait, a kernel follows all earlier work of the stream, not only the launch before it. A kernel
that is launched without the attribute, or before which the stream has something else than a kernel, waits as ever.

launch_dependents promises only that the next kernel may begin, nothing about memory: not about what its own kernel has
written, and not about what an earlier one had written when its own kernel had waited. So nothing that a kernel of the stream
writes is read before the wait, even if that kernel is several launches back, as `route` is for both GEMMs of a MoE.

The next kernel begins when every CTA of this one has called launch_dependents or ended: all have then been started. So a
CTA of a later kernel never takes a place that one of an earlier kernel still wants, and CTAs that wait for others of their
grid, as those with even shares do, do so as if nothing followed. A CTA of a GEMM that waits holds its SM's registers and most
of its shared memory: until the kernels before it have ended, other streams cannot use them.

Constants must have been written, and that seen, before the launch: `prepare_sm90` and `EqualGroups` end with a
synchronisation of the stream.

Source: PTX ISA, griddepcontrol; CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute

# A tensor's first byte and the bytes of a row are multiples of this. Source: CUDA driver API, cuTensorMapEncodeTiled.
TMA_BYTES = 16
# The 128-byte swizzle repeats after 8 rows; a buffer starts where a period does.
SWIZZLE_BYTES = 1024
WARP = 32
WARPGROUP = 128
# Launches overlap: see the module's text. Read when a kernel is compiled.
USE_PDL = True
# A stored scale in its place of a BF16 number, and the exponent's leading ones.
_SCALE_MASK, SCALE_BITS = 0x0FF00FF0, 0x70007000


@dataclass(frozen=True)
class Arch:
    """What a kernel must know of a GPU.

    Attributes:
        name: as the compiler spells it.
        num_sms: a grid of a persistent kernel is never larger.
        smem_bytes: shared memory that one CTA may have.
    """

    name: str
    num_sms: int
    smem_bytes: int


# Source: CUDA C++ Programming Guide, "Compute Capabilities" (227 KiB); NVIDIA's H200 data sheet (132 SMs).
ARCHS = {"sm_90a": Arch(name="sm_90a", num_sms=132, smem_bytes=227 * 1024)}


def num_sms(device: torch.device) -> int:
    """Returns the SMs of a GPU; those of an H200 for tensors that are on none."""
    if device.type != "cuda":
        return ARCHS["sm_90a"].num_sms
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_dependents() -> None:
    """Lets the next kernel of the stream begin, when all CTAs of this one have called this."""
    if USE_PDL:
        cute.arch.griddepcontrol_launch_dependents()


def wait_for_prerequisites() -> None:
    """Waits until all earlier work of the stream has ended and its writes can be seen; again: returns at once."""
    if USE_PDL:
        cute.arch.griddepcontrol_wait()


def mul_bf16x2_half(a: Any, b: Any, half: int) -> Any:
    """a * b of two BF16 by one, each rounded to nearest even, subnormal arguments taken as they are.

    Args:
        a: 32 bits, two BF16.
        b: 32 bits, two BF16.
        half: 0 or 1 - which of b both of a are multiplied with; selecting it costs no instruction.

    Returns:
        Int32.

    Source: PTX ISA, "Half Precision Floating Point Instructions: mul": bf16x2 supports subnormal numbers.
    """
    chosen = ("lo", "hi")[half]
    code = (
        "{ .reg .b16 lo, hi; .reg .b32 both; mov.b32 {lo, hi}, {$r1}; "
        + f"mov.b32 both, {{{chosen}, {chosen}}}; "
        + "mul.rn.bf16x2 {$w0}, {$r0}, both; }"
    )
    return cute.arch.inline_ptx(code, write_only_types=[cutlass.Int32], read_only_args=[a, b])


def rotate_right(word: Any, bits: int) -> Any:
    """Int32 rotated by so many bits to the right, in one instruction.

    Args:
        word: Int32.
        bits: 0 .. 31.

    Source: PTX ISA, "shf".
    """
    return cute.arch.inline_ptx(
        f"shf.r.wrap.b32 {{$w0}}, {{$r0}}, {{$r0}}, {bits};",
        write_only_types=[cutlass.Int32], read_only_args=[word],
    )  # fmt: skip


def in_register(value: int) -> Any:
    """An Int32 of which the compiler does not know that it is `value`, in a grid of one CTA along z.

    A logical instruction takes one constant; of two it makes two instructions, unless one of them is no constant.
    """
    return cute.arch.grid_dim()[2] + (value - 1)


def scale_pairs(word: Any, scale_bits: Any) -> tuple[Any, Any]:
    """The BF16 numbers s * 2^118 of the four stored block scales in a word; see `prepare_sm90`.

    Args:
        word: Int32 - stored scales 0 .. 3.
        scale_bits: Int32 - SCALE_BITS, better `in_register`.

    Returns:
        Int32 of scales 0 and 2, and of 1 and 3, the first in the low half.
    """
    return (word & _SCALE_MASK) | scale_bits, (rotate_right(word, 8) & _SCALE_MASK) | scale_bits


def store_relaxed(pointer: cute.Pointer, values: list[Any]) -> None:
    """Stores four Int32 where other CTAs poll them: each of the four by itself, in no order.

    Args:
        pointer: in global memory, 16-byte aligned.
        values: four Int32.
    """
    cute.arch.inline_ptx(
        "st.relaxed.gpu.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[cutlass.Int64(pointer.toint()), *values],
    )


def load_relaxed(pointer: cute.Pointer) -> Any:
    """Loads four Int32 that other CTAs may be storing: each of the four by itself, in no order.

    Args:
        pointer: in global memory, 16-byte aligned.

    Returns:
        Four Int32.
    """
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[cutlass.Int32] * 4,
        read_only_args=[cutlass.Int64(pointer.toint())],
    )


def peer_address(pointer: cute.Pointer, peer: int) -> Any:
    """The address for `store_peer` of what is at the same place in the shared memory of another CTA of the cluster.

    Args:
        pointer: in shared memory.
        peer: rank in the cluster of whose memory is meant; the own one may be.

    Returns:
        Int32.
    """
    return cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[cutlass.Int32],
        read_only_args=[cutlass.Int32(pointer.toint()), cutlass.Int32(peer)],
    )


def store_peer(address: Any, values: list[Any], mbarrier: Any) -> None:
    """Stores four Float32 in the shared memory of a CTA of the cluster, whose mbarrier counts the 16 bytes that arrive.

    Args:
        address: of `peer_address`, or so many bytes behind; a multiple of 16.
        values: four Float32.
        mbarrier: of `peer_address` for the same peer. Who waits for its bytes sees them: no fence is needed.
    """
    cute.arch.inline_ptx(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}, [{$r5}];",
        read_only_args=[address, *values, mbarrier],
    )


def store_transposed(address: Any, pairs: list[Any]) -> None:
    """Stores 8x8 matrices of 16-bit numbers that a warp has as MMAs leave them, column by column, to shared memory.

    Args:
        address: Int32 - of 16 bytes, where a column of a matrix goes: of thread 8 m + c, of column c of matrix m. Of threads
            behind the last matrix it is anything.
        pairs: 2 or 4 Int32, a matrix each: thread 4 g + t has what is in row g in columns 2 t and 2 t + 1.

    Source: PTX ISA, "stmatrix".
    """
    registers = ", ".join(f"{{$r{1 + i}}}" for i in range(len(pairs)))
    cute.arch.inline_ptx(
        f"stmatrix.sync.aligned.m8n8.x{len(pairs)}.trans.shared.b16 [{{$r0}}], {{{registers}}};",
        read_only_args=[cutlass.Int32(address), *pairs],
    )
