"""The sm90 backends: every kernel of a chain simulated, through the custom op, against the reference backend.

Both kinds of activations. What passes between the two GEMMs of an expert is looked at too: it is compared with the reference,
and what follows is then compared from there, so that no tolerance for it is needed.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hopper_kit import on_hopper
from test_runners_sm100 import (
    HALF_ULP,
    AtenOps,
    apart,
    assert_close,
    changed,
    choices,
    linear_arguments,
    misaligned,
    moe_arguments,
    own,
    random_x,
    shared_arguments,
    wo_a_arguments,
    wo_a_inputs,
)

import cutedsl.ops
import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import grouped_gemm_sm90, hopper
from cutedsl.ops import registry
from cutedsl.quantize import unscaled_activation
from cutedsl.reference.linear import PackedMatrix, linear_fp32, unscaled_mm
from cutedsl.reference.swiglu import swiglu
from cutedsl.routing import local_expert_ids
from cutedsl.runners import check_gpu, sm90, workspace
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.shared_expert import SharedExpertRunner
from cutedsl.runners.wo_a import WoARunner
from cutedsl.runners.workspace import Workspace
from ptxsim.host.capture import prepare_environment

prepare_environment()

__all__ = ["on_hopper"]

OPS = torch.ops.nvfp4
assert cutedsl.ops
MODES = ("nvfp4", "bf16")
# What a chain's buffers hold when a call begins: NaN, or integers that are rows far outside.
STALE_FLOAT, STALE_INTEGER = 0xFF, 0x7F


class Simulator:
    """Stands where compiled functions come from, and runs them in the simulator; notes what was launched."""

    def __init__(self, policy: str = "eager") -> None:
        self.policy = policy
        self.launched: list[str] = []
        # Of each GEMM: whether its weights are loaded while earlier kernels still run.
        self.early: list[bool] = []
        self._compiled = compiler.compiled

    def compiled(self, kernel: type, *arguments: Any) -> Callable[..., None]:
        function = self._compiled(kernel, *arguments)
        name = kernel.__name__.removesuffix("Sm90").removesuffix("Sm100")

        def launch(*args: Any) -> None:
            self.launched.append(name)
            if name == "GroupedGemm":
                self.early.append(bool(args[14]))
            seed = len(self.launched)
            ptxsim.run(
                function,
                *args,
                outputs=outputs(name, args),
                constant=constants(name, args),
                policy=self.policy,
                seed=seed,
            )

        return launch


def outputs(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Of a launch's arguments what it must write completely; elsewhere rows of padding stay as they were."""
    if name == "Finalize":
        return [args[4]]
    if name == "Route":
        return list(args[2:])
    all_rows = name == "GroupedGemm" and (args[4] is None or int(args[4].sum()) == len(args[6]))
    if all_rows and args[6].is_contiguous():
        return [args[6]]
    return []


