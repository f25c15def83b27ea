"""Probes of the bulk copy engine: tensor loads, stores and reductions, plain bulk copies, bulk groups, device-made maps."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from .kit import (
    ELEMENT_BYTES,
    Case,
    TensorMap,
    bf16_bits,
    coordinates,
    copy_in,
    dump_shared,
    fill_shared,
    init_barrier,
    kernel,
    random_bytes,
    random_u32,
    random_u64,
    sentinel,
    status,
    store_status,
    wait_parity,
    words,
)

TILE = 1024  # shared offset of the tile; the barrier is at offset 0
SPAN = {"none": 64, "32": 32, "64": 64, "128": 128}


def tensor_bytes(tensor: TensorMap) -> int:
    return (tensor.strides[-1] * tensor.dims[-1]) if tensor.strides else tensor.dims[0] * ELEMENT_BYTES[tensor.dtype]


def rows(tensor: TensorMap) -> int:
    return prod(-(-b // s) for b, s in zip(tensor.box[1:], tensor.steps()[1:], strict=True))


def box_bytes(tensor: TensorMap) -> int:
    """Bytes of a box. The step of dim 0 is ignored without interleave (CUDA driver API)."""
    return tensor.box[0] * ELEMENT_BYTES[tensor.dtype] * rows(tensor)


def footprint(tensor: TensorMap) -> int:
    """Bytes from the first to the last byte of a box in shared memory: a swizzled row takes the whole swizzle width."""
    row = tensor.box[0] * ELEMENT_BYTES[tensor.dtype]
    return row * rows(tensor) if tensor.swizzle == "none" else SPAN[tensor.swizzle] * rows(tensor)


def dense(dtype: str, dims: tuple[int, ...], box: tuple[int, ...], pad: int = 0, **options: Any) -> TensorMap:
    """Return a map of a row-major tensor whose rows are `pad` bytes apart."""
    strides, step = [], dims[0] * ELEMENT_BYTES[dtype] + pad
    for dim in dims[1:]:
        strides.append(step)
        step *= dim
    return TensorMap(dtype, dims, tuple(strides), box, buffer="tensor", **options)


def counting(num_bytes: int, dtype: str) -> np.ndarray[Any, Any]:
    """Return recognisable, compressible data: 16-bit counters, or random bytes for byte tensors."""
    if dtype == "u8":
        return random_bytes(11, num_bytes)
    return np.arange((num_bytes + 1) // 2, dtype=np.uint32).astype(np.uint16).view(np.uint8)[:num_bytes].copy()


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def load(
    name: str,
    tensor: TensorMap,
    at: tuple[int, ...],
    *,
    offset: int = 0,
    data: np.ndarray[Any, Any] | None = None,
    destination: str = "shared::cluster",
    hint: bool = False,
    expected: int = 0,
    fails: str = "",
    finding: str = "",
) -> Case:
    """Load one box over a filled shared memory and dump the surroundings too."""
    size = expected or box_bytes(tensor)
    region = round_up(offset + footprint(tensor), 128) + 128
    moves, names = coordinates(at)
    policy = ", %d40" if hint else ""
    suffix = ".L2::cache_hint" if hint else ""
    body = f"""
    {fill_shared(TILE + region, 32)}
    {init_barrier("%smem")}
    {moves}
    add.u32 %r0, %smem, {TILE + offset};
    mov.b64 %d40, 0x1000000000000000;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], {size};
    @%p30 cp.async.bulk.tensor.{len(at)}d.{destination}.global.tile.mbarrier::complete_tx::bytes{suffix} \
