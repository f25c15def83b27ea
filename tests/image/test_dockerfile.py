"""The Dockerfile against what it must agree with; builds nothing."""

import re
from pathlib import Path

import pytest
from vllm_nvfp4 import deepgemm_build, tilelang_build

from cutedsl import compile as compiler
from cutedsl import deployment


def defaults(text: str) -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S*)$", text, re.M))


def versions(root: Path) -> dict[str, str]:
    lines = (root / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> str:
    return (root / "Dockerfile").read_text()


def test_default_bases_are_those_of_versions_env(root: Path, dockerfile: str) -> None:
    pins, found = versions(root), defaults(dockerfile)
    digest = pins["VLLM_IMAGE_DIGEST"]
    assert found["BASE_IMAGE"] == pins["VLLM_IMAGE"] + (f"@{digest}" if digest else "")
    assert pins["VLLM_IMAGE"].endswith(f":v{pins['VLLM_VERSION']}")
    assert found["CPU_BASE_IMAGE"] == pins["CPU_BASE_IMAGE"]


def test_the_context_is_what_is_copied(root: Path, dockerfile: str) -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M)
        for source in line.split()[:-1]
    }  # fmt: skip
    lines = (root / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert {path.split("/")[0] for path in let_in} == {path.split("/")[0] for path in copied}
    for path in let_in:
        assert list(root.glob(path)), f".dockerignore lets in {path}, which is not there"


def test_image_and_pods_agree(root: Path, dockerfile: str) -> None:
    deployment = (root / "k8s" / "base" / "deployment.yaml").read_text()
    # What is compiled at start goes where a pod has room, and a container that is restarted finds it.
    caches = re.findall(r"(?:CACHE_HOME|CACHE_DIR|WORKSPACE_BASE)=(\S+)", dockerfile)
    (volume,) = re.findall(r"\{name: tmp, mountPath: (\S+)\}", deployment)
    assert len(caches) == 4
    assert all(Path(cache).is_relative_to(f"{volume}/cache") for cache in caches)
    user, group = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.M)[-1]
    assert re.findall(r"runAsUser: (\d+)", deployment) == [user]
    assert re.findall(r"runAsGroup: (\d+)", deployment) == [group]
    (entrypoint,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', dockerfile, re.M)
    assert re.findall(r"command: \[(/opt/\S+)\]", deployment) == [entrypoint]
    (port,) = re.findall(r"^EXPOSE (\d+)$", dockerfile, re.M)
    assert f"containerPort: {port}" in deployment


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
def test_one_set_of_kernels_serves_both_models(dockerfile: str, arch: str) -> None:
    found = defaults(dockerfile)
    assert arch in found["KERNEL_ARCHS"].split(",")
    assert arch in tilelang_build.NUM_SMS.keys() & deepgemm_build.NVCC_ARCH.keys()
    tp = [int(size) for size in found["KERNEL_TP"].split(",")]

    def kernels(model: str) -> set[tuple[str, str]]:
        variants = deployment.variants(deployment.deployment(deployment.find_model(model), tp, arch))
        return {(compiler.kernel_name(variant.kernel), compiler.config_text(variant.config)) for variant in variants}

    assert kernels("deepseek-v4-flash") <= kernels(found["KERNEL_MODEL"])
