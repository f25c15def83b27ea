"""What tests on a GPU share: guarded memory, random operands, comparisons, graphs, calls that neither allocate nor wait.

Cases have the sizes of tests/sim, where the same kernels run in the simulator, and those of the published models.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from cutedsl.formats import NVFP4
from cutedsl.quantize import quantize_weight
from cutedsl.runners.workspace import Workspace, workspace

# Compute capability -> backend of the runners.
CAPABILITIES = {(9, 0): "sm90", (10, 0): "sm100"}
MODES = {"sm90": ("bf16", "nvfp4"), "sm100": ("nvfp4",)}
CANARY, GUARD_BYTES = 0x5C, 4096
# What memory holds before anybody writes it: NaN in floats, rows far outside in integers. Padded block scales are read as
# numbers: 448, the largest.
STALE_FLOAT, STALE_SCALE, STALE_CODES, STALE_INTEGER = 0xFF, 0x7E, 0xA5, 0x7F
# Where the CTAs of a GEMM leave sums for each other. By contract a part of it is zeros before and behind every launch.
SUMS = "sums"


def capability() -> tuple[int, int] | None:
    """Of the GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def backend() -> str:
    """The backend that the tests are for on this machine; without a known GPU that of the fixture `gpu`, which fails."""
    return CAPABILITIES.get(capability() or (0, 0), "sm90")


def modes() -> tuple[str, ...]:
    """Activation modes of the backend."""
    return MODES[backend()]


def device() -> torch.device:
    """Where tensors are."""
    return torch.device("cuda", 0)


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the GPU."""
    return torch.Generator(device()).manual_seed(seed)


# ---- guarded memory -------------------------------------------------------------------------------------------------


class Arena:
    """Tensors full of stale bytes between canaries; of SUMS that part is zeros which must be."""

    def __init__(self) -> None:
        self._wholes: list[tuple[str, torch.Tensor]] = []

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor whose content nobody may rely on, but for the zeros of SUMS; guarded on both sides."""
        num_bytes = dtype.itemsize * math.prod(shape)
        whole = torch.full((num_bytes + 2 * GUARD_BYTES,), CANARY, dtype=torch.uint8, device=device())
        inner = whole[GUARD_BYTES : GUARD_BYTES + num_bytes]
        inner.fill_(_stale(dtype))
        if name == SUMS:
            _zeros(inner).zero_()
        self._wholes.append((name, whole))
        return inner.view(dtype).view(shape)

    def check(self) -> None:
        """No canary was touched, and no sum was left behind."""
        assert self._wholes, "nothing was guarded"
        for name, whole in self._wholes:
            assert (whole[:GUARD_BYTES] == CANARY).all(), f"bytes before {name} were written"
            assert (whole[-GUARD_BYTES:] == CANARY).all(), f"bytes behind {name} were written"
            assert name != SUMS or not _zeros(whole[GUARD_BYTES:-GUARD_BYTES]).any(), "a launch has left sums behind"


def _zeros(sums: torch.Tensor) -> torch.Tensor:
    """The part of SUMS, given as bytes, that no launch leaves anything in."""
    from cutedsl.kernels import grouped_gemm_sm90

    return grouped_gemm_sm90.zeros(sums.view(torch.int32))


def _stale(dtype: torch.dtype) -> int:
    if dtype == torch.uint8:
        return STALE_CODES
    if dtype == torch.float8_e4m3fn:
        return STALE_SCALE
    return STALE_FLOAT if dtype.is_floating_point else STALE_INTEGER


