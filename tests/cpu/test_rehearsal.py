"""The overlay cpu-demo as Kubernetes would run it: its own command, environment, probes and numbers, on the real clock.

The server is a real one, and what befalls it is real: a slow disk, one that hangs, a killed engine, stopped processes, a
deletion under load. The cases with several starts take a quarter of an hour and are marked `full`. test_rehearsal_virtual.py
has the other overlays and what takes an hour.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from container import Container
from kubelet import Kubelet
from rehearsal import pod_template, rendered

pytestmark = pytest.mark.engine

START_LIMIT_S = 400  # of a start on two cores that others use too
HANG_LIMIT_S, WEDGE_LIMIT_S = 120, 30
BAD_REQUESTS = [
    (b"{", 400),
    (b'{"prompt": [1], "max_tokens": -1}', 400),
    (b'{"prompt": [1], "max_tokens": 100000}', 400),
    (json.dumps({"prompt": [1] * 5000, "max_tokens": 1}).encode(), 400),
    (b'{"prompt": [99999999], "max_tokens": 1}', 400),
    (b'{"prompt": "' + b"a" * 3_000_000 + b'", "max_tokens": 1}', 400),
    (b'{"prompt": [1], "max_tokens": 1, "model": "another"}', 404),
]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rendered("cpu-demo", tmp_path_factory.mktemp("k8s"))


@pytest.fixture
def spec(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return pod_template(manifests)["spec"]


@pytest.fixture
def container(manifests: list[dict[str, Any]], spec: dict[str, Any], tmp_path: Path) -> Iterator[Container]:
    """The server's container, its init containers having run."""

    async def initialise() -> None:
        for raw in spec["initContainers"]:
            init = Container(manifests, spec, tmp_path, raw["name"])
            await init.start()
            assert await init.wait() == 0, init.log.read_text()

    asyncio.run(initialise())
    found = Container(manifests, spec, tmp_path)
    yield found
    found.close()


