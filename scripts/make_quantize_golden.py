"""What NVIDIA ModelOpt's NVFP4QTensor makes of a list of tensors: the golden vectors of quantize_weight.

    .venv-modelopt/bin/python scripts/make_quantize_golden.py > tests/data/quantize_golden.json

The hard part is that two environments must make the same inputs. So no random generator is used: inputs are integer
hashes and exact fp32 operations, and the digest of each input is part of the golden data. Results of small tensors are
stored in full, in hexadecimal, those of large ones as SHA-256. Tests without ModelOpt import `cases` and `entry` from here.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

BLOCK_SIZE = 16
STORED_IN_FULL_BYTES = 2048
# Expert gate and up, down; q_a, kv, o_b's group: DeepSeek-V4-Pro. The last is an expert of Flash.
MODEL_SHAPES = [(3072, 7168), (7168, 3072), (1536, 7168), (512, 7168), (2048, 4096)]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


class Case(NamedTuple):
    """One tensor to quantize.

    Attributes:
        name: key in the golden data.
        make: returns the tensor, on a CPU.
        weight_scale_2: the tensor scale to use, or None for that of the tensor.
        is_defined: False where ModelOpt's answer is NaN or garbage, and ours is another on purpose.
    """

    name: str
    make: Callable[[], torch.Tensor]
    weight_scale_2: float | None = None
    is_defined: bool = True


def hashed(seed: int, *shape: int) -> np.ndarray:
    """uint64 (shape), well mixed: SplitMix64 of the element's index and the seed."""
    size = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x5851F42D4C957F2D)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).reshape(shape)


def bell(seed: int, *shape: int) -> torch.Tensor:
    """fp32 (shape), about normal with deviation 0.58: a sum of 4 hashed 16-bit numbers, exact."""
    fields = hashed(seed, *shape).reshape(-1).view(np.uint16).reshape(-1, 4)
    return torch.from_numpy(fields.sum(axis=1, dtype=np.int32).astype(np.float32)).sub_(131070).div_(2**16).view(shape)


