"""Long prompts through the engine, against transformers' own model with the same 4-bit arithmetic (hf_oracle.py).

Lengths sit where the attention changes: 127, 128, 129 at the edge of the sliding window and at the first heavily
compressed block, 512 and 1100 with several of these blocks, 2300 where the indexer has more blocks (575) than it may
choose (512). A step takes at most CHUNK tokens, a number that divides nothing, so that prompts arrive in ragged pieces.

Two comparisons, because one is not enough:

*Answers.* The log-probabilities of the engine's tokens. They show that the model as a whole is right, and cannot show
more: beyond the 40 tokens it was trained on, this model is either certain or, where it is not, so sensitive that errors
the size of BF16 rounding move a log-probability by several nats in the oracle alone. The prompts are those where it is
certain. It then hardly reads its compressed blocks, and not at all which of them the indexer chose.

*Attention, layer by layer.* The engine saves what went into each layer's first projection and into its last one; the
oracle's attention gets the same input, so that no error has built up, and only the FP8 KV cache and BF16 lie between
them. A mistake (one token more in the window, another choice of blocks) moves the oracle's result in some direction;
the engine's difference from the oracle must not lean that way. That is far finer than the size of the difference.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hf_oracle import Oracle
from safetensors.torch import load_file, save_file
from serving import run_engine

pytestmark = pytest.mark.engine

# The rules the model was trained on: x -> (a * x + b) mod MODULUS; tokens FIRST + x, named by FIRST + MODULUS + rule.
RULES, MODULUS, FIRST = ((2, 7), (3, 11), (5, 2), (7, 29)), 59, 6
# length: (rule, first number). Chosen by the oracle alone: it is certain of 8 tokens, and stays so when disturbed by
# twice the error of a BF16 rounding (below); no other start was tried with the engine.
PROMPTS = {127: (1, 45), 128: (3, 17), 129: (0, 51), 512: (3, 14), 1100: (3, 4), 2300: (2, 40)}
LONGEST = max(PROMPTS)
NUM_NEW = 8
CHUNK = 1001
# A rounding to BF16 is off by up to 2^-9 of the value (2^-8 between neighbours).
ROUNDING = 2.0**-9
# What the oracle itself may lose when disturbed, and what the engine may differ from it, in nats.
STABLE, LOGPROB_TOLERANCE, MEAN_TOLERANCE = 0.05, 0.05, 0.01

# Relative difference of a layer's attention: E4M3 has 3 bits of mantissa, so the KV cache is off by up to 2^-4 and by
# 2^-4 / sqrt(12) = 1.8 % in the mean square over a binade; attention averages over positions, where it sees many.
# Measured (2300 tokens): mean 1.0 to 2.0 %, worst row 9 %.
ATTENTION_MEAN, ATTENTION_WORST = 0.03, 0.2
# 0 where a mistake was not made, 1 where it was. Measured: up to 0.05, and 0.14 for mistakes that touch 18 rows only.
LEANING = 0.3


def sequence(length: int, rule: int, start: int) -> list[int]:
    """Token ids: the rule's name, then its numbers from `start` on."""
    mul, add = RULES[rule]
    numbers = [start]
    while len(numbers) < length - 1:
        numbers.append((mul * numbers[-1] + add) % MODULUS)
    return [FIRST + MODULUS + rule, *(FIRST + x for x in numbers)]


class Call(NamedTuple):
    """What went into a layer's first and last projection, for every token of a prompt and the new ones but the last."""

    first: torch.Tensor
    last: torch.Tensor


class Run(NamedTuple):
    """What the engine answered and saved."""

    answers: dict[int, dict]
    attention: dict[int, dict[int, Call]]
    indexer_rows: dict[str, int]


@pytest.fixture(scope="module")
def oracle(affine: Path) -> Oracle:
    return Oracle(affine)


