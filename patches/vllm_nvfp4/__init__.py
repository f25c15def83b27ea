"""The overlay: what vLLM 0.32.0 needs to serve DeepSeek-V4 with every linear in NVFP4.

vLLM imports this package in every process, through the `vllm.general_plugins` entry point, and calls `register()`.
The hard part is being loud: vLLM logs and ignores a plugin whose *import* fails, so nothing here may fail at import, and
all that can fail happens inside `register()`, where an exception stops the process.
"""

__all__ = ["register"]

_registered = False


def register() -> None:
    """Register configuration, quantization, models, loader and CPU gaps with the installed vLLM; idempotent.

    Raises: RuntimeError - vLLM is not the version this overlay was written for.
    """
    global _registered
    if _registered:
        return
    from vllm_nvfp4 import compat

    compat.check_vllm_version()
    from vllm_nvfp4 import registration

    registration.register_all()
    _registered = True
