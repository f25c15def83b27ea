"""What a checkpoint says about itself in its small files, held against vLLM's needs and against its own tensors.

config.json becomes an object with vLLM's field names, or None where a size that all else depends on is missing or absurd: a
configuration is input like any other, and a layer count of 10^9 must not be believed.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from vllm_nvfp4 import names
from vllm_nvfp4.config_fields import declares_nvfp4, normalised
from vllm_nvfp4.doctor.findings import Finding, grouped, make
from vllm_nvfp4.doctor.source import Source
from vllm_nvfp4.inventory import Format

ARCHITECTURE, MODEL_TYPE = "DeepseekV4ForCausalLM", "deepseek_v4"
# Fields that vLLM's model code reads and its configuration class has no default for.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank",
    "o_groups", "o_lora_rank", "hc_mult", "hc_sinkhorn_iters", "index_n_heads", "index_head_dim", "index_topk",
    "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "hc_eps", "swiglu_limit", "compress_rope_theta")
OTHERS = ("norm_topk_prob", "hidden_act", "compress_ratios")
DEFAULTS = {"max_position_embeddings": 1048576, "rope_theta": 10000.0}
MAX_SIZE, MAX_LAYERS, MAX_MATRICES = 1 << 24, 1 << 12, 1 << 22
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


def read_config(raw: Mapping[str, Any]) -> tuple[SimpleNamespace | None, list[Finding]]:
    """config.json's fields as attributes with vLLM's names, None if they do not size a model; and what is wrong."""
    problems: list[str] = []
    fields = DEFAULTS | normalised(dict(raw), problems)
    findings = [make("CONFIG_CONTRADICTION", "config.json", problem) for problem in problems]
    if fields.get("model_type") != MODEL_TYPE:
        value = f"{fields.get('model_type')!r}, expected {MODEL_TYPE!r}"
        findings.append(make("CONFIG_NOT_DEEPSEEK_V4", "model_type", value))
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        findings.append(
            make("CONFIG_NOT_DEEPSEEK_V4", "architectures", f"{architectures}, expected [{ARCHITECTURE!r}]")
        )
    bad = {name: fields.get(name, "not there") for name in (*SIZES, *NUMBERS, *OTHERS) if not _is_usable(name, fields)}
    if bad.get("compress_ratios") == "not there" and problems:
        del bad["compress_ratios"]  # the contradiction that kept them from being derived has been said
        fields["compress_ratios"] = None
    findings += [make("CONFIG_FIELD", name, f"{value!r}"[:200]) for name, value in bad.items()]
    if not bad:
        findings += _absurd(fields)
    sized = not any(f.code == "CONFIG_FIELD" and f.tensor not in (*NUMBERS, *OTHERS[:2]) for f in findings)
    ratios = fields.get("compress_ratios")
    if not sized or not isinstance(ratios, list) or len(ratios) < fields["num_hidden_layers"]:
        return None, findings
    return SimpleNamespace(**fields), findings


def _is_usable(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a required field is there and of the right kind."""
    value = fields.get(name)
    if name in SIZES:
        return type(value) is int and 1 <= value <= MAX_SIZE
    if name in NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name == "compress_ratios":
        return isinstance(value, list) and all(type(ratio) is int for ratio in value)
    return value is not None


def _absurd(fields: Mapping[str, Any]) -> list[Finding]:
    """Sizes that each may be, but not together: what is computed from them must stay in bounds."""
    layers, experts, hashed = fields["num_hidden_layers"], fields["n_routed_experts"], fields["num_hash_layers"]
    if layers > MAX_LAYERS or layers * experts > MAX_MATRICES:
        return [
            make("CONFIG_FIELD", "num_hidden_layers", f"{layers} layers of {experts} experts: no such model exists")
        ]
    if type(hashed) is not int or not 0 <= hashed <= layers:
        return [make("CONFIG_FIELD", "num_hash_layers", f"{hashed!r} of {layers} layers")]
    topk = fields["num_experts_per_tok"]
    return [make("CONFIG_FIELD", "num_experts_per_tok", f"{topk} of {experts} experts")] if topk > experts else []


def check_quantization(source: Source) -> list[Finding]:
    """Whether vLLM will choose this overlay's method by what the configuration declares."""
    declared = (source.config or {}).get("quantization_config")
    where = "config.json: quantization_config"
    if declared is None:
        # vLLM falls back to ModelOpt's older file.
        where = "hf_quant_config.json"
        try:
            declared = source.read_json(where)
        except ValueError as error:
            return [make("QUANTIZATION_NOT_DECLARED", where, str(error))]
    if declares_nvfp4(declared):
        return []
    shown = {k: declared.get(k) for k in ("quant_method", "quant_algo")} if isinstance(declared, dict) else declared
    return [make("QUANTIZATION_NOT_DECLARED", where, f"{shown}, expected quant_method 'modelopt', quant_algo 'NVFP4'")]


