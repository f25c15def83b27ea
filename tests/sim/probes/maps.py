"""A table of tensor maps for the driver to encode, or to refuse. No kernel runs on them."""

from .kit import ELEMENT_BYTES, TensorMap


def _map(dtype: str, dims: tuple[int, ...], box: tuple[int, ...], pad: int = 0, **options: object) -> TensorMap:
    strides, step = [], int(dims[0] * ELEMENT_BYTES.get(dtype, 1)) + pad
    for dim in dims[1:]:
        strides.append(step)
        step *= dim
    return TensorMap(dtype, dims, tuple(strides), box, **options)  # type: ignore[arg-type]


def table() -> dict[str, TensorMap]:
    """Return maps by name. Whether the driver takes them is in the recording, not here."""
    maps: dict[str, TensorMap] = {}
    for dtype, size in ELEMENT_BYTES.items():
        maps[f"type_{dtype}"] = _map(dtype, (256 // size, 32), (64 // size, 16))
    for swizzle in ("none", "32", "64", "128", "128_atom32", "128_atom32_flip8", "128_atom64"):
        maps[f"swizzle_{swizzle}"] = _map("u16", (128, 32), (16, 16), swizzle=swizzle)
    for promotion in ("none", "64", "128", "256"):
        maps[f"promotion_{promotion}"] = _map("bf16", (128, 32), (64, 16), promotion=promotion)
    for fill in ("none", "nan"):
        for dtype in ("f16", "f32", "tf32", "f32_ftz"):
            maps[f"fill_{fill}_{dtype}"] = _map(dtype, (64, 32), (16, 16), oob_fill=fill)
    for interleave in ("16", "32"):
        swizzle = "32" if interleave == "32" else "none"
        maps[f"interleave_{interleave}"] = _map("u16", (64, 32, 8), (16, 16, 2), interleave=interleave, swizzle=swizzle)
    maps["rank_1"] = _map("f32", (1000,), (256,))
    maps["rank_3"] = _map("u8", (48, 7, 5), (32, 3, 2))
    maps["rank_4"] = _map("u16", (48, 7, 5, 3), (32, 3, 2, 1))
    maps["rank_5"] = _map("u32", (48, 7, 5, 3, 2), (32, 3, 2, 1, 2), swizzle="128")
    maps["steps"] = _map("u16", (64, 8, 8, 8), (32, 8, 8, 8), element_strides=(1, 2, 3, 8))
    maps["step_of_dim_0"] = _map("u16", (64, 8), (32, 8), element_strides=(4, 1))
    maps["box_256"] = _map("u8", (4096, 4096), (256, 256))
    maps["large_tensor"] = _map("bf16", (8192, 8192), (64, 128), swizzle="128")
    maps["tensor_below_128_kib"] = _map("bf16", (64, 1023), (64, 8))
    maps["tensor_of_128_kib"] = _map("bf16", (64, 1024), (64, 8))
    maps["tensor_above_128_kib"] = _map("bf16", (64, 1025), (64, 8))
    maps["small_by_dims_large_by_strides"] = TensorMap("u8", (64, 4), (1 << 20,), (32, 2))
    maps["large_strides"] = TensorMap("u8", (1024, 2, 2), (1 << 38, (1 << 40) - 16), (32, 2, 2))
    maps["largest_dims"] = TensorMap("u8", (1 << 32, 1 << 32), (16,), (32, 2))
    maps["overlapping_strides"] = TensorMap("u16", (64, 64), (16,), (32, 2))
    maps["zero_stride"] = TensorMap("u16", (64, 64), (0,), (32, 2))
    maps["offset_16"] = _map("u16", (64, 8), (32, 8), offset=16)
    maps["odd_dims"] = _map("u8", (37, 5, 3), (48, 8, 2), pad=11)
    for dtype, dims, box, stride in (
        ("b4x16", (256, 8), (64, 8), 128),
        ("b4x16_p64", (256, 8), (128, 8), 128),
        ("b6x16_p32", (256, 8), (128, 8), 192),
    ):
        maps[f"type_{dtype}"] = TensorMap(dtype, dims, (stride,), box)
    maps.update(_refused())
    return maps


def _refused() -> dict[str, TensorMap]:
    """Return maps that break one documented rule each."""
    swizzled = {
        f"bad_inner_swizzle{s}": _map("u16", (256, 8), (int(s) // 2 + 8, 8), swizzle=s) for s in ("32", "64", "128")
    }
    return swizzled | {
        "bad_address": _map("u16", (64, 8), (32, 8), offset=8),
        "bad_stride": TensorMap("u16", (64, 8), (136,), (32, 8)),
        "bad_stride_too_large": TensorMap("u16", (64, 8), (1 << 40,), (32, 8)),
        "bad_box_0": _map("u16", (64, 8), (0, 8)),
        "bad_box_257": _map("u16", (64, 512), (32, 257)),
        "bad_box_bytes": _map("u16", (64, 8), (4, 8)),
        "bad_box_bytes_24": _map("u8", (64, 8), (24, 8)),
        "bad_dim_0": TensorMap("u16", (0, 8), (128,), (32, 8)),
        "bad_dim_too_large": TensorMap("u8", ((1 << 32) + 1, 8), (16,), (32, 8)),
        "bad_step_0": _map("u16", (64, 8), (32, 8), element_strides=(1, 0)),
        "bad_step_9": _map("u16", (64, 32), (32, 9), element_strides=(1, 9)),
        "bad_nan_fill_of_integers": _map("u16", (64, 8), (32, 8), oob_fill="nan"),
        "bad_interleave_rank": _map("u16", (64, 8), (32, 8), interleave="16"),
        "bad_interleave_32_swizzle": _map("u16", (64, 8, 8), (16, 8, 1), interleave="32", swizzle="none"),
        "bad_interleave_32_address": _map("u16", (64, 8, 8), (16, 8, 1), interleave="32", swizzle="32", offset=16),
        "bad_interleave_32_stride": TensorMap("u16", (64, 8, 8), (144, 1152), (16, 8, 1), "32", interleave="32"),
        "bad_inner_box_none": _map("u8", (512, 8), (256, 256)),
        "bad_rank_6": TensorMap("u8", (32,) * 6, (32, 1024, 32768, 1 << 20, 1 << 25), (16, 1, 1, 1, 1, 1)),
    }
