"""The closed set of kernels: the same few for every number of tokens; and what `nvfp4 kernels explain` says of them."""

import dataclasses
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vllm_nvfp4 import architecture, cli, kernels_cli

from cutedsl import compile as compiler
from cutedsl import deployment
from cutedsl.deployment import FAMILIES, MAX_TOKENS, MODELS, Deployment, Rank, Variant, find_model, model_from_config
from cutedsl.kernels import grouped_gemm_sm90, grouped_gemm_sm100, grouped_gemm_swap_sm100, linear_sm100, route_sm100
from cutedsl.reference.linear import PackedMatrix
from cutedsl.runners import pack_matrix, sm90, sm100, workspace
from cutedsl.runners.workspace import guess_tokens

PRO, FLASH = MODELS["deepseek-v4-pro"], MODELS["deepseek-v4-flash"]
TP = (1, 2, 4, 8)


def published(root: Path, name: str) -> dict:
    return json.loads((root / "tests" / "data" / "configs" / f"{name}.json").read_text())


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_published_ones(root: Path, name: str) -> None:
    assert model_from_config(published(root, name), name) == MODELS[name]
    assert find_model(name) is MODELS[name]
    path = str(root / "tests" / "data" / "configs" / f"{name}.json")
    assert find_model(path).ratios == MODELS[name].ratios


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_model_is_in_an_operator(root: Path, name: str) -> None:
    config = SimpleNamespace(**published(root, name))
    expected = Counter()
    for module, (n, k) in architecture.expected(config, mtp_layers=1).linears.items():
        kind = "experts" if ".experts." in module else "shared" if "shared_experts" in module else "linear"
        expected["wo_a" if module.endswith(".wo_a") else kind] += n * k
    model = MODELS[name]
    rank = Rank(model)
    routed, shared = rank.experts()
    found = Counter(linear=sum(linear.n * linear.k * linear.layers for linear in rank.linears()))
    found["experts"] = 3 * routed.num_experts * routed.intermediate * model.hidden_size * routed.layers
    found["shared"] = 3 * shared.intermediate * model.hidden_size * shared.layers
    found["wo_a"] = rank.num_groups * rank.wo_a[0] * rank.wo_a[1] * rank.num_layers
    assert found == expected


def test_transformers_spelling(root: Path) -> None:
    config = published(root, "deepseek-v4-pro")
    ratios = config.pop("compress_ratios")
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    config["layer_types"] = [kinds[ratio] for ratio in ratios[:61]]
    config["compress_rates"] = {kinds[4]: 4, kinds[128]: 128}
    assert model_from_config(config, PRO.name) == PRO


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", None, "hidden_size is None, expected a positive integer"),
        ("n_routed_experts", 0, "n_routed_experts is 0"),
        ("o_groups", "16", "o_groups is '16'"),
        ("num_hidden_layers", None, "num_hidden_layers is None"),
        ("compress_ratios", [4, 128], "has 2 entries, expected one for each of 61 layers"),
    ],
)
def test_bad_configurations(root: Path, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_config({**published(root, "deepseek-v4-pro"), field: value}, "x")


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither one of deepseek-v4-pro, deepseek-v4-flash nor a readable"):
        find_model("deepseek-v5")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="nor a readable config"):
        find_model(str(tmp_path))


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="num_heads is 128, no multiple of 5; take another tp than 5"):
        deployment.deployment(PRO, [1, 5])
    with pytest.raises(ValueError, match="tp is 0"):
        deployment.deployment(PRO, [0])
    # Groups of wo_a end at 8; nothing serves V4-Flash over 16 ranks.
    with pytest.raises(ValueError, match="o_groups is 8"):
        deployment.deployment(FLASH, [16])
    assert [(rank.tp, rank.ep) for rank in deployment.deployment(PRO, [2, 1]).ranks] == [
        (1, False),
        (2, False),
        (2, True),
    ]


