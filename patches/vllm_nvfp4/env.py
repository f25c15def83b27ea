"""Every environment variable of the overlay: name, type, default and meaning, in one table.

Read when the value is needed at load time, never inside an op or a kernel.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One variable: `name`, `default` as written in the environment, and `doc`, a line for README and for errors."""

    name: str
    default: str
    doc: str


STRICT = Variable("NVFP4_STRICT", "0", "1: refuse every stock fallback instead of logging and counting it")
WO_A = Variable("NVFP4_WO_A", "0", "1: quantize wo_a to NVFP4 while loading; 0: serve it as the checkpoint has it")
STATUS_FILE = Variable("NVFP4_STATUS_FILE", "", "heartbeat file (JSON: phase, done, total, monotonic age) for probes")
ALLOW_VLLM = Variable(
    "NVFP4_ALLOW_UNTESTED_VLLM", "", "a vLLM version, exactly, that may run although it is not tested"
)
DUMP_DIR = Variable("NVFP4_DUMP_DIR", "", "test aid: every op's inputs and output are saved here (slow, eager only)")

NO_JIT = Variable("NVFP4_NO_JIT", "0", "1: never compile a kernel; one that is not loaded from a set is an error")
PROVIDER = Variable(
    "NVFP4_PROVIDER", "auto", "what computes: auto (by device), sm100, sm90, reference, or stock for vLLM's own kernels"
)
ACTIVATIONS = Variable("NVFP4_ACTIVATIONS", "auto", "nvfp4 (W4A4) or bf16 (W4A16); auto: bf16 on sm90, else nvfp4")
AOT_DIR = Variable(
    "NVFP4_AOT_DIR", "", "folder of kernels built ahead of time; unset: the packaged one, if there is one"
)
TILELANG_DIR = Variable(
    "NVFP4_TILELANG_DIR", "", "folder of TileLang's kernels built ahead of time; unset: compiled at start"
)
DEEPGEMM_DIR = Variable(
    "NVFP4_DEEPGEMM_DIR", "", "folder of DeepGEMM's kernels built ahead of time; unset: compiled at start"
)

SIDE_PORT = Variable("NVFP4_SIDE_PORT", "", "port of the metrics that exist while the model loads; none by default")

WARMUP = Variable(
    "NVFP4_WARMUP",
    "steps",
    "off; steps, before HTTP answers; or sweep: steps, and ready only when requests prove warmth",
)
WARMUP_MODES = ("off", "steps", "sweep")

VARIABLES = (
    STRICT, WO_A, STATUS_FILE, ALLOW_VLLM, DUMP_DIR, NO_JIT, PROVIDER, ACTIVATIONS, AOT_DIR, TILELANG_DIR, DEEPGEMM_DIR,
    SIDE_PORT, WARMUP,
)  # fmt: skip


def text(variable: Variable) -> str:
    """The variable's value, or its default."""
    return os.environ.get(variable.name, variable.default)


def flag(variable: Variable) -> bool:
    """The variable as 0 or 1.

    Raises: ValueError - any other text; a misspelled switch must not pass for `off`.
    """
    value = text(variable).strip()
    if value not in ("0", "1"):
        raise ValueError(
            f"{variable.name}={value!r}: expected 0 or 1 ({variable.doc}); set it to one of them or unset it"
        )
    return value == "1"


def choice(variable: Variable, allowed: tuple[str, ...]) -> str:
    """The variable as one of `allowed`.

    Raises: ValueError - any other text.
    """
    value = text(variable).strip()
    if value not in allowed:
        raise ValueError(
            f"{variable.name}={value!r}: expected one of {', '.join(allowed)} ({variable.doc}); set it to one or unset it"
        )
    return value
