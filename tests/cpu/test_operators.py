"""Every quantized operator of the running engine, on its own activations, against ModelOpt's arithmetic.

This is what proves W4A4; tokens do not: a random or even a trained model gives the same tokens for many wrong scales.
The engine saves what went into and came out of each op (NVFP4_DUMP_DIR). The oracle is the exported tensor as ModelOpt's
own NVFP4QTensor.dequantize has it (its bytes are golden data, tests/data/affine-a-dequantized.json; `make test-modelopt`
computes them with ModelOpt again), the activation formula of its simulated quantizer, and products summed in float64.

An op rounds its float32 result to BF16 once; what counts as error is what is left of |op - oracle| beyond that rounding.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hf_oracle import dequantize, fake_quantize
from safetensors.torch import load_file
from serving import run_engine

pytestmark = pytest.mark.engine

# Relative, of the whole output and of the worst row. float32 sums of at most 4096 products stay below.
TOLERANCE = 1e-5
# The indexer only computes its queries where it has to choose: more than index_topk (512) * 4 tokens.
LONG_PROMPT = 2100
# Of a long prompt's rows, every so-manyth: rows are independent, and float64 takes its time.
ROW_STEP = 64
SWIGLU_LIMIT = 10.0
FUSED = {"fused_wqa_wkv": ("wq_a", "wkv"), "fused_wkv_wgate": ("wkv", "wgate"), "gate_up_proj": ("w1", "w3")}


@pytest.fixture(scope="module")
def tensors(affine: Path) -> dict[str, torch.Tensor]:
    return load_file(affine / "model.safetensors")


@pytest.fixture(scope="module")
def dumps(affine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """module -> what each of its calls took and gave."""
    folder = tmp_path_factory.mktemp("operators")
    rows = json.loads((affine / "reference.json").read_text())
    long_prompt = (rows[4]["prompt_token_ids"] * 8)[:LONG_PROMPT]
    prompts = [rows[2]["prompt_token_ids"], long_prompt]
    run_engine(folder, affine, prompts, max_tokens=2, env={"NVFP4_DUMP_DIR": str(folder / "dump")})
    found = defaultdict(list)
    for path in sorted((folder / "dump").iterdir()):
        record = torch.load(path)
        found[record["name"]].append(record)
    return found


def checkpoint_modules(name: str) -> list[str]:
    """The export's modules behind an op's name."""
    head, _, leaf = name.rpartition(".")
    if leaf == "down_proj":
        return [f"{head}.w2"]
    return [f"{head}.{part}" for part in FUSED.get(leaf, (leaf,))]


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The dequantized matrix in float64."""
    parts = [tensors[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")]
    return dequantize(*parts).double()


def activation(tensors: dict[str, torch.Tensor], module: str, x: torch.Tensor) -> torch.Tensor:
    """The simulated-quantized input in float64."""
    return fake_quantize(x.float(), tensors[f"{module}.input_scale"]).double()


def product(tensors: dict[str, torch.Tensor], modules: list[str], x: torch.Tensor) -> torch.Tensor:
    """What a linear, or several fused into one, gives."""
    return torch.cat([activation(tensors, m, x) @ weight(tensors, m).T for m in modules], -1)


def swiglu_block(tensors: dict[str, torch.Tensor], names: tuple[str, str, str], x: torch.Tensor) -> torch.Tensor:
    """down(silu(min(gate, limit)) * clamp(up, limit)), float64 but for the float32 that is quantized between."""
    gate, up = product(tensors, [names[0]], x), product(tensors, [names[1]], x)
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    hidden = (torch.nn.functional.silu(gate) * up).float()
    return product(tensors, [names[2]], hidden)


def errors(out: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float, float]:
    """Error beyond one rounding to BF16, relative: of all, of the worst row; and the share of identical elements."""
    identical = float((out == oracle.to(torch.bfloat16)).double().mean())
    half_ulp = torch.ldexp(torch.ones_like(oracle), torch.frexp(oracle.abs().clamp(min=1e-30)).exponent - 9)
    beyond = ((out.double() - oracle).abs() - half_ulp).clamp(min=0)
    rows = beyond.norm(dim=-1) / oracle.norm(dim=-1).clamp(min=1e-30)
    return float(beyond.norm() / oracle.norm()), float(rows.max()), identical


def test_oracle_has_modelopts_own_bytes(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    golden = json.loads((root / "tests" / "data" / "affine-a-dequantized.json").read_text())
    modules = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    assert set(golden) == modules
    assert len(golden) == 426
    for module in sorted(modules):
        parts = [tensors[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")]
        # + 0.0: the sign of a zero is nobody's business, and ModelOpt has only one.
        values = (dequantize(*parts) + 0.0).contiguous().numpy()
        assert hashlib.sha256(values.tobytes()).hexdigest() == golden[module], module


def test_every_linear(dumps: dict[str, list[dict]], tensors: dict[str, torch.Tensor]) -> None:
    linears = {name: calls for name, calls in dumps.items() if calls[0]["kind"] == "LinearRunner"}
    # 4 layers: fused_wqa_wkv, wq_b, wo_b; 3 + 2 compressors; indexer.wq_b and weights_proj of two. (The shared experts'
    # two are computed inside their own op.)
    assert len(linears) == 4 * 3 + 5 + 4
    identical = 0
    for name, calls in linears.items():
        for call in calls:
            x, out = call["inputs"][0], call["output"]
            step = ROW_STEP if x.shape[0] > LONG_PROMPT // 2 else 1
            whole, worst, same = errors(out[::step], product(tensors, checkpoint_modules(name), x[::step]))
            assert whole <= TOLERANCE, f"{name}: {whole}"
            assert worst <= TOLERANCE, f"{name}: worst row {worst}"
            identical += same == 1.0
    # Most calls are identical in every element; float32 sums cannot make all of them so.
    assert identical > sum(map(len, linears.values())) / 2


def test_indexer_queries_are_computed_above_2048_tokens(dumps: dict[str, list[dict]]) -> None:
    for layer in (1, 3):
        calls = dumps[f"model.layers.{layer}.attn.indexer.wq_b"]
        assert {call["inputs"][0].shape[0] for call in calls} >= {LONG_PROMPT}
        assert min(call["inputs"][0].shape[0] for call in calls if call["inputs"][0].shape[0] > 1) == LONG_PROMPT


def test_every_shared_expert(dumps: dict[str, list[dict]], tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(4):
        name = f"model.layers.{layer}.ffn.shared_experts"
        for call in dumps[name]:
            x, out = call["inputs"][0], call["output"]
            step = ROW_STEP if x.shape[0] > LONG_PROMPT // 2 else 1
            oracle = swiglu_block(tensors, (f"{name}.w1", f"{name}.w3", f"{name}.w2"), x[::step])
            whole, worst, _ = errors(out[::step], oracle)
            assert whole <= TOLERANCE, f"{name}: {whole}"
            assert worst <= TOLERANCE, f"{name}: worst row {worst}"


def test_every_moe(dumps: dict[str, list[dict]], tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(4):
        experts = f"model.layers.{layer}.ffn.experts"
        calls = [call for name, calls in dumps.items() if name.startswith(experts) for call in calls]
        assert calls, f"no MoE call of {experts} among {sorted(dumps)}"
        for call in calls:
            x, weights, ids = call["inputs"]
            step = ROW_STEP if x.shape[0] > LONG_PROMPT // 2 else 1
            x, weights, ids = x[::step], weights[::step], ids[::step]
            oracle = torch.zeros(x.shape, dtype=torch.float64)
            for expert in ids.unique().tolist():
                token, slot = torch.where(ids == expert)
                names = tuple(f"{experts}.{expert}.{part}" for part in ("w1", "w3", "w2"))
                oracle.index_add_(
                    0, token, swiglu_block(tensors, names, x[token]) * weights[token, slot, None].double()
                )
            whole, worst, _ = errors(call["output"][::step], oracle)
            assert whole <= TOLERANCE, f"{experts}: {whole}"
            assert worst <= TOLERANCE, f"{experts}: worst row {worst}"