def guarded(call: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """What a call gives; its output and every buffer of its chain lie in an Arena, which is checked."""
    found = Arena()

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        return found.tensor("an output", dtype or self.dtype, *shape)

    def take(self: Workspace, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return found.tensor(name, dtype, *shape)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty), mock.patch.object(Workspace, "take", take):
        y = call(*arguments)
    found.check()
    return y


def assert_no_sums_left() -> None:
    """What launches share outside of an Arena is as it was too: also behind graphs and replays."""
    for kind in ("linear", "shared_expert", "moe", "wo_a"):
        sums = workspace(kind, device())._buffers.get(SUMS)
        assert sums is None or not _zeros(sums).any(), f"a launch of {kind} has left sums behind"


# ---- calls ----------------------------------------------------------------------------------------------------------

Call = Callable[..., torch.Tensor]


def assert_replays(call: Call, inputs: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> None:
    """A graph captured on some inputs gives for others, bit for bit, what an eager call gives."""
    call(*inputs)
    held = tuple(tensor.clone() for tensor in inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*held)
    for given in (others, inputs):
        for tensor, value in zip(held, given, strict=True):
            tensor.copy_(value)
        y.fill_(float("nan"))
        graph.replay()
        assert_same("a replay", y, call(*given))


def assert_quiet(call: Call, *inputs: torch.Tensor) -> None:
    """A call allocates its output alone, and never waits for the GPU."""
    call(*inputs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert made == (y.numel() > 0), f"{made} allocations in a call, expected that of the output"


def assert_same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    found_bytes, expected_bytes = (t.contiguous().view(torch.uint8) for t in (found, expected))
    bits = (found_bytes != expected_bytes).view(*found.shape, found.element_size()).any(-1)
    wrong = bits.nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} of {bits.numel()} elements differ, first at {wrong[0].tolist()}"


# ---- operands -------------------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A random packed weight, as a runner takes it."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor


def random_weight(seed: int, *shape: int) -> Weight:
    """Blocks differ in size; of a large stack a few matrices are drawn, and others have their rows in another order."""
    *stack, rows, k = shape
    count = math.prod(stack)
    random = generator(seed)
    parts = []
    for _ in range(min(count, 4)):
        size = torch.rand(rows, k // 16, generator=random, device=device()).add_(0.1).repeat_interleave(16, -1)
        parts.append(torch.randn(rows, k, generator=random, device=device()) * size)
    scale_2 = torch.stack([part.abs().max() for part in parts]).max() / NVFP4.tensor_scale_divisor
    packed = [quantize_weight(part, scale_2) for part in parts]
    weight = torch.empty(count, rows, k // 2, dtype=torch.uint8, device=device())
    scale = torch.empty(count, rows, k // 16, dtype=torch.uint8, device=device())
    for i in range(count):
        base = packed[i % len(packed)]
        weight[i], scale[i] = base.weight.roll(i, 0), base.weight_scale.view(torch.uint8).roll(i, 0)
    weight, scale = weight.view(*stack, rows, -1), scale.view(torch.float8_e4m3fn).view(*stack, rows, -1)
    return Weight(weight, scale, scale_2)


def random_x(seed: int, *shape: int) -> torch.Tensor:
    """Rows of different size, about 1."""
    random = generator(seed)
    size = torch.rand(*shape[:-1], 1, generator=random, device=device()).add_(0.2)
    return (torch.randn(shape, generator=random, device=device()) * size).bfloat16()


def uniform(seed: int, *shape: int) -> torch.Tensor:
    """FP32 between 0.5 and 1.5."""
    return torch.rand(shape, generator=generator(seed), device=device()).add_(0.5)


def input_scales(seed: int, *shape: int) -> torch.Tensor:
    """Tensor scales of activations of size about 1, all different."""
    return uniform(seed, *shape) * 4 / 2688


def own(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose tensors a runner may change."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


# ---- comparisons ----------------------------------------------------------------------------------------------------


def assert_rounded(y: torch.Tensor, exact: torch.Tensor, k: int) -> None:
    """Every element of y is exact, an FP32 sum of k products in another order, rounded to BF16 once."""
    found, exact = y.double(), exact.double()
    assert torch.isfinite(found).all(), "NaN or infinity"
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    # A tensor core adds 16 products at a time to a sum in FP32 and may cut off instead of rounding.
    allowed = ulp + max(2e-6, k / 16 * 2.0**-23) * exact.abs().amax(dim=1, keepdim=True)
    wrong = ((found - exact).abs() > allowed).nonzero()
    assert not len(wrong), f"{len(wrong)} of {y.numel()} elements are wrong, first at {wrong[0].tolist()}"


def assert_near(y: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, requantized: int) -> None:
    """Every row of y is exact up to roundings to BF16, but for rows in which a value in between was rounded the other way.

    Args:
        y: (rows, columns) bf16.
        exact: likewise.
        size: likewise, sums of the terms' magnitudes: what is rounded before the last sum is as large.
        requantized: how many values were rounded in between. About one in 1e5 is so near a bound between two codes that FP32
            sums in another order lie on its other side. That moves its row by 3 % at most.
    """
    found, exact = y.double(), exact.double()
    assert torch.isfinite(found).all(), "NaN or infinity"
    off = (found - exact).norm(dim=1)
    allowed = 2.0**-8 * (exact.norm(dim=1) + size.double().norm(dim=1))
    rows = (off > allowed).nonzero().flatten().tolist()
    flips = math.ceil(requantized / 30_000)
    assert len(rows) <= flips, f"rows {rows[:9]} are wrong, {flips} may be"
    worst = max((float(off[row] / exact[row].norm()) for row in rows), default=0.0)
    assert worst <= 0.05, f"the worst row is off by {worst:.1e}"