def check_ignore(source: Source, by_canonical: Mapping[str, str], formats: Mapping[str, Format]) -> list[Finding]:
    """Lists of what was left unquantized, against the tensors.

    Args: formats: canonical module -> Format, routed experts as one a layer.
    """
    lists = _lists(source)
    if not lists:
        return []
    stored = _stored_modules(by_canonical, formats)
    there = _with_parents(by_canonical.values())
    findings: list[Finding] = []
    for where, entries in lists:
        listed = _Listed(entries)
        matched = {module for module in stored if module in listed}
        contradicted = [(m, f"in {where}, but NVFP4") for m in sorted(matched) if stored[m] is Format.NVFP4]
        omitted = [(m, f"not in {where}") for m, form in stored.items() if form is Format.HIGH and m not in matched]
        unmatched = [(e, f"in {where}") for e in listed.exact if e not in there]
        unmatched += [(e, f"in {where}") for e in listed.wild if not fnmatch.filter(there, e)]
        findings += grouped("IGNORE_CONTRADICTS", contradicted)
        findings += grouped("IGNORE_OMITS", omitted)
        findings += grouped("IGNORE_UNMATCHED", unmatched)
    return findings


class _Listed:
    """A list's entries; `module in listed` knows wildcards, and asks them once for all experts of a layer."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.wild = [e for e in entries if any(c in e for c in "*?[")]
        self.exact = sorted(set(entries) - set(self.wild))
        self.names = frozenset(self.exact)
        self.pattern = re.compile("|".join(fnmatch.translate(e) for e in self.wild)) if self.wild else None
        self.known: dict[str, bool] = {}

    def __contains__(self, module: str) -> bool:
        if module in self.names or self.pattern is None:
            return module in self.names
        alike = _EXPERT.sub(".experts.0.", module)
        if alike not in self.known:
            self.known[alike] = self.pattern.match(alike) is not None
        return self.known[alike]


def _with_parents(tensors: Iterable[str]) -> set[str]:
    """Every module and every parent of one; of the experts of a layer the first stands for all."""
    found: set[str] = set()
    for name in tensors:
        module = _EXPERT.sub(".experts.0.", name).rpartition(".")[0] or name
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found


def _stored_modules(by_canonical: Mapping[str, str], formats: Mapping[str, Format]) -> dict[str, Format]:
    """Linears by the checkpoint's own names, with their formats."""
    stored = {}
    for canonical, name in by_canonical.items():
        if not canonical.endswith(".weight"):
            continue
        module = canonical.removesuffix(".weight")
        expert = names.parse_expert(canonical)
        form = formats.get(f"{expert.layer}.ffn.experts" if expert else module)
        if form is not None:
            stored[name.removesuffix(".weight")] = form
    return stored


def _lists(source: Source) -> list[tuple[str, list[str]]]:
    """(where it stands, entries) of each list of unquantized modules; those of one content once."""
    quantization = (source.config or {}).get("quantization_config")
    found = [("config.json", quantization if isinstance(quantization, dict) else {})]
    try:
        described = source.read_json("hf_quant_config.json")
        nested = described.get("quantization") if isinstance(described, dict) else None
        found.append(("hf_quant_config.json", nested if isinstance(nested, dict) else {}))
    except ValueError:
        pass  # vLLM reads it only where config.json declares nothing, and there it has been said
    lists: list[tuple[str, list[str]]] = []
    for where, fields in found:
        for key in ("ignore", "exclude_modules"):
            entries = fields.get(key)
            if (
                isinstance(entries, list)
                and all(isinstance(e, str) for e in entries)
                and entries not in [e for _, e in lists]
            ):
                lists.append((f"{where}: {key}", entries))
    return lists


def check_mtp(config: Any, num_mtp_layers: int) -> list[Finding]:
    """MTP layers there are against those that config.json counts."""
    declared = getattr(config, "num_nextn_predict_layers", 0) or 0
    if declared == num_mtp_layers:
        return []
    code = "MTP_MISSING" if type(declared) is int and declared > num_mtp_layers else "MTP_UNDECLARED"
    return [make(code, "num_nextn_predict_layers", f"{declared}, the checkpoint has {num_mtp_layers}")]


def check_tokenizer(source: Source, config: Any) -> list[Finding]:
    """tokenizer.json there, readable, and within the embedding; the files beside it there."""
    findings = []
    try:
        tokenizer = source.read_json("tokenizer.json")
        if tokenizer is None:
            findings.append(make("TOKENIZER_MISSING", "tokenizer.json", "not there"))
        elif not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
            findings.append(make("TOKENIZER_UNREADABLE", "tokenizer.json", "has no `model`: it is no tokenizer"))
        elif config is not None and (largest := _largest_id(tokenizer)) >= config.vocab_size:
            value = f"token ids up to {largest}, but vocab_size is {config.vocab_size}"
            findings.append(make("TOKENIZER_VOCABULARY", "tokenizer.json", value))
    except ValueError as error:
        findings.append(make("TOKENIZER_UNREADABLE", "tokenizer.json", str(error)))
    for name, code in (
        ("tokenizer_config.json", "TOKENIZER_CONFIG_MISSING"),
        ("generation_config.json", "GENERATION_CONFIG_MISSING"),
    ):
        if source.folder is None or not (source.folder / name).is_file():
            findings.append(make(code, name, "not there"))
    return findings


def _largest_id(tokenizer: Mapping[str, Any]) -> int:
    """The largest token id, -1 where none can be told."""
    vocabulary = tokenizer["model"].get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = tokenizer.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((i for i in ids if type(i) is int), default=-1)
