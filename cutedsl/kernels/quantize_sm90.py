"""NVFP4 quantization on Hopper: rows of BF16 to codes and scales, to the BF16 numbers that these stand for, or copied.

    codes   packed FP4 codes and swizzled block scales, byte for byte those of `quantize_sm100`
    bf16    e2m1 * block scale, which is exact in BF16: what a GEMM without FP4 multiplies
    copy    the rows as they are, at other places

The hard part is speed without an instruction for FP4: see `cutedsl.kernels.round_block`. A thread has 8 neighbouring
numbers, half a block: it loads 16 bytes and a warp 512 in a row, a single row of 7168 numbers occupies 896 threads. Where
rows come from and where they go is as in `quantize_sm100`:

    plain   row t                 -> row t
    groups  row t of group g      -> row g * (T up to 128) + t
    slots   row slot_token[s]     -> row slot_row[s], maps and number of slots read on the device

Threads walk a grid-stride loop over the parts of all rows; the grid is bounded, and depends on shapes alone.

Verified on one H200: docs/evidence/h200.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import hopper, quantize_block, quantize_sm100, round_block
from cutedsl.kernels.hopper import ARCHS, TMA_BYTES, num_sms
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, WIDE_LOAD
from cutedsl.kernels.round_block import PART
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

CODES, BF16, COPY = "codes", "bf16", "copy"
OUTPUTS = (CODES, BF16, COPY)
THREADS = 128
# Of 2048 threads that an SM can have, those for which there are registers.
CTAS_PER_SM = 12
# Parts are counted in 32 bits, and the last step of the loop goes beyond the last part.
_MAX_PARTS = 1 << 30
_OP = "quantize_sm90"


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and every K.

    Attributes:
        output: CODES, BF16 or COPY.
        by_slot: rows, and their tensor scales, are found through maps on the device.
        load_bytes: WIDE_LOAD or NARROW_LOAD.
        arch: a key of ARCHS.
    """

    output: str
    by_slot: bool
    load_bytes: int = WIDE_LOAD
    arch: str = "sm_90a"

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.output not in OUTPUTS:
            raise ValueError(f"Config: output is {self.output!r}, expected one of {OUTPUTS}")
        if self.load_bytes not in (WIDE_LOAD, NARROW_LOAD):
            raise ValueError(f"Config: load_bytes is {self.load_bytes}, expected {WIDE_LOAD} or {NARROW_LOAD}")
        return self


def choose_config(x: torch.Tensor, output: str, by_slot: bool, arch: str = "sm_90a") -> Config:
    """The widest load that x's address and strides allow.

    Args:
        x: to be quantized or copied.
        output: CODES, BF16 or COPY.
        by_slot: rows are found through maps.
        arch: a key of ARCHS.

    Returns:
        Of each output one of four configurations.

    Raises:
        ValueError: output or arch is unknown.
    """
    return Config(output, by_slot, quantize_sm100.load_bytes(x), arch).validate()


