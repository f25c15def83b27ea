import numpy as np
import pytest

from ptxsim.mma_formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, UE4M3, UE8M0, bad_scales

E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_is_the_eight_values_and_their_negatives():
    np.testing.assert_array_equal(E2M1, [*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


@pytest.mark.parametrize(
    ("table", "code", "value"),
    [
        (E4M3, 0x01, 2**-9),
        (E4M3, 0x38, 1.0),
        (E4M3, 0x7E, 448.0),
        (E4M3, 0xFE, -448.0),
        (E5M2, 0x01, 2**-16),
        (E5M2, 0x3C, 1.0),
        (E5M2, 0x7B, 57344.0),
        (E5M2, 0x7C, np.inf),
        (E2M3, 0x1F, 7.5),
        (E2M3, 0x01, 0.125),
        (E3M2, 0x1F, 28.0),
        (E3M2, 0x01, 0.0625),
        (UE4M3, 0x7E, 448.0),
        (UE8M0, 0x7F, 1.0),
        (UE8M0, 0x00, 2.0**-127),
        (UE8M0, 0xFE, 2.0**127),
    ],
)
def test_corner_values(table, code, value):
    assert table[code] == np.float32(value)


def test_nans():
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    assert np.isfinite(np.delete(E4M3, [0x7F, 0xFF])).all()
    assert np.isnan(E5M2[[0x7D, 0x7F, 0xFD]]).all()
    assert np.isnan(UE8M0[0xFF])
    assert np.isnan(UE4M3[0x7F])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_against_torch(name):
    torch = pytest.importorskip("torch")
    expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(E4M3 if "e4m3" in name else E5M2, expected)


def test_packed_fp4_has_element_0_in_the_low_nibble():
    raw = np.array([[0x21, 0xF7]], np.uint8)
    np.testing.assert_array_equal(FORMATS["e2m1x2"].decode(raw), [[0.5, 1.0, 6.0, -6.0]])


def test_padded_fp4_and_fp6_ignore_the_padding():
    codes = np.arange(32).reshape(2, 16) % 16
    raw = np.full((2, 16), 0xEE, np.uint8)
    raw[:, :8] = codes[:, ::2] | codes[:, 1::2] << 4
    np.testing.assert_array_equal(FORMATS["e2m1"].decode(raw), E2M1[codes])
    codes = np.random.default_rng(0).integers(0, 64, (2, 16))
    for row in range(2):
        bits = sum(int(c) << (6 * i) for i, c in enumerate(codes[row]))
        raw[row, :12] = np.frombuffer(bits.to_bytes(12, "little"), np.uint8)
    np.testing.assert_array_equal(FORMATS["e2m3"].decode(raw), E2M3[codes])
    np.testing.assert_array_equal(FORMATS["e3m2"].decode(raw), E3M2[codes])


def test_wide_formats():
    values = np.array([[1.5, -2.25, 3e-3, 65504]], np.float32)
    np.testing.assert_array_equal(
        FORMATS["f16"].decode(values.astype(np.float16).view(np.uint8)), values.astype(np.float16)
    )
    np.testing.assert_array_equal(
        FORMATS["bf16"].decode((values[:, :2].view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)), values[:, :2]
    )
    almost = np.array([[0x3F801FFF]], np.uint32)
    assert FORMATS["tf32"].decode(almost.view(np.uint8))[0, 0] == 1.0
    np.testing.assert_array_equal(FORMATS["s8"].decode(np.array([[0xFF, 0x7F]], np.uint8)), [[-1, 127]])
    np.testing.assert_array_equal(FORMATS["u8"].decode(np.array([[0xFF, 0x7F]], np.uint8)), [[255, 127]])


def test_bad_scales():
    raw = np.array([0, 0x7E, 0x7F, 0x80, 0xFF], np.uint8)
    assert bad_scales(raw, "ue4m3").tolist() == [False, False, True, True, True]
    assert bad_scales(raw, "ue8m0").tolist() == [False, False, False, False, True]
