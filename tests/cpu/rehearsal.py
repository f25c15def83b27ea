"""A server in virtual time, for the kubelet of kubelet.py and the real `nvfp4 probe`: what it does is a function of time."""

import argparse
import asyncio
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kustomize
import yaml
from kubelet import Kubelet, run_virtually
from vllm_nvfp4 import probe, probe_machine
from vllm_nvfp4.status import FRONT, SWEEP, State

K8S = Path(__file__).resolve().parents[2] / "k8s"
PYTHON_S = 0.2  # what starting a probe costs


@dataclass(frozen=True)
class Now:
    """A server at one moment.

    beats: (rank, phase, done, total, seconds since its heartbeat); health: status of /health, None: hangs or refused;
    completes: does a request for a token get one; steps: engine steps so far; exit_code: it has ended by itself;
    sweep: (phase, pid, reason) of the process that sends the warm-up's requests.
    """

    beats: tuple[tuple[int, str, int, int, float], ...] = ()
    active: bool = True
    health: int | None = None
    completes: bool = False
    refusal: int | None = None
    steps: float = 0
    exit_code: int | None = None
    sweep: tuple[str, int, str] | None = None


@functools.cache
def parsed(arguments: tuple[str, ...]) -> argparse.Namespace:
    """What `nvfp4 probe` makes of its flags."""
    return probe.parser().parse_args(arguments)


Behaviour = Callable[[float], Now]


class Model:
    """kubelet.Runtime and probe.Machine of a server that behaves as told, from each start anew."""

    def __init__(
        self,
        behave: Behaviour,
        drain_s: float = 0,
        environment: dict[str, str] | None = None,
        python_s: float = PYTHON_S,
    ) -> None:
        self.behave, self.drain_s, self.environment, self.python_s = behave, drain_s, environment or {}, python_s
        self.life = 0

    # ---- Runtime

    async def start(self) -> None:
        self.life += 1
        self.born, self.marks = self._clock(), {}
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        while not self.ended.done():
            code = self.look().exit_code
            if code is not None:
                return code
            await asyncio.wait([self.ended], timeout=1)
        return self.ended.result()

    async def probe(self, command: list[str]) -> bool:
        assert command[:2] == ["nvfp4", "probe"], command
        self.spent_s, self.options = self.python_s, parsed(tuple(command[2:]))
        passed = probe.judge(self, self.options, self.environment).passed
        await asyncio.sleep(self.spent_s)
        return passed

    def signal(self, name: str) -> None:
        if self.ended.done():
            return
        if name == "SIGKILL":
            self.ended.set_result(137)
        elif self.look().active or self.look().health:  # what hangs does not handle signals
            asyncio.get_running_loop().call_later(self.drain_s, lambda: self.ended.done() or self.ended.set_result(0))

    # ---- Machine

    def look(self) -> Now:
        return self.behave(self._clock() - self.born)

    def now(self) -> float:
        return self._clock()

    def states(self) -> list[State]:
        now = self._clock()
        return [
            State(phase, done, total, "bytes", now - age, 0.0, 1, rank)
            for rank, phase, done, total, age in self.look().beats
        ]

    def sweep(self) -> State | None:
        if self.look().sweep is None:
            return None
        phase, pid, reason = self.look().sweep
        return State(phase, 5, 9, "requests", self._clock(), 0.0, pid, SWEEP, reason)

    def alive(self, state: State) -> bool:
        return state.pid == 1 and not self.ended.done()

    def active(self, pid: int) -> bool:
        self.spent_s += probe_machine.WATCH_S
        return self.look().active

    def health(self) -> int | None:
        if self.look().health is None and self.marks:
            self.spent_s += probe_machine.HEALTH_S
        return self.look().health

    def steps(self) -> float | None:
        # A busy engine steps while a probe waits.
        return self.look().steps + self.spent_s * (self.look().steps > 0)

    def complete(self) -> tuple[int, str] | None:
        if self.look().refusal:
            return self.look().refusal, "no"
        if self.look().completes:
            return 200, ""
        self.spent_s += self.options.completion_s
        return None

    def mark(self, event: str) -> None:
        self.marks[event] = self._clock()

    def marked_at(self, event: str) -> float | None:
        return self.marks.get(event)

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()


def rendered(overlay: str, folder: Path) -> list[dict[str, Any]]:
    """The manifests of an overlay, rendered from a copy in `folder` that has an API key."""
    copy = folder / "k8s"
    if not copy.exists():
        shutil.copytree(K8S, copy)
        (copy / "components" / "api-key" / "api-key.env").write_text("api-key=a-key-for-the-rehearsal\n")
    return kustomize.render(copy / "overlays" / overlay)


def pod_template(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The one pod template among manifests."""
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            found.append(manifest["spec"]["template"])
        if manifest["kind"] == "LeaderWorkerSet":
            found.append(manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"])
    (template,) = found
    return template


def watch(spec: dict[str, Any], model: Model, seconds: float, delete_at: float | None = None) -> Kubelet:
    """A kubelet that has run `spec` for `seconds` of virtual time; call it within `run_virtually`."""
    kubelet = Kubelet(spec, model)

    async def main() -> None:
        running = asyncio.create_task(kubelet.run())
        if delete_at is None:
            await asyncio.sleep(seconds)
        else:
            await asyncio.sleep(delete_at)
            await kubelet.delete()
            await running
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_virtually(main)
    return kubelet


def copy_of(spec: dict[str, Any]) -> dict[str, Any]:
    """A deep copy without YAML's aliases."""
    return yaml.safe_load(yaml.safe_dump(spec))


def loading(t: float, num_bytes: int, bytes_per_s: float, quiet_from: float = 0) -> Now:
    """An ordinary start: 20 s of imports, then bytes; `quiet_from`: from then on no heartbeat any more."""
    if t < 0.3:
        return Now()
    if t < 20:
        return Now(((FRONT, "imports", 0, 0, t - 0.3),))
    front = (FRONT, "imports", 0, 0, t - 0.3)
    done = int(min(num_bytes, (t - 20) * bytes_per_s))
    if done < num_bytes:
        return Now((front, (0, "loading", done, num_bytes, 0.5)))
    over = t - 20 - num_bytes / bytes_per_s
    return Now((front, (0, "loaded", 1, 1, over)))


def serving(t: float) -> Now:
    """A server that answers, and has been warmed."""
    beats = ((FRONT, "imports", 0, 0, t), (0, "loaded", 1, 1, t))
    return Now(beats, health=200, completes=True, sweep=("swept", 2, ""))


def environment(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """What the ConfigMap among manifests gives the container and its probes."""
    (found,) = (manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap")
    return found