@pytest.fixture(scope="module")
def run(affine: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One engine, all prompts one after the other."""
    folder = tmp_path_factory.mktemp("long")
    dump = folder / "dump"
    prompts = [sequence(length, *rule) for length, rule in PROMPTS.items()]
    out = run_engine(
        folder,
        affine,
        prompts,
        NUM_NEW,
        env={"NVFP4_DUMP_DIR": str(dump)},
        llm={"max_num_batched_tokens": CHUNK, "max_num_seqs": 8},
    )
    sizes = [length + NUM_NEW - 1 for length in PROMPTS]
    num_layers = json.loads((affine / "config.json").read_text())["num_hidden_layers"]
    attention: dict[int, dict[int, Call]] = {length: {} for length in PROMPTS}
    for layer in range(num_layers):
        name = f"model.layers.{layer}.attn"
        first, last = (rows(dump, f"{name}.{leaf}").split(sizes) for leaf in ("fused_wqa_wkv", "wo_b"))
        for length, call in zip(PROMPTS, map(Call, first, last), strict=True):
            attention[length][layer] = call
    names = {path.name.split(".", 1)[1] for path in dump.glob("*.attn.indexer.wq_b.pt")}
    indexer_rows = {name: len(rows(dump, name.removesuffix(".pt"))) for name in names}
    shutil.rmtree(dump)  # hundreds of megabytes
    return Run(dict(zip(PROMPTS, out["answers"], strict=True)), attention, indexer_rows)


def rows(dump: Path, name: str) -> torch.Tensor:
    """The inputs of every call of one op, one after the other."""
    return torch.cat([torch.load(path)["inputs"][0].float() for path in sorted(dump.glob(f"*.{name}.pt"))])


def chosen(logprobs: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The log-probability of the token taken at each position."""
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("row", range(5), ids=["12", "24", "40", "130", "300"])
def test_oracle_gives_modelopts_answers(oracle: Oracle, affine: Path, row: int) -> None:
    """The oracle against what ModelOpt's own simulation of this model answered (before the export requantized it)."""
    reference = json.loads((affine / "reference.json").read_text())[row]
    prompt, greedy, top = (reference[key] for key in ("prompt_token_ids", "greedy", "top5_logprobs"))
    logprobs = oracle.logprobs(prompt, len(greedy), greedy)
    undecided = [index for index, (first, second, *_) in enumerate(top) if first[1] - second[1] < 0.5]
    sure = min(undecided, default=len(greedy))
    assert logprobs.argmax(-1).tolist()[:sure] == greedy[:sure]
    assert sure >= 11
    if len(prompt) <= 40:
        # Measured: 1e-4, 2e-4, 1e-2. At 130 and 300 tokens the model is undecided: up to 0.7, and 2.8 at one position.
        difference = chosen(logprobs, greedy) - torch.tensor([first[1] for first, *_ in top])
        assert difference.abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.attn.indexer.wq_b.input_scale"), "found only"),
        (lambda t: t.pop("model.norm.weight"), "without a tensor of the checkpoint"),
        (lambda t: [t.pop(n) for n in list(t) if ".3.attn.wo_b." in n], "without a tensor of the checkpoint"),
        (lambda t: [t.pop(n) for n in list(t) if ".ffn.experts.31." in n], "do not fit 32 places"),
        (lambda t: t.update({"model.layers.0.attn.new.weight": torch.ones(1)}), "has no place for it"),
        (lambda t: t.update({"model.layers.0.attn.q_norm.weight": torch.ones(1)}), "does not fit"),
        (lambda t: t.update({"model.layers.0.attn.compressor.ape": torch.ones(1)}), "does not fit"),
    ],
    ids=["scale", "tensor", "linear", "expert", "new", "shape", "module"],
)
def test_oracle_refuses_leftovers(affine: Path, tmp_path: Path, change: Callable, message: str) -> None:
    tensors = load_file(affine / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(affine / "config.json", tmp_path)
    with pytest.raises(ValueError, match=message):
        Oracle(tmp_path)


@pytest.mark.parametrize("length", PROMPTS)
def test_answers(run: Run, oracle: Oracle, length: int) -> None:
    answer = run.answers[length]
    prompt, tokens = sequence(length, *PROMPTS[length]), answer["tokens"]
    logprobs = oracle.logprobs(prompt, NUM_NEW, tokens)
    with oracle.disturbed(2 * ROUNDING, seed=length):
        disturbed = oracle.logprobs(prompt, NUM_NEW, tokens)
    # Were this not so, the tolerance would mean nothing.
    assert (chosen(disturbed, tokens) - chosen(logprobs, tokens)).abs().max() < STABLE
    assert tokens == logprobs.argmax(-1).tolist()
    difference = (torch.tensor(answer["logprobs"]) - chosen(logprobs, tokens)).abs()
    assert difference.max() < LOGPROB_TOLERANCE, difference
    assert difference.mean() < MEAN_TOLERANCE, difference


def test_the_indexer_chooses_beyond_its_limit_only(run: Run, oracle: Oracle) -> None:
    """Its queries are computed in steps that see more blocks than it may choose, and in no other."""
    limit = oracle.config.index_topk * oracle.config.compress_rates["compressed_sparse_attention"]
    expected = LONGEST % CHUNK + NUM_NEW - 1
    assert LONGEST - LONGEST % CHUNK < limit < LONGEST
    assert sorted(run.indexer_rows.values()) == [expected, expected]


@pytest.mark.parametrize("layer", range(4), ids=["sliding", "csa", "hca", "csa2"])
@pytest.mark.parametrize("length", PROMPTS)
def test_attention_on_the_engines_inputs(run: Run, oracle: Oracle, length: int, layer: int) -> None:
    call = run.attention[length][layer]
    expected = oracle.attention(layer, call.first)
    error = (call.last - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.mean() < ATTENTION_MEAN
    assert error.max() < ATTENTION_WORST


def causal(seen: torch.Tensor, rate: int, shift: int = 0) -> torch.Tensor:
    """Every block that is complete once `shift` more tokens are there."""
    num_tokens, num_blocks = seen.shape
    complete = (torch.arange(num_tokens) + 1 + shift) // rate
    return torch.arange(num_blocks) < complete[:, None]


def keep(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The 512 complete blocks with the highest of these scores."""
    complete = causal(seen, 4)
    best = scores.expand(seen.shape).masked_fill(~complete, float("-inf")).topk(512).indices
    return torch.zeros_like(seen).scatter(1, best, value=True) & complete


MISTAKES: dict[str, tuple[int, int, dict]] = {
    "sliding: window too short": (0, 512, {"window": 127}),
    "sliding: window too long": (0, 512, {"window": 129}),
    "csa: window too short": (1, 512, {"window": 127}),
    "csa: window too long": (1, 512, {"window": 129}),
    "hca: window too short": (2, 512, {"window": 127}),
    "hca: window too long": (2, 512, {"window": 129}),
    "csa: blocks a token late": (1, 512, {"blocks": lambda seen: causal(seen, 4, -1)}),
    "csa: blocks a token early": (1, 512, {"blocks": lambda seen: causal(seen, 4, 1)}),
    "hca: blocks a token late": (2, LONGEST, {"blocks": lambda seen: causal(seen, 128, -1)}),
    "hca: blocks a token early": (2, LONGEST, {"blocks": lambda seen: causal(seen, 128, 1)}),
    "hca: the last block missing": (2, LONGEST, {"blocks": lambda seen: causal(seen, 128, -128)}),
    "indexer: all": (1, LONGEST, {"blocks": lambda seen: causal(seen, 4)}),
    "indexer: all, second layer": (3, LONGEST, {"blocks": lambda seen: causal(seen, 4)}),
    "indexer: the newest": (1, LONGEST, {"blocks": lambda seen: keep(torch.arange(seen.shape[1]).float(), seen)}),
    "indexer: the oldest": (1, LONGEST, {"blocks": lambda seen: keep(-torch.arange(seen.shape[1]).float(), seen)}),
    "indexer: any": (
        3,
        LONGEST,
        {"blocks": lambda seen: keep(torch.rand(seen.shape, generator=torch.Generator().manual_seed(0)), seen)},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_attention_leans_to_no_mistake(run: Run, oracle: Oracle, mistake: str) -> None:
    layer, length, change = MISTAKES[mistake]
    call = run.attention[length][layer]
    right = oracle.attention(layer, call.first)
    direction = oracle.attention(layer, call.first, **change) - right
    touched = direction.norm(dim=1) > 1e-4 * right.norm(dim=1)
    assert touched.sum() > 10
    direction, error = direction[touched], (call.last - right)[touched]
    leaning = (error * direction).sum() / direction.square().sum()
    assert leaning.abs() < LEANING, f"{leaning:.3f}: 0 is the oracle's result, 1 is the mistake's"
