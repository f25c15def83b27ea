"""The sm100 backends: every kernel of a chain simulated, through the custom op, against the reference backend."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cutedsl.ops
import ptxsim
from cutedsl import compile as compiler
from cutedsl.ops import registry
from cutedsl.quantize import quantize_weight
from cutedsl.reference.linear import linear_fp32
from cutedsl.reference.shared_expert import expert_fp32
from cutedsl.routing import local_expert_ids
from cutedsl.runners import check_gpu, sm100, workspace
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.shared_expert import SharedExpertRunner
from cutedsl.runners.wo_a import WoARunner
from ptxsim.host.capture import prepare_environment

prepare_environment()

OPS = torch.ops.nvfp4
assert cutedsl.ops
# One rounding to BF16 is off by half an ulp, and an ulp is at most 2^-7 of a number.
HALF_ULP = 2.0**-8
# What a chain's buffers hold when a call begins, by the last word of their names; route's integers: a row far outside.
STALE = {"codes": 0xA5, "scales": 0x7E, "y": 0xFF, "part": 0xFF}
STALE_INTEGER = 0x7F


class Simulator:
    """Stands where compiled functions come from, and runs them in the simulator; notes what was launched."""

    def __init__(self, policy: str = "eager") -> None:
        self.policy = policy
        self.launched: list[str] = []
        self._compiled = compiler.compiled

    def compiled(self, kernel: type, *arguments: Any) -> Callable[..., None]:
        function = self._compiled(kernel, *arguments)
        name = kernel.__name__.removesuffix("Sm100")

        def launch(*args: Any) -> None:
            self.launched.append(name)
            ptxsim.run(function, *args, outputs=outputs(name, args), policy=self.policy, seed=len(self.launched))

        return launch


def outputs(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Of a launch's arguments what it must write completely; elsewhere rows of padding stay as they were."""
    if name == "Linear":
        return [args[5]]
    if name == "Finalize":
        return [args[4]]
    if name == "Route":
        return list(args[2:])
    if name == "GroupedGemm":
        used = int(args[6][-1])
        return [tensor[:used] for tensor in args[7:9] if tensor is not None and used]
    return []


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    found = Simulator()
    monkeypatch.setattr(compiler, "compiled", found.compiled)
    take = workspace.Workspace.take

    def take_stale(self: workspace.Workspace, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        tensor = take(self, name, dtype, *shape)
        tensor.view(torch.uint8).fill_(STALE.get(name.split()[-1], STALE_INTEGER))
        return tensor

    monkeypatch.setattr(workspace.Workspace, "take", take_stale)
    yield found
    registry.clear()
    workspace.workspace.cache_clear()


# ---- numerics -------------------------------------------------------------------------------------------------------


def assert_close(y: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor | float = 0.0, requantized: int = 0) -> None:
    """y is exact, FP32 sums in another order, rounded to BF16 once.

    Args:
        y: (rows, columns) bf16.
        exact: the reference before its rounding.
        slack: what roundings before the last may add.
        requantized: how many values were quantized in between, by FP32 numbers that differ in their last bits from the
            reference's. About one in 1e5 such numbers falls on the other side of a boundary between two codes. That moves
            one of the 128 or more terms of each sum in its row by up to a third: the row is off by 3 % at most.
    """
    assert torch.isfinite(y).all(), "NaN or infinity"
    exact, found = exact.double(), y.double()
    allowed = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7) + slack + 2e-6 * exact.abs().amax()
    rows = ((found - exact).abs() > allowed).any(dim=1)
    flips = round(requantized / 50_000)
    assert int(rows.sum()) <= flips, f"rows {rows.nonzero().flatten().tolist()[:9]} are wrong, {flips} may be"
    norm = exact.norm(dim=1).clamp(min=1e-30)
    worst = ((found - exact).norm(dim=1) / norm).max()
    assert worst <= (0.03 if flips else 2.0**-8), f"the worst row is off by {float(worst):.1e}"
    assert float((found * exact).sum() / (found.norm() * exact.norm())) >= 0.9999


