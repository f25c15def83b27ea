"""Which cutedsl backend serves on this platform."""

from functools import cache


@cache
def _choice() -> tuple[str | None, str | None]:
    """(backend, None), or (None, why there is none)."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "reference", None
    return None, f"cutedsl has no kernels for {current_platform.device_name} yet"


def backend() -> str | None:
    """`reference` on a CPU; None where cutedsl has no kernels and vLLM's stock ones serve as a recorded fallback."""
    return _choice()[0]


def unavailable_reason() -> str | None:
    """Why `backend()` is None, for logs and errors; None where there is one."""
    return _choice()[1]
