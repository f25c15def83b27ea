"""`nvfp4`: the one command a user needs to remember.

    nvfp4 serve MODEL [any `vllm serve` flag] [--nvfp4-activations nvfp4|bf16]
    nvfp4 doctor CHECKPOINT [flags; --help lists them]
    nvfp4 kernels explain [--model deepseek-v4-pro --tp 8 -m 64]
    nvfp4 layertest CHECKPOINT [--layers 0,2,30 --tokens 1,64,512]
    nvfp4 probe startup|live|ready|plan [flags; --help lists them]

`serve` starts vLLM's OpenAI server with what DeepSeek-V4 needs: on a machine without a GPU the environment of Triton's
interpreter, and DeepSeek-V4's tokenizer mode, reasoning parser and tool parser unless the flags say otherwise.
--nvfp4-activations is NVFP4_ACTIVATIONS as a flag: what linears take as input, bf16 by default on an H200, nvfp4 elsewhere.
`doctor` tells whether a checkpoint will serve, on what, and what is wrong with it, from its headers and scales.
`kernels explain` lists the kernel, configuration and roofline of each operator.
`layertest` runs single layers of a checkpoint through the kernels, without the engine, and compares them with FP32.
`probe` is what a kubelet asks about a running server, and `probe plan` derives its limits from a checkpoint.
"""

import contextlib
import os
import sys
from pathlib import Path

import yaml

from vllm_nvfp4 import compat, env
from vllm_nvfp4.platform import ACTIVATIONS

# flag -> value; each is left out if the user gave it, on the command line or in a --config file.
SERVE_DEFAULTS = {
    "--tokenizer-mode": "deepseek_v4",
    "--reasoning-parser": "deepseek_v4",
    "--tool-call-parser": "deepseek_v4",
    "--enable-auto-tool-choice": None,
}
ACTIVATIONS_FLAG = "--nvfp4-activations"
# One thread: on two cores vLLM's OpenMP threads spin against each other (4.0 s against 1.1 s for a short prompt).
CPU_DEFAULTS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
USAGE = (
    "usage: nvfp4 serve MODEL [any `vllm serve` flag], nvfp4 doctor CHECKPOINT [flags], nvfp4 kernels explain [flags]"
)


def serve_command(arguments: list[str]) -> list[str]:
    """The arguments of `vllm` for the user's arguments."""
    given = given_flags(arguments)
    defaults: list[str] = []
    for flag, value in SERVE_DEFAULTS.items():
        if flag not in given:
            defaults += [flag] if value is None else [flag, value]
    # Behind the model, which vLLM wants first, and before the user's flags: of two spellings argparse takes the last.
    num_models = 0 if arguments[0].startswith("-") else 1
    return ["serve", *arguments[:num_models], *defaults, *arguments[num_models:]]


def given_flags(arguments: list[str]) -> set[str]:
    """The flags that the user gave, as vLLM spells them: `--tokenizer_mode=hf` and `--no-x` count as the flag itself.

    A --config file that cannot be read counts as empty: vLLM reads it again and says what is wrong.
    """
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    if "--config" in arguments[:-1]:
        with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            text = Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8")
            given += [f"--{key}" for key in yaml.safe_load(text)]
    return {f"--{flag[2:].replace('_', '-').removeprefix('no-')}" for flag in given}


def take_activations(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without --nvfp4-activations, which vLLM does not know, and the environment that says the same.

    Raises: ValueError - the flag has no value, or one that it cannot have.
    """
    rest: list[str] = []
    value: str | None = None
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, given = argument.partition("=")
        if flag.replace("_", "-") != ACTIVATIONS_FLAG:
            rest.append(argument)
            continue
        value = given if equals else next(waiting, "")
        if value not in ACTIVATIONS:
            raise ValueError(f"{ACTIVATIONS_FLAG} {value}: expected one of {', '.join(ACTIVATIONS)}")
    return rest, {} if value is None else {env.ACTIVATIONS.name: value}


def environment(distribution: str, current: dict[str, str]) -> dict[str, str]:
    """The process environment for serving: what the user has set wins, but for what the CPU path cannot do without."""
    if distribution != "vllm-cpu":
        return dict(current)
    return {**CPU_DEFAULTS, **current, **compat.CPU_ENVIRONMENT}


def main() -> None:
    """Entry point of the `nvfp4` command."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if arguments[:1] == ["doctor"]:
        # Imported here: the doctor needs neither vLLM nor this module's checks.
        from vllm_nvfp4.doctor.cli import main as doctor

        sys.exit(doctor(arguments[1:]))
    if arguments[:1] == ["kernels"]:
        from vllm_nvfp4.kernels_cli import main as kernels

        sys.exit(kernels(arguments[1:]))
    if arguments[:1] == ["layertest"]:
        from vllm_nvfp4.layertest import main as layertest

        sys.exit(layertest(arguments[1:]))
    if arguments[:1] == ["probe"]:
        from vllm_nvfp4.probe import main as probe

        sys.exit(probe(arguments[1:]))
    if len(arguments) < 2 or arguments[0] != "serve":
        found = " ".join(arguments) or "nothing"
        sys.exit(f"nvfp4: expected `serve MODEL` or `doctor CHECKPOINT`, found {found}\n{USAGE}")
    try:
        compat.check_vllm_version()
        rest, switches = take_activations(arguments[1:])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"nvfp4: {error}")
    distribution = compat.installed_vllm()[0]
    module = "vllm_nvfp4.vllm_cli" if distribution == "vllm-cpu" else "vllm.entrypoints.cli.main"
    # Imported here: a probe, which starts every few seconds, does without Prometheus.
    from vllm_nvfp4 import side_port

    try:
        side_port.begin()
    except (OSError, ValueError) as error:
        sys.exit(f"nvfp4: {error}")
    # By module rather than by a program called `vllm`: PATH may hold another environment's.
    command = [sys.executable, "-m", module, *serve_command(rest)]
    os.execve(sys.executable, command, environment(distribution, {**os.environ, **switches}))


if __name__ == "__main__":
    main()
