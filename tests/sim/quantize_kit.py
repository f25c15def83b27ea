"""What tests of kernels that quantize share: inputs with every kind of number, and the reference's bytes in whole buffers."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch

import ptxsim
from cutedsl.layout import padded_shape, swizzle_block_scale
from cutedsl.quantize import quantize_activation

POISON = 0xA5
GUARD = 64
NAN, INF = float("nan"), float("inf")
# Halfway between two neighbouring codes, both signs.
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
LEAST = 2.0**-133

# Blocks for a tensor scale of 1, or of another power of two that they are multiplied with. The first number is the largest.
SPECIAL_BLOCKS = [
    [],
    [-0.0] * 16,
    [6.0, -0.0, *TIES, *(-t for t in TIES)],
    [5.97, *(t * 1.004 for t in TIES), *(-t * 0.996 for t in TIES)],
    # The same with scales whose reciprocal is not exact.
    *(
        [6 * scale, *(t * scale for t in TIES), *(-t * scale for t in TIES)]
        for scale in (1.125, 1.375, 1.625, 1.75, 1.875)
    ),
    # The sign of what rounds to zero is kept, that of what is below all FP32 numbers is not.
    [6.0, 0.2, -0.2, 0.25, -0.25, LEAST, -LEAST, -0.0],
    [3e38, -3e38, LEAST, -LEAST, 1e-10, -1e-10],
    # Block scales halfway between two of E4M3, and not quite.
    [6 * 1.0625, 1.0, -3.0],
    [6 * 1.1875, 1.0, -3.0],
    [-6.34375, 1.0, -3.0],
    [6.40625, 1.0, -3.0],
    # Around 2^-10, where a block scale becomes 0; and the subnormal ones.
    [6 * 2.0**-10, -(2.0**-10)],
    [6 * 2.0**-10 * 1.0078125, -(2.0**-10)],
    [6 * 2.0**-10 * 0.9921875, -(2.0**-10)],
    [9 * 2.0**-9, 2.0**-9, -(2.0**-8)],
    [15 * 2.0**-9, 2.0**-9, -(2.0**-8)],
    [6 * 2.0**-6, 2.0**-6, -(2.0**-5)],
    # Around 448, and far above.
    [6 * 432.0, 448.0, -600.0],
    [6 * 448.0, 448.0, -600.0],
    [-6 * 464.0, 2240.0, -600.0],
    [1e9, -1e4, 112.0, -111.0],
    # Not finite.
    [NAN],
    [1.0, -NAN, 2.0, -3.0],
    [NAN, INF, -INF, 5.0, -5.0],
    [INF, 5.0, -5.0, 1344.0, -1343.0],
    [5.0, -5.0, -INF, LEAST, -LEAST],
    # Subnormal numbers.
    [LEAST, -LEAST, LEAST * 5],
    [2.0**-126, 2.0**-130, -(2.0**-127)],
]
# The smallest are subnormal, as are their products; 448 times the largest is not finite.
SPECIAL_SCALES = [1.0, 2.0**-9, 0.0021, 2.0**-110, 1.5 * 2.0**-133, 3e30, 5e37]


def special_rows(columns: int, factor: float = 1.0) -> torch.Tensor:
    """Rows of `columns` blocks, all SPECIAL_BLOCKS among them, as bf16."""
    rows = -(-len(SPECIAL_BLOCKS) // columns)
    blocks = torch.zeros(rows * columns, 16)
    for i, block in enumerate(SPECIAL_BLOCKS):
        blocks[i, : len(block)] = torch.tensor(block, dtype=torch.float32) * factor
    return blocks.view(rows, columns * 16).bfloat16()


def random_rows(m: int, k: int, seed: int) -> torch.Tensor:
    """(m, k) bf16: rows and blocks of different sizes, here and there a special block."""
    generator = torch.Generator().manual_seed(seed * 7_919 + m * 1_009 + k)
    x = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator).add(0.1) * 3
    x = (x * torch.rand(m, k // 16, generator=generator).repeat_interleave(16, 1)).bfloat16()
    blocks = x.view(-1, 16)
    chosen = torch.randint(0, len(blocks), (len(blocks) // 16,), generator=generator)
    special = special_rows(1)
    blocks[chosen] = special[torch.randint(0, len(special), (len(chosen),), generator=generator)]
    return x


class Outputs:
    """Codes and scales full of poison, with guards around them, and what they must hold after the kernel."""

    def __init__(self, rows: int, k: int) -> None:
        self._codes, self.codes = _guarded((rows, k // 2))
        self._scales, scales = _guarded(padded_shape(rows, k // 16))
        self.scales = scales.view(torch.float8_e4m3fn)
        self.expected_codes = self.codes.clone()
        # Not swizzled yet.
        self._expected_scales = scales.clone()

    def expect(self, rows: torch.Tensor | slice, x: torch.Tensor, tensor_scale: torch.Tensor) -> None:
        """Rows of the outputs are those of x."""
        codes, block_sf = quantize_activation(x, tensor_scale)
        self.expected_codes[rows] = codes
        self._expected_scales[rows] = 0
        self._expected_scales[rows, : block_sf.shape[1]] = block_sf.view(torch.uint8)

    def check(self) -> None:
        """Every byte is as expected, also those that keep their poison."""
        for name, whole in (("codes", self._codes), ("scales", self._scales)):
            assert (whole[:GUARD] == POISON).all(), f"bytes before the {name} were written"
            assert (whole[-GUARD:] == POISON).all(), f"bytes behind the {name} were written"
        assert_same_bytes("codes", self.codes, self.expected_codes)
        assert_same_bytes("swizzled scales", self.scales.view(torch.uint8), swizzle_block_scale(self._expected_scales))


@contextlib.contextmanager
def simulated(module: ModuleType, policy: str, seed: int) -> Iterator[list[ptxsim.Report]]:
    """Kernels that the module's functions launch run here; yields a list to which their reports are added."""
    reports = []
    compiled = module.compiled

    def launcher(config):
        return lambda *args: reports.append(ptxsim.run(compiled(config), *args, policy=policy, seed=seed))

    with mock.patch.object(module, "compiled", launcher):
        yield reports


def assert_same_bytes(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = (found != expected).nonzero()
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {found.numel()} bytes of {name} are wrong, first at {first}: "
            f"{int(found[first]):#04x}, expected {int(expected[first]):#04x}"
        )


def _guarded(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    num_bytes = shape[0] * shape[1]
    whole = torch.full((num_bytes + 2 * GUARD,), POISON, dtype=torch.uint8)
    return whole, whole[GUARD : GUARD + num_bytes].view(shape)