def spread(seed: int, *shape: int, low: int = -12, high: int = 4) -> torch.Tensor:
    """bell times a power of two of each block of 16, 2^low .. 2^high."""
    exponents = (hashed(seed + 1, *shape[:-1], shape[-1] // BLOCK_SIZE) % np.uint64(high - low + 1)).astype(np.int32)
    factor = torch.from_numpy(np.ldexp(np.float32(1), exponents + low)).repeat_interleave(BLOCK_SIZE, -1)
    return bell(seed, *shape) * factor


def typed(make: Callable[..., torch.Tensor], seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """bell or spread in another type."""
    return make(seed, *shape).to(dtype)


def around(values: np.ndarray, ulps: int = 1) -> np.ndarray:
    """fp32 values and their neighbours, up to `ulps` on both sides."""
    bits = np.asarray(values, np.float32).view(np.int32)
    return np.concatenate([(bits + step).view(np.float32) for step in range(-ulps, ulps + 1)])


def e4m3() -> np.ndarray:
    """fp32 (127,) every finite e4m3 number from 0 up."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def scale_edges(tensor_scale: float) -> torch.Tensor:
    """Blocks whose largest element, at places that vary, is on or beside each e4m3 number and midpoint, times 6."""
    numbers = e4m3()
    edges = np.concatenate((numbers[1:], (numbers[1:] + numbers[:-1]) / 2)).astype(np.float32)
    amax = around(edges * (np.float32(6) * np.float32(tensor_scale)))
    blocks = np.zeros((len(amax), BLOCK_SIZE), np.float32)
    row = np.arange(len(amax))
    blocks[row, row % BLOCK_SIZE] = amax
    blocks[row, (row + 5) % BLOCK_SIZE] = -amax / 3
    return torch.from_numpy(blocks)


def code_ties(tensor_scale: float) -> torch.Tensor:
    """Every tie of e2m1 and its neighbours, of both signs, in blocks whose largest element makes the scale known."""
    ties = np.array(TIES, np.float32)
    rows = []
    for scale in e4m3()[1:]:
        step = scale * np.float32(tensor_scale)
        near = around(ties * step, ulps=2)
        near = np.concatenate((near, -near, np.zeros(5, np.float32))).reshape(-1, BLOCK_SIZE - 1)
        rows.append(np.concatenate((np.full((len(near), 1), 6 * step, np.float32), near), axis=1))
    return torch.from_numpy(np.concatenate(rows))


def with_values(x: torch.Tensor, values: dict[tuple[int, ...], float]) -> torch.Tensor:
    """x with single elements replaced."""
    for index, value in values.items():
        x[index] = value
    return x


def with_zero_blocks(seed: int) -> torch.Tensor:
    """Every third block zeros, some of them negative zeros."""
    x = bell(seed, 24, 96).view(-1, BLOCK_SIZE)
    x[::3] = 0.0
    x[::6] = -0.0
    return x.view(24, 96)


def random_cases(seed: int) -> Iterator[Case]:
    """Shapes, types and given scales."""
    for shape in [(1, 16), (1, 32), (3, 48), (2, 5, 64), (17, 160), (64, 256)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for given in (None, 3e-3):
                name = f"random {'x'.join(map(str, shape))} {str(dtype)[6:]} {given}"
                yield Case(name, partial(typed, bell, seed, shape, dtype), given)
    for low, high in [(-12, 4), (-30, 30), (-100, -60), (60, 120)]:
        yield Case(f"spread 2^{low}..2^{high}", partial(spread, seed, 64, 256, low=low, high=high))
    for shape in MODEL_SHAPES:
        yield Case(f"model {'x'.join(map(str, shape))} bfloat16", partial(typed, spread, seed, shape, torch.bfloat16))
    yield Case("model 1536x7168 float32", partial(typed, spread, seed, (1536, 7168), torch.float32))


def structured_cases() -> Iterator[Case]:
    """Tensors with a pattern."""
    ramp = torch.arange(4096, dtype=torch.float32).view(16, 256)
    yield Case("ramp", lambda: ramp.clone())
    yield Case("ramp through zero", lambda: ramp - 2048)
    yield Case("constant", lambda: torch.full((4, 64), -0.7))
    yield Case("checkerboard", lambda: torch.where(ramp % 2 == 0, 1.5, -1.5))
    yield Case("powers of two", lambda: torch.ldexp(torch.ones(8, 64), torch.arange(512).view(8, 64) % 40 - 20))
    yield Case("identity", lambda: torch.eye(64))
    yield Case("quarters", lambda: (ramp % 49 - 24) / 4, 1 / 16)
    yield Case("every bfloat16 in a binade", lambda: (torch.arange(128).view(1, 128) + 128).bfloat16())


def adversarial_cases(seed: int) -> Iterator[Case]:
    """Edges of the formats."""
    for scale in (1.0, 2.0**-7, 0.3, 1 / 2688, 3e-30):
        yield Case(f"scale edges {scale}", partial(scale_edges, scale), scale)
        yield Case(f"code ties {scale}", partial(code_ties, scale), scale)
    subnormal = torch.arange(1, 4097, dtype=torch.float32).view(256, 16) / 4096
    yield Case("subnormal scales", lambda: (subnormal * 2.0**-6 * 6).contiguous(), 1.0)
    yield Case("underflowing scales", lambda: (subnormal * 2.0**-9 * 6).contiguous(), 1.0)
    yield Case("outlier", lambda: with_values(bell(seed, 32, 128), {(7, 50): 1e6}))
    yield Case("outlier 2^127", lambda: with_values(bell(seed, 32, 128), {(31, 127): -(2.0**127)}))
    yield Case("largest fp32", lambda: with_values(bell(seed, 2, 32), {(0, 3): torch.finfo(torch.float32).max}))
    yield Case("zero blocks", lambda: with_zero_blocks(seed))
    yield Case("one element", lambda: with_values(torch.zeros(4, 64), {(2, 33): -3.0}))
    yield Case("tiny", lambda: bell(seed, 8, 64) * 2.0**-100)
    yield Case("fp32 subnormal elements", lambda: with_values(bell(seed, 8, 64) * 2.0**-126, {(0, 0): 1e-3}))
    yield Case("saturating", lambda: spread(seed, 16, 64), 1e-6)
    nan, inf = float("nan"), float("inf")
    yield Case("zeros", lambda: torch.zeros(2, 32), is_defined=False)
    yield Case("NaN", lambda: with_values(bell(seed, 2, 32), {(0, 3): nan}), is_defined=False)
    yield Case("infinity", lambda: with_values(bell(seed, 2, 32), {(0, 3): inf}), is_defined=False)


def cases(seed: int = 0) -> Iterator[Case]:
    """All cases; another seed gives other random tensors under the same names."""
    yield from random_cases(seed)
    yield from structured_cases()
    yield from adversarial_cases(seed)


def digest(x: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major."""
    return hashlib.sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def stored(x: torch.Tensor) -> str:
    """A tensor's bytes in hexadecimal, or their digest where they are many."""
    data = x.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.tobytes().hex() if data.size <= STORED_IN_FULL_BYTES else "sha256:" + digest(x)


def entry(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    dequantized: torch.Tensor,
) -> dict[str, str]:
    """What is stored of a case; `dequantized` in fp32."""
    return {
        "input": digest(x),
        "weight": stored(weight),
        "weight_scale": stored(weight_scale),
        "weight_scale_2": stored(weight_scale_2),
        # + 0.0 makes every zero positive: ModelOpt's table has no negative zero, others keep the sign of code 8.
        "dequantized": digest(dequantized + 0.0),
    }


def modelopt_entry(case: Case) -> dict[str, str]:
    """A case through NVFP4QTensor.quantize and dequantize."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = case.make()
    given = None if case.weight_scale_2 is None else torch.tensor(case.weight_scale_2)
    quantized, scale, scale_2 = NVFP4QTensor.quantize(x.clone(), BLOCK_SIZE, weights_scaling_factor_2=given)
    values = quantized.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK_SIZE})
    return entry(x, quantized._quantized_data, scale, scale_2, values)


def main() -> None:
    """Prints the golden data as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other random tensors (the stored data has seed 0)")
    seed = parser.parse_args().seed
    print(json.dumps({case.name: modelopt_entry(case) for case in cases(seed)}, indent=0))


if __name__ == "__main__":
    main()
