"""Kernels built ahead of time: found, checked and put into use in a worker, before its first kernel is asked for.

`python -m cutedsl.aot build` writes a set. A set that does not fit this machine or these sources is refused with
NVFP4_STRICT=1; otherwise it is logged and counted as a fallback, and the compiler works at start-up as if there were none.
"""

import logging
from functools import cache
from pathlib import Path

import cutedsl
from vllm_nvfp4 import env, selection

logger = logging.getLogger("vllm.nvfp4")

# Where an image or a wheel puts its set.
PACKAGED = Path(cutedsl.__file__).with_name("prebuilt")


def folder() -> Path | None:
    """NVFP4_AOT_DIR, else the packaged set, else None.

    Raises: RuntimeError - NVFP4_AOT_DIR names no folder; a misspelled path must not pass for "compile everything".
    """
    asked = env.text(env.AOT_DIR)
    if not asked:
        return PACKAGED if PACKAGED.is_dir() else None
    if not Path(asked).is_dir():
        raise RuntimeError(
            f"{env.AOT_DIR.name}={asked} is no folder; build a set there, or unset it to compile at start"
        )
    return Path(asked)


@cache
def use() -> int:
    """Put the set into use, once in a process; returns how many kernels it has, 0 where there is none to use.

    Raises: RuntimeError - there is no such folder, or the set is stale and NVFP4_STRICT=1; the message has the reason.
    """
    found = folder()
    if found is None:
        logger.info("NVFP4 kernels: no set built ahead of time, compiling at start (%s)", env.AOT_DIR.doc)
        return 0
    from cutedsl import aot
    from cutedsl import compile as compiler

    try:
        count = compiler.use(found)
    except aot.StaleSetError as error:
        selection.record("kernels", "kernel_set", "compiler", fallback=True, reason=str(error))
        return 0
    logger.info("NVFP4 kernels: %d built ahead of time in %s", count, found)
    return count