class QuantizeSm90:
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
        mTensorScale: Any,
        mOut: cute.Tensor,
        mSF_bytes: Any,
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
            mTensorScale: (E,) fp32, E is 1 unless by slot; None for COPY.
            mOut: (rows, K/2) uint8 for CODES, (rows, K) bf16 for others.
            mSF_bytes: (rows up to 128, K/16 up to 4) e4m3 for CODES, else None.
            mSlotToken, mSlotRow: (slots,) int32; these and the next are None unless by slot.
            mNumSlots: (1,) int32.
            mTileExpert: (rows / 128,) int32; None for COPY.
            max_ctas: at least 1.
            stream: to launch on.
        """
        num_parts = cute.size(mX, mode=[2]) // PART
        mSF = mSF_bytes
        if cutlass.const_expr(self.config.output == CODES):
            mOut, mSF = code_parts(mOut), quantize_block.swizzled_scales(mSF_bytes, num_parts // 2)
            # Scales behind the last block are written too.
            num_parts = cute.round_up(num_parts, 2 * TILE_COLUMNS)
        num_items = cute.size(mX, mode=[0])
        if cutlass.const_expr(self.config.by_slot):
            num_items = cute.size(mSlotRow)
        num_ctas = cutlass.min(cute.ceil_div(num_items * num_parts, THREADS), max_ctas)
        parts = cute.fast_divmod_create_divisor_v2(num_parts)
        self.kernel(mX, mTensorScale, mOut, mSF, mSlotToken, mSlotRow, mNumSlots, mTileExpert, parts).launch(
            grid=(num_ctas, cute.size(mX, mode=[1]), 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=hopper.USE_PDL,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mTensorScale: Any,
        mOut: cute.Tensor,
        mSF: Any,
        mSlotToken: Any,
        mSlotRow: Any,
        mNumSlots: Any,
        mTileExpert: Any,
        parts: cute.FastDivmodDivisorV2,
    ) -> None:
        """Walks the parts of all rows; both parts of a block are in one pair of lanes, in the same step."""
        hopper.launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        cta, group, _ = cute.arch.block_idx()
        step = cute.arch.grid_dim()[0] * THREADS
        num_items = cute.size(mX, mode=[0])
        hopper.wait_for_prerequisites()
        if cutlass.const_expr(self.config.by_slot):
            num_items = mNumSlots[0]
        for index in cutlass.range(cta * THREADS + thread, num_items * parts.divisor, step, unroll=1):
            item, part = divmod(index, parts)
            if cutlass.const_expr(self.config.by_slot):
                token, row = mSlotToken[item], mSlotRow[item]
            else:
                token, row = item, group * cute.round_up(num_items, TILE_ROWS) + item
            tensor_scale = None
            if cutlass.const_expr(self.config.output != COPY):
                expert = mTileExpert[row // TILE_ROWS] if cutlass.const_expr(self.config.by_slot) else 0
                tensor_scale = mTensorScale[expert]
            if part * PART < cute.size(mX, mode=[2]):
                store_part(self.config.output, mOut, mSF, row, part, load_part(mX, (token, group, part)), tensor_scale)
            elif cutlass.const_expr(self.config.output == CODES):
                mSF[row, part // 2] = quantize_block.zero_scale()


@cute.jit
def load_part(mX: cute.Tensor, place: Any) -> cute.Tensor:
    """Returns part `place` of (T, G, K) bf16 as 8 BF16 numbers in registers."""
    loaded = cute.make_rmem_tensor(PART, cutlass.BFloat16)
    cute.autovec_copy(cute.local_tile(mX, (1, 1, PART), place)[0, 0, None], loaded)
    return loaded


@cute.jit
def store_part(
    output: cutlass.Constexpr[str],
    mOut: cute.Tensor,
    mSF: Any,
    row: Any,
    part: Any,
    numbers: cute.Tensor,
    tensor_scale: Any,
) -> None:
    """Stores 8 numbers as codes and scale, as e2m1 * scale, or as they are; both lanes of a block must call this.

    Args:
        output: CODES, BF16 or COPY.
        mOut: from code_parts for CODES, else (rows, K) bf16.
        mSF: from quantize_block.swizzled_scales for CODES, else None.
        row: of both.
        part: numbers 8 * part .. 8 * part + 7 of the row; even in even lanes.
        numbers: (8,) BF16 in registers.
        tensor_scale: of the row; None for COPY.
    """
    stored = numbers
    if cutlass.const_expr(output != COPY):
        values = cute.make_rmem_tensor(PART, cutlass.Float32)
        values.store(numbers.load().to(cutlass.Float32))
        amax = round_block.part_amax(values)
        block_sf, scale = round_block.block_scale(amax, tensor_scale)
        nearest = round_block.nearest_e2m1(values, amax, block_sf, tensor_scale)
        if cutlass.const_expr(output == CODES):
            mOut[row, part] = round_block.pack_codes(nearest)
            if part % 2 == 0:
                mSF[row, part // 2] = scale
        else:
            stored = round_block.unscaled(nearest, block_sf)
    if cutlass.const_expr(output != CODES):
        cute.autovec_copy(stored, cute.local_tile(mOut, (1, PART), (row, part))[0, None])


def code_parts(packed: cute.Tensor) -> cute.Tensor:
    """Returns (rows, K/8) uint32, the codes of a part in one, of (rows, K/2) bytes whose rows are 4-byte aligned."""
    rows, num_bytes = packed.shape
    num_parts = num_bytes * NVFP4.codes_per_byte // PART
    pointer = cute.recast_ptr(packed.iterator, dtype=cutlass.Uint32)
    # 64 bits, as codes of many experts' rows can be more than 2^31 bytes.
    return cute.make_tensor(pointer, cute.make_layout((rows, num_parts), stride=(cutlass.Int64(num_parts), 1)))


# ---- launches --------------------------------------------------------------------------------------------------------


def quantize(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """codes, scales = quantize_activation(x, tensor_scale), scales swizzled; groups one after another.

    Args, Raises, Layout, Numerics: those of `quantize_sm100.quantize`, with at most 2^29 blocks.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check(x, tensor_scale, codes, scales, max_ctas)
    _launch(CODES, x, tensor_scale, (codes, scales), None, max_ctas)


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

    Args, Raises, Layout, Numerics: those of `quantize_sm100.quantize_slots`, with at most 2^29 blocks.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream and does not
    depend on num_slots.
    """
    maps = (slot_token, slot_row, num_slots, tile_expert)
    check_slots(x, tensor_scale, *maps, codes, scales, max_ctas)
    _launch(CODES, x, tensor_scale, (codes, scales), maps, max_ctas)


def round_rows(x: torch.Tensor, tensor_scale: torch.Tensor, y: torch.Tensor, max_ctas: int | None = None) -> None:
    """y = unscaled(quantize_activation(x, tensor_scale)): x in NVFP4 as BF16 numbers, without the tensor scale.

    Args:
        x: (M, K) or (T, G, D) bf16 - K, D a multiple of 16; rows and groups may be strided; M, T may be 0.
        tensor_scale: (1,) fp32 - positive and finite (checked where runners are made).
        y: (M, K) or (G * T up to 128, D) bf16 - group g at rows g * (T up to 128) and on.
        max_ctas: the most CTAs to launch for each group; None: CTAS_PER_SM for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, there are more than 2^29 blocks, or max_ctas is
            less than 1.

    Layout: y contiguous, its first byte 16-byte aligned; rows of padding keep what they held.
    Numerics: bit-identical to `cutedsl.quantize.unscaled_activation`, also zeros' signs; a NaN's bits are any NaN's.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check_rows(x, tensor_scale, y, max_ctas)
    _launch(BF16, x, tensor_scale, (y, None), None, max_ctas)


