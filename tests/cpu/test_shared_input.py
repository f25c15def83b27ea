"""Linears with a common input as one: which are joined, in what order, what is refused, and what is said."""

import logging

import pytest
import torch
import torch._dynamo.testing
from shared_input_kit import INPUT_SCALE, MAX_TOKENS, SHARDS, Attention, K, Linear, Unquantized, serve_with
from vllm_nvfp4 import platform, selection
from vllm_nvfp4.attention import input_linears
from vllm_nvfp4.shared_input import JOINED, LEAVES, SEPARATE, join, share_query

from cutedsl.ops import registry
from cutedsl.runners.linear import LinearRunner


@pytest.fixture(autouse=True)
def clean() -> None:
    registry.clear()
    selection.clear()


def x_of(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).bfloat16()


@pytest.mark.parametrize("backend", ["reference", None])
def test_where_nothing_is_launched_nothing_is_joined(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_nvfp4.platform.backend", lambda: backend)
    assert join("layer", input_linears(Attention())) is None


@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_all_four(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", activations, monkeypatch)
    attn, x = Attention(), x_of(5)
    shared = attn.serve()
    assert shared is not None
    assert shared.places == (0, 1, 2, 3)
    assert {info.name for info in registry.describe()} == {
        "layer.input_projections",
        "layer.wq_b",
        "layer.indexer.wq_b",
    }
    (choice,) = selection.choices()
    assert (choice.module, choice.kind, choice.fallback) == ("layer.input_projections", JOINED, False)
    found = attn.project(x)
    assert [y.dtype for y in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for linear, y in zip(input_linears(attn), found, strict=True):
        assert torch.equal(y.float(), linear.exact(x, activations).bfloat16().float())
    for leaf in LEAVES:
        assert len({getattr(linear, leaf).untyped_storage().data_ptr() for linear in input_linears(attn)}) == 1


@pytest.mark.parametrize("place", range(4))
def test_one_that_is_not_quantized_stays_beside_the_others(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn, x = Attention(), x_of(5)
    owner = (attn, attn.compressor, attn.indexer, attn.indexer.compressor)[place]
    name = ("fused_wqa_wkv", "fused_wkv_wgate", "weights_proj", "fused_wkv_wgate")[place]
    setattr(owner, name, Unquantized(sum(SHARDS[place]), returns_bias=place in (0, 2)))
    shared = attn.serve()
    assert shared is not None
    assert shared.places == tuple(other for other in range(4) if other != place)
    mm = torch.mm

    def mm_into(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return mm(a, b) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))  # torch has it for GPUs only

    monkeypatch.setattr(torch, "mm", mm_into)
    for other, (linear, y) in enumerate(zip(input_linears(attn), attn.project(x), strict=True)):
        assert y.dtype == (torch.float32 if other in (1, 3) else torch.bfloat16)
        if other == place:
            assert torch.allclose(y.float(), x.float() @ linear.weight.float().T, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(y.float(), linear.exact(x, "nvfp4").bfloat16().float())


def test_rows_that_upstreams_kernels_cannot_read_as_part_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn = Attention()
    attn.indexer.weights_proj = Linear("indexer.weights_proj", (12,), 9, returns_bias=True)
    shared = attn.serve()
    assert shared is not None
    assert shared.places == (0, 1, 3)
    x = x_of(3)
    for linear, y in zip(input_linears(attn), attn.project(x), strict=True):
        assert torch.equal(y.float(), linear.exact(x, "nvfp4").bfloat16().float())


def test_one_alone_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn = Attention()
    attn.compressor = attn.indexer = None
    assert attn.serve() is None
    (y, *none), x = attn.project(x_of(3)), x_of(3)
    assert none == [None] * 3
    assert torch.equal(y, attn.fused_wqa_wkv.exact(x, "nvfp4").bfloat16())


@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_different_input_scales(
    activations: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve_with("reference", activations, monkeypatch)
    monkeypatch.setattr(logging.getLogger("vllm.nvfp4"), "propagate", True)
    attn, x = Attention(), x_of(5)
    attn.indexer.weights_proj.values["input_scale"].mul_(2)
    with caplog.at_level(logging.WARNING, "vllm.nvfp4"):
        attn.serve()
    assert (attn.nvfp4_input_runner is None) == (activations == "nvfp4")
    for linear, y in zip(input_linears(attn), attn.project(x), strict=True):
        assert torch.equal(y.float(), linear.exact(x, activations).bfloat16().float())
    named = f"{INPUT_SCALE:.6g}, {2 * INPUT_SCALE:.6g}, {INPUT_SCALE:.6g}"
    assert (f"layer.input_projections: input_scale differs ({INPUT_SCALE:.6g}" in caplog.text) == (
        activations == "nvfp4"
    )
    assert (named in caplog.text) == (activations == "nvfp4")
    (choice,) = selection.choices()
    assert choice.kind == (SEPARATE if activations == "nvfp4" else JOINED)
    caplog.clear()
    again = Attention()
    again.indexer.weights_proj.values["input_scale"].mul_(2)
    again.serve()
    assert caplog.text == "", "a line for every layer"


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_parameter_that_was_moved(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn = Attention()
    shared = join("layer.input_projections", input_linears(attn))
    assert shared is not None
    moved = getattr(attn.indexer.weights_proj, leaf)
    moved.data = moved.data.clone()
    with pytest.raises(RuntimeError, match=rf"layer.indexer.weights_proj.{leaf} was replaced or moved"):
        shared.finish()


# ---- the query latent ----------------------------------------------------------------------------------------------


def qr_kv_of(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, sum(SHARDS[0]), generator=torch.Generator().manual_seed(tokens)).bfloat16()


@pytest.mark.parametrize("tokens", [0, 1, 130, MAX_TOKENS, MAX_TOKENS + 1])
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_the_query_latent_is_quantized_once(activations: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", activations, monkeypatch)
    attn, qr_kv = Attention(), qr_kv_of(tokens)
    attn.serve()
    times: list[int] = []
    quantize = LinearRunner.quantize
    monkeypatch.setattr(LinearRunner, "quantize", lambda self, x, sf: times.append(len(x)) or quantize(self, x, sf))
    found = attn.queries(qr_kv)
    shares = activations == "nvfp4" and tokens <= MAX_TOKENS
    assert times == ([tokens] if shares else [])
    qr = qr_kv[:, : SHARDS[0][0]]
    for linear, q in zip((attn.wq_b, attn.indexer.wq_b), found, strict=True):
        assert torch.equal(q, linear.exact(qr, activations).bfloat16())


def test_query_latents_of_different_input_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn, qr_kv = Attention(), qr_kv_of(3)
    attn.indexer.wq_b.values["input_scale"].mul_(2)
    attn.serve()
    assert attn.nvfp4_shared_query is None
    for linear, q in zip((attn.wq_b, attn.indexer.wq_b), attn.queries(qr_kv), strict=True):
        assert torch.equal(q, linear.exact(qr_kv[:, : SHARDS[0][0]], "nvfp4").bfloat16())


def test_a_query_linear_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with("reference", "nvfp4", monkeypatch)
    attn = Attention()
    first, second = attn.wq_b, attn.indexer.wq_b
    for linear in (first, second):
        linear.load()
    assert share_query(first, second, MAX_TOKENS) is not None
    assert share_query(first, Unquantized(32, returns_bias=True), MAX_TOKENS) is None
    monkeypatch.delitem(platform.CAPABILITY_OF, "reference")
    assert share_query(first, second, MAX_TOKENS) is None


@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_a_compiled_layer_has_one_linear_and_one_quantization(
    activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_with("reference", activations, monkeypatch)
    attn = Attention()
    attn.serve()

    def layer(x: torch.Tensor) -> list[torch.Tensor]:
        found = attn.project(x)
        return found + attn.queries(found[0])

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 7):
        for got, want in zip(compiled(x_of(tokens)), layer(x_of(tokens)), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if str(node.target).startswith("nvfp4")]
    queries = ["quantize_input", *["linear_of_quantized"] * 2] if activations == "nvfp4" else ["linear"] * 2
    assert called == [f"nvfp4.{op}" for op in ("linear", *queries)]
