"""What a kubelet does with one container of a pod, from the pod's own numbers: probes, thresholds, restarts, deletion.

The same code runs against a real process on the real clock, and against a model of one in virtual time (`run_virtually`),
where 40 minutes take a moment. Modelled as Kubernetes documents it (Pod lifecycle; Configure probes): liveness and
readiness start when startup has passed once; each probe has its own ticker, and ticks during a probe are dropped; a
probe past its timeout failed; a probe may bring its own grace period; preStop counts against the grace; no liveness
while a pod terminates; a container that ends is started again.
"""

import asyncio
import math
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

Pod = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One probe with Kubernetes' defaults filled in."""

    command: list[str]
    initial_delay_s: float
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int
    grace_s: float | None

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Probe":
        unknown = set(raw) - {
            "exec", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold",
            "terminationGracePeriodSeconds",
        }  # fmt: skip
        assert not unknown, f"the rehearsal does not know {unknown} of a probe"
        return cls(
            raw["exec"]["command"],
            raw.get("initialDelaySeconds", 0),
            raw.get("periodSeconds", 10),
            raw.get("timeoutSeconds", 1),
            raw.get("successThreshold", 1),
            raw.get("failureThreshold", 3),
            raw.get("terminationGracePeriodSeconds"),
        )


class Runtime(Protocol):
    """Where the container runs. All calls may be cancelled."""

    async def start(self) -> None:
        """Start the container's process."""

    async def wait(self) -> int:
        """Exit code, once it has ended."""

    async def probe(self, command: list[str]) -> bool:
        """Run a probe's command in the container; True: exit code 0. Cancelled when it takes too long."""

    def signal(self, name: str) -> None:
        """Send SIGTERM or SIGKILL to the container's first process; SIGKILL ends all of them."""


@dataclass
class Kubelet:
    """Runs container `name` of a pod (a PodSpec) until it is deleted; `events` has (seconds, what happened)."""

    spec: Pod
    runtime: Runtime
    name: str = "server"
    events: list[tuple[float, str]] = field(default_factory=list)
    started: bool = False
    ready: bool = False
    restarts: int = 0
    terminating: bool = False

    def __post_init__(self) -> None:
        (self.container,) = (c for c in self.spec["containers"] if c["name"] == self.name)
        kinds = ("startup", "liveness", "readiness")
        self.probes = {k: Probe.of(self.container[f"{k}Probe"]) for k in kinds if f"{k}Probe" in self.container}
        lifecycle = self.container.get("lifecycle", {})
        assert set(lifecycle) <= {"preStop"}, lifecycle
        self.pre_stop_s = lifecycle["preStop"]["sleep"]["seconds"] if lifecycle else 0
        self.grace_s = self.spec.get("terminationGracePeriodSeconds", 30)
        self.doomed: asyncio.Future[float] | None = None

    def note(self, what: str) -> None:
        """Remember what happened now."""
        self.events.append((asyncio.get_running_loop().time() - self.began, what))

    def at(self, what: str) -> list[float]:
        """When it happened."""
        return [when for when, event in self.events if event.startswith(what)]

    async def run(self) -> None:
        """Keep the container running until `delete`."""
        self.began = asyncio.get_running_loop().time()
        while not self.terminating:
            await self._live()

    async def delete(self) -> None:
        """Delete the pod: out of the Service at once, then the container ends."""
        self.terminating = True
        self._set_ready(False)
        self.note("deleted")
        if self.doomed and not self.doomed.done():
            self.doomed.set_result(self.grace_s)

    async def _live(self) -> None:
        """One life of the container."""
        self.started, self.doomed = "startup" not in self.probes, asyncio.get_running_loop().create_future()
        await self.runtime.start()
        self.note("running")
        watchers = [asyncio.create_task(self._watch(kind, probe)) for kind, probe in self.probes.items()]
        ended = asyncio.create_task(self.runtime.wait())
        await asyncio.wait([ended, self.doomed], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await self._kill(ended, self.doomed.result())
        for watcher in watchers:
            watcher.cancel()
        self._set_ready(False)
        self.note(f"exited {ended.result()}")
        if not self.terminating:
            self.restarts += 1

    async def _kill(self, ended: "asyncio.Task[int]", grace_s: float) -> None:
        """preStop, SIGTERM, SIGKILL, within one grace period."""
        await asyncio.wait([ended], timeout=min(self.pre_stop_s, grace_s))
        self.note("SIGTERM")
        self.runtime.signal("SIGTERM")
        # A kubelet leaves two seconds for SIGTERM, however long preStop took.
        await asyncio.wait([ended], timeout=max(grace_s - self.pre_stop_s, 2))
        if not ended.done():
            self.note("SIGKILL")
            self.runtime.signal("SIGKILL")
            await ended

    async def _watch(self, kind: str, probe: Probe) -> None:
        """Probe at every tick; act on thresholds."""
        loop = asyncio.get_running_loop()
        if kind != "startup":
            while not self.started:
                await asyncio.sleep(0.1)
        await asyncio.sleep(probe.initial_delay_s)
        first, passes, fails = loop.time(), 0, 0
        while not self.doomed.done() or kind == "readiness":
            try:
                async with asyncio.timeout(probe.timeout_s):  # unlike wait_for, it never loses a cancellation
                    passed = await self.runtime.probe(probe.command)
            except TimeoutError:
                passed = False
            passes, fails = (passes + 1, 0) if passed else (0, fails + 1)
            if kind == "startup" and passes >= probe.success_threshold:
                self.started = True
                self.note("started")
                return
            if kind == "readiness":
                if passes >= probe.success_threshold and not self.terminating:
                    self._set_ready(True)
                elif fails >= probe.failure_threshold:
                    self._set_ready(False)
            elif fails >= probe.failure_threshold and not self.doomed.done():
                self.note(f"{kind} failed")
                self.doomed.set_result(self.grace_s if probe.grace_s is None else probe.grace_s)
                return
            # The next tick; one that fell due while the probe ran fires at once, more are lost.
            elapsed = loop.time() - first
            ticks = math.floor(elapsed / probe.period_s + 1e-6)
            await asyncio.sleep((ticks + 1) * probe.period_s - elapsed)

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self.note("ready" if ready else "unready")


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: a timeout passes by moving the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("virtual time stands still: every task waits for something that nobody does")
        self.now += max(timeout, 0)
        return super().select(0)


def run_virtually(main: Callable[[], Coroutine[Any, Any, Any]] | Awaitable[Any]) -> Any:
    """asyncio.run in virtual time."""
    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    # The loop drops what is due within its clock's resolution; ours is exact.
    loop._clock_resolution = 1e-9  # type: ignore[attr-defined]
    try:
        return loop.run_until_complete(main() if callable(main) else main)
    finally:
        loop.close()