[%r0], [%map0, {names}], [%smem]{policy};
    {wait_parity("%smem", 0)}
    {dump_shared("%ptr1", region, 32, TILE)}
    {store_status("%ptr2")}
    """
    source = counting(tensor_bytes(tensor), tensor.dtype) if data is None else data
    return Case(
        name=f"tma_load/{name}",
        ptx=kernel(body, pointers=3, maps=1),
        buffers={"tensor": source, "out": sentinel(region), "status": status()},
        outputs=("out", "status"),
        maps=(tensor,),
        shared_bytes=TILE + region,
        is_async=True,
        fails=fails,
        finding=finding,
    )


def load_cases() -> Iterator[Case]:
    for dtype in ("u8", "u16", "u32", "u64", "f16", "bf16", "f32"):
        size = ELEMENT_BYTES[dtype]
        for swizzle, span in SPAN.items():
            tensor = dense(dtype, (256 // size, 24), (span // size, 16), swizzle=swizzle)
            yield load(f"{dtype}_swizzle{swizzle}", tensor, (32 // size, 3))
    # Where the tile starts: does the XOR use the absolute shared address or the offset in the tile?
    for swizzle in SPAN:
        tensor = dense("u16", (128, 24), (SPAN[swizzle] // 2, 16), swizzle=swizzle)
        for offset in (128, 256, 384, 640, 896):
            yield load(f"start{offset}_swizzle{swizzle}", tensor, (16, 2), offset=offset)
    # Boxes narrower than the swizzle span.
    for swizzle, inner in (("128", 64), ("128", 32), ("128", 16), ("128", 96), ("64", 32), ("64", 16), ("32", 16)):
        tensor = dense("u16", (128, 24), (inner // 2, 16), swizzle=swizzle)
        yield load(f"narrow{inner}_swizzle{swizzle}", tensor, (16, 2))
        yield load(f"narrow{inner}_swizzle{swizzle}_start128", tensor, (16, 2), offset=128)
    # Barriers count the bytes of the box, not those that its rows are apart.
    tensor = dense("u16", (128, 24), (32, 16), swizzle="128")
    yield load("narrow64_swizzle128_full_count", tensor, (16, 2), expected=footprint(tensor), finding="deadlock")
    yield from out_of_bounds_cases()
    yield from rank_cases()
    yield from step_cases()
    rounding = random_u32(21, 64 * 16).view(np.uint8)
    rounding[:64] = np.array(  # subnormals, infinities, NaNs first
        [1, 0x80000001, 0x7FFFFF, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001] * 2, dtype=np.uint32
    ).view(np.uint8)
    for dtype in ("f32_ftz", "tf32", "tf32_ftz"):
        yield load(f"{dtype}_values", dense(dtype, (64, 16), (32, 8)), (0, 0), data=rounding)
    ties = rounding.view(np.uint32) & np.uint32(0xFFFFE000) | np.uint32(0x1000)
    ties[16:32] ^= np.uint32(1)  # just beside a tie
    ties[:8] = [0x7F7FF000, 0x7F7FEFFF, 0xFF7FF000, 0x1000, 0x3000, 0x80001000, 0x7FF000, 0x7FD000]
    yield load("tf32_ties", dense("tf32", (64, 16), (32, 8)), (0, 0), data=ties.view(np.uint8))
    yield load_by_4_lanes()
    tensor = dense("bf16", (64, 16), (64, 8), swizzle="128", promotion="128")
    yield load("cache_hint", tensor, (0, 4), hint=True)
    yield load("shared_cta_destination", tensor, (0, 4), destination="shared::cta")
    yield load("shared_cta_destination_hint", tensor, (0, 4), destination="shared::cta", hint=True)
    padded = dense("u16", (40, 12), (64, 16), pad=16)
    yield load("box_larger_than_tensor", padded, (0, 0))
    yield load("padded_rows", dense("u16", (40, 12), (32, 8), pad=16), (8, 2))
    yield from refused_load_cases()


# (arguments of Case): a first coordinate that is not at a multiple of 16 bytes, a negative one where a copy may have none,
# and a shared address that is not a multiple of 128.
OFF_CHUNK: dict[str, Any] = {"fails": "ILLEGAL_INSTRUCTION", "finding": "misaligned"}
NEGATIVE: dict[str, Any] = {"fails": "ILLEGAL_INSTRUCTION", "finding": "bad-value"}
OFF_ROW: dict[str, Any] = {"fails": "MISALIGNED_ADDRESS", "finding": "misaligned"}


def refused_load_cases() -> Iterator[Case]:
    tensor = dense("u16", (128, 24), (32, 16), swizzle="64")
    yield load("refused_coordinate_inside", tensor, (4, 2), **OFF_CHUNK)
    yield load("refused_coordinate_before", tensor, (-5, 2), **OFF_CHUNK)
    yield load("refused_coordinate_outside", tensor, (4, 40), **OFF_CHUNK)
    yield load("refused_destination_64", tensor, (16, 2), offset=64, **OFF_ROW)
    yield load("refused_destination_64_unswizzled", dense("u8", (96, 8), (48, 8)), (16, 2), offset=64, **OFF_ROW)


def load_by_4_lanes() -> Case:
    """Each lane loads its own box; the barrier counts them all."""
    tensor = dense("u16", (128, 24), (32, 4))
    body = f"""
    {fill_shared(TILE + 1280, 32)}
    {init_barrier("%smem")}
    shl.b32 %r0, %tix, 8;
    add.u32 %r0, %r0, %smem;
    add.u32 %r0, %r0, {TILE};
    shl.b32 %r100, %tix, 3;
    add.u32 %r101, %tix, 2;
    setp.lt.u32 %p29, %tix, 4;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 1024;
    @%p29 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes \
