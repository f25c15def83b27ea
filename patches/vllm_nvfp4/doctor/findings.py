"""What the doctor can find: one table of codes with severity, reason and remedy, and the grouping of what is alike.

The hard part is scale: a mistake of an exporter is in every one of 70 000 experts' matrices. Findings that differ only in the
numbers within their names become one, with a count and the first names. Names come from files that may be damaged on purpose,
so nothing unprintable passes into a report.
"""

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_EXAMPLES = 3
MAX_TEXT = 600


class Severity(enum.StrEnum):
    """error: will not serve, or serves garbage; warning: will serve, but look at it; info: good to know."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO


@dataclass(frozen=True)
class Code:
    """What a code means: its usual severity, why it matters, what to do."""

    severity: Severity
    why: str
    action: str


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    tensor: what it is about - a tensor, a pattern of `count` tensors (numbers as *), a file, or a field of config.json.
    value: what was found there. why: why it matters. action: what to do. examples: the first names behind a pattern.
    """

    severity: Severity
    code: str
    tensor: str
    value: str
    why: str
    action: str
    count: int = 1
    examples: tuple[str, ...] = ()


_AGAIN = "download it again, and compare its size and checksum with the publisher's"
_EXPORT = "export the checkpoint again"
_GARBAGE = "the loader refuses it, for serving it would give garbage without a word"

