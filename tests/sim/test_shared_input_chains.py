"""Linears with a common input on kernels: it is quantized once, and each answer is that of its linear."""

from contextlib import nullcontext

import pytest
import torch
from hopper_kit import machine
from shared_input_kit import SHARDS, Attention, serve_with
from test_runners_sm90 import simulator as hopper
from test_runners_sm100 import assert_close, random_x
from test_runners_sm100 import simulator as blackwell
from vllm_nvfp4 import selection
from vllm_nvfp4.attention import input_linears

__all__ = ["blackwell", "hopper"]
K = 256
# Backend, activations, tokens, what GEMMs are called.
MODES = [
    ("sm100", "nvfp4", 7, "GroupedGemmSwap"),
    ("sm100", "nvfp4", 129, "Linear"),
    ("sm90", "nvfp4", 7, "GroupedGemm"),
    ("sm90", "bf16", 7, "GroupedGemm"),
    ("sm90", "bf16", 129, "GroupedGemm"),
]


@pytest.mark.parametrize("own_scale", [False, True], ids=["one scale", "another scale"])
@pytest.mark.parametrize(("backend", "activations", "tokens", "gemm"), MODES)
def test_launches_and_answers(
    backend: str,
    activations: str,
    tokens: int,
    gemm: str,
    own_scale: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulator = request.getfixturevalue("blackwell" if backend == "sm100" else "hopper")
    serve_with(backend, activations, monkeypatch)
    selection.clear()
    attn, x = Attention(), random_x(torch.Generator().manual_seed(tokens), tokens, K)
    if own_scale:
        for linear in (attn.indexer.weights_proj, attn.indexer.wq_b):
            linear.values["input_scale"].mul_(1.5)
    attn.serve()
    with machine("sm_90a") if backend == "sm90" else nullcontext():
        found = attn.project(x)
    quantize = ["Quantize"] if activations == "nvfp4" else []
    # Where every linear quantizes for itself it also launches for itself.
    times = 4 if own_scale and quantize else 1
    assert simulator.launched == ([*quantize, gemm]) * times
    for place, (linear, y) in enumerate(zip(input_linears(attn), found, strict=True)):
        exact = linear.exact(x, activations)
        assert (y.shape, y.dtype) == (exact.shape, torch.float32 if place in (1, 3) else torch.bfloat16)
        assert torch.equal(y.float(), y.bfloat16().float())
        assert y.stride(1) == 1
        # Upstream's compressors take kv scores compact.
        assert y.is_contiguous() or y.dtype != torch.float32
        assert_close(y, exact)
    simulator.launched.clear()
    with machine("sm_90a") if backend == "sm90" else nullcontext():
        queries = attn.queries(found[0])
    assert simulator.launched == ([*quantize, gemm] * 2 if own_scale else [*quantize, gemm, gemm])
    qr = found[0][:, : SHARDS[0][0]].contiguous()
    for linear, q in zip((attn.wq_b, attn.indexer.wq_b), queries, strict=True):
        assert_close(q, linear.exact(qr, activations))
        with machine("sm_90a") if backend == "sm90" else nullcontext():
            assert torch.equal(q, linear.nvfp4_runner(qr))