def test_no_kernel_for_another_architecture() -> None:
    with pytest.raises(ValueError, match=r"no kernel in cutedsl\.kernels is for sm_80; expected sm_100a or sm_90a"):
        deployment.variants(deployment.deployment(PRO, [8], "sm_80"))


# ---- the closed set -------------------------------------------------------------------------------------------------


def arch_of(family: deployment.Family) -> str:
    return "sm_90a" if family.module.endswith("sm90") else "sm_100a"


@functools.cache
def closed(name: str, arch: str) -> list[Variant]:
    return deployment.variants(deployment.deployment(MODELS[name], TP, arch))


def configs(name: str, kernel: str, arch: str = "sm_100a") -> set:
    return {variant.config for variant in closed(name, arch) if variant.kernel.__name__ == kernel}


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """choose_config for a million shapes makes the same few configurations again and again."""
    for module in (linear_sm100, grouped_gemm_sm100, grouped_gemm_swap_sm100, grouped_gemm_sm90):
        monkeypatch.setattr(module, "largest_config", functools.cache(module.largest_config))


class EveryBatch(Deployment):
    """Asks for every number of tokens, and for some beyond."""

    def batches(self) -> list[int]:
        return [*range(MAX_TOKENS + 1), 3 * MAX_TOKENS, 1 << 20]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.module)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("remembered")
def test_no_number_of_tokens_needs_another_kernel(name: str, family: deployment.Family) -> None:
    every = EveryBatch(deployment.deployment(MODELS[name], TP).ranks, arch_of(family))
    found = {variant.config for variant in family.variants(every)}
    assert found
    assert found == configs(name, family.kernel, arch_of(family))


def hopper_shapes(asked: Deployment) -> Iterator[tuple[int, int, int, int, int, str]]:
    """n, k, groups, top_k, all experts and epilogue of every GEMM on Hopper; of a group with all tokens the two are 1."""
    for rank in asked.ranks:
        alone = [linear for parts in rank.input_linears().values() for linear in parts]
        yield from ((linear.n, linear.k, 1, 1, 1, "bf16") for linear in [*rank.linears(), *alone])
        yield (*rank.wo_a, rank.num_groups, 1, 1, "bf16")
        for experts in rank.experts():
            num_experts = experts.num_experts if experts.total == 1 else max(experts.num_experts, 2)
            group, hidden = (num_experts, experts.top_k, experts.total), rank.model.hidden_size
            yield (2 * experts.intermediate, hidden, *group, "swiglu")
            yield (2 * experts.intermediate, hidden, *group, "swiglu_nvfp4")
            yield (hidden, experts.intermediate, *group, "bf16")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("remembered")
def test_hopper_needs_no_kernel_beyond_the_closed_set(name: str) -> None:
    every = EveryBatch(deployment.deployment(MODELS[name], TP).ranks, "sm_90a")
    have = configs(name, "GroupedGemmSm90", "sm_90a")
    for n, k, num_groups, top_k, total, epilogue in sorted(set(hopper_shapes(every))):
        for batch in every.batches():
            tokens = workspace.large_group(max(batch, 1), top_k, total)
            num_hit = workspace.expected_hit(batch, top_k, total, num_groups) if total > 1 else None
            shape = grouped_gemm_sm90.Shape(tokens, n, k, num_groups, num_hit)
            assert grouped_gemm_sm90.choose_config(shape, epilogue) in have, shape