CODES: dict[str, Code] = {
    # Files and configuration.
    "NOT_FOUND": Code(ERROR, "there is nothing to read", "give a checkpoint folder, a config.json, or a Hub id"),
    "NO_WEIGHTS": Code(
        ERROR, "there is no *.safetensors file to serve", "download the weights, or plan without them: --plan-only"
    ),
    "FILE_UNREADABLE": Code(
        ERROR, "what this file holds cannot be loaded (its tensors are not listed as missing one by one)", _AGAIN
    ),
    "FILE_MISSING": Code(
        ERROR, "a part of the weights is not there (its tensors are not listed as missing one by one)", "download it"
    ),
    "FILE_UNUSED": Code(
        WARNING,
        "the index does not name this file, so it is never read: a leftover of another download, or a stale index",
        "remove the file, or download index and shards again from one revision",
    ),
    "INDEX_UNREADABLE": Code(
        ERROR, "without it nothing says which files belong to the checkpoint", "download it again"
    ),
    "INDEX_STALE": Code(
        ERROR,
        "the index promises tensors that no shard has: index and shards are of different revisions",
        "download index and shards again, from one revision",
    ),
    "INDEX_DISAGREES": Code(
        WARNING,
        "the shards' headers decide here, but a tool that trusts the index looks in another place",
        "write the index again from the shards, or download both from one revision",
    ),
    "CONFIG_UNREADABLE": Code(ERROR, "vLLM cannot start without it", "download config.json again"),
    "CONFIG_FIELD": Code(
        ERROR, "vLLM's DeepSeek-V4 needs this field", "compare config.json with the one of the model's publisher"
    ),
    "CONFIG_CONTRADICTION": Code(
        ERROR, "two fields say different things and the overlay does not choose for you", "correct the wrong one"
    ),
    "CONFIG_NOT_DEEPSEEK_V4": Code(
        ERROR, "this overlay serves DeepSeek-V4 only", "is this the folder you meant? If it is, restore the field"
    ),
    "QUANTIZATION_NOT_DECLARED": Code(
        ERROR,
        "vLLM chooses the quantization method by this field, and would take another one than NVFP4",
        "restore quantization_config as ModelOpt writes it: quant_method 'modelopt', quant_algo 'NVFP4'",
    ),
    "TOKENIZER_MISSING": Code(ERROR, "vLLM cannot start without a tokenizer", "copy it from the original model"),
    "TOKENIZER_UNREADABLE": Code(ERROR, "vLLM cannot start without a tokenizer", "copy it from the original model"),
    "TOKENIZER_CONFIG_MISSING": Code(
        WARNING,
        "the tokenizer loads, but does not know which tokens begin and end a text",
        "copy tokenizer_config.json from the original model",
    ),
    "TOKENIZER_VOCABULARY": Code(
        WARNING,
        "tokens beyond the embedding's rows cannot be served",
        "copy the tokenizer of this model; another one is here",
    ),
    "GENERATION_CONFIG_MISSING": Code(
        INFO,
        "requests that set no sampling options get vLLM's defaults",
        "copy it from the original model if it had one",
    ),
    "HUB_SCALES_NOT_READ": Code(
        INFO,
        "of a model on the Hub only headers are read: bad scale values are not found here",
        "download the checkpoint, then run the doctor on its folder",
    ),
    # Tensors.
    "LAYOUT_UNKNOWN": Code(ERROR, "the loader does not know these names", "export with one tool, from DeepSeek-V4"),
    "NAME_UNKNOWN": Code(
        ERROR,
        "the loader refuses a tensor that no rule covers, for leaving it out might leave out a weight",
        "remove the tensor, or add a rule to vllm_nvfp4/names.py",
    ),
    "TENSOR_DUPLICATE": Code(ERROR, "two tensors claim one place, and may differ", "remove one of them"),
    "TENSOR_MISSING": Code(ERROR, "the model cannot be loaded without it", "download or export the checkpoint again"),
    "TENSOR_UNEXPECTED": Code(
        ERROR,
        "the model that config.json describes has no place for it: one of the two is of another model",
        "check num_hidden_layers, n_routed_experts and compress_ratios; or remove the tensor",
    ),
    "TENSOR_DTYPE": Code(ERROR, "converting it would change what its bytes mean", _EXPORT),
    "TENSOR_SHAPE": Code(
        ERROR, "file and config.json are not of one model", "restore the config.json that belongs to these weights"
    ),
    "TENSOR_UNUSED": Code(INFO, "known, and left out on purpose", "nothing"),
    "SCALE_STRAY": Code(ERROR, "a scale of another format: it is not clear which one the weight has", _EXPORT),
    "FORMATS_MIXED": Code(
        ERROR, "vLLM computes these as one matrix, in one format", "export them all in the same format"
    ),
    "NO_KERNEL": Code(
        INFO, "nothing can compute this format there", "serve where there is a kernel, or export another"
    ),
    # Scales.
    "SCALE_NAN": Code(ERROR, _GARBAGE, "calibrate and " + _EXPORT),
    "SCALE_INFINITE": Code(ERROR, _GARBAGE, "calibrate and " + _EXPORT),
    "SCALE_NEGATIVE": Code(ERROR, _GARBAGE, _EXPORT),
    "SCALE_ZERO": Code(ERROR, _GARBAGE, "calibrate and " + _EXPORT),
    "EXPERT_UNCALIBRATED": Code(
        ERROR,
        "calibration never routed a token to this expert, so nothing is known about its activations",
        "calibrate with more data, or give such experts the input_scale of their layer's others; then export again",
    ),
    "INPUT_SCALE_AMPLIFIES": Code(
        ERROR,
        "1 or more is no scale of a calibrated input: it is stored inverted, or never was set. Activations would come out "
        "wrong by the factor, and NaN a few layers on",
        "store amax / 2688 (multiply to dequantize), not 2688 / amax; calibrate and export again",
    ),
    "WEIGHT_SCALE_AMPLIFIES": Code(
        ERROR,
        "1 or more is no scale of a weight: it is stored inverted, or never was set. Weights would be wrong by the factor",
        "store amax / 2688 (multiply to dequantize), not 2688 / amax; export again",
    ),
    "INPUT_SCALE_OUTLIER": Code(
        WARNING,
        "far from its like: too small and activations clip, too large and they round to zero",
        "calibrate again; compare with the export of the unquantized model",
    ),
    "WEIGHT_SCALE_OUTLIER": Code(
        WARNING, "far from its like: the weight is wrong by the factor, or has one huge outlier", _EXPORT
    ),
    "SHARD_SCALES_DIFFER": Code(
        INFO,
        "vLLM computes these as one matrix. Exact here, as every shard keeps its scale, with one exception: where gate and "
        "up have different input scales the sm100 kernels, and sm90 with NVFP4 activations, refuse the load",
        "nothing, but for that exception: export with one input_scale for gate and up, as ModelOpt 0.47 does",
    ),
    "BLOCK_SCALE_NAN": Code(ERROR, _GARBAGE, "download or " + _EXPORT),
    "BLOCK_SCALE_NEGATIVE": Code(ERROR, _GARBAGE, "download or " + _EXPORT),
    "BLOCK_SCALE_SATURATED": Code(
        WARNING,
        "so many blocks at the largest scale, 448, mean that their values were clipped: weight_scale_2 is too small",
        _EXPORT,
    ),
    "BLOCK_SCALE_ZERO": Code(
        WARNING,
        "so many blocks of zeros mean that weight_scale_2 is too large, or the weight was never filled",
        _EXPORT,
    ),
    "FP8_SCALE_BAD": Code(
        ERROR, "the CPU path refuses it, vLLM's GPU kernels would give garbage without a word", "download or " + _EXPORT
    ),
    # With --deep.
    "WEIGHT_ZERO": Code(WARNING, "every value is 0: the weight was never filled", "compare with the unquantized model"),
    "WEIGHT_SATURATED": Code(
        WARNING,
        "so many codes at the largest magnitude, 6, mean that values were clipped: the block scales are too small",
        _EXPORT,
    ),
    "WEIGHT_NOT_FINITE": Code(ERROR, "NaN or infinity reaches every answer", "download or " + _EXPORT),
    "ROUTER_TABLE": Code(
        ERROR,
        "the hash router would send tokens to experts that do not exist",
        "copy the table from the original model",
    ),
    # What the files say about themselves.
    "IGNORE_CONTRADICTS": Code(
        WARNING,
        "the list says that these are not quantized, their tensors say NVFP4. Here the tensors decide; other engines and "
        "tools may trust the list and read packed codes as numbers",
        "correct the list, if other tools read this checkpoint",
    ),
    "IGNORE_OMITS": Code(
        INFO,
        "stored in high precision, but not in the list of what was left unquantized (ModelOpt 0.47 forgets wo_a). Here the "
        "tensors decide",
        "nothing; correct the list if other tools read this checkpoint",
    ),
    "IGNORE_UNMATCHED": Code(
        INFO,
        "an entry of the list names no module of this checkpoint: another spelling, usually. Here the tensors decide",
        "nothing",
    ),
    "MTP_MISSING": Code(
        WARNING,
        "config.json promises MTP layers that the checkpoint lacks: it serves, but cannot draft for speculative decoding",
        "leave --speculative-config out, and set num_nextn_predict_layers to what there is",
    ),
    "MTP_UNDECLARED": Code(
        WARNING,
        "vLLM takes the number of MTP layers from config.json, so those beyond it are never used to draft",
        "set num_nextn_predict_layers to what there is",
    ),
    # The plan.
    "PLAN_OPTIONS": Code(ERROR, "vLLM would refuse this", "change the option"),
    "PLAN_DOES_NOT_FIT": Code(ERROR, "vLLM would not start", "see the plan for a layout that fits"),
    "PLAN_FEWER_REQUESTS": Code(
        WARNING,
        "it starts, but requests of this length queue",
        "more GPUs, a shorter --context, or fewer --max-num-seqs",
    ),
    "PLAN_NO_LAYOUT": Code(
        WARNING, "the model does not fit on as many GPUs as were tried", "see the plan for the closest"
    ),
}

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def printable(text: str) -> str:
    """The text with everything that a terminal might obey, or not encode, escaped; cut at MAX_TEXT characters."""
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def make(code: str, tensor: str, value: str, severity: Severity | None = None) -> Finding:
    """One finding, its reason and remedy from CODES."""
    known = CODES[code]
    return Finding(severity or known.severity, code, printable(tensor), printable(value), known.why, known.action)


