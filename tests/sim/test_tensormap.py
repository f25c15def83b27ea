"""Tensor maps against the driver's own, against those CuTe DSL packs, and swizzles against a table by row.

tests/data/probes/tensormap_driver.jsonl holds what cuTensorMapEncodeTiled of CUDA 13.0 answered on an H200: where and
when, then line by line its arguments and the first 64 bytes of the map, or null where it refused.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptxsim.boxes import Box
from ptxsim.tensormap import (
    ELEMENT_TYPES,
    Interleave,
    OobFill,
    Swizzle,
    TensorMap,
    TensorMapError,
    check,
    decode,
    encode,
    meaningful_bytes,
    swizzle_offset,
)

ENCODABLE = [swizzle for swizzle in Swizzle if swizzle != Swizzle.B128_ATOM_32B_FLIP_8B]
PLAIN = TensorMap(
    global_address=0x7F0000001000,
    dtype="f16",
    dims=(256, 64),
    strides_bytes=(1024,),
    box=(64, 8),
    element_strides=(1, 1),
    swizzle=Swizzle.B128,
)


def driver_cases():
    recorded = Path(__file__).resolve().parents[1] / "data" / "probes" / "tensormap_driver.jsonl"
    for line in recorded.read_text().splitlines()[1:]:
        fields = json.loads(line)
        packed = fields.pop("map")
        for name in ("dims", "strides_bytes", "box", "element_strides"):
            fields[name] = tuple(fields[name])
        for name, kind in (("swizzle", Swizzle), ("interleave", Interleave), ("oob_fill", OobFill)):
            fields[name] = kind(fields[name])
        yield TensorMap(**fields), packed


def test_decode_and_encode_agree_with_the_driver():
    accepted = [(tensor_map, packed) for tensor_map, packed in driver_cases() if packed]
    assert len(accepted) > 50
    for tensor_map, packed in accepted:
        assert decode(bytes.fromhex(packed)) == tensor_map
        assert encode(tensor_map)[:64].hex() == packed


def test_check_agrees_with_the_driver():
    cases = list(driver_cases())
    assert sum(packed is None for _, packed in cases) > 20
    for tensor_map, packed in cases:
        messages = check(tensor_map, "sm_90a")
        if tensor_map.interleave == Interleave.B32 and tensor_map.swizzle != Swizzle.B32:
            # Documented, but not enforced.
            assert packed
            assert messages == [f"interleave 32B with swizzle {tensor_map.swizzle.name}, want swizzle B32"]
        else:
            assert bool(messages) == (packed is None), (tensor_map, messages)


def random_map(draw):
    rank = draw.randint(1, 5)
    return TensorMap(
        global_address=draw.randrange(1 << 57),
        dtype=draw.choice(list(ELEMENT_TYPES)),
        dims=tuple(draw.choice([1, 2**32, draw.randint(1, 2**32)]) for _ in range(rank)),
        strides_bytes=tuple(16 * draw.choice([0, 2**36 - 1, draw.randrange(2**36)]) for _ in range(rank - 1)),
        box=tuple(draw.randint(1, 256) for _ in range(rank)),
        element_strides=tuple(draw.randint(1, 8) for _ in range(rank)),
        swizzle=draw.choice(ENCODABLE),
        interleave=draw.choice(list(Interleave)),
        oob_fill=draw.choice(list(OobFill)),
        l2_promotion=draw.randrange(4),
        version=draw.choice([0, 2]),
        large_hint=draw.random() < 0.5,
    )


def test_round_trip():
    draw = random.Random(0)
    for _ in range(500):
        tensor_map = random_map(draw)
        packed = encode(tensor_map)
        assert len(packed) == 128
        assert decode(packed) == tensor_map
        assert decode(packed[:64]) == tensor_map


def test_second_half_is_ignored():
    garbage = encode(PLAIN)[:64] + bytes(range(64))
    assert decode(garbage) == PLAIN
    assert hash(decode(garbage)) == hash(PLAIN)
    assert meaningful_bytes(garbage) == meaningful_bytes(encode(PLAIN))


def test_no_bit_is_ignored():
    """Every bit of the first 64 bytes changes the map or is refused."""
    packed = encode(PLAIN)
    refused = 0
    for bit in range(512):
        changed = bytearray(packed)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(bytes(changed)) != PLAIN, bit
        except TensorMapError:
            refused += 1
    # Among them: unused dimensions (3 of 32 bits each) and the 32 bits at the end.
    assert refused > 128


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (0x11, "version 1"),
        (0x10 | 14 << 7, "element type code 14"),
        (0x10 | 6 << 7 | 1 << 16, "tf32 bit 1"),
        (0x10 | 3 << 11, "interleave 3"),
        (0x10 | 3 << 13 | 2 << 19, "swizzle 3 with atom 2"),
        (0x10 | 1 << 22, "reserved bits"),
        (0x50, "rank 6"),
    ],
)
def test_unknown_mode(word, message):
    packed = bytearray(encode(PLAIN))
    packed[8:12] = word.to_bytes(4, "little")
    with pytest.raises(TensorMapError, match=message):
        decode(bytes(packed))


def test_not_a_map():
    with pytest.raises(TensorMapError, match="128 bytes, got 100"):
        decode(bytes(100))
    with pytest.raises(TensorMapError, match="2\\^57"):
        decode(b"\xff" * 8 + encode(PLAIN)[8:])


@pytest.mark.parametrize(
    "change",
    [
        {"dims": (256, 64, 1)},
        {"dims": (0, 64)},
        {"box": (257, 1)},
        {"element_strides": (1, 9)},
        {"strides_bytes": (8,)},
        {"strides_bytes": (1 << 40,)},
        {"dtype": "f8"},
        {"swizzle": Swizzle.B128_ATOM_32B_FLIP_8B},
        {"version": 1},
        {"global_address": 1 << 57},
    ],
)
def test_encode_refuses_what_does_not_fit(change):
    with pytest.raises(TensorMapError):
        encode(replace(PLAIN, **change))


FP4 = replace(PLAIN, dtype="b4x16", box=(256, 8))
PADDED_FP4 = replace(PLAIN, dtype="b4x16_p64", box=(128, 8))


@pytest.mark.parametrize(
    ("tensor_map", "change", "message"),
    [
        (PLAIN, {"global_address": 0x1008}, "multiple of 16"),
        (PLAIN, {"strides_bytes": (1032,)}, "multiple of 16"),
        (PLAIN, {"box": (128, 8)}, "256 bytes along dimension 0, swizzle B128 allows 128"),
        (PLAIN, {"box": (4, 8)}, "8 bytes along dimension 0"),
        (PLAIN, {"box": (64, 257)}, "257 elements along dimension 1"),
        (PLAIN, {"element_strides": (1, 9)}, "element stride of dimension 1"),
        (PLAIN, {"dims": (256, 0)}, "dimension 1 has 0"),
        (PLAIN, {"dtype": "u16", "oob_fill": OobFill.NAN}, "NaN fill"),
        (PLAIN, {"interleave": Interleave.B16}, "want at least 3"),
        (FP4, {"dims": (255, 64)}, "b4x16 wants a multiple of 2"),
        (FP4, {"box": (16, 8)}, "8 bytes along"),
        (FP4, {"oob_fill": OobFill.NAN}, "NaN fill"),
        (PADDED_FP4, {"dims": (192, 64)}, "multiple of 128"),
        (PADDED_FP4, {"box": (64, 8)}, "wants 128"),
        (PADDED_FP4, {"global_address": 0x1010}, "multiple of 32"),
        (PADDED_FP4, {"strides_bytes": (1040,)}, "multiple of 32"),
        (PADDED_FP4, {"swizzle": Swizzle.B64}, "with swizzle B64"),
        (PADDED_FP4, {"swizzle": Swizzle.B128_ATOM_64B}, "with swizzle B128_ATOM_64B"),
    ],
)
def test_check(tensor_map, change, message):
    assert check(tensor_map) == []
    assert message in " ".join(check(replace(tensor_map, **change)))


def test_check_of_packed_interleave_and_target():
    padded = replace(PADDED_FP4, dtype="b6x16_p32", dims=(256, 4, 4), strides_bytes=(1024, 4096), box=(128, 1, 1))
    padded = replace(padded, element_strides=(1, 1, 1))
    assert check(padded) == []
    assert "b6x16_p32 with an interleaved layout" in check(replace(padded, interleave=Interleave.B16))
    assert check(FP4, "sm_90a") == ["type b4x16 needs sm_100, the target is sm_90a"]
    wide = replace(PLAIN, swizzle=Swizzle.B128_ATOM_32B)
    assert check(wide, "sm_103a") == []
    assert check(wide, "sm_90a") == ["swizzle B128_ATOM_32B needs sm_100, the target is sm_90a"]


@pytest.mark.parametrize(
    ("swizzle", "span", "atom", "rows_per_step"),
    [
        (Swizzle.B32, 32, 16, 4),
        (Swizzle.B64, 64, 16, 2),
        (Swizzle.B128, 128, 16, 1),
        (Swizzle.B128_ATOM_32B, 128, 32, 1),
        (Swizzle.B128_ATOM_64B, 128, 64, 1),
    ],
)
def test_swizzle_is_a_permutation_of_chunks_by_row(swizzle, span, atom, rows_per_step):
    """Reference: within a row of `span` bytes, chunk c of row r goes to c ^ (r // rows_per_step)."""
    chunks = span // atom
    for address in range(0, 4096, 8):
        row, within = divmod(address, span)
        chunk, byte = divmod(within, atom)
        expected = row * span + (chunk ^ (row // rows_per_step) % chunks) * atom + byte
        assert swizzle_offset(address, swizzle) == expected
    addresses = np.arange(4096, dtype=np.int64)
    moved = swizzle_offset(addresses, swizzle)
    assert moved.tolist() == [swizzle_offset(int(a), swizzle) for a in addresses]
    assert sorted(moved.tolist()) == addresses.tolist()
    assert (swizzle_offset(moved, swizzle) == addresses).all()


def test_swizzle_of_nothing_and_of_the_unknown():
    assert swizzle_offset(1234, Swizzle.NONE) == 1234
    with pytest.raises(TensorMapError, match="FLIP_8B"):
        swizzle_offset(0, Swizzle.B128_ATOM_32B_FLIP_8B)


def test_sizes_of_a_box():
    stepped = replace(PLAIN, dims=(20, 5, 4), strides_bytes=(64, 512), box=(16, 4, 3), element_strides=(1, 3, 1))
    assert stepped.rank == 3
    assert stepped.box_counts == (16, 2, 3)
    assert (stepped.row_bytes, stepped.box_bytes) == (32, 192)
    assert (FP4.element_bits, FP4.row_bytes, FP4.box_bytes) == (4, 128, 1024)
    # 64 bytes of global memory spread over 128 bytes of shared memory.
    assert (PADDED_FP4.element_bits, PADDED_FP4.row_bytes, PADDED_FP4.box_bytes) == (4, 128, 1024)


CUTE_TYPES = {
    "Uint8": "u8",
    "Int16": "u16",
    "Int32": "u32",
    "Int64": "u64",
    "Float16": "f16",
    "BFloat16": "bf16",
    "Float32": "f32",
    "TFloat32": "tf32",
    "Float64": "f64",
    "Float8E4M3FN": "u8",
    "Float4E2M1FN": "b4x16",
    "Float6E2M3FN": "b6x16_p32",
}
CUTE_SWIZZLES = {
    (0, 4, 3): Swizzle.NONE,
    (1, 4, 3): Swizzle.B32,
    (2, 4, 3): Swizzle.B64,
    (3, 4, 3): Swizzle.B128,
    (2, 5, 2): Swizzle.B128_ATOM_32B,
    (1, 6, 1): Swizzle.B128_ATOM_64B,
}


@pytest.fixture(scope="module")
def pack():
    """Makes a tensor map with CuTe DSL and returns its bytes and the tensor's address."""
    pytest.importorskip("cutlass")
    import kernels_small as kernels

    return kernels.pack_tensor_map


@pytest.mark.parametrize("name", CUTE_TYPES)
def test_types_that_cute_packs(pack, name):
    inner = 128 if name.startswith("Float6") else 32
    data, address = pack(name, shape=(256, 40), strides=(1, 512), tile=(inner, 8))
    tensor_map = decode(data)
    assert (tensor_map.global_address, tensor_map.dtype) == (address, CUTE_TYPES[name])
    assert (tensor_map.dims, tensor_map.box, tensor_map.element_strides) == ((256, 40), (inner, 8), (1, 1))
    assert tensor_map.strides_bytes == (512 * tensor_map.element_bits // 8,)
    assert check(tensor_map) == []
    assert encode(tensor_map)[:64] == meaningful_bytes(data)


@pytest.mark.parametrize("bits", CUTE_SWIZZLES)
def test_swizzles_that_cute_packs(pack, bits):
    inner = CUTE_SWIZZLES[bits].span or 64
    data, _ = pack("Uint8", shape=(256, 40), strides=(1, 512), tile=(inner, 8), swizzle_bits=bits)
    assert decode(data).swizzle == CUTE_SWIZZLES[bits]
    assert encode(decode(data))[:64] == meaningful_bytes(data)


def test_padded_fp4_that_cute_packs(pack):
    data, _ = pack("Float4E2M1FN", shape=(256, 40), strides=(1, 512), tile=(128, 8), internal="Uint8")
    assert decode(data).dtype == "b4x16_p64"
    assert check(decode(data)) == []


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_ranks_that_cute_packs(pack, rank):
    shape, tile = (64, 32, 16, 8, 4)[:rank], (32, 4, 2, 2, 1)[:rank]
    strides = (1, 64, 2**11, 2**15, 2**37 + 2**18)[:rank]
    data, _ = pack("Float16", shape=shape, strides=strides, tile=tile)
    tensor_map = decode(data)
    assert (tensor_map.dims, tensor_map.box) == (shape, tile)
    assert tensor_map.strides_bytes == tuple(2 * stride for stride in strides[1:])
    assert encode(tensor_map)[:64] == meaningful_bytes(data)


@pytest.mark.parametrize("shifted_rows", [0, 2**30])
def test_a_map_that_begins_before_address_zero(shifted_rows):
    """Of a ragged tensor QuACK moves the pointer back by 2^30 rows, and adds them in a coordinate: 57 bits are kept."""
    address = 0x1E448B00
    ragged = TensorMap(
        global_address=(address - shifted_rows * 256) % 2**57,
        dtype="bf16",
        dims=(128, 2**30, 2**31 - 1),
        strides_bytes=(256, 256),
        box=(64, 8, 1),
        element_strides=(1, 1, 1),
    )
    clip = Box(ragged).clip([0, 0, shifted_rows + 5])
    assert (clip.first, clip.end) == (address + 5 * 256, address + 5 * 256 + 7 * 256 + 128)