def constants(name: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Of a launch's arguments what may be read while earlier launches still run: of equal groups weights and counts."""
    early = name == "GroupedGemm" and args[14]
    # Without a list of groups there are no counts.
    return tuple(args[i] for i in (1, 2, 4) if args[i] is not None) if early else ()


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    found = Simulator()
    monkeypatch.setattr(compiler, "compiled", found.compiled)
    take = Workspace.take

    def take_stale(self: Workspace, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        tensor = take(self, name, dtype, *shape)
        if name != "sums":
            tensor.view(torch.uint8).fill_(STALE_FLOAT if dtype.is_floating_point else STALE_INTEGER)
        else:
            assert not grouped_gemm_sm90.zeros(tensor).any(), "a launch has left sums behind"
        return tensor

    monkeypatch.setattr(Workspace, "take", take_stale)
    # Shares of a few SMs are more than a tile, and less.
    monkeypatch.setattr(hopper, "num_sms", lambda device: 6)
    yield found
    registry.clear()
    workspace.workspace.cache_clear()


def left_in(chain: Any, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """What a call left in a buffer of its workspace."""
    buffer = chain.workspace._buffers[name].view(dtype)
    return buffer[: torch.Size(shape).numel()].view(shape).clone()


def multiplied(a: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """alpha * (a @ W^T) in FP32, for an operand that needs no rounding."""
    return unscaled_mm(a, matrix.weight, matrix.weight_scale).mul_(matrix.alpha)


def assert_middle(h: torch.Tensor, exact: torch.Tensor, down: PackedMatrix) -> None:
    """h is exact, FP32 in another order, rounded to BF16 once, or quantized with down's input scale."""
    expected = exact.bfloat16()
    if down.scale_groups:
        expected = unscaled_activation(exact, down.scale_groups[0].input_scale)
    # FP32 numbers that differ in their last bits lie on two sides of a bound now and then: more often of BF16's.
    different = (h != expected) | h.isnan()
    assert int(different.sum()) <= max(2, h.numel() // 400), f"{int(different.sum())} of {h.numel()} values differ"
    if not down.scale_groups:
        # Where gate or up cancels, sums in another order differ by more than a rounding.
        allowed = HALF_ULP * exact.abs() + 2e-6 * exact.abs().amax()
        assert ((h.double() - exact.double()).abs() <= allowed.double()).all()


# ---- linear ---------------------------------------------------------------------------------------------------------

# Tokens, shards, K, their input scales, activations, policy.
LINEARS = [
    (1, [192, 64], 256, [0, 0], "bf16", "lazy"),
    (7, [72], 288, [0], "nvfp4", "random"),
    (64, [128, 256], 512, [0, 1], "bf16", "eager"),
    (64, [128, 64], 256, [0, 0], "nvfp4", "lazy"),
    (129, [128, 136], 320, [0, 0], "nvfp4", "random"),
    (129, [104], 272, [0], "bf16", "random"),
    (7, [128, 64, 8], 256, [0, 1, 0], "nvfp4", "eager"),
    (7, [128, 64, 8], 256, [0, 1, 0], "bf16", "random"),
]


@pytest.mark.parametrize(("tokens", "shards", "k", "scales", "activations", "policy"), LINEARS)
def test_linear(
    simulator: Simulator, tokens: int, shards: list[int], k: int, scales: list[int], activations: str, policy: str
) -> None:
    simulator.policy = policy
    arguments = linear_arguments(shards, k, scales)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, k)
    exact = linear_fp32(x, LinearRunner("reference", **arguments, activations=activations).matrix)
    runner = LinearRunner("layer", **own(arguments), backend="sm90", activations=activations)
    y = OPS.linear(x, runner.runner_id)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, sum(shards)), torch.bfloat16, True)
    assert_close(y, exact)
    spans = {(0,): [1], (0, 0): [1], (0, 1, 0): [2, 1], (0, 1): [1, 1]}[tuple(scales)]
    expected = [name for count in spans for name in ("Quantize", *["GroupedGemm"] * count)]
    assert simulator.launched == (expected if activations == "nvfp4" else ["GroupedGemm"])
    assert all(simulator.early)


@pytest.mark.parametrize("activations", MODES)
def test_linear_of_strided_rows(simulator: Simulator, activations: str) -> None:
    runner = LinearRunner("layer", **linear_arguments([64], 256, [0]), backend="sm90", activations=activations)
    wide = random_x(torch.Generator().manual_seed(1), 5, 400)
    # The second begins at 2 bytes, where a load of 16 cannot; the third is one row, and contiguous at 2 bytes.
    for x in (wide[:, 16:272], wide[:, 1:257], wide[:1, 1:257]):
        assert torch.equal(OPS.linear(x, runner.runner_id), OPS.linear(x.clone(), runner.runner_id))


# ---- shared expert --------------------------------------------------------------------------------------------------

SHARED = [
    (1, 256, 128, 1.5, "bf16", "lazy"),
    (7, 288, 192, 1.5, "nvfp4", "random"),
    (64, 512, 160, None, "nvfp4", "eager"),
    (64, 256, 96, 1.5, "bf16", "random"),
    (129, 256, 192, 1.5, "nvfp4", "lazy"),
    (129, 272, 144, None, "bf16", "eager"),
]


@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "limit", "activations", "policy"), SHARED)
def test_shared_expert(
    simulator: Simulator,
    tokens: int,
    hidden: int,
    intermediate: int,
    limit: float | None,
    activations: str,
    policy: str,
) -> None:
    simulator.policy = policy
    arguments = shared_arguments(hidden, intermediate, limit)
    reference = SharedExpertRunner("reference", **arguments, activations=activations)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, hidden)
    exact_h = swiglu(linear_fp32(x, reference.gate_up), limit)
    if limit is not None:
        unclamped = swiglu(linear_fp32(x, reference.gate_up), None)
        assert (exact_h - unclamped).norm() > 0.1 * exact_h.norm(), "the limit does nothing here"
    runner = SharedExpertRunner("layer", **own(arguments), backend="sm90", activations=activations)
    y = OPS.shared_expert(x, runner.runner_id)
    h = left_in(runner.chain, "h", torch.bfloat16, tokens, intermediate)
    assert_middle(h, exact_h, reference.down)
    assert_close(y, multiplied(h, reference.down))
    assert simulator.launched == ["Quantize"] * (activations == "nvfp4") + ["GroupedGemm"] * 2
    assert all(simulator.early)


