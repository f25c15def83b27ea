"""The server as its users meet it: real HTTP, the real `openai` client, real vLLM, one CPU.

The model is a ModelOpt export (tests/data/affine-a), its tokenizer that of the tiny checkpoint, which has DeepSeek-V4's
special tokens (both have 512 entries; prompts that matter here are token ids).
"""

import asyncio
import json
import re
from pathlib import Path

import openai
import pytest
from serving import Server, serve

pytestmark = pytest.mark.engine

API_KEY = "a-key-for-tests"
# Log-probabilities of the chosen tokens against ModelOpt's own simulation (float32; ours has BF16 activations).
LOGPROB_TOLERANCE = 0.05
# Beyond 40 tokens the model is uncertain: tokens are compared up to where the reference itself is nearly undecided.
SURE_LENGTH, UNDECIDED_MARGIN = 40, 0.5
# Requests computed together against alone: other matrix sizes sum in another order (FP32, then BF16 roundings).
TOGETHER_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint

    out = tmp_path_factory.mktemp("tiny") / "tiny"
    make_tiny_checkpoint(out, TinySpec())
    return out


@pytest.fixture(scope="module")
def status_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("status") / "status.json"


@pytest.fixture(scope="module")
def server(affine: Path, tiny: Path, status_file: Path, tmp_path_factory: pytest.TempPathFactory):
    flags = ("--tokenizer", str(tiny), "--api-key", API_KEY, "--served-model-name", "affine", str(affine))
    env = {"NVFP4_STATUS_FILE": str(status_file), "NVFP4_STRICT": "1"}
    with serve(tmp_path_factory.mktemp("http"), affine, *flags, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, timeout=300)


@pytest.fixture(scope="module")
def reference(affine: Path) -> list[dict]:
    return json.loads((affine / "reference.json").read_text())


def complete(client: openai.OpenAI, prompt: list[int], max_tokens: int = 16) -> tuple[list[int], list[float]]:
    """Greedy token ids and their log-probabilities."""
    answer = client.completions.create(
        model="affine", prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=1, extra_body=EXTRA
    )
    return parse(answer)


EXTRA = {"return_tokens_as_token_ids": True, "ignore_eos": True}


def parse(answer) -> tuple[list[int], list[float]]:
    logprobs = answer.choices[0].logprobs
    return [int(t.removeprefix("token_id:")) for t in logprobs.tokens], list(logprobs.token_logprobs)


def sure_positions(row: dict) -> int:
    """How many tokens to compare: all, or up to the first position where the reference is nearly undecided."""
    if len(row["prompt_token_ids"]) <= SURE_LENGTH:
        return len(row["greedy"])
    margins = [top[0][1] - top[1][1] for top in row["top5_logprobs"]]
    return next((i for i, margin in enumerate(margins) if margin < UNDECIDED_MARGIN), len(margins))


def test_greedy_equals_modelopt(client: openai.OpenAI, reference: list[dict]) -> None:
    compared = 0
    for row in reference:
        tokens, logprobs = complete(client, row["prompt_token_ids"])
        count = sure_positions(row)
        assert tokens[:count] == row["greedy"][:count], f"prompt of {len(row['prompt_token_ids'])} tokens"
        compared += count
        if len(row["prompt_token_ids"]) <= SURE_LENGTH:
            expected = [top[0][1] for top in row["top5_logprobs"]]
            worst = max(abs(a - b) for a, b in zip(logprobs, expected, strict=True))
            assert worst < LOGPROB_TOLERANCE, f"prompt of {len(row['prompt_token_ids'])} tokens: off by {worst}"
    # The three sure prompts alone give 48; a reference that compares less would prove nothing.
    assert compared >= 48


def test_eight_requests_at_once_equal_the_same_alone(client: openai.OpenAI, reference: list[dict]) -> None:
    longest = reference[-1]["prompt_token_ids"]
    prompts = [row["prompt_token_ids"] for row in reference] + [longest[:7], longest[:127], longest[:129]]
    alone = [complete(client, prompt) for prompt in prompts]

    async def together() -> list:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=API_KEY, timeout=300) as many:
            requests = [
                many.completions.create(
                    model="affine", prompt=p, max_tokens=16, temperature=0, logprobs=1, extra_body=EXTRA
                )
                for p in prompts
            ]
            return await asyncio.gather(*requests)

    for prompt, one, answer in zip(prompts, alone, asyncio.run(together()), strict=True):
        tokens, logprobs = parse(answer)
        assert tokens == one[0], f"prompt of {len(prompt)} tokens"
        worst = max(abs(a - b) for a, b in zip(logprobs, one[1], strict=True))
        assert worst < TOGETHER_TOLERANCE, f"prompt of {len(prompt)} tokens: off by {worst}"


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_k": 5}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_sampling_by_rank_and_by_mass(client: openai.OpenAI, reference: list[dict], how: dict[str, float]) -> None:
    options = {
        "model": "affine",
        "prompt": reference[0]["prompt_token_ids"],
        "max_tokens": 4,
        "temperature": 1.0,
        "seed": 3,
    }
    first, again = (client.completions.create(**options, extra_body=how).choices[0].text for _ in range(2))
    assert first == again


