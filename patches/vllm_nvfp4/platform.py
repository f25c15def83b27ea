"""Which implementation computes, and in which mode: the only place that looks at the device.

    compute capability 10.0 -> sm100, 9.0 -> sm90, CPU -> reference; anything else is refused with this list

NVFP4_PROVIDER overrides the choice and is refused where it cannot work. vLLM's stock kernels serve on request only
(NVFP4_PROVIDER=stock), never because something is missing: they merge scales and round differently.
"""

import logging
from functools import cache

from vllm_nvfp4 import env

logger = logging.getLogger("vllm.nvfp4")

PROVIDERS = ("auto", "sm100", "sm90", "reference", "stock")
ACTIVATIONS = ("auto", "nvfp4", "bf16")
# Machine code for sm_100a and sm_90a runs on exactly these.
CAPABILITY_OF = {"sm100": (10, 0), "sm90": (9, 0)}
WORKS = (
    "compute capability 10.0 (B200, GB200) with sm100, 9.0 (H100, H200) with sm90, any NVIDIA GPU with "
    "NVFP4_PROVIDER=reference (slow, for debugging) or NVFP4_PROVIDER=stock (vLLM's own kernels), CPUs with reference"
)


@cache
def _choice() -> tuple[str | None, str | None]:
    """(backend, None), or (None, why vLLM's stock kernels serve instead).

    Raises: RuntimeError - nothing of ours runs on this device, or what NVFP4_PROVIDER asks for does not; ValueError -
        NVFP4_PROVIDER is misspelled.
    """
    asked = env.choice(env.PROVIDER, PROVIDERS)
    device, capability = _device()
    fitting = [name for name, needed in CAPABILITY_OF.items() if needed == capability]
    on_cpu = device == "CPU"
    chosen = asked if asked != "auto" else "reference" if on_cpu else fitting[0] if fitting else None
    if chosen is None:
        raise RuntimeError(f"no NVFP4 kernels for {device}. What works: {WORKS}")
    if chosen in CAPABILITY_OF and chosen not in fitting:
        needed = ".".join(map(str, CAPABILITY_OF[chosen]))
        raise RuntimeError(
            f"{env.PROVIDER.name}={chosen} needs a GPU of compute capability {needed}, found {device}. What works: {WORKS}"
        )
    if chosen == "stock" and on_cpu:
        raise RuntimeError(f"{env.PROVIDER.name}=stock: vLLM has no NVFP4 kernels for CPUs; unset {env.PROVIDER.name}")
    how = f"{env.PROVIDER.name}={asked}" if asked != "auto" else "chosen by device"
    logger.info("NVFP4 provider: %s on %s (%s)", chosen, device, how)
    return (None, f"{env.PROVIDER.name}=stock") if chosen == "stock" else (chosen, None)


def _device() -> tuple[str, tuple[int, int] | None]:
    """The device's name for messages, "CPU" for a CPU, and the compute capability of an NVIDIA GPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "CPU", None
    name = current_platform.get_device_name()
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        return f"{name} (no NVIDIA GPU)", None
    return f"{name} (compute capability {capability.major}.{capability.minor})", (capability.major, capability.minor)


def backend() -> str | None:
    """What cutedsl's runners are built with; None where NVFP4_PROVIDER=stock leaves it to vLLM, a recorded fallback.

    Raises: RuntimeError, ValueError - see `_choice`.
    """
    return _choice()[0]


def unavailable_reason() -> str | None:
    """Why `backend()` is None, for logs and errors; None where there is one."""
    return _choice()[1]


def activations() -> str:
    """ "nvfp4" (W4A4) or "bf16" (W4A16), what linears take as input; bf16 is the default on Hopper, which has no FP4.

    Raises: ValueError - NVFP4_ACTIVATIONS is misspelled, or asks for what the backend cannot do.
    """
    asked, chosen = env.choice(env.ACTIVATIONS, ACTIVATIONS), backend()
    if asked == "bf16" and chosen == "sm100":
        raise ValueError(
            f"{env.ACTIVATIONS.name}=bf16: the sm100 kernels multiply NVFP4 by NVFP4 only; set it to nvfp4 or unset it"
        )
    if asked != "auto" and chosen is None:
        raise ValueError(
            f"{env.ACTIVATIONS.name}={asked}: vLLM's stock kernels decide that themselves; unset it, or "
            f"{env.PROVIDER.name}"
        )
    if asked != "auto":
        return asked
    return "bf16" if chosen == "sm90" else "nvfp4"


def check(enforce_eager: bool) -> None:
    """Refuse, before a worker is started, what would fail in every worker.

    Raises: RuntimeError, ValueError - see `backend` and `activations`; or the reference would run under CUDA graphs.
    """
    activations()
    if backend() == "reference" and _device()[0] != "CPU" and not enforce_eager:
        raise ValueError(
            f"{env.PROVIDER.name}=reference on a GPU reads routing back to the host, which no CUDA graph can hold; "
            "add --enforce-eager (it is slow, and for debugging only)"
        )