# ---- routed experts -------------------------------------------------------------------------------------------------

# Tokens, top_k, experts here, experts of all ranks or None, hidden, I, limit, type of ids, activations, policy.
MOES = [
    (1, 6, 8, None, 256, 128, 1.5, torch.int32, "nvfp4", "lazy"),
    (1, 2, 4, None, 256, 64, None, torch.int32, "bf16", "random"),
    (7, 2, 4, 8, 288, 192, 1.5, torch.int64, "nvfp4", "random"),
    (64, 6, 5, 12, 256, 128, None, torch.int32, "bf16", "eager"),
    (129, 2, 4, None, 256, 128, 1.5, torch.int32, "bf16", "lazy"),
    (129, 2, 4, None, 512, 96, 1.5, torch.int32, "nvfp4", "random"),
]


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "num_global", "hidden", "intermediate", "limit", "dtype", "activations", "policy"),
    MOES,
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
    activations: str,
    policy: str,
) -> None:
    simulator.policy = policy
    expert_map = None
    if num_global is not None:
        # Experts of this rank, backwards, among those of others.
        expert_map = torch.full((num_global,), -1)
        expert_map[1 : 2 * experts : 2] = torch.arange(experts).flip(0)
    arguments = moe_arguments(experts, hidden, intermediate, limit) | {"expert_map": expert_map}
    reference = MoeRunner("reference", **arguments, activations=activations)
    empty = (1,) if top_k < (num_global or experts) else ()
    weights, ids = choices(tokens, top_k, num_global or experts, empty)
    x = random_x(torch.Generator().manual_seed(tokens), tokens, hidden)
    runner = MoeRunner("layer", **own(arguments), backend="sm90", activations=activations)
    y = OPS.moe(x, weights, ids.to(dtype), runner.runner_id)

    local = local_expert_ids(ids, expert_map)
    choice_row = left_in(runner.chain, "choice_row", torch.int32, tokens, top_k).long()
    h = left_in(runner.chain, "h", torch.bfloat16, int(choice_row.max()) + 1, intermediate)
    total, size = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
    for e, (gate_up, down) in enumerate(reference.experts):
        token, choice = (local == e).nonzero(as_tuple=True)
        mine = h[choice_row[token, choice]]
        if len(mine):
            assert_middle(mine, swiglu(linear_fp32(x[token], gate_up), limit), down)
        terms = multiplied(mine, down).double() * weights[token, choice, None]
        total.index_add_(0, token, terms)
        size.index_add_(0, token, terms.abs())
    # Each term is rounded to BF16 before it is weighted.
    assert_close(y, total, HALF_ULP * size)
    nothing = (local < 0).all(dim=1)
    assert nothing.any() == (tokens > 1)
    assert y[nothing].eq(0).all()
    # As near to what the reference backend gives.
    expected = OPS.moe(x, weights, ids.to(dtype), reference.runner_id).double()
    assert (y.double() - expected).norm() <= 2.0**-7 * expected.norm()
    assert simulator.launched == ["Route", "Quantize", "GroupedGemm", "GroupedGemm", "Finalize"]
    assert not any(simulator.early)


@pytest.mark.parametrize("activations", MODES)
def test_moe_with_no_choice_here_and_strided_tables(simulator: Simulator, activations: str) -> None:
    arguments = moe_arguments(4, 256, 128, None)
    runner = MoeRunner("layer", **own(arguments), backend="sm90", activations=activations)
    x = random_x(torch.Generator().manual_seed(3), 5, 256)
    weights, ids = choices(5, 4, 4, ())
    weights, ids = weights[:, :2], ids.int()[:, :2]
    y = OPS.moe(x, weights, ids, runner.runner_id)
    assert torch.equal(y, OPS.moe(x, weights.contiguous(), ids.contiguous(), runner.runner_id))
    # 4 is no expert: the reference backend raises, kernels take it for none.
    for nobody in (-1, 4):
        assert OPS.moe(x, weights, torch.full_like(ids, nobody), runner.runner_id).eq(0).all()


# ---- wo_a -----------------------------------------------------------------------------------------------------------

WO_AS = [
    (1, 2, 4, 128, 128, 64, "bf16", "lazy"),
    (7, 3, 6, 72, 64, 16, "nvfp4", "random"),
    (64, 2, 4, 64, 128, 64, "nvfp4", "eager"),
    (129, 2, 2, 128, 256, 64, "bf16", "random"),
    (129, 2, 2, 136, 64, 64, "nvfp4", "lazy"),
]