def pattern_of(name: str) -> str:
    """The name with its numbers as *: model.layers.*.ffn.experts.*.w1.weight."""
    return _NUMBER.sub("*", name)


def grouped(code: str, hits: Iterable[tuple[str, str]], severity: Severity | None = None) -> list[Finding]:
    """Findings for (name, value) pairs; names that differ only in numbers become one, with the first one's value."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in hits:
        groups.setdefault(pattern_of(name), []).append((name, value))
    findings = []
    for pattern, members in groups.items():
        first, value = members[0]
        if len(members) == 1:
            findings.append(make(code, first, value, severity))
            continue
        if any(other != value for _, other in members):
            value = f"first: {value}"
        names = tuple(printable(name) for name, _ in members[:MAX_EXAMPLES])
        findings.append(replace(make(code, pattern, value, severity), count=len(members), examples=names))
    return findings


def sorted_by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, what has one code together, otherwise in the order found."""
    found = list(findings)
    order, codes = list(Severity), list(dict.fromkeys(f.code for f in found))
    return sorted(found, key=lambda f: (order.index(f.severity), codes.index(f.code)))


def exit_code(findings: Iterable[Finding]) -> int:
    """0 serve, 1 will not serve, 2 will serve with warnings."""
    severities = {f.severity for f in findings}
    return 1 if ERROR in severities else 2 if WARNING in severities else 0