def random_weight(generator: torch.Generator, *shape: int) -> Any:
    """Packed weights whose blocks differ in size."""
    *rows, k = shape
    size = torch.rand(*rows, k // 16, generator=generator).add(0.1).repeat_interleave(16, -1)
    return quantize_weight(torch.randn(shape, generator=generator) * size)


def random_x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    size = torch.rand(*shape[:-1], 1, generator=generator).add(0.2)
    return (torch.randn(shape, generator=generator) * size).bfloat16()


def input_scales(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Tensor scales of activations of size about 1, all different."""
    return (torch.rand(shape, generator=generator) + 0.5) * 4 / 2688


def own(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose tensors a runner may change."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


# ---- linear ---------------------------------------------------------------------------------------------------------


def linear_arguments(shards: list[int], k: int, scales: list[int]) -> dict[str, Any]:
    """A linear whose shard i has the scales[i]-th of different input scales."""
    generator = torch.Generator().manual_seed(k + sum(shards))
    packed = random_weight(generator, sum(shards), k)
    return {
        "weight": packed.weight,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": packed.weight_scale_2 * torch.rand(len(shards), generator=generator).add(0.5),
        "input_scale": input_scales(generator, 9)[scales],
        "shard_sizes": shards,
    }


# Tokens, shards, K, their input scales, policy. Below 128 tokens operands are swapped.
LINEARS = [
    (1, [192, 64], 256, [0, 0], "lazy"),
    (7, [72], 288, [0], "random"),
    (64, [128, 256], 512, [0, 0], "eager"),
    (129, [128, 136], 320, [0, 0], "random"),
    (7, [128, 64, 8], 256, [0, 1, 0], "eager"),
    (129, [64, 128], 256, [0, 1], "lazy"),
]


@pytest.mark.parametrize(("tokens", "shards", "k", "scales", "policy"), LINEARS)
def test_linear(simulator: Simulator, tokens: int, shards: list[int], k: int, scales: list[int], policy: str) -> None:
    simulator.policy = policy
    arguments = linear_arguments(shards, k, scales)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, k)
    exact = linear_fp32(x, LinearRunner("reference", **arguments).matrix)
    runner = LinearRunner("layer", **own(arguments), backend="sm100")
    y = OPS.linear(x, runner.runner_id)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, sum(shards)), torch.bfloat16, True)
    assert_close(y, exact)
    gemm = "GroupedGemmSwap" if tokens <= sm100.SWAP_TOKENS else "Linear"
    spans = {(0,): [1], (0, 0): [1], (0, 1, 0): [2, 1], (0, 1): [1, 1]}[tuple(scales)]
    assert simulator.launched == [name for count in spans for name in ("Quantize", *[gemm] * count)]


def test_linear_of_strided_rows(simulator: Simulator) -> None:
    runner = LinearRunner("layer", **linear_arguments([64], 256, [0]), backend="sm100")
    wide = random_x(torch.Generator().manual_seed(1), 5, 400)
    # The second begins at 2 bytes, where a load of 16 cannot.
    for x in (wide[:, 16:272], wide[:, 1:257]):
        assert torch.equal(OPS.linear(x, runner.runner_id), OPS.linear(x.contiguous(), runner.runner_id))


# ---- shared expert --------------------------------------------------------------------------------------------------


def shared_arguments(hidden: int, intermediate: int, limit: float | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hidden + intermediate)
    gate_up, down = random_weight(generator, 2 * intermediate, hidden), random_weight(generator, hidden, intermediate)
    return {
        "gate_up_weight": gate_up.weight,
        "gate_up_weight_scale": gate_up.weight_scale,
        # The sums are about sqrt(hidden): gates and ups become about 2.
        "gate_up_weight_scale_2": gate_up.weight_scale_2 * torch.tensor([4.0, 7.0]) / hidden**0.5,
        "gate_up_input_scale": input_scales(generator, 1).repeat(2),
        "down_weight": down.weight,
        "down_weight_scale": down.weight_scale,
        "down_weight_scale_2": down.weight_scale_2,
        "down_input_scale": input_scales(generator, 1),
        "swiglu_limit": limit,
    }


SHARED = [
    (1, 256, 128, 1.5, "lazy"),
    (7, 288, 192, 1.5, "random"),
    (64, 512, 160, None, "eager"),
    (129, 256, 192, 1.5, "random"),
]


@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "limit", "policy"), SHARED)
def test_shared_expert(
    simulator: Simulator, tokens: int, hidden: int, intermediate: int, limit: float | None, policy: str
) -> None:
    simulator.policy = policy
    arguments = shared_arguments(hidden, intermediate, limit)
    reference = SharedExpertRunner("reference", **arguments)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, hidden)
    exact = expert_fp32(x, reference.gate_up, reference.down, limit)
    if limit is not None:
        unclamped = expert_fp32(x, reference.gate_up, reference.down, None)
        assert (exact - unclamped).norm() > 0.1 * exact.norm(), "the limit does nothing here"
    runner = SharedExpertRunner("layer", **own(arguments), backend="sm100")
    assert_close(OPS.shared_expert(x, runner.runner_id), exact, requantized=tokens * intermediate)
    small = tokens <= sm100.SWAP_TOKENS
    gemms = ["GroupedGemmSwap"] * 2 if small else ["GroupedGemm", "Linear"]
    assert simulator.launched == ["Quantize", *gemms]


# ---- routed experts -------------------------------------------------------------------------------------------------


def moe_arguments(experts: int, hidden: int, intermediate: int, limit: float | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(experts + hidden + intermediate)
    w13 = random_weight(generator, experts, 2 * intermediate, hidden)
    w2 = random_weight(generator, experts, hidden, intermediate)

    def spread(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).add(0.5)

    return {
        "w13_weight": w13.weight,
        "w13_weight_scale": w13.weight_scale,
        "w13_weight_scale_2": w13.weight_scale_2 * spread(experts, 2) * torch.tensor([4.0, 7.0]) / hidden**0.5,
        "w13_input_scale": input_scales(generator, experts, 1).repeat(1, 2),
        "w2_weight": w2.weight,
        "w2_weight_scale": w2.weight_scale,
        "w2_weight_scale_2": w2.weight_scale_2 * spread(experts),
        "w2_input_scale": input_scales(generator, experts),
        "swiglu_limit": limit,
    }


def choices(tokens: int, top_k: int, num_global: int, empty: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids: distinct experts, some of them of nobody, some tokens without any."""
    generator = torch.Generator().manual_seed(tokens * 7 + top_k)
    order = torch.rand(tokens, num_global, generator=generator)
    order[:, list(empty)] = 2.0
    ids = order.argsort(1)[:, :top_k].contiguous()
    if tokens > 1:
        ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
        ids[tokens // 2] = -1
    return torch.rand(tokens, top_k, generator=generator) * 2.5, ids


def moe_terms(
    reference: MoeRunner, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, hidden) FP64: the sum of all terms, and of their magnitudes."""
    total, size = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
    local = local_expert_ids(ids, reference.expert_map)
    for e, (gate_up, down) in enumerate(reference.experts):
        token, choice = (local == e).nonzero(as_tuple=True)
        terms = expert_fp32(x[token], gate_up, down, reference.swiglu_limit).double() * weights[token, choice, None]
        total.index_add_(0, token, terms)
        size.index_add_(0, token, terms.abs())
    return total, size


# Tokens, top_k, experts here, experts of all ranks or None, hidden, I, limit, type of ids, policy.
MOES = [
    (1, 6, 8, None, 256, 128, 1.5, torch.int32, "lazy"),
    (7, 2, 4, 8, 288, 192, 1.5, torch.int64, "random"),
    (64, 6, 5, 12, 256, 128, None, torch.int32, "eager"),
    (129, 2, 4, None, 512, 128, 1.5, torch.int32, "random"),
]


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "num_global", "hidden", "intermediate", "limit", "dtype", "policy"), MOES
)
def test_moe(
    simulator: Simulator,
    tokens: int,
    top_k: int,
    experts: int,
    num_global: int | None,
    hidden: int,
    intermediate: int,
    limit: float | None,
    dtype: torch.dtype,
    policy: str,
) -> None:
    simulator.policy = policy
    expert_map = None
    if num_global is not None:
        # Experts of this rank, backwards, among those of others.
        expert_map = torch.full((num_global,), -1)
        expert_map[1 : 2 * experts : 2] = torch.arange(experts).flip(0)
    arguments = moe_arguments(experts, hidden, intermediate, limit) | {"expert_map": expert_map}
    reference = MoeRunner("reference", **arguments)
    empty = (1,) if top_k < (num_global or experts) else ()
    weights, ids = choices(tokens, top_k, num_global or experts, empty)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, hidden)
    exact, size = moe_terms(reference, x, weights, ids)
    runner = MoeRunner("layer", **own(arguments), backend="sm100")
    y = OPS.moe(x, weights, ids.to(dtype), runner.runner_id)
    # Each term is rounded to BF16 before it is weighted.
    num_values = int((local_expert_ids(ids, expert_map) >= 0).sum()) * intermediate
    assert_close(y, exact, HALF_ULP * size, requantized=num_values)
    nothing = (local_expert_ids(ids, expert_map) < 0).all(dim=1)
    assert nothing.any() == (tokens > 1)
    assert y[nothing].eq(0).all()
    # As near to what the reference backend gives.
    assert_close(OPS.moe(x, weights, ids.to(dtype), reference.runner_id), exact)
    # 129 tokens are 65 to an expert: not many enough for 128-row tiles.
    gemm = "GroupedGemmSwap"
    assert simulator.launched == ["Route", "Quantize", gemm, gemm, "Finalize"]


def test_moe_with_no_choice_here_and_strided_tables(simulator: Simulator) -> None:
    arguments = moe_arguments(4, 256, 128, None)
    reference, runner = MoeRunner("r", **arguments), MoeRunner("layer", **own(arguments), backend="sm100")
    x = random_x(torch.Generator().manual_seed(3), 5, 256)
    weights, ids = choices(5, 4, 4, ())
    weights, ids = weights[:, :2], ids.int()[:, :2]
    exact, size = moe_terms(reference, x, weights, ids)
    assert_close(OPS.moe(x, weights, ids, runner.runner_id), exact, HALF_ULP * size, requantized=10 * 128)
    # 4 is no expert: the reference backend raises, kernels take it for none.
    for nobody in (-1, 4):
        assert OPS.moe(x, weights, torch.full_like(ids, nobody), runner.runner_id).eq(0).all()


# ---- wo_a -----------------------------------------------------------------------------------------------------------


def wo_a_arguments(groups: int, heads: int, rank: int, head_dim: int, rope_dim: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(groups + heads + rank)
    packed = random_weight(generator, groups * rank, heads // groups * head_dim)
    return {
        "weight": packed.weight,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": packed.weight_scale_2,
        "input_scale": input_scales(generator, 1),
        "num_groups": groups,
        "head_dim": head_dim,
        "rope_dim": rope_dim,
    }


def wo_a_inputs(tokens: int, heads: int, head_dim: int, rope_dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    angles = torch.rand(50, rope_dim // 2, generator=generator) * 6.2832
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    return random_x(generator, tokens, heads, head_dim), positions, torch.cat((angles.cos(), angles.sin()), dim=1)


WO_AS = [
    (1, 2, 4, 128, 128, 64, "lazy"),
    (7, 3, 6, 72, 64, 16, "random"),
    (64, 2, 4, 64, 128, 64, "eager"),
    (129, 2, 2, 128, 256, 64, "random"),
]


@pytest.mark.parametrize(("tokens", "groups", "heads", "rank", "head_dim", "rope_dim", "policy"), WO_AS)
def test_wo_a(
    simulator: Simulator, tokens: int, groups: int, heads: int, rank: int, head_dim: int, rope_dim: int, policy: str
) -> None:
    simulator.policy = policy
    arguments = wo_a_arguments(groups, heads, rank, head_dim, rope_dim)
    inputs = wo_a_inputs(tokens, heads, head_dim, rope_dim)
    reference = WoARunner("reference", **arguments)
    runner = WoARunner("layer", **own(arguments), backend="sm100")
    y = OPS.wo_a(*inputs, runner.runner_id)
    assert y.is_contiguous()
    # The reference's own rounding to BF16, then: the two differ by one ulp where FP32 sums differ.
    expected = OPS.wo_a(*inputs, reference.runner_id)
    assert (y != expected).double().mean() <= 0.005
    assert_close(y, expected)
    gemm = "GroupedGemmSwap" if tokens <= sm100.SWAP_TOKENS else "GroupedGemm"
    assert simulator.launched == ["InverseRopeQuantize", gemm]


# ---- a real export --------------------------------------------------------------------------------------------------

AFFINE = Path(__file__).parents[1] / "data" / "affine-a" / "model.safetensors"
_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def stored(*names: str) -> list[torch.Tensor]:
    """Tensors of the export; its file is a length, a header in JSON, and bytes."""
    data = AFFINE.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = []
    for name in names:
        entry = header[name]
        first, last = (start + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[first:last]), dtype=_TYPES[entry["dtype"]])
        found.append(flat.view(entry["shape"]))
    return found


LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def packed(module: str) -> list[torch.Tensor]:
    return stored(*(f"model.layers.3.{module}.{leaf}" for leaf in LEAVES))


def fused(*modules: str) -> tuple[torch.Tensor, ...]:
    """Rows of several modules one after another, and their tensor scales."""
    weight, scale, scale_2, input_scale = zip(*map(packed, modules), strict=True)
    rows = torch.cat([part.view(torch.uint8) for part in scale]).view(scale[0].dtype)
    return torch.cat(weight), rows, torch.stack(scale_2), torch.stack(input_scale)


def test_a_trained_models_layer(simulator: Simulator) -> None:
    x = random_x(torch.Generator().manual_seed(5), 7, 256)
    merged = dict(zip(LEAVES, fused("attn.wq_a", "attn.wkv"), strict=True)) | {"shard_sizes": [128, 512]}
    exact = linear_fp32(x, LinearRunner("reference", **merged).matrix)
    assert_close(OPS.linear(x, LinearRunner("layer", **own(merged), backend="sm100").runner_id), exact)

    gate_up = [fused(f"ffn.experts.{e}.w1", f"ffn.experts.{e}.w3") for e in range(4)]
    down = [packed(f"ffn.experts.{e}.w2") for e in range(4)]
    arguments = {
        f"{name}_{leaf}": torch.stack([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
        if leaf == "weight_scale"
        else torch.stack(tensors)
        for name, experts in (("w13", gate_up), ("w2", down))
        for leaf, tensors in zip(LEAVES, zip(*experts, strict=True), strict=True)
    } | {"swiglu_limit": 10.0}
    reference, runner = MoeRunner("r", **arguments), MoeRunner("layer", **own(arguments), backend="sm100")
    weights, ids = choices(7, 2, 4, ())
    exact, size = moe_terms(reference, x, weights, ids)
    assert_close(OPS.moe(x, weights, ids, runner.runner_id), exact, HALF_ULP * size, requantized=14 * 64)


# ---- what surrounds the kernels -------------------------------------------------------------------------------------


class AtenOps(TorchDispatchMode):
    """Names of the operators of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


KINDS: dict[str, tuple[Callable[[], Any], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "linear": (
        lambda: LinearRunner("layer", **linear_arguments([128], 256, [0]), backend="sm100"),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16),),
    ),
    "shared_expert": (
        lambda: SharedExpertRunner("layer", **shared_arguments(256, 128, 1.5), backend="sm100"),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16),),
    ),
    "moe": (
        lambda: MoeRunner("layer", **moe_arguments(4, 256, 128, 1.5), backend="sm100"),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16), *choices(tokens, 2, 4, ())),
    ),
    "wo_a": (
        lambda: WoARunner("layer", **wo_a_arguments(2, 4, 64, 64, 16), backend="sm100"),
        lambda tokens: wo_a_inputs(tokens, 4, 64, 16),
    ),
}


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Kernels that do nothing but leave their arguments here."""
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compiler, "compiled", lambda *_: lambda *args: launched.append(args))
    yield launched
    registry.clear()
    workspace.workspace.cache_clear()
    workspace.equal_groups.cache_clear()


@pytest.mark.parametrize("tokens", [7, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_allocates_its_output_only_and_reads_nothing_back(kind: str, tokens: int, no_launch: list) -> None:
    make, inputs = KINDS[kind]
    runner, arguments = make(), inputs(tokens)
    runner(*arguments)
    first = [tensor.data_ptr() for args in no_launch for tensor in args if isinstance(tensor, torch.Tensor)]
    no_launch.clear()
    with AtenOps() as ops:
        runner(*arguments)
    views = {"view", "slice", "select", "unsqueeze", "transpose", "as_strided", "alias", "detach", "permute"}
    # wo_a's result is copied from rows by group to rows by token.
    assert sorted(set(ops.names) - views) == (["copy_", "new_empty"] if kind == "wo_a" else ["new_empty"])
    assert ops.names.count("new_empty") == 1
    assert ops.names.count("copy_") <= 1
    second = [tensor.data_ptr() for args in no_launch for tensor in args if isinstance(tensor, torch.Tensor)]
    moved = sum(a != b for a, b in zip(first, second, strict=True))
    assert moved <= 1, "a graph would not find its buffers again"


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_launch_nothing(kind: str, no_launch: list) -> None:
    make, inputs = KINDS[kind]
    runner = make()
    assert len(OPS.__getattr__(kind)(*inputs(0), runner.runner_id)) == 0
    assert no_launch == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows_during_a_capture(kind: str, no_launch: list, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = KINDS[kind]
    runner = make()
    runner(*inputs(130))
    monkeypatch.setattr(workspace, "_capturing", lambda device: True)
    for tokens in (130, 64, 1):
        runner(*inputs(tokens))
    with pytest.raises(RuntimeError, match=r"graph is being captured; run the largest batch once before"):
        runner(*inputs(300))


def test_buffers_of_a_captured_graph_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = workspace.Workspace(torch.device("cpu"))
    with torch.inference_mode():
        buffers.take("other", torch.uint8, 16)
    buffers.take("other", torch.uint8, 16).fill_(1)
    small = buffers.take("x", torch.int32, 4)
    assert small.data_ptr() == buffers.take("x", torch.bfloat16, 2, 3).data_ptr()
    assert small.eq(0).all()
    assert small.data_ptr() % 16 == 0
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_capturing", lambda device: True)
        buffers.take("x", torch.int32, 4)
    large = buffers.take("x", torch.int32, 400)
    buffers.take("other", torch.uint8, 1600)
    assert [kept.data_ptr() for kept in buffers._retired] == [small.data_ptr()]
    assert buffers.take("x", torch.int32, 100).data_ptr() == large.data_ptr()


def test_runners_of_a_kind_share_buffers_and_kinds_do_not(no_launch: list) -> None:
    (linear, inputs), (shared, _) = KINDS["linear"], KINDS["shared_expert"]
    for runner in (linear(), linear(), shared()):
        runner(*inputs(7))
    codes = [args[2].data_ptr() for args in no_launch if len(args) == 9]
    assert codes[0] == codes[1] != codes[2]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_equal_groups(num_groups: int) -> None:
    groups = workspace.EqualGroups(num_groups, torch.device("cpu"))
    for tokens in (300, 1, 64, 65, 128, 129):
        found = groups.of(tokens)
        tiles = -(-tokens // 128)
        assert found.tile_expert.tolist() == [g for g in range(num_groups) for _ in range(tiles)]
        assert found.padded_offset.tolist() == [g * tiles * 128 for g in range(num_groups + 1)]
        assert {tensor.dtype for tensor in (found.tile_expert, found.padded_offset, found.count)} == {torch.int32}
        assert found.count.tolist() == [tokens] * num_groups
        assert found.tokens == tokens


def test_weights_are_prepared_in_place(no_launch: list) -> None:
    arguments = moe_arguments(2, 256, 128, None)
    held = {key: arguments[key].data_ptr() for key in arguments if key.endswith(("weight", "weight_scale"))}
    runner = MoeRunner("layer", **arguments, backend="sm100")
    runner(*KINDS["moe"][1](3))
    passed = {tensor.data_ptr() for args in no_launch for tensor in args if isinstance(tensor, torch.Tensor)}
    assert set(held.values()) <= passed
    for name in ("w13_weight", "w2_weight_scale", "experts"):
        assert not hasattr(runner, name), "what others would take for a weight in rows"


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed(arguments: dict[str, Any], **functions: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return arguments | {key: function(arguments[key]) for key, function in functions.items()}


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel() + 32, dtype=torch.uint8)
    offset = (-flat.data_ptr()) % 16 + 8
    return flat[offset : offset + tensor.numel()].copy_(tensor.view(torch.uint8).flatten()).view(tensor.shape)


def apart(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clone()
    scale.view(-1)[-1] *= 2
    return scale


REFUSED: list[tuple[type, Callable[[], dict[str, Any]], str]] = [
    (LinearRunner, lambda: linear_arguments([64], 48, [0]), "64 rows with K = 48 on this rank"),
    (LinearRunner, lambda: linear_arguments([64, 12], 64, [0, 1]), "12 rows with K = 64 on this rank"),
    (
        LinearRunner,
        lambda: changed(linear_arguments([64], 64, [0]), weight=misaligned),
        "starts at 0x.*copy it at load",
    ),
    (SharedExpertRunner, lambda: shared_arguments(64, 48, None), "down has a part of 64 rows with K = 48"),
    (SharedExpertRunner, lambda: shared_arguments(48, 64, None), "gate_up has a part of 128 rows with K = 48"),
    (
        SharedExpertRunner,
        lambda: changed(shared_arguments(64, 64, None), gate_up_input_scale=apart),
        r"gate and up of 1 of 1 experts have different input_scale, the first is expert 0 with \[.*quantizes.*once",
    ),
    (SharedExpertRunner, lambda: changed(shared_arguments(64, 64, None), down_weight=misaligned), "down has a tensor"),
    (MoeRunner, lambda: moe_arguments(2, 64, 48, None), "w2 has a part of 64 rows with K = 48"),
    (MoeRunner, lambda: moe_arguments(2, 48, 64, None), "w13 has a part of 128 rows with K = 48"),
    (MoeRunner, lambda: moe_arguments(513, 32, 32, None), "513 experts on this rank, .* at most 512"),
    (
        MoeRunner,
        lambda: changed(moe_arguments(3, 64, 64, None), w13_input_scale=apart),
        "gate and up of 1 of 3 experts have different input_scale, the first is expert 2",
    ),
    (MoeRunner, lambda: changed(moe_arguments(2, 64, 64, None), w2_weight=misaligned), "w2 has a tensor that starts"),
    (WoARunner, lambda: wo_a_arguments(2, 4, 12, 64, 16), "a group of wo_a has a part of 12 rows with K = 128"),
    (WoARunner, lambda: wo_a_arguments(2, 4, 8, 32, 16), "head_dim is 32, expected a positive multiple of 64"),
    (WoARunner, lambda: wo_a_arguments(2, 4, 8, 64, 24), "rope_dim is 24, expected a positive multiple of 16"),
    (WoARunner, lambda: changed(wo_a_arguments(2, 4, 8, 64, 16), weight=misaligned), "wo_a has a tensor that starts"),
]


@pytest.mark.parametrize(("runner", "arguments", "match"), REFUSED)
def test_what_kernels_cannot_do_is_refused_untouched(runner: type, arguments: Callable, match: str) -> None:
    arguments = arguments()
    before = own(arguments)
    registry.clear()
    with pytest.raises(ValueError, match=rf"(?s)layers\.1: .*{match}"):
        runner("layers.1", **arguments, backend="sm100")
    assert registry.describe() == []
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8)), key
    # The reference backend takes it.
    assert runner("layers.1", **arguments).runner_id
    registry.clear()


@pytest.mark.parametrize(
    ("runner", "arguments"),
    [
        (LinearRunner, lambda: linear_arguments([64], 64, [0])),
        (SharedExpertRunner, lambda: shared_arguments(64, 64, None)),
        (MoeRunner, lambda: moe_arguments(2, 64, 64, None)),
        (WoARunner, lambda: wo_a_arguments(2, 4, 8, 64, 16)),
    ],
)
def test_activations_are_nvfp4_only(runner: type, arguments: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"layer: the sm100 backend has no activations in BF16: .*activations='nvfp4'"):
        runner("layer", **arguments(), backend="sm100", activations="bf16")
    assert registry.describe() == []


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"layer: cuda:0 has compute capability \(9, 0\), expected \(10, 0\)"):
        check_gpu("layer", torch.device("cuda:0"), sm100.CAPABILITY, "sm100")
    check_gpu("layer", torch.device("cpu"), sm100.CAPABILITY, "sm100")


def test_without_the_compiler_only_sm100_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cutedsl.runners.sm100", None)
    with pytest.raises(ImportError, match=r"layer: the sm100 backend cannot be imported .*install nvidia-cutlass-dsl"):
        LinearRunner("layer", **linear_arguments([64], 64, [0]), backend="sm100")
    assert LinearRunner("layer", **linear_arguments([64], 64, [0])).runner_id
    registry.clear()


@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [(7168, 3072 // tp) for tp in (1, 2, 4, 8, 16)] + [(4096, 2048 // tp) for tp in (1, 2, 4, 8)],
)
def test_every_v4_expert_is_taken(hidden: int, intermediate: int) -> None:
    sm100._check_sizes("layer", "w13", 2 * intermediate, hidden)
    sm100._check_sizes("layer", "w2", hidden, intermediate)
