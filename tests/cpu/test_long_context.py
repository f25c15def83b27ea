"""Long prompts through the engine, against transformers' own model with the same 4-bit arithmetic (hf_oracle.py).

Lengths sit where the attention changes: 127, 128, 129 at the edge of the sliding window and at the first heavily
compressed block, 512 and 1100 with several of these blocks, 2300 where the indexer has more blocks (575) than it may
choose (512). A prompt is one step: without AMX, vLLM does not split prompts on a CPU.

Two comparisons, because one is not enough:

*Answers.* The log-probabilities of the engine's tokens. They show that the model as a whole is right, and cannot show
more: beyond the 40 tokens it was trained on, this model is either certain or, where it is not, so sensitive that errors
the size of BF16 rounding move a log-probability by several nats in the oracle alone. The prompts are those where it is
certain; there it hardly cares about far tokens. An engine made to choose the wrong blocks passes; one whose window is a
token short fails at 127 only.

*Attention, layer by layer.* The engine saves what went into each layer's first projection and into its last one; the
oracle's attention gets the same input, so that no error has built up, and rounds where the engine does. A mistake (one
token more in the window, another choice of blocks) moves the oracle's result in some direction; the engine's difference
from the oracle must not lean that way. That is far finer than the size of the difference: an engine made to take the
oldest blocks leans to that mistake by 0.95, one whose window is a token short by 0.99 to 1.01.
"""

import functools
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
# length: (rule, first number). Chosen by what the oracle says: it is certain of 8 tokens, and stays so when disturbed by
# twice the error of a BF16 rounding (below). For 21 prompts taken blindly the engine differed by up to 3.9
# nats, and once, at a margin of 2.6, in the token; in the four worst, oracles disturbed with 6 seeds differ from the
# oracle as widely, and some or all of them side with the engine.
PROMPTS = {127: (1, 45), 128: (3, 23), 129: (1, 9), 512: (3, 14), 1100: (3, 4), 2300: (3, 38)}
LONGEST = max(PROMPTS)
NUM_NEW = 8
# A rounding to BF16 is off by up to 2^-9 of the value (2^-8 between neighbours).
ROUNDING = 2.0**-9
# What the oracle itself may lose when disturbed (up to 0.015 with 6 or 12 seeds; 0.007 with the test's), and what the engine
# may differ from it (0.004; 0.0012 in the mean), in nats.
STABLE, LOGPROB_TOLERANCE, MEAN_TOLERANCE = 0.02, 0.02, 0.005

# Relative difference of a layer's attention. A BF16 rounding that comes out the other way changes a 4-bit code here and
# there, by a whole step. Measured: 0.7 to 1.3 % in the mean of a prompt's rows, 7.3 % in the worst row.
ATTENTION_MEAN, ATTENTION_WORST = 0.02, 0.15
# 0 where a mistake was not made, 1 where it was; at 0.5 the engine would be as far from the one as from the other.
# Measured: up to 0.05, and 0.12 for a mistake that touches one token in 128.
LEANING = 0.3


def sequence(length: int, rule: int, start: int) -> list[int]:
    """Token ids: the rule's name, then its numbers from `start` on."""
    mul, add = RULES[rule]
    numbers = [start]
    while len(numbers) < length - 1:
        numbers.append((mul * numbers[-1] + add) % MODULUS)
    return [FIRST + MODULUS + rule, *(FIRST + x for x in numbers)]


Attention = Callable[[int, int], torch.Tensor]


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
        llm={"max_num_batched_tokens": 4096},  # whole prompts also where vLLM could split them
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


@pytest.fixture(scope="module")
def attention(run: Run, oracle: Oracle) -> Attention:
    """The oracle's attention of (length, layer), on what the engine gave that layer."""
    return functools.cache(lambda length, layer: oracle.attention(layer, run.attention[length][layer].first))


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
    """Its queries are computed for the prompt that has more blocks than it may choose, in both layers that have one."""
    limit = oracle.config.index_topk * oracle.config.compress_rates["compressed_sparse_attention"]
    assert sum(length > limit for length in PROMPTS) == 1
    assert list(run.indexer_rows.values()) == [LONGEST + NUM_NEW - 1] * 2


@pytest.mark.parametrize("layer", range(4), ids=["sliding", "csa", "hca", "csa2"])
@pytest.mark.parametrize("length", PROMPTS)
def test_attention_on_the_engines_inputs(run: Run, attention: Attention, length: int, layer: int) -> None:
    expected = attention(length, layer)
    error = (run.attention[length][layer].last - expected).norm(dim=1) / expected.norm(dim=1)
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


class Mistake(NamedTuple):
    """A layer, the prompts that show the mistake well, and how Oracle.attention makes it."""

    layer: int
    lengths: tuple[int, ...]
    options: dict


def choice(layer: int, blocks: Callable[[torch.Tensor], torch.Tensor]) -> Mistake:
    return Mistake(layer, (LONGEST,), {"blocks": blocks})


def index(seen: torch.Tensor) -> torch.Tensor:
    return torch.arange(seen.shape[1]).float()


def luck(seen: torch.Tensor) -> torch.Tensor:
    return torch.rand(seen.shape, generator=torch.Generator().manual_seed(0))


EVERY = tuple(PROMPTS)
MISTAKES = {
    "sliding: window too short": Mistake(0, (512,), {"window": 127}),
    "sliding: window too long": Mistake(0, (512,), {"window": 129}),
    "csa: window too short": Mistake(1, (512,), {"window": 127}),
    "csa: window too long": Mistake(1, (512,), {"window": 129}),
    "hca: window too short": Mistake(2, (512,), {"window": 127}),
    "hca: window too long": Mistake(2, (512,), {"window": 129}),
    "csa: blocks a token late": Mistake(1, (512,), {"blocks": lambda seen: causal(seen, 4, -1)}),
    "csa: blocks a token early": Mistake(1, (512,), {"blocks": lambda seen: causal(seen, 4, 1)}),
    # These touch one token in 128.
    "hca: blocks a token late": Mistake(2, EVERY, {"blocks": lambda seen: causal(seen, 128, -1)}),
    "hca: blocks a token early": Mistake(2, EVERY, {"blocks": lambda seen: causal(seen, 128, 1)}),
    "hca: last block missing": Mistake(2, EVERY, {"blocks": lambda seen: causal(seen, 128, -128)}),
    "indexer: all": choice(1, lambda seen: causal(seen, 4)),
    "indexer: all, in the second layer": choice(3, lambda seen: causal(seen, 4)),
    "indexer: the oldest": choice(1, lambda seen: keep(-index(seen), seen)),
    "indexer: the newest": choice(3, lambda seen: keep(index(seen), seen)),
    "indexer: any": choice(3, lambda seen: keep(luck(seen), seen)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_attention_leans_to_no_mistake(run: Run, oracle: Oracle, attention: Attention, mistake: str) -> None:
    layer, lengths, options = MISTAKES[mistake]
    along = square = 0.0
    for length in lengths:
        call, right = run.attention[length][layer], attention(length, layer)
        direction = oracle.attention(layer, call.first, **options) - right
        along += ((call.last - right) * direction).sum().item()
        square += direction.square().sum().item()
    assert square > 0
    assert abs(along / square) < LEANING, f"{along / square:.3f}: 0 is the oracle's result, 1 is the mistake's"