[%r0], [%map0, {{%r100, %r101}}], [%smem];
    {wait_parity("%smem", 0)}
    {dump_shared("%ptr1", 1280, 32, TILE)}
    {store_status("%ptr2")}
    """
    return Case(
        name="tma_load/by_4_lanes",
        ptx=kernel(body, pointers=3, maps=1),
        buffers={"tensor": counting(tensor_bytes(tensor), "u16"), "out": sentinel(1280), "status": status()},
        outputs=("out", "status"),
        maps=(tensor,),
        shared_bytes=TILE + 1280,
        is_async=True,
    )


def out_of_bounds_cases() -> Iterator[Case]:
    places = {
        "before": (-8, -3),
        "past_end": (104, 20),
        "corner": (-16, 20),
        "outside": (200, 40),
        "far_before": (-2000000000, 5),
        "last_elements": (120, 23),
    }
    for name, at in places.items():
        yield load(f"oob_{name}", dense("u16", (128, 24), (32, 16), swizzle="64"), at)
    for dtype in ("f16", "bf16", "f32", "f64", "tf32", "f32_ftz"):
        size = ELEMENT_BYTES[dtype]
        tensor = dense(dtype, (256 // size, 24), (64 // size, 8), oob_fill="nan")
        data = np.zeros(tensor_bytes(tensor), dtype=np.uint8)
        yield load(f"oob_nan_{dtype}", tensor, (-16 // size, 20), data=data)
    yield load("oob_u8", dense("u8", (96, 8), (48, 8)), (64, -2))
    yield load("oob_f32", dense("f32", (36, 9), (16, 4)), (28, 7))
    for at in ((0, 0), (16, 1), (32, -1), (48, 0), (-16, 2)):
        place = "_".join(str(x).replace("-", "minus") for x in at)
        yield load(f"oob_odd_dims_u8_at_{place}", dense("u8", (37, 5), (48, 8), pad=11), at)
    yield load("oob_odd_dims_u16", dense("u16", (37, 5), (32, 4), pad=6, swizzle="64"), (16, 2))
    yield load("oob_odd_dims_f32", dense("f32", (9, 5), (8, 4), pad=12), (4, 2))
    yield load("oob_nan_odd_dims_bf16", dense("bf16", (37, 5), (32, 4), pad=6, swizzle="64", oob_fill="nan"), (16, 2))


def rank_cases() -> Iterator[Case]:
    yield load("rank1_u8", dense("u8", (100,), (64,)), (0,))
    yield load("rank1_u8_past_end", dense("u8", (100,), (64,)), (64,))
    yield load("rank1_u8_before", dense("u8", (100,), (64,)), (-16,))
    yield load("rank1_f32", dense("f32", (300,), (256,)), (40,))
    yield load("rank3_u16", dense("u16", (32, 6, 5), (16, 4, 3)), (8, 1, 1))
    yield load("rank3_bf16_swizzle128_oob", dense("bf16", (64, 6, 5), (64, 4, 3), swizzle="128"), (0, 4, -1))
    yield load("rank4_u8", dense("u8", (48, 4, 3, 3), (32, 2, 2, 2)), (16, 1, 1, 1))
    yield load("rank4_u16_oob", dense("u16", (32, 4, 3, 3), (16, 3, 2, 2), swizzle="32"), (-8, 2, 2, -1))
    yield load("rank5_u32", dense("u32", (16, 3, 3, 2, 2), (8, 2, 2, 2, 2)), (4, 1, 1, 0, 0))
    yield load("rank5_u16_oob", dense("u16", (16, 3, 3, 2, 2), (16, 2, 2, 2, 2), swizzle="32"), (8, 2, -1, 1, -1))


def step_cases() -> Iterator[Case]:
    for swizzle in ("none", "64"):
        tensor = dense("u16", (128, 24), (32, 16), swizzle=swizzle, element_strides=(1, 2))
        yield load(f"step1x2_swizzle{swizzle}", tensor, (8, 2))
        yield load(f"step1x2_swizzle{swizzle}_oob", tensor, (8, 15))
        yield load(f"step1x2_swizzle{swizzle}_before", tensor, (8, -3))
    yield load("step1x3_odd_box", dense("u16", (128, 24), (32, 16), element_strides=(1, 3)), (0, 1))
    yield load("step2x1", dense("u16", (128, 24), (32, 16), element_strides=(2, 1)), (8, 2))
    yield load("step1x2x2", dense("u32", (16, 8, 8), (8, 4, 4), element_strides=(1, 2, 2)), (4, 1, 1))


def store(
    name: str,
    tensor: TensorMap,
    at: tuple[int, ...],
    *,
    offset: int = 0,
    operation: str = "",
    source: np.ndarray[Any, Any] | None = None,
    target: np.ndarray[Any, Any] | None = None,
    hint: bool = False,
    fails: str = "",
    finding: str = "",
    lanes: int = 1,
) -> Case:
    """Store (or reduce) one box from shared memory and read the whole tensor back."""
    size = round_up(footprint(tensor), 16)
    data = counting(size, "u16") if source is None else source
    assert data.nbytes == size, (name, data.nbytes, size)
    moves, names = coordinates(at)
    opcode = f"cp.reduce.async.bulk.tensor.{len(at)}d" if operation else f"cp.async.bulk.tensor.{len(at)}d"
    suffix = f".{operation}" if operation else ""
    policy = ", %d40" if hint else ""
    cache = ".L2::cache_hint" if hint else ""
    body = f"""
    {copy_in("%ptr1", size, 32, offset)}
    {moves}
    add.u32 %r0, %smem, {offset};
    mov.b64 %d40, 0x1000000000000000;
    {"setp.eq.b32 %p0, 0, 0;" if lanes == 32 else f"setp.lt.u32 %p0, %tix, {lanes};"}
    @%p0 {opcode}.global.shared::cta{suffix}.tile.bulk_group{cache} [%map0, {names}], [%r0]{policy};
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    return Case(
        name=f"{'tma_reduce' if operation else 'tma_store'}/{name}",
        ptx=kernel(body, pointers=2, maps=1),
        buffers={"tensor": sentinel(tensor_bytes(tensor)) if target is None else target, "source": data},
        outputs=("tensor",),
        maps=(tensor,),
        shared_bytes=offset + round_up(size, 128),
        is_async=True,
        fails=fails,
        finding=finding,
    )