@pytest.mark.parametrize("name", MODELS)
def test_what_the_closed_set_is(name: str) -> None:
    found = closed(name, "sm_100a")
    assert len(found) == len({(variant.kernel, variant.config) for variant in found})
    assert sorted(config.tile_n for config in configs(name, "LinearSm100")) == [64, 128, 256]
    for kernel, most in (("GroupedGemmSm100", 5), ("GroupedGemmSwapSm100", 4)):
        by_epilogue = Counter(config.epilogue for config in configs(name, kernel))
        assert set(by_epilogue) == {"bf16", "swiglu_nvfp4"}
        assert max(by_epilogue.values()) <= most
    assert {config.tile_n for config in configs(name, "GroupedGemmSwapSm100")} == set(grouped_gemm_swap_sm100.TILES_N)
    assert Counter(variant.kernel.__name__ for variant in found if "Gemm" not in variant.kernel.__name__) == {
        "LinearSm100": 3,
        "QuantizeSm100": 4,
        "InverseRopeQuantizeSm100": 2,
        "RouteSm100": 8,
        "FinalizeSm100": 4,
    }
    assert all(variant.config.validate() is variant.config for variant in found)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_closed_set_is_on_hopper(name: str) -> None:
    found = closed(name, "sm_90a")
    assert len(found) == len({(variant.kernel, variant.config) for variant in found})
    assert {variant.config.arch for variant in found} == {"sm_90a"}
    gemms, epilogues = configs(name, "GroupedGemmSm90", "sm_90a"), grouped_gemm_sm90.EPILOGUES
    assert {config.epilogue for config in gemms} == set(epilogues)
    assert gemms <= {config for epilogue in epilogues for config in grouped_gemm_sm90.all_configs(epilogue)}
    # Of both kinds of activations.
    for kernel in ("QuantizeSm90", "InverseRopeQuantizeSm90"):
        assert {config.output for config in configs(name, kernel, "sm_90a")} == {"bf16", "copy"}
    assert Counter(variant.kernel.__name__ for variant in found if "Gemm" not in variant.kernel.__name__) == {
        "QuantizeSm90": 8,
        "InverseRopeQuantizeSm90": 4,
        "RouteSm90": 8,
        "FinalizeSm90": 4,
    }
    assert all(variant.config.validate() is variant.config for variant in found)


# Small enough to make the weights of; every kind of operator is there.
SMALL = dataclasses.replace(
    PRO, hidden_size=256, q_lora_rank=64, head_dim=64, rope_dim=16, num_heads=8, o_groups=4, o_lora_rank=64,
    index_head_dim=32, index_num_heads=8, intermediate_size=128, num_experts=8, top_k=2, ratios=(0, 4, 128),
)  # fmt: skip


