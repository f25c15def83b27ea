"""Routing on Hopper: simulated as machine code for it, every integer equal to the reference's; contracts as on Blackwell."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kit import on_hopper
from kernel_table import facts, find_cubin
from test_route_sm100 import CANARY, GUARD, POISON, assert_equal, expected_route, guarded, make_ids, rank_map

import ptxsim
from cutedsl.kernels import route_sm90, route_sm100
from cutedsl.kernels.route_sm90 import Config, Route, choose_config, route_sizes
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

__all__ = ["on_hopper"]


def simulate(
    ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None, num_ctas: int, policy: str, seed: int
) -> ptxsim.Report:
    wholes, tensors = zip(*(guarded(size) for size in route_sizes(*ids.shape, num_experts)), strict=True)
    out = Route(*tensors)
    route_sm90.check(ids, expert_map, out)
    config = Config(ids.shape[1], ids.element_size() * 8, expert_map is not None, num_ctas)
    compiled = route_sm90.compiled(config)
    report = ptxsim.run(compiled, ids, expert_map, *out, outputs=out, policy=policy, seed=seed)
    assert_equal(out, expected_route(ids, num_experts, expert_map))
    for name, whole in zip(Route._fields, wholes, strict=True):
        assert (whole[:GUARD] == CANARY).all(), f"{name}: what lies before it was written"
        assert (whole[-GUARD:] == CANARY).all(), f"{name}: what lies behind it was written"
    return report


# T, top_k, experts, bits of an id.
SHAPES = [(0, 6, 48, 32), (1, 6, 384, 32), (7, 8, 5, 32), (64, 16, 512, 64), (129, 6, 256, 32), (820, 1, 48, 64)]


def test_one_cta(matrix) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int, int]) -> ptxsim.Report:
        num_tokens, top_k, num_experts, id_bits = shape
        return simulate(make_ids(num_tokens, top_k, num_experts, id_bits), num_experts, None, 1, policy, seed)

    matrix(case, policies=("random",), shape=SHAPES)


@pytest.mark.parametrize(("num_ctas", "num_tokens", "num_experts"), [(2, 129, 5), (8, 1, 256), (8, 820, 384)])
def test_cluster(matrix, num_ctas: int, num_tokens: int, num_experts: int) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(make_ids(num_tokens, 6, num_experts, 64), num_experts, None, num_ctas, policy, seed)

    matrix(case, policies=("random",))


def test_expert_map(matrix) -> None:
    def case(policy: str, seed: int, rank: int, num_tokens: int) -> ptxsim.Report:
        ids = make_ids(num_tokens, 6, 384, 64)
        return simulate(ids, 48, rank_map(rank, 8, 384), 1, policy, seed)

    matrix(case, policies=("random",), rank=(0, 7), num_tokens=(0, 7, 129))


def test_route_runs_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, expert_map = make_ids(7, 6, 384, 64), rank_map(2, 8, 384)
    out = Route(*(torch.full((size + 3,), POISON, dtype=torch.int32)[:size] for size in route_sizes(7, 6, 48)))
    compiled = route_sm90.compiled
    monkeypatch.setattr(route_sm90, "compiled", lambda c: functools.partial(ptxsim.run, compiled(c), outputs=out))
    route_sm90.route(ids, expert_map, out)
    assert_equal(out, expected_route(ids, 48, expert_map))


@pytest.mark.parametrize(("num_tokens", "num_ctas"), [(0, 1), (725, 1), (726, 8), (16384, 8)])
def test_launch(num_tokens: int, num_ctas: int) -> None:
    config = choose_config(num_tokens, 6, 32, False)
    assert isinstance(config, Config)
    out = [torch.empty(size, dtype=torch.int32) for size in route_sizes(num_tokens, 6, 48)]
    (launch,) = capture(route_sm90.compiled(config), make_ids(num_tokens, 6, 48, 32), None, *out)
    assert (launch.grid, launch.block, launch.cluster) == ((num_ctas, 1, 1), (544, 1, 1), (num_ctas, 1, 1))


def test_machine_code(tmp_path: Path) -> None:
    function: Any = route_sm90.compiled(Config(6, num_ctas=8), line_info=False)
    assert ".target sm_90a" in function.artifacts.PTX
    function.export_to_c(object_file_path=str(tmp_path / "kernel.o"), function_name="kernel")
    found = facts(find_cubin((tmp_path / "kernel.o").read_bytes()), str(function.ir_module))
    assert (found.stack, found.local) == (0, 0)


# ---- contracts ------------------------------------------------------------------------------------------------------


def arguments() -> tuple[torch.Tensor, torch.Tensor, Route]:
    out = Route(*(torch.zeros(size, dtype=torch.int32) for size in route_sizes(7, 6, 5)))
    return torch.zeros(7, 6, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), out


def test_a_wrong_type_is_refused_before_the_launch() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(TypeError, match=r"topk_ids is torch.int16, expected torch.int32 or torch.int64"):
        route_sm90.route(ids.short(), expert_map, out)


def test_a_wrong_shape_is_refused_before_the_launch() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(ValueError, match=r"slot_row has shape .* expected"):
        route_sm90.route(ids, expert_map, out._replace(slot_row=torch.zeros(41, dtype=torch.int32)))


def test_the_contract_is_that_of_blackwell() -> None:
    # Every other part of it is tested there.
    assert route_sm90.check is route_sm100.check


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(6, arch="sm_100a"), r"arch is 'sm_100a', expected one of \['sm_90a'\]"),
        (route_sm100.Config(6, arch="sm_90a"), r"arch is 'sm_90a', expected one of \['sm_100a'\]"),
        (Config(0), r"top_k is 0, expected 1 \.\. 16"),
    ],
)
def test_impossible_configs_are_refused(config: route_sm100.Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_90'"):
        choose_config(1, 6, 32, False, arch="sm_90")