def test_streaming_gives_the_same_text(client: openai.OpenAI, reference: list[dict]) -> None:
    prompt = reference[0]["prompt_token_ids"]
    whole = client.completions.create(model="affine", prompt=prompt, max_tokens=16, temperature=0)
    pieces = list(client.completions.create(model="affine", prompt=prompt, max_tokens=16, temperature=0, stream=True))
    assert len(pieces) > 1
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_chat_with_reasoning_and_without(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Continue: 1, 2, 3"}]

    def ask(thinking: bool):
        body = {"chat_template_kwargs": {"thinking": thinking}}
        answer = client.chat.completions.create(
            model="affine", messages=messages, max_tokens=8, temperature=0, extra_body=body
        )
        return answer.choices[0].message

    # Thinking opens the answer inside <think>: the reasoning parser puts an unfinished thought there, not in the text.
    thought, plain = ask(True), ask(False)
    assert thought.reasoning
    assert not thought.content
    assert plain.content
    assert not getattr(plain, "reasoning", None)


def test_chat_streams(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"chat_template_kwargs": {"thinking": False}}
    stream = client.chat.completions.create(
        model="affine", messages=messages, max_tokens=8, temperature=0, stream=True, extra_body=body
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add two digits", "parameters": {"type": "object", "properties": {}}},
}


def test_tool_calls_come_back_parsed(client: openai.OpenAI) -> None:
    # The model knows nothing of tools: constrained decoding makes it open a call, and the parser must read it. What
    # stands in the call is noise, so only its name is compared.
    answer = client.chat.completions.create(
        model="affine",
        messages=[{"role": "user", "content": "add"}],
        tools=[TOOL],
        tool_choice="required",
        max_tokens=64,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "add"
    assert isinstance(json.loads(calls[0].function.arguments), dict)


def test_models_health_and_key(server: Server, client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"affine"}
    assert server.get("/health")[0] == 200
    assert server.get("/v1/models")[0] == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_bad_requests_are_answered_not_crashed_on(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model="affine", prompt=[7] * 5000, max_tokens=1)
    assert server.get("/health")[0] == 200


def test_metrics_name_what_serves(server: Server) -> None:
    status, text = server.get("/metrics")
    assert status == 200
    assert "vllm:num_requests_running" in text
    rows = dict(re.findall(r'nvfp4_modules\{[^}]*kind="(\w+)"[^}]*served_by="cutedsl reference"\} (\d+)\.0', text))
    # 4 layers: 4 fused_wqa_wkv, wq_b and wo_b each, 3 + 2 compressors, 2 indexer.wq_b and weights_proj each, 2 x 4 in
    # shared experts.
    assert rows == {"linear": "29", "moe": "4", "shared_expert": "4"}
    assert 'nvfp4_fallback_modules{rank="0"} 0.0' in text


def test_what_serves_each_module_is_logged_once(server: Server) -> None:
    log = server.log.read_text()
    lines = re.findall(r"NVFP4 selection: (.*)", log)
    assert len(lines) == 3
    linears = next(line for line in lines if line.startswith("29 linear by cutedsl reference: "))
    for module in (
        "model.layers.{0-3}.attn.fused_wqa_wkv",
        "model.layers.{1-3}.attn.compressor.fused_wkv_wgate",
        "model.layers.{1,3}.attn.indexer.weights_proj",
        "model.layers.{1,3}.attn.indexer.wq_b",
        "model.layers.{0-3}.ffn.shared_experts.down_proj",
    ):
        assert module in linears
    assert not re.search(r"NVFP4 fallback|stock fallback", log)


def test_progress_is_one_line_a_layer(server: Server) -> None:
    lines = re.findall(r"Loaded (\S+) \((\d) of 5\), ([\d.]+) of ([\d.]+) MB", server.log.read_text())
    assert [line[1] for line in lines] == ["1", "2", "3", "4", "5"]
    assert {line[0] for line in lines} == {"other", *(f"model.layers.{i}" for i in range(4))}
    assert lines[-1][2] == lines[-1][3]


def test_heartbeat_says_loaded(server: Server, status_file: Path) -> None:
    state = json.loads(status_file.read_text())
    assert state["phase"] == "ready"
    assert state["done"] == state["total"]
    assert 0 < state["phase_started_monotonic_s"] <= state["monotonic_s"]