def chains(
    rank: Rank, expert_map: torch.Tensor | None, backend: ModuleType, activations: str
) -> Iterator[Callable[[int], object]]:
    """A backend's chains for all operators of a rank, as functions of a number of tokens."""
    model, (routed, shared) = rank.model, rank.experts()
    hidden = model.hidden_size

    def matrix(n: int, k: int) -> PackedMatrix:
        weight, scale = torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // 16, dtype=torch.float8_e4m3fn)
        return pack_matrix(weight, scale, torch.ones(1), torch.ones(1), (n,), activations)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    for linear in rank.linears():
        chain = backend.LinearChain(linear.name, matrix(linear.n, linear.k))
        yield lambda tokens, chain=chain, k=linear.k: chain(bf16(tokens, k))
    gate_up, down = matrix(2 * shared.intermediate, hidden), matrix(hidden, shared.intermediate)
    one = backend.SharedExpertChain("shared", gate_up, down, torch.ones(2), torch.ones(2), 10.0)
    yield lambda tokens: one(bf16(tokens, hidden))
    experts = [
        torch.stack([part] * routed.num_experts)
        for packed in (matrix(2 * routed.intermediate, hidden), matrix(hidden, routed.intermediate))
        for part in packed[:2]
    ]
    pairs, ones = torch.ones(routed.num_experts, 2), torch.ones(routed.num_experts)
    more = (activations,) if backend is sm90 else ()
    moe = backend.MoeChain("moe", *experts[:2], pairs, pairs, *experts[2:], ones, ones, expert_map, 10.0, *more)
    for ids in (torch.int32, torch.int64):
        yield lambda tokens, ids=ids: moe(
            bf16(tokens, hidden), torch.ones(tokens, model.top_k), torch.zeros(tokens, model.top_k, dtype=ids)
        )
    n, k = rank.wo_a
    heads = model.num_heads // rank.tp
    wo_a = backend.WoAChain(
        "wo_a",
        matrix(rank.num_groups * n, k),
        torch.ones(1),
        torch.ones(1),
        rank.num_groups,
        model.head_dim,
        model.rope_dim,
    )
    angles = torch.zeros(9, model.rope_dim)
    yield lambda tokens: wo_a(bf16(tokens, heads, model.head_dim), torch.zeros(tokens, dtype=torch.int64), angles)


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
@pytest.mark.parametrize(("tp", "ep"), [(1, False), (2, False), (2, True)])
def test_the_runners_ask_for_nothing_else(monkeypatch: pytest.MonkeyPatch, tp: int, ep: bool, arch: str) -> None:
    asked: set = set()

    def note(kernel: type, config: object, *_: object) -> Callable[..., None]:
        asked.add((kernel, config))
        return lambda *_: None

    monkeypatch.setattr(compiler, "compiled", note)
    rank = Rank(SMALL, tp, ep).check()
    expert_map = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1], dtype=torch.int32) if ep else None
    backend, modes = (sm100, ("nvfp4",)) if arch == "sm_100a" else (sm90, ("nvfp4", "bf16"))
    for activations in modes:
        for chain in chains(rank, expert_map, backend, activations):
            for tokens in (1, 7, 8, 9, 33, 64, 65, 129, 3000):
                chain(tokens)
    workspace.workspace.cache_clear()
    known = {(variant.kernel, variant.config) for variant in deployment.variants(Deployment((rank,), arch))}
    assert asked <= known
    # None of the modules went unasked, or the runners would not be what is tested.
    expected = {family.kernel for family in FAMILIES if arch_of(family) == arch}
    assert {kernel.__name__ for kernel, _ in asked} == expected


def test_without_experts_dealt_out_there_is_no_map() -> None:
    found = deployment.variants(deployment.deployment(PRO, [1]))
    mapped = {variant.config.mapped for variant in found if variant.kernel is route_sm100.RouteSm100}
    assert mapped == {False}


def test_every_kernel_module_is_in_the_table(root: Path) -> None:
    modules = {path.stem for path in (root / "cutedsl" / "kernels").glob("*_sm*.py")}
    assert modules == {family.module for family in FAMILIES}


def test_a_module_may_say_its_configurations_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = linear_sm100.choose_config(linear_sm100.Shape(1, 64, 64))
    monkeypatch.setattr(linear_sm100, "variants", lambda asked: [config, config], raising=False)
    family = deployment.Family("linear_sm100", "LinearSm100")
    assert family.variants(Deployment((Rank(PRO),))) == [
        Variant(linear_sm100.LinearSm100, config, linear_sm100.compiled)
    ]


# ---- explain --------------------------------------------------------------------------------------------------------


def by_name(tp: int = 8, tokens: int = 64, ep: bool = False) -> dict[str, kernels_cli.Operator]:
    return {operator.name: operator for operator in kernels_cli.explain(PRO, tp, tokens, ep)}


def test_bytes_and_flop_of_a_linear() -> None:
    m, n, k = 200, 3072, 7168
    found = by_name(tokens=m)["layer's input, ratio 128"]
    assert (found.kernel, found.shape, found.layers) == ("linear_sm100", "m 200, n 3072, k 7168", 31)
    assert found.flop == 2 * m * n * k
    assert found.num_bytes == (m * k + n * k) // 2 + (m * k + n * k) // 16 + 4 * n + 2 * m * n
    assert found.seconds == pytest.approx(found.num_bytes / 8e12)
    assert found.bound == "memory"
    config = linear_sm100.choose_config(linear_sm100.Shape(m, n, k))
    assert (found.tile, found.smem_bytes, found.tmem_columns) == ("128x64x256", config.smem_bytes, config.tmem_columns)