def round_slots(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    tile_expert: torch.Tensor,
    y: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """y[slot_row[s]] = unscaled(quantize_activation(x[slot_token[s]], its expert's tensor_scale)).

    Args:
        x: (T, K) bf16 - K a multiple of 16; rows may be strided.
        tensor_scale: (E,) fp32 - of each expert, positive and finite (checked where runners are made).
        slot_token: (S,) int32 - row of x, 0 .. T - 1; S may be 0.
        slot_row: (S,) int32 - row of y, 0 .. P - 1, no two alike.
        num_slots: (1,) int32 - slots 0 .. num_slots - 1 have an expert here, at most S; of later ones nothing is read.
        tile_expert: (P / 128,) int32 - expert of each 128 rows of y, 0 .. E - 1 where a slot has a row.
        y: (P, K) bf16 - P a multiple of 128.
        max_ctas: the most CTAs to launch; None: CTAS_PER_SM for each SM.

    Raises:
        TypeError, ValueError: as round_rows. Values on the device are not checked.

    Layout: y and maps contiguous, y's first byte 16-byte aligned; rows without a slot keep what they held.
    Numerics: as round_rows.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream and does not
    depend on num_slots.
    """
    maps = (slot_token, slot_row, num_slots, tile_expert)
    check_row_slots(x, tensor_scale, *maps, y, max_ctas)
    _launch(BF16, x, tensor_scale, (y, None), maps, max_ctas)


def copy_rows(x: torch.Tensor, y: torch.Tensor, max_ctas: int | None = None) -> None:
    """y = x, groups one after another.

    Args, Raises, Layout: those of round_rows.
    Numerics: bits are moved.
    Graph-safe: as round_rows.
    """
    check_rows(x, None, y, max_ctas)
    _launch(COPY, x, None, (y, None), None, max_ctas)


def copy_slots(
    x: torch.Tensor,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    y: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """y[slot_row[s]] = x[slot_token[s]].

    Args, Raises, Layout: those of round_slots.
    Numerics: bits are moved.
    Graph-safe: as round_slots.
    """
    maps = (slot_token, slot_row, num_slots, None)
    check_row_slots(x, None, *maps, y, max_ctas)
    _launch(COPY, x, None, (y, None), maps, max_ctas)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes x as (T, G, K), tensor_scale, codes or y, scales, four maps, and the most CTAs.

    Args:
        config: which kernel; what it does not need is None.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(QuantizeSm90, config, lambda: _stand_ins(config), config.arch, line_info)


def _launch(
    output: str,
    x: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    outputs: tuple[torch.Tensor | None, ...],
    maps: tuple[torch.Tensor | None, ...] | None,
    max_ctas: int | None,
) -> None:
    num_items = x.shape[0] if maps is None or maps[0] is None else maps[0].shape[0]
    if num_items == 0:
        return
    launch = compiled(choose_config(x, output, by_slot=maps is not None))
    no_maps = (None,) * 4
    launch(quantize_sm100.grouped(x), tensor_scale, *outputs, *(maps or no_maps), most_ctas(x.device, max_ctas))


# ---- contracts -------------------------------------------------------------------------------------------------------


def check(
    x: torch.Tensor,
    tensor_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what quantize raises; reads no device memory."""
    rows = _check_plain(x, tensor_scale, max_ctas)
    quantize_sm100.check_outputs(_OP, codes, scales, rows, x.shape[-1], x.device)


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
    _check_maps(x, tensor_scale, slot_token, slot_row, num_slots, tile_expert, max_ctas)
    quantize_sm100.check_outputs(_OP, codes, scales, tile_expert.shape[0] * TILE_ROWS, x.shape[1], x.device)


def check_rows(
    x: torch.Tensor, tensor_scale: torch.Tensor | None, y: torch.Tensor, max_ctas: int | None = None
) -> None:
    """Raises what round_rows and, without tensor_scale, copy_rows raise; reads no device memory."""
    check_y(_OP, y, _check_plain(x, tensor_scale, max_ctas), x.shape[-1], x.device)


def check_row_slots(
    x: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    tile_expert: torch.Tensor | None,
    y: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what round_slots and, without tensor_scale and tile_expert, copy_slots raise; reads no device memory."""
    _check_maps(x, tensor_scale, slot_token, slot_row, num_slots, tile_expert, max_ctas)
    check_y(_OP, y, None if tile_expert is None else tile_expert.shape[0] * TILE_ROWS, x.shape[1], x.device)


def check_y(op: str, y: torch.Tensor, rows: int | None, k: int, device: torch.device) -> None:
    """Checks y (rows, k), or with any number of rows.

    Raises:
        TypeError, ValueError: as round_rows.
    """
    registry.check_tensor(op, "y", y, (torch.bfloat16,), (rows, k), device)
    if not y.is_contiguous():
        raise ValueError(f"{op}: y has strides {y.stride()}, expected contiguous rows")
    if y.data_ptr() % TMA_BYTES:
        raise ValueError(
            f"{op}: y starts at {y.data_ptr():#x}, expected a multiple of {TMA_BYTES} bytes; give it a buffer of its own"
        )


def check_launch(op: str, rows: int, k: int, max_ctas: int | None) -> None:
    """Checks the number of blocks and of CTAs.

    Raises:
        ValueError: as round_rows.
    """
    num_blocks = rows * padded_shape(0, k // NVFP4.block_size)[1]
    if 2 * num_blocks > _MAX_PARTS:
        raise ValueError(f"{op}: {rows} rows of {k} are {num_blocks} blocks, expected at most 2^29; quantize in parts")
    if max_ctas is not None and max_ctas < 1:
        raise ValueError(f"{op}: max_ctas is {max_ctas}, expected at least 1, or None")


def most_ctas(device: torch.device, max_ctas: int | None) -> int:
    """max_ctas, or if that is None as many as run at a time on the GPU; for no GPU those of an H200."""
    return num_sms(device) * CTAS_PER_SM if max_ctas is None else max_ctas


def _check_plain(x: torch.Tensor, tensor_scale: torch.Tensor | None, max_ctas: int | None) -> int:
    """Returns the rows of the output."""
    _check_x(x, (2, 3))
    if tensor_scale is not None:
        registry.check_tensor(_OP, "tensor_scale", tensor_scale, (torch.float32,), (1,), x.device)
    rows = x.shape[0] if x.ndim == 2 else x.shape[1] * padded_shape(x.shape[0], 0)[0]
    check_launch(_OP, rows, x.shape[-1], max_ctas)
    return rows


def _check_maps(
    x: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    slot_token: torch.Tensor,
    slot_row: torch.Tensor,
    num_slots: torch.Tensor,
    tile_expert: torch.Tensor | None,
    max_ctas: int | None,
) -> None:
    _check_x(x, (2,))
    if tensor_scale is not None:
        registry.check_tensor(_OP, "tensor_scale", tensor_scale, (torch.float32,), (None,), x.device)
    maps = {"slot_token": (slot_token, None), "slot_row": (slot_row, slot_token.shape[0]), "num_slots": (num_slots, 1)}
    if tile_expert is not None:
        maps["tile_expert"] = (tile_expert, None)
    for name, (tensor, size) in maps.items():
        registry.check_tensor(_OP, name, tensor, (torch.int32,), (size,), x.device)
    check_launch(_OP, slot_row.shape[0], x.shape[1], max_ctas)


def _check_x(x: torch.Tensor, dimensions: tuple[int, ...]) -> None:
    if x.ndim not in dimensions:
        raise ValueError(
            f"{_OP}: x has shape {tuple(x.shape)}, expected {' or '.join(map(str, dimensions))} dimensions"
        )
    registry.check_tensor(_OP, "x", x, (torch.bfloat16,), (None,) * x.ndim, x.device)
    if x.shape[-1] % NVFP4.block_size or 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected rows of a positive multiple of 16; pad K")


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: symbolic sizes."""

    def vector(dtype: Any, size: Any) -> Any:
        return make_fake_compact_tensor(dtype, (size,), assumed_align=4)

    rounds = config.output != COPY
    num_slots = cute.sym_int()
    outer = (cute.sym_int(), 1 if config.by_slot else cute.sym_int())
    k = cute.sym_int(divisibility=NVFP4.block_size)
    maps = (
        vector(cutlass.Int32, num_slots),
        vector(cutlass.Int32, num_slots),
        vector(cutlass.Int32, 1),
        vector(cutlass.Int32, cute.sym_int()) if rounds else None,
    )
    return (
        quantize_sm100.source_stand_in(outer, k, config.load_bytes),
        vector(cutlass.Float32, cute.sym_int() if config.by_slot else 1) if rounds else None,
        *(quantize_sm100.output_stand_ins() if config.output == CODES else (y_stand_in(k), None)),
        *(maps if config.by_slot else (None,) * len(maps)),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def y_stand_in(k: Any) -> Any:
    """Returns bf16 (rows, k) whose parts are aligned; its rows' stride is in 64 bits."""
    return quantize_sm100.source_stand_in((cute.sym_int(),), k, WIDE_LOAD)