async def until(condition: Callable[[], Any], limit_s: float, what: str, container: Container) -> float:
    """Seconds until a condition holds."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_s:
            logs = container.log.read_text()[-3000:] + (container.folder / "probes.log").read_text()[-2000:]
            raise AssertionError(f"not {what} within {limit_s} s:\n{logs}")
        await asyncio.sleep(0.1)
    return time.monotonic() - began


def rehearse(spec: dict[str, Any], container: Container, play: Callable[[Kubelet], Awaitable[None]]) -> Kubelet:
    """A kubelet running the pod, while `play` happens to it; then the pod is deleted."""
    kubelet = Kubelet(spec, container)

    async def main() -> None:
        running = asyncio.create_task(kubelet.run())
        await asyncio.sleep(0)
        try:
            await play(kubelet)
        finally:
            await kubelet.delete()
            await running

    asyncio.run(main())
    return kubelet


def test_a_pod_from_its_first_second_to_its_last(spec: dict[str, Any], container: Container) -> None:
    streams: list[list[str]] = []

    async def play(kubelet: Kubelet) -> None:
        await until(
            lambda: "nvfp4_phase{" in container.request("GET", "/metrics", port="side")[1], 20, "metrics", container
        )
        assert container.request("GET", "/health")[0] == 0, "the side port answers before HTTP does"
        await until(lambda: kubelet.ready, START_LIMIT_S, "ready", container)
        await asyncio.to_thread(refuses_what_it_should, container)
        await wedge(kubelet, container)
        stream = asyncio.create_task(asyncio.to_thread(container.stream, 150))
        await asyncio.sleep(1)
        assert not stream.done(), "the stream must still run when the pod is deleted"
        await kubelet.delete()
        streams.append(await stream)

    kubelet = rehearse(spec, container, play)
    (lines,) = streams
    assert lines[-1] == "[DONE]"
    # A server that is busy sends tokens together: lines are not counted.
    tokens = [token for line in lines[:-1] for token in json.loads(line)["choices"][0]["token_ids"] or []]
    assert len(tokens) == 150, "every token of a request that ran came"
    assert kubelet.restarts == 0
    assert kubelet.at("SIGKILL") == []
    assert kubelet.at("exited 0"), kubelet.events
    assert container.api_key not in container.log.read_text()
    assert container.api_key not in (container.folder / "probes.log").read_text()


def refuses_what_it_should(container: Container) -> None:
    """Wrong keys, malformed and oversized requests; after each of them it serves."""
    good = b'{"prompt": [1], "max_tokens": 1}'
    for key in ("", "wrong", container.api_key + "x"):
        assert container.request("POST", "/v1/completions", good, key)[0] == 401
    for body, status in BAD_REQUESTS:
        assert container.request("POST", "/v1/completions", body)[0] == status, body[:60]
        assert container.request("POST", "/v1/completions", good)[0] == 200, f"after {body[:60]!r}"
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                assert container.api_key.encode() not in (folder / "cmdline").read_bytes()
            except OSError:
                continue


async def wedge(kubelet: Kubelet, container: Container) -> None:
    """The engine stops while HTTP goes on: unready, and ready again when it goes on."""
    heartbeat = container.heartbeat()
    assert heartbeat
    os.kill(heartbeat["pid"], signal.SIGSTOP)
    await until(lambda: not kubelet.ready, WEDGE_LIMIT_S, "unready", container)
    assert container.request("GET", "/health")[0] == 200, "vLLM's own /health does not notice"
    assert kubelet.restarts == 0
    os.kill(heartbeat["pid"], signal.SIGCONT)
    await until(lambda: kubelet.ready, 30, "ready again", container)


@pytest.mark.full
def test_a_slow_disk_survives_and_a_dead_one_does_not(spec: dict[str, Any], container: Container) -> None:
    disk = container.slow_disk()
    disk.set(120e3)  # 17 MB in 143 s: more than a hang may take

    async def play(kubelet: Kubelet) -> None:
        def loaded(num_bytes: float) -> Callable[[], bool]:
            return lambda: bool(h := container.heartbeat()) and h["phase"] == "loading" and h["done"] >= num_bytes

        await until(loaded(1), START_LIMIT_S, "loading", container)
        await until(loaded(14e6), 200, "loading on", container)
        assert kubelet.restarts == 0
        disk.set(-1)
        took = await until(lambda: kubelet.restarts == 1, HANG_LIMIT_S, "restarted", container)
        assert took > 60
        disk.set(0)
        await until(lambda: kubelet.ready, START_LIMIT_S, "ready", container)
        assert kubelet.restarts == 1

    kubelet = rehearse(spec, container, play)
    assert len(kubelet.at("liveness failed")) == 1


@pytest.mark.full
def test_dead_and_stopped_processes_are_restarted(spec: dict[str, Any], container: Container) -> None:
    async def play(kubelet: Kubelet) -> None:
        await until(lambda: kubelet.ready, START_LIMIT_S, "ready", container)
        os.kill(container.heartbeat()["pid"], signal.SIGKILL)
        await until(lambda: not kubelet.ready, WEDGE_LIMIT_S, "unready", container)
        await until(lambda: kubelet.restarts == 1, HANG_LIMIT_S, "restarted", container)
        await until(lambda: kubelet.ready, START_LIMIT_S, "ready", container)
        os.kill(container.heartbeat(".front")["pid"], signal.SIGSTOP)
        await until(lambda: not kubelet.ready, WEDGE_LIMIT_S, "unready", container)
        await until(lambda: kubelet.restarts == 2, HANG_LIMIT_S, "restarted", container)
        await until(lambda: kubelet.ready, START_LIMIT_S, "ready", container)

    kubelet = rehearse(spec, container, play)
    assert kubelet.at("SIGKILL"), "a stopped process answers no SIGTERM"
    assert kubelet.restarts == 2