def test_linears_with_the_layers_input_are_one() -> None:
    # wq_a, wkv; the compressor's two; weights_proj; the indexer's compressor.
    rows = {
        "wq_a + wkv": 1536 + 512,
        "layer's input, ratio 128": 2048 + 1024,
        "layer's input, ratio 4": 2048 + 2048 + 64 + 512,
    }
    found = {linear.name: linear for linear in Rank(PRO).linears() if linear.k == 7168}
    assert {name: found[name].n for name in rows} == rows
    assert sum(found[name].layers for name in rows) == Rank(PRO).num_layers
    alone = {linear.name: linear.n for linear in Rank(PRO).input_linears()[4]}
    assert alone == {"wq_a + wkv": 2048, "compressor": 2048, "weights_proj": 64, "indexer compressor": 512}


@pytest.mark.parametrize("tokens", [1, 64, 1000, 16384])
@pytest.mark.parametrize("top_k", [1, 6])
def test_groups_are_guessed_as_the_runner_does(tokens: int, top_k: int) -> None:
    experts = Rank(PRO, 8, ep=True).experts()[0]._replace(top_k=top_k)
    assert deployment.group_tokens(experts, tokens) == guess_tokens(tokens, top_k, 384)


def test_large_steps_are_bound_by_the_tensor_cores() -> None:
    found = by_name(tokens=16384)["wq_b"]
    assert found.bound == "tensor"
    assert found.seconds == pytest.approx(2 * 16384 * 8192 * 1536 / 9e15)


def test_few_tokens_swap_operands_and_many_do_not() -> None:
    for name in ("wq_b", "experts: gate, up", "shared expert: down", "wo_a (if NVFP4)"):
        few, many = by_name()[name], by_name(tokens=16384)[name]
        assert (few.swap, few.kernel) == (True, "grouped_gemm_swap_sm100")
        assert not many.swap
        # The host guesses 4/3 of the mean for experts: 2 of 64 tokens. Other groups have all.
        assert few.config["tile_n"] == (8 if name.startswith("experts") else 64)


def test_experts_that_nobody_chose_are_not_read() -> None:
    one, two = (by_name(tokens=tokens)["experts: down"] for tokens in (1, 4096))
    expert_bytes = 7168 * 384 * (1 / 2 + 1 / 16)
    # Six of 384 for one token, all of them for thousands; and the rows.
    assert one.num_bytes == pytest.approx(6 * (expert_bytes + 384 * 9 / 16 + 2 * 7168), rel=1e-6)
    assert two.num_bytes == pytest.approx(384 * expert_bytes + 4096 * 6 * (384 * 9 / 16 + 2 * 7168), rel=1e-6)
    assert one.flop == 6 * 2 * 7168 * 384


def test_dealing_experts_out_moves_the_same_work() -> None:
    cut, dealt = by_name()["experts: gate, up"], by_name(ep=True)["experts: gate, up"]
    assert "of 48" in dealt.shape
    assert dealt.flop == cut.flop


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("tokens", [1, 200, 16384])
def test_explained_kernels_are_in_the_closed_set(name: str, tp: int, tokens: int) -> None:
    for arch, gpu in kernels_cli.GPUS.items():
        there = {(variant.kernel.__module__.rpartition(".")[2], str(variant.config)) for variant in closed(name, arch)}
        for ep, activations in itertools.product((False, True), gpu.activations):
            for operator in kernels_cli.explain(MODELS[name], tp, tokens, ep, arch, activations):
                config = next(f for f in FAMILIES if f.module == operator.kernel).load().Config(**operator.config)
                assert (operator.kernel, str(config)) in there


def hopper(activations: str | None, tokens: int = 64) -> dict[str, kernels_cli.Operator]:
    found = kernels_cli.explain(PRO, 8, tokens, arch="sm_90a", activations=activations)
    return {operator.name: operator for operator in found}


