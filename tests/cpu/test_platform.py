"""What serves on which device, what overrides it, and what is refused: never a silent fallback."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.platforms.interface import DeviceCapability
from vllm_nvfp4 import platform


class Device:
    """What vLLM tells about a machine, as far as the overlay asks."""

    def __init__(self, kind: str, capability: tuple[int, int] | None = None, name: str = "NVIDIA Thing") -> None:
        self.kind, self.capability, self.name = kind, capability, name

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def get_device_name(self) -> str:
        return self.name

    def get_device_capability(self) -> DeviceCapability | None:
        return DeviceCapability(*self.capability) if self.capability else None


Choose = Callable[..., None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """Put the overlay on a device, with switches."""

    def choose(kind: str, capability: tuple[int, int] | None = None, **switches: str) -> None:
        monkeypatch.setattr("vllm.platforms.current_platform", Device(kind, capability))
        for name, value in switches.items():
            monkeypatch.setenv(f"NVFP4_{name}", value)
        platform._choice.cache_clear()

    platform._choice.cache_clear()
    yield choose
    platform._choice.cache_clear()


@pytest.mark.parametrize(
    ("device", "provider", "backend", "activations"),
    [
        (("cuda", (10, 0)), None, "sm100", "nvfp4"),
        (("cuda", (9, 0)), None, "sm90", "bf16"),
        (("cpu",), None, "reference", "nvfp4"),
        (("cuda", (10, 0)), "sm100", "sm100", "nvfp4"),
        (("cuda", (9, 0)), "sm90", "sm90", "bf16"),
        (("cuda", (9, 0)), "reference", "reference", "nvfp4"),
        (("cuda", (8, 6)), "reference", "reference", "nvfp4"),
        (("cuda", (10, 3)), "reference", "reference", "nvfp4"),
        (("cpu",), "reference", "reference", "nvfp4"),
        (("cpu",), "auto", "reference", "nvfp4"),
    ],
)
def test_device_and_override_choose(
    on: Choose, device: tuple[Any, ...], provider: str | None, backend: str, activations: str
) -> None:
    on(*device, **({} if provider is None else {"PROVIDER": provider}))
    assert (platform.backend(), platform.unavailable_reason(), platform.activations()) == (backend, None, activations)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1)])
def test_another_gpu_is_refused_with_what_works(on: Choose, capability: tuple[int, int]) -> None:
    on("cuda", capability)
    found = f"no NVFP4 kernels for NVIDIA Thing (compute capability {capability[0]}.{capability[1]}). What works: "
    with pytest.raises(RuntimeError, match=re.escape(found + platform.WORKS)):
        platform.backend()


@pytest.mark.parametrize("device", [("rocm", (9, 0)), ("xpu", None), ("cuda", None)])
def test_another_vendor_is_refused(on: Choose, device: tuple[Any, ...]) -> None:
    # An AMD GPU of "9.0" must not pass for a Hopper.
    on(*device)
    with pytest.raises(
        RuntimeError, match=re.escape("no NVFP4 kernels for NVIDIA Thing (no NVIDIA GPU). What works: ")
    ):
        platform.backend()


@pytest.mark.parametrize(
    ("device", "provider", "needed"),
    [
        (("cuda", (9, 0)), "sm100", "10.0"),
        (("cuda", (10, 3)), "sm100", "10.0"),
        (("cuda", (10, 0)), "sm90", "9.0"),
        (("cpu",), "sm90", "9.0"),
        (("cpu",), "sm100", "10.0"),
    ],
)
def test_an_impossible_override_is_refused(on: Choose, device: tuple[Any, ...], provider: str, needed: str) -> None:
    on(*device, PROVIDER=provider)
    message = f"NVFP4_PROVIDER={provider} needs a GPU of compute capability {needed}, found "
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        platform.backend()
    assert platform.WORKS in str(error.value)


def test_stock_serves_on_request_only(on: Choose) -> None:
    on("cuda", (8, 0), PROVIDER="stock")
    assert (platform.backend(), platform.unavailable_reason()) == (None, "NVFP4_PROVIDER=stock")
    on("cpu", PROVIDER="stock")
    with pytest.raises(RuntimeError, match="vLLM has no NVFP4 kernels for CPUs"):
        platform.backend()


def test_a_misspelled_provider_is_an_error(on: Choose) -> None:
    on("cpu", PROVIDER="sm_100")
    with pytest.raises(
        ValueError, match="NVFP4_PROVIDER='sm_100': expected one of auto, sm100, sm90, reference, stock"
    ):
        platform.backend()


@pytest.mark.parametrize(
    ("device", "switches", "expected"),
    [
        (("cuda", (9, 0)), {"ACTIVATIONS": "nvfp4"}, "nvfp4"),
        (("cuda", (9, 0)), {"ACTIVATIONS": "bf16"}, "bf16"),
        (("cuda", (10, 0)), {"ACTIVATIONS": "nvfp4"}, "nvfp4"),
        (("cpu",), {"ACTIVATIONS": "bf16"}, "bf16"),
        (("cuda", (10, 0)), {"ACTIVATIONS": "bf16", "PROVIDER": "reference"}, "bf16"),
    ],
)
def test_activations_on_request(on: Choose, device: tuple[Any, ...], switches: dict[str, str], expected: str) -> None:
    on(*device, **switches)
    assert platform.activations() == expected


def test_activations_that_cannot_be_had_are_refused(on: Choose) -> None:
    on("cuda", (10, 0), ACTIVATIONS="bf16")
    with pytest.raises(ValueError, match="NVFP4_ACTIVATIONS=bf16: the sm100 kernels multiply NVFP4 by NVFP4 only"):
        platform.activations()
    on("cuda", (9, 0), ACTIVATIONS="bf16", PROVIDER="stock")
    with pytest.raises(ValueError, match="NVFP4_ACTIVATIONS=bf16: vLLM's stock kernels decide that themselves"):
        platform.activations()


def test_the_reference_on_a_gpu_runs_eagerly_only(on: Choose) -> None:
    on("cuda", (9, 0), PROVIDER="reference")
    platform.check(enforce_eager=True)
    with pytest.raises(ValueError, match=r"NVFP4_PROVIDER=reference on a GPU .* add --enforce-eager"):
        platform.check(enforce_eager=False)
    on("cpu", PROVIDER="reference")
    platform.check(enforce_eager=False)
    on("cuda", (9, 0), PROVIDER="sm90")
    platform.check(enforce_eager=False)


def test_what_is_refused_is_refused_by_the_check(on: Choose) -> None:
    on("cuda", (12, 0))
    with pytest.raises(RuntimeError, match="no NVFP4 kernels"):
        platform.check(enforce_eager=True)
    on("cuda", (10, 0), ACTIVATIONS="bf16")
    with pytest.raises(ValueError, match="NVFP4_ACTIVATIONS"):
        platform.check(enforce_eager=True)


def test_the_choice_is_logged_once(on: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(platform.logger, "handlers", [handler])
    level = platform.logger.level
    platform.logger.setLevel(logging.INFO)
    on("cuda", (9, 0), PROVIDER="reference")
    for _ in range(3):
        platform.backend()
    on("cuda", (9, 0), PROVIDER="auto")
    platform.backend()
    platform.logger.setLevel(level)
    assert lines == [
        "NVFP4 provider: reference on NVIDIA Thing (compute capability 9.0) (NVFP4_PROVIDER=reference)",
        "NVFP4 provider: sm90 on NVIDIA Thing (compute capability 9.0) (chosen by device)",
    ]


def test_another_models_linears_keep_vllms_kernels(on: Choose) -> None:
    # The class stands first in vLLM's list, for any NVFP4 linear of any model.
    from vllm_nvfp4.linear import Nvfp4RunnerLinearKernel, _for_our_method

    on("cuda", (12, 0))  # where ours would refuse to start
    assert Nvfp4RunnerLinearKernel.is_supported() == (False, "it serves DeepSeek-V4 only")
    on("cuda", (9, 0))
    assert Nvfp4RunnerLinearKernel.is_supported()[0] is False
    token = _for_our_method.set(True)
    try:
        assert Nvfp4RunnerLinearKernel.is_supported() == (True, None)
    finally:
        _for_our_method.reset(token)
