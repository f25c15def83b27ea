"""The custom ops as torch sees them: registration, contracts, fakes, torch.compile, and the table of runners."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numerics
import pytest
import torch
import torch._dynamo.testing

import cutedsl.ops
from cutedsl.ops import registry
from cutedsl.ops.linear import linear
from cutedsl.ops.moe import moe
from cutedsl.ops.shared_expert import shared_expert
from cutedsl.ops.wo_a import wo_a
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.shared_expert import SharedExpertRunner
from cutedsl.runners.wo_a import WoARunner

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 4, 3
GROUPS, HEADS, HEAD_DIM, ROPE_DIM, RANK = 2, 4, 32, 16, 8


@pytest.fixture(autouse=True)
def _empty_registry():
    registry.clear()
    torch._dynamo.reset()
    yield
    registry.clear()


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32)


def make_runner(kind: str):
    if kind == "linear":
        w = numerics.random_packed(24, HIDDEN)
        return LinearRunner("a.linear", *w[:2], 0.1 * ones(2), 0.01 * ones(2), [8, 16])
    if kind == "shared_expert":
        up, down = numerics.random_packed(2 * INTERMEDIATE, HIDDEN), numerics.random_packed(HIDDEN, INTERMEDIATE)
        return SharedExpertRunner(
            "a.shared", *up[:2], 0.1 * ones(2), 0.01 * ones(2), *down[:2], 0.1 * ones(), 0.1 * ones(), 10.0
        )
    if kind == "moe":
        up = numerics.random_packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        down = numerics.random_packed(EXPERTS, HIDDEN, INTERMEDIATE)
        scales = 0.1 * ones(EXPERTS, 2), 0.01 * ones(EXPERTS, 2)
        return MoeRunner("a.moe", *up[:2], *scales, *down[:2], 0.1 * ones(EXPERTS), 0.1 * ones(EXPERTS), 10.0)
    w = numerics.random_packed(GROUPS * RANK, HEADS // GROUPS * HEAD_DIM)
    return WoARunner("a.wo_a", *w[:2], 0.1 * ones(), 0.01 * ones(), GROUPS, HEAD_DIM, ROPE_DIM)


def make_inputs(kind: str, m: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m)
    if kind == "wo_a":
        o = numerics.random_x(m, HEADS * HEAD_DIM).view(m, HEADS, HEAD_DIM)
        return o, torch.randint(0, 50, (m,), generator=generator), torch.rand(50, ROPE_DIM, generator=generator)
    x = numerics.random_x(m, HIDDEN)
    if kind == "moe":
        ids = torch.randint(-1, EXPERTS, (m, TOP_K), generator=generator, dtype=torch.int32)
        return x, torch.rand(m, TOP_K, generator=generator), ids
    return (x,)


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": linear,
    "shared_expert": shared_expert,
    "moe": moe,
    "wo_a": wo_a,
}
OUT = {"linear": 24, "shared_expert": HIDDEN, "moe": HIDDEN, "wo_a": GROUPS * RANK}


def as_op(kind: str):
    return getattr(torch.ops.nvfp4, kind).default


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPS)
def test_schema_is_functional(kind: str) -> None:
    schema = as_op(kind)._schema
    assert schema.name == f"nvfp4::{kind}"
    assert not schema.is_mutable
    assert schema.arguments[-1].name == "runner_id"
    assert len(schema.returns) == 1


def test_registering_again_is_harmless() -> None:
    for kind in OPS:
        importlib.reload(importlib.import_module(f"cutedsl.ops.{kind}"))
    importlib.reload(cutedsl.ops)
    runner = make_runner("linear")
    x = make_inputs("linear", 3)
    assert torch.equal(linear(*x, runner.runner_id), runner(*x))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("kind", OPS)
def test_opcheck(kind: str, m: int) -> None:
    torch.library.opcheck(as_op(kind), (*make_inputs(kind, m), make_runner(kind).runner_id))


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("kind", OPS)
def test_fake_agrees_with_the_op(kind: str, m: int) -> None:
    inputs, runner_id = make_inputs(kind, m), make_runner(kind).runner_id
    real = OPS[kind](*inputs, runner_id)
    assert real.shape == (m, OUT[kind])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS[kind](*(mode.from_tensor(t) for t in inputs), runner_id)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("kind", OPS)
def test_op_dispatches_to_the_runner_of_that_id(kind: str) -> None:
    first, second = make_runner(kind), make_runner(kind)
    inputs = make_inputs(kind, 2)
    second._forward = lambda runner, *_: torch.full((2, OUT[kind]), 7.0, dtype=torch.bfloat16)
    assert OPS[kind](*inputs, second.runner_id).eq(7).all()
    assert torch.equal(OPS[kind](*inputs, first.runner_id), first(*inputs))


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_fullgraph_with_all_ops_and_any_batch_compiles_once() -> None:
    # In a process of its own: what other tests compiled or imported before is part of the compiler's state (one run of the
    # whole suite in five counted a second frame; alone it never did).
    code = "import test_ops; test_ops.compile_all_ops_once()"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled 1 frame" in done.stdout


def compile_all_ops_once() -> None:
    """A function of all four ops, compiled without a graph break, once for every batch; called by the test above."""
    ids = {kind: make_runner(kind).runner_id for kind in OPS}

    def layer(x, weights, topk_ids, o, positions, cache):
        y = shared_expert(x * 2, ids["shared_expert"]) + moe(x, weights, topk_ids, ids["moe"])
        return torch.cat((linear(y, ids["linear"]), wo_a(o, positions, cache, ids["wo_a"])), dim=1)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # None of the sizes is top_k: the compiler takes sizes that are equal at first for one and the same.
    for m in (5, 7, 12):
        inputs = (*make_inputs("moe", m), *make_inputs("wo_a", m))
        assert torch.equal(compiled(*inputs), layer(*inputs))
    assert counter.frame_count == 1
    nodes = {str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"}
    assert {f"nvfp4.{kind}" for kind in OPS} <= nodes
    for m in (0, 1):
        inputs = (*make_inputs("moe", m), *make_inputs("wo_a", m))
        assert torch.equal(compiled(*inputs), layer(*inputs))
    print("compiled 1 frame")


def test_an_id_that_varies_is_specialized_and_right() -> None:
    """A function called with several ids makes the compiler try a symbolic id: each must still find its runner."""
    first, second, third = (make_runner("linear") for _ in range(3))
    for factor, runner in ((2.0, second), (4.0, third)):
        forward = runner._forward
        runner._forward = lambda r, x, factor=factor, forward=forward: forward(r, x) * factor
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    (x,) = make_inputs("linear", 4)
    base = first(x)
    for runner, factor in ((first, 1), (second, 2), (third, 4), (first, 1)):
        assert torch.equal(compiled(x, runner.runner_id), base * factor)


def test_contract_is_checked_while_tracing() -> None:
    runner_id = make_runner("linear").runner_id
    compiled = torch.compile(lambda x: linear(x, runner_id), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"nvfp4::linear \(a\.linear\): x has shape"):
        compiled(torch.zeros(2, HIDDEN + 16, dtype=torch.bfloat16))


# --- contracts -------------------------------------------------------------------------------------------------------


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same shape with another order in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("kind", "position", "change", "error", "match"),
    [
        (kind, 0, change, error, match)
        for kind in OPS
        for change, error, match in (
            (lambda t: t.float(), TypeError, r"is torch\.float32, expected torch\.bfloat16"),
            (lambda t: t[..., :-16], ValueError, "has shape"),
            (lambda t: t.unsqueeze(0), ValueError, "has shape"),
            (lambda t: t.to("meta"), ValueError, "is on meta, expected cpu"),
            (transposed, ValueError, "has strides"),
        )
    ]
    + [
        ("moe", 1, lambda t: t.bfloat16(), TypeError, r"topk_weights is torch\.bfloat16"),
        ("moe", 1, lambda t: t[:-1], ValueError, "topk_weights has shape"),
        ("moe", 1, transposed, ValueError, "topk_weights has strides"),
        ("moe", 2, lambda t: t.to(torch.int16), TypeError, r"topk_ids is torch\.int16"),
        ("moe", 2, lambda t: t[:, :-1], ValueError, "topk_ids has shape"),
        ("wo_a", 0, lambda t: t[:, :-1], ValueError, "o has shape"),
        ("wo_a", 1, lambda t: t.int(), TypeError, r"positions is torch\.int32"),
        ("wo_a", 1, lambda t: t[:-1], ValueError, "positions has shape"),
        ("wo_a", 2, lambda t: t.bfloat16(), TypeError, r"cos_sin_cache is torch\.bfloat16"),
        ("wo_a", 2, lambda t: t[:, :-2], ValueError, "cos_sin_cache has shape"),
    ],
)
def test_contract(kind, position, change, error, match) -> None:
    inputs = list(make_inputs(kind, 4))
    runner = make_runner(kind)
    inputs[position] = change(inputs[position])
    if inputs[position].is_meta:
        # The dispatcher sends a meta tensor to the fake implementation, which checks the same contract.
        with pytest.raises(error, match=match):
            as_op(kind)(*inputs, runner.runner_id)
        return
    for call in (OPS[kind], as_op(kind)):
        with pytest.raises(error, match=rf"nvfp4::{kind} \({runner.name}\): .*{match}"):
            call(*inputs, runner.runner_id)


@pytest.mark.parametrize("kind", OPS)
def test_unknown_and_foreign_ids(kind: str) -> None:
    inputs = make_inputs(kind, 2)
    for unknown in (0, -1, 10**9):
        with pytest.raises(LookupError, match=f"nvfp4::{kind}: no runner has id {unknown}"):
            OPS[kind](*inputs, unknown)
    other = make_runner("moe" if kind == "linear" else "linear")
    with pytest.raises(TypeError, match=f"nvfp4::{kind}: runner {other.runner_id} .{other.name}. is of kind"):
        OPS[kind](*inputs, other.runner_id)


# --- the table -------------------------------------------------------------------------------------------------------


def test_ids_grow_and_are_never_reused() -> None:
    first = registry.register(lambda x: x, "linear")
    second = registry.register(lambda x: x, "moe")
    registry.clear()
    third = registry.register(lambda x: x, "linear")
    assert 0 < first < second < third
    for gone in (first, second):
        with pytest.raises(LookupError, match="1 registered"):
            registry.get(gone, "linear")


def test_register_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind 'conv'; known: linear"):
        registry.register(lambda x: x, "conv")


def test_replaced_runner_is_the_one_called() -> None:
    runner, other = make_runner("linear"), make_runner("linear")
    calls = []

    class Wrapper:
        def __getattr__(self, name: str):
            return getattr(runner, name)

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            calls.append(len(inputs))
            return runner(*inputs)

    registry.replace(runner.runner_id, Wrapper())
    x = make_inputs("linear", 2)
    assert torch.equal(linear(*x, runner.runner_id), runner(*x))
    linear(*x, other.runner_id)
    assert calls == [1]
    with pytest.raises(TypeError, match="of kind 'linear'"):
        registry.get(runner.runner_id, "moe")
    with pytest.raises(LookupError, match="none can be replaced"):
        registry.replace(10**9, runner)


def test_describe_lists_runners() -> None:
    runners = {kind: make_runner(kind) for kind in OPS}
    assert registry.describe() == [
        registry.RunnerInfo(runner.runner_id, kind, runner.name, "reference") for kind, runner in runners.items()
    ]
    registry.clear()
    assert registry.describe() == []


def test_a_runner_that_failed_to_construct_is_not_listed() -> None:
    w = numerics.random_packed(24, HIDDEN)
    with pytest.raises(ValueError, match="input_scale"):
        LinearRunner("broken", *w[:2], ones(1), ones(1) * torch.nan, [24])
    assert registry.describe() == []