@pytest.mark.parametrize(("tokens", "groups", "heads", "rank", "head_dim", "rope_dim", "activations", "policy"), WO_AS)
def test_wo_a(
    simulator: Simulator,
    tokens: int,
    groups: int,
    heads: int,
    rank: int,
    head_dim: int,
    rope_dim: int,
    activations: str,
    policy: str,
) -> None:
    simulator.policy = policy
    arguments = wo_a_arguments(groups, heads, rank, head_dim, rope_dim)
    inputs = wo_a_inputs(tokens, heads, head_dim, rope_dim)
    reference = WoARunner("reference", **arguments, activations=activations)
    runner = WoARunner("layer", **own(arguments), backend="sm90", activations=activations)
    y = OPS.wo_a(*inputs, runner.runner_id)
    assert y.is_contiguous()
    # The reference's own rounding to BF16, then: the two differ by one ulp where FP32 sums differ.
    expected = OPS.wo_a(*inputs, reference.runner_id)
    assert (y != expected).double().mean() <= 0.005
    assert_close(y, expected)
    assert simulator.launched == ["InverseRopeQuantize", "GroupedGemm"]
    assert all(simulator.early)


# ---- what surrounds the kernels -------------------------------------------------------------------------------------

KINDS: dict[str, tuple[type, Callable[[], dict[str, Any]], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "linear": (
        LinearRunner,
        lambda: linear_arguments([64, 128, 8], 256, [0, 1, 0]),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16),),
    ),
    "shared_expert": (
        SharedExpertRunner,
        lambda: shared_arguments(256, 128, 1.5),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16),),
    ),
    "moe": (
        MoeRunner,
        lambda: moe_arguments(4, 256, 128, 1.5),
        lambda tokens: (torch.zeros(tokens, 256, dtype=torch.bfloat16), *choices(tokens, 2, 4, ())),
    ),
    "wo_a": (WoARunner, lambda: wo_a_arguments(2, 4, 64, 64, 16), lambda tokens: wo_a_inputs(tokens, 4, 64, 16)),
}