def test_what_hopper_does_to_activations() -> None:
    default, bf16, nvfp4 = hopper(None), hopper("bf16"), hopper("nvfp4")
    assert default == bf16
    first = "round for wq_a + wkv"
    assert first in nvfp4
    assert not any(name.startswith("round") for name in bf16)
    assert {name for name in bf16 if name.startswith("copy")} == {"copy for experts"}
    assert bf16["experts: gate, up"].config["epilogue"] == "swiglu"
    assert nvfp4["experts: gate, up"].config["epilogue"] == "swiglu_nvfp4"
    assert nvfp4[first].num_bytes == 64 * 7168 * 4
    assert "inverse rope, round for wo_a" in nvfp4
    assert "inverse rope for wo_a" in bf16


def test_bytes_and_flop_of_a_linear_on_hopper() -> None:
    m, n, k = 200, 2048, 7168
    found = hopper("bf16", m)["wq_a + wkv"]
    assert (found.kernel, found.swap) == ("grouped_gemm_sm90", True)
    assert found.num_bytes == 2 * m * k + n * k // 2 + n * k // 16 + 4 * n + 2 * m * n
    assert found.flop == 2 * m * n * k
    assert found.seconds == pytest.approx(max(found.num_bytes / 4.8e12, found.flop / 0.989e15))
    large = hopper("bf16", 16384)["wq_b"]
    assert large.bound == "tensor"
    assert large.seconds == pytest.approx(2 * 16384 * 8192 * 1536 / 0.989e15)


def test_experts_on_hopper_move_their_weights_and_rows_of_bf16() -> None:
    found = hopper("bf16", 4096)
    assert found["experts: down"].num_bytes == pytest.approx(
        384 * 7168 * 384 * 9 / 16 + 4096 * 6 * (2 * 384 + 2 * 7168), rel=1e-6
    )
    assert found["experts: gate, up"].num_bytes == pytest.approx(
        384 * 768 * 7168 * 9 / 16 + 4096 * 6 * (2 * 7168 + 2 * 384), rel=1e-6
    )


def test_explain_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_cli.main(["explain", "--tp", "8", "-m", "64"]) == 0
    text = capsys.readouterr().out
    assert "deepseek-v4-pro, tp 8, 64 tokens" in text
    assert text.count("roofline of one B200, not measured: 8 TB/s, 9 PFLOPS dense FP4") == 2
    assert "wq_a + wkv" in text


def test_explain_prints_a_table_of_hopper(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_cli.main(["explain", "--arch", "sm_90a", "--activations", "nvfp4"]) == 0
    text = capsys.readouterr().out
    assert text.count("roofline of one H200, not measured: 4.8 TB/s, 0.989 PFLOPS dense BF16") == 2
    assert "round for wq_b" in text


def test_explain_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_cli.main(["explain", "--model", "deepseek-v4-flash", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "tile", "roofline_seconds", "label"} <= set(found[0])
    assert all("not measured" in operator["label"] for operator in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "5"], "num_heads is 128, no multiple of 5"),
        (["-m", "0"], "-m is 0, expected at least 1 token"),
        (["--model", "nowhere"], "nor a readable config.json"),
        (["--arch", "sm_80"], "--arch is 'sm_80', expected one of sm_100a, sm_90a"),
        (["--activations", "bf16"], "--activations is 'bf16', expected nvfp4 on sm_100a"),
        (["--arch", "sm_90a", "--activations", "fp8"], "--activations is 'fp8', expected bf16 or nvfp4 on sm_90a"),
    ],
)
def test_explain_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert kernels_cli.main(["explain", *arguments]) == 64
    assert message in capsys.readouterr().err


def test_the_command_line_knows_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4", "kernels", "explain", "--wrong"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 64
    assert "nvfp4 kernels: error: unrecognized arguments: --wrong" in capsys.readouterr().err
