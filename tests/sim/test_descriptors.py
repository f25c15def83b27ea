import pytest

from ptxsim.descriptors import InstructionDescriptor, decode_instruction, decode_matrix, k_major_chunks, mn_major_chunks
from ptxsim.findings import Unsupported

CODES = {"none": 0, "128/32": 1, "128": 2, "64": 4, "32": 6}
ATOM_BYTES = {"none": 16, "32": 32, "64": 64, "128": 128, "128/32": 128}


def sm100(start, leading, stride, swizzle):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | CODES[swizzle] << 61


def sm90(start, leading, stride, swizzle):
    code = {"none": 0, "128": 1, "64": 2, "32": 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62


def swizzle_bit_by_bit(address, swizzle):
    """Address bits from 4 (5 for 32-byte atoms) upwards are XORed with those from 7 upwards."""
    first = 5 if swizzle == "128/32" else 4
    for i in range({"none": 0, "32": 1, "64": 2, "128": 3, "128/32": 2}[swizzle]):
        address ^= (address >> (7 + i) & 1) << (first + i)
    return address


@pytest.mark.parametrize("swizzle", ["none", "32", "64", "128"])
@pytest.mark.parametrize("start", [0x400, 0x4A0])
@pytest.mark.parametrize("arch", ["sm100", "sm90"])
def test_k_major(swizzle, start, arch):
    leading, stride = 4096, 2048
    value = (sm100 if arch == "sm100" else sm90)(start, leading, stride, swizzle)
    chunks = k_major_chunks(value, arch, 24, 2)
    for row in range(24):
        for c in range(2):
            core = row // 8 * stride + row % 8 * ATOM_BYTES[swizzle]
            address = start + core + c * (leading if swizzle == "none" else 16)
            assert chunks[row, c] * 16 == swizzle_bit_by_bit(address, swizzle)


@pytest.mark.parametrize("swizzle", ["none", "32", "64", "128", "128/32"])
def test_mn_major(swizzle):
    start, leading, stride = 0x800, 8192, 1024
    chunks = mn_major_chunks(sm100(start, leading, stride, swizzle), "sm100", 20, 16)
    width = ATOM_BYTES[swizzle] // 16
    height = 4 if swizzle == "128/32" else 8
    for k in range(16):
        for i in range(20):
            if swizzle == "none":
                address = start + i * stride + k // 8 * leading + k % 8 * 16
            else:
                atom = i // width * leading + k // height * stride
                address = start + atom + k % height * ATOM_BYTES[swizzle] + i % width * 16
            assert chunks[k, i] * 16 == swizzle_bit_by_bit(address, swizzle)


@pytest.mark.parametrize(
    ("value", "arch", "text"),
    [
        (sm100(1024, 0, 1024, "128") | 1 << 14, "sm100", "reserved"),
        (sm100(1024, 0, 1024, "128") | 1 << 53, "sm100", "reserved"),
        (sm100(1024, 0, 1024, "128") | 1 << 49, "sm100", "base offset"),
        (sm100(1024, 0, 1024, "128") | 1 << 52, "sm100", "absolute"),
        (sm100(1024, 0, 1024, "128") ^ 1 << 46, "sm100", "0b001"),
        (sm100(1024, 0, 1024, "128") | 1 << 61, "sm100", "swizzle mode 3"),
        (sm90(1024, 0, 1024, "128") | 1 << 46, "sm90", "reserved"),
        (sm90(1024, 0, 1024, "128") | 1 << 50, "sm90", "base offset"),
    ],
)
def test_refused_matrix_descriptors(value, arch, text):
    with pytest.raises(Unsupported, match=text):
        decode_matrix(value, arch)


def test_k_major_has_no_32_byte_atoms():
    with pytest.raises(Unsupported, match="K-major"):
        k_major_chunks(sm100(1024, 0, 1024, "128/32"), "sm100", 8, 2)


def plain(m, n, a=0, b=0, d=1):
    return d << 4 | a << 7 | b << 10 | n >> 3 << 17 | m >> 4 << 24


def scaled(m, n, a=1, b=1, scale=0, a_id=0, b_id=0):
    return b_id << 4 | a << 7 | b << 10 | n >> 3 << 17 | scale << 23 | m >> 7 << 27 | a_id << 29


def test_instruction_descriptors():
    assert decode_instruction(plain(128, 96, 1, 0), "f16", False) == InstructionDescriptor(
        128, 96, 16, "bf16", "f16", "f32"
    )
    assert decode_instruction(plain(64, 8, 2, 2) | 0b11 << 15 | 1 << 14, "tf32", False) == InstructionDescriptor(
        64, 8, 8, "tf32", "tf32", "f32", a_mn_major=True, b_mn_major=True, b_negative=True
    )
    assert decode_instruction(plain(256, 256, 5, 4, 0), "f8f6f4", True) == InstructionDescriptor(
        256, 256, 32, "e2m1", "e3m2", "f16"
    )
    assert decode_instruction(plain(128, 32, 1, 0, 2) | 8, "i8", False) == InstructionDescriptor(
        128, 32, 32, "s8", "u8", "s32", saturate=True
    )
    assert decode_instruction(scaled(128, 192), "mxf4nvf4", False) == InstructionDescriptor(
        128, 192, 64, "e2m1x2", "e2m1x2", "f32", scale="ue4m3"
    )
    assert decode_instruction(scaled(256, 64, 0, 3, 1, 3, 2), "mxf8f6f4", True) == InstructionDescriptor(
        256, 64, 32, "e4m3", "e2m3", "f32", scale="ue8m0", a_scale_id=3, b_scale_id=2
    )


@pytest.mark.parametrize(
    ("value", "kind", "pair"),
    [
        (plain(128, 128) | 1 << 6, "f16", False),
        (plain(128, 128) | 1 << 2, "f16", False),  # sparse
        (plain(128, 128) | 1 << 3, "f16", False),  # integer saturation
        (plain(128, 128) | 1 << 23, "f16", False),
        (plain(128, 128) | 1 << 30, "f16", False),
        (plain(128, 128, 2), "f16", False),
        (plain(128, 128, 0, 0, 2), "f16", False),
        (plain(128, 128, 2), "f8f6f4", False),
        (plain(128, 128, 5) | 1 << 15, "f8f6f4", False),  # transposed FP4
        (plain(128, 128, 0, 0, 2) | 1 << 13, "i8", False),  # negated integers
        (plain(256, 128), "f16", False),
        (plain(64, 128), "f16", True),
        (plain(128, 24), "f16", True),
        (plain(128, 40, 0, 0, 2), "i8", False),
        (scaled(128, 128) | 1 << 31, "mxf4nvf4", False),  # K = 96
        (scaled(128, 128) | 1 << 24, "mxf4nvf4", False),
        (scaled(128, 128) | 1 << 15, "mxf4nvf4", False),
        (scaled(128, 128, 0), "mxf4nvf4", False),
        (scaled(128, 128), "mxf4", False),  # UE4M3 scale factors
    ],
)
def test_refused_instruction_descriptors(value, kind, pair):
    with pytest.raises(Unsupported):
        decode_instruction(value, kind, pair)