def made(kind: str, activations: str) -> Any:
    runner, arguments, _ = KINDS[kind]
    return runner("layer", **arguments(), backend="sm90", activations=activations)


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Kernels that do nothing but leave their arguments here."""
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compiler, "compiled", lambda *_: lambda *args: launched.append(args))
    yield launched
    registry.clear()
    workspace.workspace.cache_clear()
    workspace.equal_groups.cache_clear()


def addresses(launched: list[tuple[Any, ...]]) -> list[int]:
    return [tensor.data_ptr() for args in launched for tensor in args if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("tokens", [7, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_allocates_its_output_only_and_reads_nothing_back(
    kind: str, tokens: int, activations: str, no_launch: list
) -> None:
    runner, arguments = made(kind, activations), KINDS[kind][2](tokens)
    runner(*arguments)
    first = addresses(no_launch)
    no_launch.clear()
    with AtenOps() as ops:
        out = runner(*arguments)
    views = {"view", "slice", "select", "unsqueeze", "transpose", "as_strided", "alias", "detach", "permute"}
    assert sorted(name for name in ops.names if name not in views) == ["new_empty"]
    moved = {b for a, b in zip(first, addresses(no_launch), strict=True) if a != b}
    # Columns of the result begin at several addresses.
    size = out.numel() * out.element_size()
    assert all(out.data_ptr() <= address < out.data_ptr() + size for address in moved), (
        "a graph would not find its buffers"
    )


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_launch_nothing(kind: str, activations: str, no_launch: list) -> None:
    runner = made(kind, activations)
    assert len(OPS.__getattr__(kind)(*KINDS[kind][2](0), runner.runner_id)) == 0
    assert no_launch == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows_during_a_capture(kind: str, no_launch: list, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, inputs = made(kind, "nvfp4"), KINDS[kind][2]
    runner(*inputs(130))
    monkeypatch.setattr(workspace, "_capturing", lambda device: True)
    for tokens in (130, 64, 1):
        runner(*inputs(tokens))
    with pytest.raises(RuntimeError, match=r"graph is being captured; run the largest batch once before"):
        runner(*inputs(300))


def test_gathered_rows_and_results_share_a_buffer(no_launch: list) -> None:
    made("moe", "bf16")(*KINDS["moe"][2](9))
    (_, gather, first, second, finalize) = no_launch
    assert gather[2].data_ptr() == first[0].data_ptr() == second[6].data_ptr() == finalize[0].data_ptr()
    assert first[6].data_ptr() == second[0].data_ptr() != first[0].data_ptr()


def test_bf16_rows_are_multiplied_where_they_are(no_launch: list) -> None:
    x = torch.zeros(9, 256, dtype=torch.bfloat16)
    made("linear", "bf16")(x)
    ((a, *_),) = no_launch
    assert a.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("kind", ["moe", "shared_expert", "linear"])
def test_weights_are_prepared_in_place(kind: str, no_launch: list) -> None:
    runner_type, make, inputs = KINDS[kind]
    arguments = make() if kind != "linear" else linear_arguments([64, 128], 256, [0, 1])
    held = {arguments[key].data_ptr() for key in arguments if key.endswith(("weight", "weight_scale"))}
    runner = runner_type("layer", **arguments, backend="sm90", activations="bf16")
    runner(*inputs(3))
    assert held <= set(addresses(no_launch))
    for name in ("w13_weight", "w2_weight_scale", "experts", "gate_up", "down", "matrix", "weight", "weight_scale"):
        assert not hasattr(runner, name), "what others would take for a weight in rows"


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[type, Callable[[], dict[str, Any]], str]] = [
    (LinearRunner, lambda: linear_arguments([64, 12], 64, [0, 1]), "the matrix has a part of 12 rows on this rank"),
    (
        LinearRunner,
        lambda: changed(linear_arguments([64], 64, [0]), weight=misaligned),
        "starts at 0x.*copy it at load",
    ),
    (
        SharedExpertRunner,
        lambda: changed(shared_arguments(64, 64, None), gate_up_input_scale=apart),
        r"gate and up of 1 of 1 experts have different input_scale, the first is expert 0 with \[.*sm90 backend quantizes",
    ),
    (SharedExpertRunner, lambda: changed(shared_arguments(64, 64, None), down_weight=misaligned), "down has a tensor"),
    (MoeRunner, lambda: moe_arguments(513, 32, 32, None), "513 experts on this rank, .* at most 512"),
    (
        MoeRunner,
        lambda: changed(moe_arguments(3, 64, 64, None), w13_input_scale=apart),
        "gate and up of 1 of 3 experts have different input_scale, the first is expert 2",
    ),
    (MoeRunner, lambda: changed(moe_arguments(2, 64, 64, None), w2_weight=misaligned), "w2 has a tensor that starts"),
    (WoARunner, lambda: wo_a_arguments(2, 4, 12, 64, 16), "a group of wo_a has a part of 12 rows"),
    (WoARunner, lambda: wo_a_arguments(2, 4, 8, 64, 24), "cannot rotate these heads: .*rope_dim is 24"),
    (WoARunner, lambda: changed(wo_a_arguments(2, 4, 8, 64, 16), weight=misaligned), "wo_a has a tensor that starts"),
]


@pytest.mark.parametrize(("runner", "arguments", "match"), REFUSED)
def test_what_kernels_cannot_do_is_refused_untouched(runner: type, arguments: Callable, match: str) -> None:
    arguments = arguments()
    before = own(arguments)
    registry.clear()
    with pytest.raises(ValueError, match=rf"(?s)layers\.1: .*{match}"):
        runner("layers.1", **arguments, backend="sm90")
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
        (SharedExpertRunner, lambda: changed(shared_arguments(64, 64, None), gate_up_input_scale=apart)),
        (MoeRunner, lambda: changed(moe_arguments(3, 64, 64, None), w13_input_scale=apart)),
        (LinearRunner, lambda: linear_arguments([60, 12], 64, [0, 1])),
    ],
)
def test_input_scales_do_not_matter_to_bf16_activations(runner: type, arguments: Callable) -> None:
    assert runner("layers.1", **arguments(), backend="sm90", activations="bf16").runner_id
    registry.clear()


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((10, 0), (9, 1), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(
            ValueError, match=rf"layer: cuda:0 has .* \({capability[0]}, {capability[1]}\), expected \(9, 0\)"
        ):
            check_gpu("layer", torch.device("cuda:0"), sm90.CAPABILITY, "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_gpu("layer", torch.device("cuda:0"), sm90.CAPABILITY, "sm90")


def test_without_the_compiler_only_sm90_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cutedsl.runners.sm90", None)
    with pytest.raises(ImportError, match=r"layer: the sm90 backend cannot be imported .*install nvidia-cutlass-dsl"):
        LinearRunner("layer", **linear_arguments([64], 64, [0]), backend="sm90")
    assert LinearRunner("layer", **linear_arguments([64], 64, [0])).runner_id
    registry.clear()