def store_cases() -> Iterator[Case]:
    for swizzle, span in SPAN.items():
        tensor = dense("u16", (96, 16), (span // 2, 8), swizzle=swizzle)
        yield store(f"u16_swizzle{swizzle}", tensor, (8, 3))
        yield store(f"u16_swizzle{swizzle}_start128", tensor, (8, 3), offset=128)
        yield store(f"u16_swizzle{swizzle}_start896", tensor, (8, 3), offset=896)
        yield store(f"u16_swizzle{swizzle}_clipped", tensor, (88, 12))
    for swizzle, inner in (("128", 64), ("128", 16), ("128", 96), ("64", 32), ("32", 16)):
        tensor = dense("u16", (96, 16), (inner // 2, 8), swizzle=swizzle)
        yield store(f"narrow{inner}_swizzle{swizzle}", tensor, (8, 3), offset=128)
    yield store("clipped_u8", dense("u8", (80, 8), (32, 8)), (64, 5))
    yield from odd_store_cases()
    yield store("outside_f32", dense("f32", (16, 8), (8, 4)), (16, 0))
    yield store("f32_hint", dense("f32", (16, 8), (8, 4)), (4, 2), hint=True)
    yield store("rank1", dense("u32", (64,), (32,)), (40,))
    for at in ((16, 1, 1), (24, 1, 1), (16, 3, 2)):
        place = "_".join(str(x) for x in at)
        yield store(f"rank3_at_{place}", dense("bf16", (32, 4, 4), (16, 2, 3)), at)
    yield store("rank4", dense("u16", (16, 3, 3, 2), (8, 2, 2, 2)), (8, 2, 1, 1))
    yield store("rank5", dense("u8", (32, 2, 2, 2, 2), (16, 2, 1, 2, 2)), (16, 1, 1, 0, 1))
    yield store("step1x2", dense("u16", (64, 16), (16, 8), element_strides=(1, 2)), (8, 3))
    values = random_u32(22, 16 * 8)
    values[:8] = [1, 0x80000001, 0x7FFFFF, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]
    for dtype in ("f32_ftz", "tf32"):
        yield store(f"{dtype}_values", dense(dtype, (32, 8), (16, 8)), (8, 0), source=values.view(np.uint8))


def odd_store_cases() -> Iterator[Case]:
    """Rows that end inside a 16-byte unit, and what the engine refuses."""
    for at in ((0, 0), (16, 1), (32, 3), (48, 0)):
        yield store(f"odd_dims_u8_at_{at[0]}_{at[1]}", dense("u8", (37, 5), (48, 8), pad=11), at)
    yield store("odd_dims_u16", dense("u16", (37, 5), (32, 4), pad=6, swizzle="64"), (16, 2))
    yield store("odd_dims_bf16_aligned_32", dense("bf16", (41, 5), (32, 4), pad=14), (16, 0))
    yield store("odd_dims_f32", dense("f32", (9, 5), (8, 4), pad=12), (4, 2))
    yield store("odd_dims_u64", dense("u64", (5, 5), (4, 4), pad=8), (2, 2))
    yield store("odd_dims_rank3_f16", dense("f16", (9, 3, 3), (16, 2, 2), pad=14), (0, 1, 1))
    tensor = dense("u16", (96, 16), (32, 8), swizzle="64")
    yield store("refused_coordinate", tensor, (4, 3), **OFF_CHUNK)
    yield store("refused_coordinate_clipped", tensor, (84, 12), **OFF_CHUNK)
    yield store("refused_source_64", tensor, (8, 3), offset=64, **OFF_ROW)
    yield store("refused_before_row", tensor, (8, -3), **NEGATIVE)
    yield store("refused_before_column", tensor, (-16, 3), **NEGATIVE)
    yield store("refused_before_rank3", dense("bf16", (32, 4, 4), (16, 2, 3)), (16, 1, -1), **NEGATIVE)


def float_data(dtype: str, seed: int, n: int) -> np.ndarray[Any, Any]:
    """Return n floats of a type as bytes: ordinary values of like size, then special ones."""
    values = (random_u64(seed, n).astype(np.int64) >> 40).astype(np.float64) / 2.0**20
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 65504.0, 1e-7, 3.0e38])
    at = int(random_u32(seed, 1)[0]) % 7
    values[at : at + len(special)] = special
    with np.errstate(over="ignore"):
        if dtype == "f64":
            return values.view(np.uint8).copy()
        if dtype == "f32":
            return values.astype(np.float32).view(np.uint8).copy()
        if dtype == "f16":
            return values.astype(np.float16).view(np.uint8).copy()
        truncated = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bf16_bits(truncated.view(np.float32)).view(np.uint8).copy()


def reduce_data(dtype: str, seed: int, num_bytes: int) -> np.ndarray[Any, Any]:
    if dtype in ("f16", "bf16", "f32", "f64"):
        return float_data(dtype, seed, num_bytes // ELEMENT_BYTES[dtype])
    return random_bytes(seed, num_bytes)


REDUCTIONS = {
    "u32": ("add", "min", "max", "inc", "dec", "and", "or", "xor"),
    "s32": ("add", "min", "max"),
    "u64": ("add", "min", "max", "and", "or", "xor"),
    "s64": ("min", "max"),
    "f16": ("add", "min", "max"),
    "bf16": ("add", "min", "max"),
    "f32": ("add",),
}


def reduce_cases() -> Iterator[Case]:
    for dtype, operations in REDUCTIONS.items():
        size = ELEMENT_BYTES[dtype]
        tensor = dense(dtype, (128 // size, 6), (64 // size, 4), swizzle="64")
        for i, operation in enumerate(operations):
            yield store(
                f"{operation}_{dtype}",
                tensor,
                (64 // size, 3),  # the last row is out of bounds
                operation=operation,
                source=reduce_data(dtype, 31 + i, 256),
                target=reduce_data(dtype, 51 + i, 128 * 6),
            )
    for dtype in ("u32", "f16", "f32"):
        size = ELEMENT_BYTES[dtype]
        tensor = dense(dtype, (36 // size, 5), (32 // size, 4), pad=12)
        source, target = reduce_data(dtype, 41, 128), reduce_data(dtype, 61, 240)
        yield store(f"add_{dtype}_odd_dims", tensor, (16 // size, 2), operation="add", source=source, target=target)
    tensor = dense("u32", (32, 6), (8, 4))
    data = reduce_data("u32", 42, 128 * 6)
    for name, at, refused in (("coordinate", (2, 1), OFF_CHUNK), ("before", (8, -1), NEGATIVE)):
        yield store(f"refused_{name}", tensor, at, operation="add", source=data[:128], target=data, **refused)
    # A reduction runs once for each lane. (Of stores ptxas makes one instruction for the warp.)
    for lanes in (5, 32):
        name = f"add_u32_by_{lanes}_lanes"
        yield store(name, tensor, (8, 1), operation="add", source=data[:128], target=data, lanes=lanes)


def bulk_cases() -> Iterator[Case]:
    """Copies without a tensor map."""
    for size, source, target in ((16, 0, 0), (48, 16, 32), (1024, 0, 128), (2000, 48, 16)):
        region = round_up(target + size, 128) + 128
        for destination in ("shared::cluster", "shared::cta"):
            body = f"""
            {fill_shared(TILE + region, 32)}
            {init_barrier("%smem")}
            add.u32 %r0, %smem, {TILE + target};
            add.u64 %d1, %ptr0, {source};
            mov.b32 %r1, {size};
            @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], {size};
            @%p30 cp.async.bulk.{destination}.global.mbarrier::complete_tx::bytes [%r0], [%d1], %r1, [%smem];
            {wait_parity("%smem", 0)}
            {dump_shared("%ptr1", region, 32, TILE)}
            {store_status("%ptr2")}
            """
            yield Case(
                name=f"bulk/load_{size}_to_{destination.replace('::', '_')}",
                ptx=kernel(body, pointers=3),
                buffers={"tensor": counting(2048, "u16"), "out": sentinel(region), "status": status()},
                outputs=("out", "status"),
                shared_bytes=TILE + region,
                is_async=True,
            )
        body = f"""
        {copy_in("%ptr1", 2048, 32)}
        add.u32 %r0, %smem, {source};
        add.u64 %d1, %ptr0, {target};
        mov.b32 %r1, {size};
        setp.eq.u32 %p0, %tix, 0;
        @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r0], %r1;
        @%p0 cp.async.bulk.commit_group;
        @%p0 cp.async.bulk.wait_group 0;
        """
        yield Case(
            name=f"bulk/store_{size}",
            ptx=kernel(body, pointers=2),
            buffers={"out": sentinel(2304), "source": counting(2048, "u16")},
            outputs=("out",),
            shared_bytes=2048,
            is_async=True,
        )
    yield from bulk_reduce_cases()
    yield from by_several_lanes()


def by_several_lanes() -> Iterator[Case]:
    """A reduction in 4 lanes runs 4 times; loads in 4 lanes are counted together."""
    body = f"""
    {copy_in("%ptr1", 256, 32)}
    setp.lt.u32 %p0, %tix, 4;
    mov.b32 %r1, 256;
    @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%ptr0], [%smem], %r1;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    yield Case(
        name="bulk_reduce/add.u32_by_4_lanes",
        ptx=kernel(body, pointers=2),
        buffers={"out": random_bytes(131, 256), "source": random_bytes(132, 256)},
        outputs=("out",),
        shared_bytes=256,
        is_async=True,
    )
    body = f"""
    {fill_shared(TILE + 640, 32)}
    {init_barrier("%smem")}
    shl.b32 %r2, %tix, 7;
    add.u32 %r0, %smem, %r2;
    add.u32 %r0, %r0, {TILE};
    cvt.u64.u32 %d2, %r2;
    add.u64 %d2, %d2, %ptr0;
    mov.b32 %r1, 128;
    setp.lt.u32 %p0, %tix, 4;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 512;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d2], %r1, [%smem];
    {wait_parity("%smem", 0)}
    {dump_shared("%ptr1", 640, 32, TILE)}
    {store_status("%ptr2")}
    """
    yield Case(
        name="bulk/load_by_4_lanes",
        ptx=kernel(body, pointers=3),
        buffers={"tensor": counting(512, "u16"), "out": sentinel(640), "status": status()},
        outputs=("out", "status"),
        shared_bytes=TILE + 640,
        is_async=True,
    )


BULK_REDUCTIONS = words(
    "add.u32 add.s32 add.u64 inc.u32 dec.u32 min.u32 max.u32 min.s32 max.s32 min.u64 max.u64 min.s64 max.s64 "
    "and.b32 or.b32 xor.b32 and.b64 or.b64 xor.b64 add.f32 add.f64 add.noftz.f16 add.noftz.bf16 "
    "min.f16 max.f16 min.bf16 max.bf16"
)


def bulk_reduce_cases() -> Iterator[Case]:
    for i, operation in enumerate(BULK_REDUCTIONS):
        dtype = operation.split(".")[-1]
        dtype = dtype.replace("b", "u") if dtype in ("b32", "b64") else dtype
        body = f"""
        {copy_in("%ptr1", 256, 32)}
        setp.eq.u32 %p0, %tix, 0;
        add.u64 %d1, %ptr0, 16;
        mov.b32 %r1, 240;
        @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation} [%d1], [%smem], %r1;
        @%p0 cp.async.bulk.commit_group;
        @%p0 cp.async.bulk.wait_group 0;
        """
        yield Case(
            name=f"bulk_reduce/{operation}",
            ptx=kernel(body, pointers=2),
            buffers={"out": reduce_data(dtype, 71 + i, 272), "source": reduce_data(dtype, 101 + i, 256)},
            outputs=("out",),
            shared_bytes=256,
            is_async=True,
        )


def group_cases() -> Iterator[Case]:
    """wait_group N: all but the N most recent groups are complete (or have read their source)."""

    def stores(groups: int, waits: str, slots: int) -> Case:
        """Store `groups` blocks of 128 bytes through `slots` shared slots; a slot is rewritten after the wait."""
        parts = []
        for g in range(groups):
            slot = (g % slots) * 128
            parts.append(
                f"""
                mov.b32 %r1, {g + 1};
                shl.b32 %r2, %tix, 2;
                add.u32 %r2, %r2, %smem;
                mad.lo.u32 %r3, %tix, 0x10001, %r1;
                st.shared.b32 [%r2+{slot}], %r3;
                fence.proxy.async.shared::cta;
                bar.sync 0;
                add.u32 %r4, %smem, {slot};
                add.u64 %d1, %ptr0, {g * 128};
                mov.b32 %r5, 128;
                @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r4], %r5;
                @%p0 cp.async.bulk.commit_group;
                @%p0 cp.async.bulk.{waits};
                bar.sync 0;
                """
            )
        body = "setp.eq.u32 %p0, %tix, 0;\n" + "\n".join(parts) + "\n@%p0 cp.async.bulk.wait_group 0;"
        return Case(
            name=f"bulk_group/{waits.replace(' ', '_')}_{groups}_groups_{slots}_slots",
            ptx=kernel(body, pointers=1),
            buffers={"out": sentinel(groups * 128)},
            outputs=("out",),
            shared_bytes=slots * 128,
            is_async=True,
        )

    yield stores(6, "wait_group.read 0", 1)
    yield stores(6, "wait_group.read 1", 2)
    yield stores(8, "wait_group.read 3", 4)
    yield stores(6, "wait_group 1", 2)
    body = """
    setp.eq.u32 %p0, %tix, 0;
    @%p0 cp.async.bulk.wait_group 0;
    @%p0 cp.async.bulk.wait_group.read 3;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 1;
    @%p0 cp.async.bulk.wait_group 0;
    @%p0 st.global.b32 [%ptr0], 7;
    """
    yield Case("bulk_group/empty_groups", kernel(body, pointers=1, shared=False), {"out": sentinel(4)}, ("out",))
    # A store, a wait for its completion (not only its read), then a load of the same memory.
    body = f"""
    {copy_in("%ptr1", 128, 32)}
    add.u32 %r0, %smem, 1024;
    {init_barrier("%r0")}
    mov.b32 %r1, 128;
    add.u32 %r2, %smem, 128;
    @%p30 cp.async.bulk.global.shared::cta.bulk_group [%ptr0], [%smem], %r1;
    @%p30 cp.async.bulk.commit_group;
    @%p30 cp.async.bulk.wait_group 0;
    @%p30 fence.proxy.async;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%r0], 128;
    @%p30 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%ptr0], %r1, [%r0];
    {wait_parity("%r0", 0)}
    {dump_shared("%ptr2", 256, 32)}
    {store_status("%ptr3")}
    """
    yield Case(
        name="bulk_group/store_then_load",
        ptx=kernel(body, pointers=4),
        buffers={
            "tensor": sentinel(128),
            "source": counting(128, "u16"),
            "out": sentinel(256),
            "status": status(),
        },
        outputs=("tensor", "out", "status"),
        shared_bytes=1040,
        is_async=True,
    )


REPLACED = """
tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%smem], 0x123456780;
tensormap.replace.tile.rank.shared::cta.b1024.b32 [%smem], 2;
tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%smem], 0, 16;
tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%smem], 2, 5;
tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%smem], 0, 70000;
tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%smem], 1, 33;
tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%smem], 0, 560000;
tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%smem], 1, 0x7000000010;
tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%smem], 1, 3;
tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%smem], 4;
tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%smem], 0;
tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%smem], 2;
tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%smem], 1;
""".strip().splitlines()
PUBLISH = """
bar.sync 0;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%ptr0], [%smem], 128;
"""


def copy_map_to_shared(base: str) -> str:
    return f"""
    shl.b32 %r10, %tix, 2;
    cvt.u64.u32 %d10, %r10;
    add.u64 %d11, {base}, %d10;
    ld.b32 %r11, [%d11];
    add.u32 %r12, %smem, %r10;
    st.shared.b32 [%r12], %r11;
    bar.sync 0;
    setp.eq.u32 %p0, %tix, 0;
    """


def device_map_cases() -> Iterator[Case]:
    """Maps made or changed by the kernel."""
    base = dense("bf16", (64, 16, 8), (32, 8, 4), swizzle="64")
    fixed = "tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%smem], 0x123456780;"
    for line in REPLACED:
        lines = [line] if "global_address" in line else [fixed, line]
        field = line.split(".")[3] + "".join("_" + word.rstrip(",;") for word in line.split()[2:-1])
        changes = "\n".join("@%p0 " + change for change in lines)
        yield Case(
            name=f"device_map/replace_{field}",
            ptx=kernel(copy_map_to_shared("%map0") + changes + PUBLISH, pointers=2, maps=1),
            buffers={"out": sentinel(128), "tensor": sentinel(16384)},
            outputs=("out",),
            maps=(base,),
            shared_bytes=128,
        )
    changes = "\n".join("@%p0 " + change for change in REPLACED)
    yield Case(
        name="device_map/replace_all",
        ptx=kernel(copy_map_to_shared("%map0") + changes + PUBLISH, pointers=2, maps=1),
        buffers={"out": sentinel(128), "tensor": sentinel(16384)},
        outputs=("out",),
        maps=(base,),
        shared_bytes=128,
    )
    yield use_device_map()


def use_device_map() -> Case:
    """Write a map to global memory, change its height, fence, and load through it."""
    tensor = dense("u16", (32, 16), (32, 8), swizzle="64")
    moves, names = coordinates((0, 6))
    body = f"""
    {copy_map_to_shared("%map0")}
    @%p0 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%smem], 1, 10;
    {PUBLISH}
    fence.proxy.tensormap::generic.acquire.gpu [%ptr0], 128;
    {fill_shared(2048, 32)}
    {init_barrier("%smem")}
    {moves}
    add.u32 %r0, %smem, 1024;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 512;
    @%p30 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes \
[%r0], [%ptr0, {names}], [%smem];
    {wait_parity("%smem", 0)}
    {dump_shared("%ptr2", 1024, 32, 1024)}
    {store_status("%ptr3")}
    """
    return Case(
        name="device_map/load_through_replaced_map",
        ptx=kernel(body, pointers=4, maps=1),
        buffers={
            "map": np.zeros(128, dtype=np.uint8),
            "tensor": counting(1024, "u16"),
            "out": sentinel(1024),
            "status": status(),
        },
        outputs=("out", "status"),
        maps=(tensor,),
        shared_bytes=2048,
        is_async=True,
    )


def cases() -> Iterator[Case]:
    yield from load_cases()
    yield from store_cases()
    yield from reduce_cases()
    yield from bulk_cases()
    yield from group_cases()
    yield from device_map_cases()
