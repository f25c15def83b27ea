"""Routing on Blackwell: simulated, every integer equal to the reference's; every contract."""

import functools
import os

import pytest
import torch
from covering import run_pairs

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import route_sm100
from cutedsl.kernels.route_sm100 import Config, Route, choose_config, route_sizes
from cutedsl.layout import max_padded_rows, swizzle_grouped_block_scale
from cutedsl.routing import local_expert_ids, sort_by_expert
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

CANARY = -77777777
POISON = 1234567890
GUARD = 8


def expected_route(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None = None) -> Route:
    """What the reference functions say; an id that is no expert is one of another rank."""
    num_global = num_experts if expert_map is None else len(expert_map)
    known = torch.where(topk_ids < num_global, topk_ids, -1)
    local = local_expert_ids(known, expert_map)
    routing = sort_by_expert(local, num_experts)
    count = routing.expert_offset.diff()
    n = topk_ids.numel()
    padded_offset = swizzle_grouped_block_scale(torch.zeros(n, 4, dtype=torch.uint8), count).padded_offsets
    expert = local.flatten()[routing.slot_choice].long()
    here = (expert >= 0) & (expert < num_experts)
    shift = (padded_offset - routing.expert_offset)[torch.where(here, expert, 0)]
    slot_row = torch.where(here, torch.arange(n) + shift, -1)
    choice_row = torch.empty(n, dtype=torch.int64).scatter_(0, routing.slot_choice, slot_row)
    tile_expert = torch.full((max_padded_rows(n, num_experts) // 128,), -1)
    used = torch.repeat_interleave(torch.arange(num_experts), padded_offset.diff() // 128)
    tile_expert[: len(used)] = used
    outputs = (routing.slot_token, slot_row, choice_row, count, padded_offset, tile_expert)
    return Route(*(tensor.int() for tensor in outputs), here.sum().int().view(1))


def guarded(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor full of poison, and what lies around it too."""
    whole = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.int32)
    whole[GUARD : GUARD + size] = POISON
    return whole, whole[GUARD : GUARD + size]


def simulate(
    config: Config,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
    policy: str,
    seed: int,
) -> ptxsim.Report:
    sizes = route_sizes(*topk_ids.shape, num_experts)
    wholes, tensors = zip(*(guarded(size) for size in sizes), strict=True)
    out = Route(*tensors)
    route_sm100.check(topk_ids, expert_map, out)
    compiled = route_sm100.compiled(config)
    report = ptxsim.run(compiled, topk_ids, expert_map, *out, outputs=out, policy=policy, seed=seed)
    assert_equal(out, expected_route(topk_ids, num_experts, expert_map))
    for name, whole in zip(Route._fields, wholes, strict=True):
        assert (whole[:GUARD] == CANARY).all(), f"{name}: what lies before it was written"
        assert (whole[-GUARD:] == CANARY).all(), f"{name}: what lies behind it was written"
    return report


def assert_equal(out: Route, expected: Route) -> None:
    for name, found, wanted in zip(Route._fields, out, expected, strict=True):
        assert found.shape == wanted.shape, name
        wrong = (found != wanted).nonzero()
        assert not len(wrong), f"{name} differs first at {wrong[0].tolist()}: {found} is not {wanted}"


@functools.lru_cache(maxsize=64)
def make_ids(num_tokens: int, top_k: int, num_ids: int, id_bits: int) -> torch.Tensor:
    """Uneven choices, a tenth of them -1; low ids are the frequent ones, and some have none."""
    generator = torch.Generator().manual_seed(num_tokens * 1009 + top_k * 31 + num_ids)
    ids = (torch.rand(num_tokens, top_k, generator=generator) ** 2 * num_ids).long()
    ids[torch.rand(num_tokens, top_k, generator=generator) < 0.1] = -1
    return ids.to(torch.int64 if id_bits == 64 else torch.int32)


# T, top_k, experts, bits of an id.
SHAPES = [
    (0, 6, 48, 32),
    (1, 1, 1, 64),
    (1, 6, 384, 32),
    (7, 8, 5, 32),
    (64, 16, 512, 64),
    (129, 6, 256, 32),
    (129, 8, 512, 32),
    (820, 1, 48, 64),
    (820, 6, 384, 32),
]


def test_one_cta(matrix) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int, int]) -> ptxsim.Report:
        num_tokens, top_k, num_experts, id_bits = shape
        ids = make_ids(num_tokens, top_k, num_experts, id_bits)
        return simulate(Config(top_k, id_bits), ids, num_experts, None, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


@pytest.mark.parametrize(
    ("num_ctas", "num_tokens", "num_experts", "id_bits"), [(2, 129, 5, 32), (8, 1, 256, 64), (8, 820, 384, 64)]
)
def test_cluster(matrix, num_ctas: int, num_tokens: int, num_experts: int, id_bits: int) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        ids = make_ids(num_tokens, 6, num_experts, id_bits)
        return simulate(Config(6, id_bits, num_ctas=num_ctas), ids, num_experts, None, policy, seed)

    # Nothing here is asynchronous: policies differ in the order in which warps run, and only `random` mixes that.
    matrix(case, policies=("lazy", "random"))


def rank_map(rank: int, num_ranks: int, num_global: int) -> torch.Tensor:
    """A contiguous share of the experts, in reverse so that the map is no shift."""
    share = num_global // num_ranks
    expert_map = torch.full((num_global,), -1, dtype=torch.int32)
    expert_map[rank * share : (rank + 1) * share] = torch.arange(share - 1, -1, -1, dtype=torch.int32)
    return expert_map


def test_expert_map(matrix) -> None:
    def case(policy: str, seed: int, rank: int, num_tokens: int) -> ptxsim.Report:
        ids = make_ids(num_tokens, 6, 384, 64)
        return simulate(Config(6, 64, mapped=True), ids, 48, rank_map(rank, 8, 384), policy, seed)

    matrix(case, rank=(0, 7), num_tokens=(0, 7, 129))


def test_expert_map_in_a_cluster(matrix) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        ids = make_ids(64, 8, 256, 32)
        return simulate(Config(8, 32, True, num_ctas=2), ids, 64, rank_map(1, 4, 256), policy, seed)

    matrix(case)


INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([-1], id="no expert here"),
        pytest.param([3], id="one expert"),
        pytest.param([0, 1, 2, 3, 4], id="in turn"),
        pytest.param([4, 3, 2, 1, 0, -1], id="in reverse"),
        pytest.param([5, 4, INT32_MAX, 0, INT32_MIN, -2, 6, 543, 512], id="out of range"),
    ],
)
def test_patterns(matrix, ids: list[int]) -> None:
    topk_ids = torch.tensor(ids, dtype=torch.int32).repeat(129 * 6)[: 129 * 6].view(129, 6)

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(Config(6), topk_ids, 5, None, policy, seed)

    matrix(case, policies=("random",))


def test_wide_ids_are_not_cut_off(matrix) -> None:
    # Cut to 32 bits, each of these would be an expert.
    topk_ids = torch.tensor([[2**32, 2**32 + 1, -(2**32) + 2, 2**40, 2**63 - 1, 1]])

    def case(policy: str, seed: int, mapped: bool) -> ptxsim.Report:
        expert_map = rank_map(0, 1, 5) if mapped else None
        return simulate(Config(6, 64, mapped), topk_ids, 5, expert_map, policy, seed)

    matrix(case, policies=("eager",), mapped=(False, True))


@pytest.mark.full
def test_all_shapes(matrix) -> None:
    def case(policy: str, seed: int, num_tokens: int, top_k: int, num_experts: int) -> ptxsim.Report:
        config = Config(top_k, 32, num_ctas=1 + num_tokens % 2)
        return simulate(config, make_ids(num_tokens, top_k, num_experts, 32), num_experts, None, policy, seed)

    run_pairs(
        matrix,
        case,
        policies=("lazy", "random"),
        seeds=(0, 1),
        num_tokens=(0, 1, 7, 64, 129, 820),
        top_k=(1, 6, 8, 16),
        num_experts=(1, 5, 48, 256, 384, 512),
    )


@pytest.mark.full
@pytest.mark.parametrize("mapped", [False, True])
def test_large_prefill(matrix, mapped: bool) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        ids = make_ids(16384, 6, 384, 32)
        config = choose_config(16384, 6, 32, mapped)
        return simulate(config, ids, 48 if mapped else 384, rank_map(3, 8, 384) if mapped else None, policy, seed)

    matrix(case, policies=("eager", "random"))


def test_route_runs_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, expert_map = make_ids(7, 6, 384, 64), rank_map(2, 8, 384)
    # Leading parts of larger workspaces.
    out = Route(*(torch.full((size + 3,), POISON, dtype=torch.int32)[:size] for size in route_sizes(7, 6, 48)))
    compiled = route_sm100.compiled
    monkeypatch.setattr(route_sm100, "compiled", lambda c: functools.partial(ptxsim.run, compiled(c), outputs=out))
    route_sm100.route(ids, expert_map, out)
    assert_equal(out, expected_route(ids, 48, expert_map))


@pytest.mark.parametrize(("num_tokens", "num_ctas"), [(0, 1), (725, 1), (726, 8), (16384, 8)])
def test_launch(num_tokens: int, num_ctas: int) -> None:
    config = choose_config(num_tokens, 6, 32, False)
    out = [torch.empty(size, dtype=torch.int32) for size in route_sizes(num_tokens, 6, 48)]
    (launch,) = capture(route_sm100.compiled(config), make_ids(num_tokens, 6, 48, 32), None, *out)
    assert (launch.grid, launch.block) == ((num_ctas, 1, 1), (544, 1, 1))
    assert launch.cluster == (num_ctas, 1, 1)


def test_sizes_do_not_compile_again() -> None:
    first = route_sm100.compiled(choose_config(7, 6, 32, False))
    num_kernels = len(compiler.cached_keys())
    for num_tokens in (0, 1, 64, 700):
        assert route_sm100.compiled(choose_config(num_tokens, 6, 32, False)) is first
    assert len(compiler.cached_keys()) == num_kernels
    assert len({choose_config(t, 6, 64, True) for t in range(0, 20000, 100)}) == 2


# ---- contracts ------------------------------------------------------------------------------------------------------

OUTPUTS = Route._fields


def arguments(
    num_tokens: int = 7, top_k: int = 6, num_experts: int = 5, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    sizes = route_sizes(num_tokens, top_k, num_experts)
    out = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32, device=device)
    return ids, torch.zeros(9, dtype=torch.int32, device=device), dict(zip(OUTPUTS, out, strict=True))


def call(ids: torch.Tensor, expert_map: torch.Tensor | None, out: dict[str, torch.Tensor]) -> None:
    route_sm100.route(ids, expert_map, Route(**out))


def test_the_contract_accepts_what_is_right() -> None:
    ids, expert_map, out = arguments()
    route_sm100.check(ids, expert_map, Route(**out))
    route_sm100.check(ids.long(), None, Route(**out))


def test_wrong_type_of_ids() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(TypeError, match=r"topk_ids is torch.int16, expected torch.int32 or torch.int64"):
        call(ids.short(), expert_map, out)


def test_wrong_type_of_map() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(TypeError, match=r"expert_map is torch.int64, expected torch.int32"):
        call(ids, expert_map.long(), out)


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_type_of_output(name: str) -> None:
    ids, expert_map, out = arguments()
    out[name] = out[name].long()
    with pytest.raises(TypeError, match=rf"{name} is torch.int64, expected torch.int32"):
        call(ids, expert_map, out)


def test_wrong_shape_of_ids() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(ValueError, match=r"topk_ids has shape \(42,\), expected \(\*, \*\)"):
        call(ids.flatten(), expert_map, out)


def test_wrong_shape_of_map() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(ValueError, match=r"expert_map has shape \(3, 3\), expected \(\*\)"):
        call(ids, expert_map.view(3, 3), out)


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_size_of_output(name: str) -> None:
    ids, expert_map, out = arguments()
    out[name] = torch.zeros(out[name].numel() + 1, dtype=torch.int32)
    # With an expert more, the offsets do not fit.
    named = "padded_offset" if name == "count" else name
    with pytest.raises(ValueError, match=f"{named} has shape .* expected"):
        call(ids, expert_map, out)


@pytest.mark.parametrize("name", ["expert_map", *OUTPUTS])
def test_wrong_device(name: str) -> None:
    ids, expert_map, out = arguments()
    if name == "expert_map":
        expert_map = expert_map.to("meta")
    else:
        out[name] = out[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, expected cpu"):
        call(ids, expert_map, out)


def test_ids_not_contiguous() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(ValueError, match=r"topk_ids has strides \(12, 1\), expected contiguous"):
        call(ids.repeat(1, 2)[:, :6], expert_map, out)


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "num_slots"])
def test_output_not_contiguous(name: str) -> None:
    ids, expert_map, out = arguments()
    out[name] = out[name].repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        call(ids, expert_map, out)


@pytest.mark.parametrize("top_k", [0, 17])
def test_top_k_out_of_range(top_k: int) -> None:
    _, expert_map, out = arguments()
    with pytest.raises(ValueError, match=rf"top_k is {top_k}, expected 1 \.\. 16"):
        call(torch.zeros(7, top_k, dtype=torch.int32), expert_map, out)


@pytest.mark.parametrize("num_experts", [0, 513])
def test_number_of_experts_out_of_range(num_experts: int) -> None:
    ids, expert_map, out = arguments()
    out["count"] = torch.zeros(num_experts, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"count has {num_experts} experts, expected 1 \.\. 512"):
        call(ids, expert_map, out)


def test_empty_map() -> None:
    ids, expert_map, out = arguments()
    with pytest.raises(ValueError, match="expert_map is empty"):
        call(ids, expert_map[:0], out)


def test_too_many_choices() -> None:
    ids, expert_map, out = arguments(2**27, 16, device="meta")
    with pytest.raises(ValueError, match="2147483648 choices, expected at most 1073741824"):
        call(ids, expert_map, out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(6, arch="sm_90a"), "arch is 'sm_90a'"),
        (Config(0), r"top_k is 0, expected 1 \.\. 16"),
        (Config(17), r"top_k is 17, expected 1 \.\. 16"),
        (Config(6, id_bits=16), "id_bits is 16"),
        (Config(6, num_ctas=16), "num_ctas is 16"),
        (Config(6, num_ctas=3), "num_ctas is 3"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        choose_config(1, 6, 32, False, arch="sm_100")


def test_ptx_is_of_the_architecture_and_has_no_atomics() -> None:
    text = route_sm100.compiled(Config(6)).artifacts.PTX
    assert ".target sm_100a" in text
    assert "atom" not in text.split(".entry")[1].split(".section")[0]
    if os.environ.get("CUTE_DSL_LINEINFO") == "1":
        assert "route_sm100.py" in text
