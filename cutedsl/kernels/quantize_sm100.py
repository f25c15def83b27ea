"""NVFP4 quantization on Blackwell: rows of BF16 to packed FP4 codes and block scales where a tensor core wants them.

The hard part is where a row comes from and where it goes, as one kernel serves every quantized operand:

    plain     row t                 -> row t                          a linear, a shared expert
    groups    row t of group g      -> row g * (T up to 128) + t      wo_a: scale tiles belong to one group
    slots     row slot_token[s]     -> row slot_row[s]                routed experts: rows gathered, each expert padded

In the first two the places follow from sizes. In the third they are read on the device, and so is the number of slots that
have an expert here: shapes, and with them the launch, depend only on the number of choices.

A thread quantizes one block of 16: it loads 32 bytes, and stores 8 bytes of codes and one scale. Threads walk a grid-stride
loop over the blocks of all rows; the grid is bounded. Up to 3 scales behind a row's last block are zeros (see
`cutedsl.kernels.quantize_block`, where the arithmetic is); no other byte of a row that is not quantized is touched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import quantize_block
from cutedsl.kernels.blackwell import ARCHS, TMA_BYTES, num_sms
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

THREADS = 128
CTAS_PER_SM = 8
# Bytes that one load takes: 8 elements, or 1 where rows begin anywhere.
WIDE_LOAD, NARROW_LOAD = 16, 2
_BF16_BYTES = 2
# Blocks are counted in 32 bits, and the last step of the loop goes beyond the last block.
_MAX_BLOCKS = 1 << 30


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and every K.

    Attributes:
        by_slot: rows and their tensor scales are found through maps on the device.
        load_bytes: WIDE_LOAD or NARROW_LOAD.
        arch: a key of ARCHS.
    """

    by_slot: bool
    load_bytes: int = WIDE_LOAD
    arch: str = "sm_100a"

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.load_bytes not in (WIDE_LOAD, NARROW_LOAD):
            raise ValueError(f"Config: load_bytes is {self.load_bytes}, expected {WIDE_LOAD} or {NARROW_LOAD}")
        return self


def choose_config(x: torch.Tensor, by_slot: bool, arch: str = "sm_100a") -> Config:
    """The widest load that x's address and strides allow.

    Args:
        x: to be quantized.
        by_slot: rows are found through maps.
        arch: a key of ARCHS.

    Returns:
        One of four configurations.

    Raises:
        ValueError: arch is unknown.
    """
    return Config(by_slot, load_bytes(x), arch).validate()


def load_bytes(x: torch.Tensor) -> int:
    """WIDE_LOAD if all rows of x, BF16, are aligned for it, else NARROW_LOAD."""
    starts = (x.data_ptr(), *(stride * _BF16_BYTES for stride in x.stride()[:-1]))
    return NARROW_LOAD if any(start % WIDE_LOAD for start in starts) else WIDE_LOAD


class QuantizeSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mTensorScale: cute.Tensor,
        mCodes_packed: cute.Tensor,
        mSF_bytes: cute.Tensor,
        mSlotToken: Any,
        mSlotRow: Any,
        mNumSlots: Any,
        mTileExpert: Any,
        max_ctas: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Launches at most max_ctas CTAs for each group.

        Args:
            mX: (T, G, K) bf16; G is 1 by slot.
            mTensorScale: (E,) fp32; E is 1 unless by slot.
            mCodes_packed: (rows, K/2) uint8.
            mSF_bytes: (rows up to 128, K/16 up to 4) e4m3.
            mSlotToken, mSlotRow: (slots,) int32; these and the next are None unless by slot.
            mNumSlots: (1,) int32.
            mTileExpert: (rows / 128,) int32.
            max_ctas: at least 1.
            stream: to launch on.
        """
        num_blocks = cute.size(mX, mode=[2]) // NVFP4.block_size
        num_columns = cute.round_up(num_blocks, TILE_COLUMNS)
        num_items = cute.size(mX, mode=[0])
        if cutlass.const_expr(self.config.by_slot):
            num_items = cute.size(mSlotRow)
        mCodes = quantize_block.block_codes(mCodes_packed)
        mSF = quantize_block.swizzled_scales(mSF_bytes, num_blocks)
        num_ctas = cutlass.min(cute.ceil_div(num_items * num_columns, THREADS), max_ctas)
        columns = cute.fast_divmod_create_divisor_v2(num_columns)
        self.kernel(mX, mTensorScale, mCodes, mSF, mSlotToken, mSlotRow, mNumSlots, mTileExpert, columns).launch(
            grid=(num_ctas, cute.size(mX, mode=[1]), 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mTensorScale: cute.Tensor,
        mCodes: cute.Tensor,
        mSF: cute.Tensor,
        mSlotToken: Any,
        mSlotRow: Any,
        mNumSlots: Any,
        mTileExpert: Any,
        columns: cute.FastDivmodDivisorV2,
    ) -> None:
        """Walks the blocks of all rows, each row's padded to whole scale tiles."""
        thread, _, _ = cute.arch.thread_idx()
        cta, group, _ = cute.arch.block_idx()
        step = cute.arch.grid_dim()[0] * THREADS
        num_blocks = cute.size(mX, mode=[2]) // NVFP4.block_size
        num_items = cute.size(mX, mode=[0])
        if cutlass.const_expr(self.config.by_slot):
            num_items = mNumSlots[0]
        for index in cutlass.range(cta * THREADS + thread, num_items * columns.divisor, step, unroll=1):
            item, block = divmod(index, columns)
            if cutlass.const_expr(self.config.by_slot):
                token, row = mSlotToken[item], mSlotRow[item]
                tensor_scale = mTensorScale[mTileExpert[row // TILE_ROWS]]
            else:
                token, row = item, group * cute.round_up(num_items, TILE_ROWS) + item
                tensor_scale = mTensorScale[0]
            if block < num_blocks:
                values = load_block(mX, (token, group, block))
                quantize_block.store_block(mCodes, mSF, row, block, values, tensor_scale)
            else:
                mSF[row, block] = quantize_block.zero_scale()


@cute.jit
def load_block(mX: cute.Tensor, place: Any) -> cute.Tensor:
    """Returns block `place` of (T, G, K) bf16 as 16 FP32 numbers in registers."""
    gX = cute.local_tile(mX, (1, 1, NVFP4.block_size), place)[0, 0, None]
    loaded = cute.make_rmem_tensor(NVFP4.block_size, cutlass.BFloat16)
    cute.autovec_copy(gX, loaded)
    values = cute.make_rmem_tensor(NVFP4.block_size, cutlass.Float32)
    values.store(loaded.load().to(cutlass.Float32))
    return values


def quantize(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """codes, scales = quantize_activation(x, tensor_scale), scales swizzled; groups one after another.

    Args:
        x: (M, K) or (T, G, D) bf16 - K, D a multiple of 16; rows and groups may be strided; M, T may be 0.
        tensor_scale: (1,) fp32 - positive and finite (checked where runners are made).
        codes: (M, K/2) or (G * T up to 128, D/2) uint8 - group g at rows g * (T up to 128) and on.
        scales: (M up to 128, K/16 up to 4) or (G * T up to 128, D/16 up to 4) e4m3 - likewise, in 128x4 tiles.
        max_ctas: the most CTAs to launch for each group; None: CTAS_PER_SM for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, there are more than 2^30 blocks, or max_ctas is
            less than 1.

    Layout: outputs contiguous, first bytes 16-byte aligned; scales see `cutedsl.layout`. Scales of a row that is
    quantized are all written, zeros behind the last; rows of padding keep what they held.
    Numerics: bit-identical to `quantize_activation`.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check(x, tensor_scale, codes, scales, max_ctas)
    if x.shape[0] == 0:
        return
    launch = compiled(choose_config(x, by_slot=False))
    launch(grouped(x), tensor_scale, codes, scales, None, None, None, None, most_ctas(x.device, max_ctas))


def quantize_slots(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    tile_expert: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Row slot_row[s] of codes and scales is quantize_activation(x[slot_token[s]], its expert's tensor_scale).

    Args:
        x: (T, K) bf16 - K a multiple of 16; rows may be strided.
        tensor_scale: (E,) fp32 - of each expert, positive and finite (checked where runners are made).
        slot_token: (S,) int32 - row of x, 0 .. T - 1; S may be 0.
        slot_row: (S,) int32 - row of codes, 0 .. P - 1, no two alike.
        num_slots: (1,) int32 - slots 0 .. num_slots - 1 have an expert here, at most S; of later ones nothing is read.
        tile_expert: (P / 128,) int32 - expert of each 128 rows of codes, 0 .. E - 1 where a slot has a row.
        codes: (P, K/2) uint8 - P a multiple of 128.
        scales: (P, K/16 up to 4) e4m3 - in 128x4 tiles.
        max_ctas: the most CTAs to launch; None: CTAS_PER_SM for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, there are more than 2^30 blocks, or max_ctas is
            less than 1. Values on the device are not checked.

    Layout: outputs and maps contiguous, first bytes of outputs 16-byte aligned; scales see `cutedsl.layout`. Scales of
    a slot's row are all written, zeros behind the last; rows without a slot keep what they held.
    Numerics: bit-identical to `quantize_activation`.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream and does not
    depend on num_slots.
    """
    check_slots(x, tensor_scale, slot_token, slot_row, num_slots, tile_expert, codes, scales, max_ctas)
    if slot_row.shape[0] == 0:
        return
    launch = compiled(choose_config(x, by_slot=True))
    maps = (slot_token, slot_row, num_slots, tile_expert)
    launch(grouped(x), tensor_scale, codes, scales, *maps, most_ctas(x.device, max_ctas))


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes x as (T, G, K), tensor_scale, codes, scales, four maps or None, and the most CTAs.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(QuantizeSm100, config, lambda: _stand_ins(config), config.arch, line_info)


def check(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what quantize raises; reads no device memory."""
    op = "quantize_sm100"
    _check_x(op, x, (2, 3))
    registry.check_tensor(op, "tensor_scale", tensor_scale, (torch.float32,), (1,), x.device)
    rows = x.shape[0] if x.ndim == 2 else x.shape[1] * padded_shape(x.shape[0], 0)[0]
    check_outputs(op, codes, scales, rows, x.shape[-1], x.device)
    check_launch(op, rows, x.shape[-1], max_ctas)


def check_slots(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    tile_expert: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what quantize_slots raises; reads no device memory."""
    op = "quantize_sm100"
    _check_x(op, x, (2,))
    registry.check_tensor(op, "tensor_scale", tensor_scale, (torch.float32,), (None,), x.device)
    registry.check_tensor(op, "slot_token", slot_token, (torch.int32,), (None,), x.device)
    registry.check_tensor(op, "slot_row", slot_row, (torch.int32,), (slot_token.shape[0],), x.device)
    registry.check_tensor(op, "num_slots", num_slots, (torch.int32,), (1,), x.device)
    registry.check_tensor(op, "tile_expert", tile_expert, (torch.int32,), (None,), x.device)
    check_outputs(op, codes, scales, tile_expert.shape[0] * TILE_ROWS, x.shape[1], x.device)
    check_launch(op, max(slot_row.shape[0], codes.shape[0]), x.shape[1], max_ctas)


def _check_x(op: str, x: torch.Tensor, dimensions: tuple[int, ...]) -> None:
    if x.ndim not in dimensions:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected {' or '.join(map(str, dimensions))} dimensions")
    registry.check_tensor(op, "x", x, (torch.bfloat16,), (None,) * x.ndim, x.device)
    if x.shape[-1] % NVFP4.block_size or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected rows of a positive multiple of 16; pad K")


def check_outputs(op: str, codes: torch.Tensor, scales: torch.Tensor, rows: int, k: int, device: torch.device) -> None:
    """Checks codes (rows, k/2) and their scales.

    Raises:
        TypeError, ValueError: as quantize.
    """
    expected = {
        "codes": (codes, torch.uint8, (rows, k // NVFP4.codes_per_byte)),
        "scales": (scales, NVFP4.scale_dtype, padded_shape(rows, k // NVFP4.block_size)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        registry.check_tensor(op, name, tensor, (dtype,), shape, device)
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected contiguous rows")
        if tensor.data_ptr() % TMA_BYTES:
            raise ValueError(
                f"{op}: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {TMA_BYTES} bytes; "
                "give it a buffer of its own"
            )


def check_launch(op: str, rows: int, k: int, max_ctas: int | None) -> None:
    """Checks the number of blocks and of CTAs.

    Raises:
        ValueError: as quantize.
    """
    num_blocks = rows * padded_shape(0, k // NVFP4.block_size)[1]
    if num_blocks > _MAX_BLOCKS:
        raise ValueError(f"{op}: {rows} rows of {k} are {num_blocks} blocks, expected at most 2^30; quantize in parts")
    if max_ctas is not None and max_ctas < 1:
        raise ValueError(f"{op}: max_ctas is {max_ctas}, expected at least 1, or None")


def grouped(x: torch.Tensor) -> torch.Tensor:
    """(M, K) as (M, 1, K); what has groups stays as it is."""
    return x.unsqueeze(1) if x.ndim == 2 else x


def most_ctas(device: torch.device, max_ctas: int | None) -> int:
    """max_ctas, or if that is None as many as run at a time on the GPU; for no GPU those of the full part."""
    if max_ctas is not None:
        return max_ctas
    return num_sms(device) * CTAS_PER_SM


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: symbolic sizes."""

    def vector(dtype: Any, size: Any) -> Any:
        return make_fake_compact_tensor(dtype, (size,), assumed_align=4)

    num_slots = cute.sym_int()
    outer = (cute.sym_int(), 1 if config.by_slot else cute.sym_int())
    k = cute.sym_int(divisibility=NVFP4.block_size)
    maps = (
        vector(cutlass.Int32, num_slots),
        vector(cutlass.Int32, num_slots),
        vector(cutlass.Int32, 1),
        vector(cutlass.Int32, cute.sym_int()),
    )
    return (
        source_stand_in(outer, k, config.load_bytes),
        vector(cutlass.Float32, cute.sym_int() if config.by_slot else 1),
        *output_stand_ins(),
        *(maps if config.by_slot else (None,) * len(maps)),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def source_stand_in(outer: tuple[Any, ...], k: Any, load_bytes: int) -> Any:
    """Returns bf16 (*outer, k) with strided rows that are aligned to load_bytes."""
    strides = tuple(cute.sym_int64(divisibility=load_bytes // _BF16_BYTES) for _ in outer)
    return make_fake_tensor(cutlass.BFloat16, (*outer, k), (*strides, 1), assumed_align=load_bytes)


def output_stand_ins() -> tuple[Any, Any]:
    """Returns codes and scales with symbolic sizes."""
    bytes_k = cute.sym_int(divisibility=quantize_block.BLOCK_BYTES)
    padded = cute.sym_int(divisibility=TILE_ROWS), cute.sym_int(divisibility=TILE_COLUMNS)
    return (
        make_fake_compact_tensor(
            cutlass.Uint8, (cute.sym_int(), bytes_k), stride_order=(1, 0), assumed_align=TMA_BYTES
        ),
        make_fake_compact_tensor(cutlass.Float8E4M3FN, padded, stride_order=(1, 0), assumed_align=TMA_BYTES),
    )
