"""`nvfp4 probe startup|live|ready`: what a kubelet asks, answered from heartbeats, /health and a real completion.

    startup   passes at the first heartbeat of this start; from then on `live` judges, while the model still loads
    live      passes while loading advances, and once HTTP has answered only while /health answers
    ready     passes when one token was really computed, or the engine is seen to compute others' tokens; with
              NVFP4_WARMUP=sweep not before scripts/warmup.py has proven that requests compile nothing any more

The hard part is to tell slow from stuck. A phase that counts (bytes loaded) is stuck when its count rests for `stall_s`.
A phase that cannot count evenly (imports, graph capture) may be silent for `silent_s` while its processes compute or read;
one that does neither is stuck after `stall_s` too. `nvfp4 probe plan` derives both from a checkpoint and its disk.

An answer is one line on stdout and an exit code: 0 passes, 1 fails, 64 wrong usage. The API key is read from
VLLM_API_KEY, as the server reads it, and never printed.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vllm_nvfp4 import env, status
from vllm_nvfp4.status import ANSWERED, HEALTHY, State


class Verdict(NamedTuple):
    """passed: the probe's answer; reason: one line, which `kubectl describe` shows."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Limits:
    """How long nothing may happen.

    stall_s: a count rests, or a silent phase neither computes nor reads.
    silent_s: a phase without a count, whatever its processes do.
    wedged_s: no completion since the last one, though HTTP answers; then a restart is all that is left.
    """

    stall_s: float = 60
    silent_s: float = 1800
    wedged_s: float = 300

    def validate(self) -> None:
        """Raises: ValueError - not 0 < stall_s <= silent_s, or wedged_s not positive."""
        if not 0 < self.stall_s <= self.silent_s or self.wedged_s <= 0:
            raise ValueError(f"{self}: expected 0 < stall_s <= silent_s and wedged_s > 0; correct the probe's flags")


@dataclass(frozen=True)
class Node:
    """What this node is of a server.

    headless: it serves no HTTP, and only its load is judged. in_group: there are other nodes, for which it may wait idle.
    sweeps: it is ready only once requests have warmed it. strict: and not if that failed.
    """

    headless: bool = False
    in_group: bool = False
    sweeps: bool = False
    strict: bool = False


ALONE = Node()
# Phases with all weights in place; what follows is vLLM's, which leads all ranks through it together.
THROUGH = (status.LOADED, status.WARM, status.UPSTREAM, status.STEPPING, status.CAPTURING, status.READY)


class Machine(Protocol):
    """What a probe can see and remember; probe_machine.py has the real one, tests one in virtual time."""

    def now(self) -> float:
        """CLOCK_MONOTONIC."""

    def states(self) -> list[State]:
        """Every heartbeat."""

    def sweep(self) -> State | None:
        """The heartbeat of the process that sends the warm-up's requests."""

    def alive(self, state: State) -> bool:
        """Does the process that wrote a heartbeat still run? Not another one, that got its id later."""

    def active(self, pid: int) -> bool:
        """Does the process, or one below it, compute or read? Takes a second to say."""

    def health(self) -> int | None:
        """Status of GET /health; None: no answer."""

    def steps(self) -> float | None:
        """Engine steps so far, from /metrics; None: no answer."""

    def complete(self) -> tuple[int, str] | None:
        """Status and body of a request for one token; None: no answer in time."""

    def mark(self, event: str) -> None:
        """Remember an event for later probes."""

    def marked_at(self, event: str) -> float | None:
        """When it happened last; None: not in this server's life."""


def startup(machine: Machine) -> Verdict:
    """Has this server begun?"""
    states = machine.states()
    if not states:
        return Verdict(False, "no heartbeat yet")
    if not machine.alive(_front(states)):
        return Verdict(False, f"process {_front(states).pid} of the last heartbeat is gone")
    return Verdict(True, f"started: {_shown(_newest(states))}")


def live(machine: Machine, limits: Limits, node: Node = ALONE) -> Verdict:
    """Would a restart help?

    Raises: ValueError - as Limits.validate.
    """
    limits.validate()
    states = machine.states()
    if not states:
        return Verdict(False, "no heartbeat")
    if not machine.alive(_front(states)):
        return Verdict(False, f"process {_front(states).pid} is gone")
    if not node.headless and machine.health() == 200:
        machine.mark(HEALTHY)
        return _not_wedged(machine, limits)
    if machine.marked_at(HEALTHY) is not None:
        return Verdict(False, "/health answered before and does not now")
    if node.headless and _loaded(states):
        return Verdict(True, "loaded")
    return _loading(machine, limits, states, node)


def _not_wedged(machine: Machine, limits: Limits) -> Verdict:
    answered = machine.marked_at(ANSWERED)
    if answered is not None and machine.now() - answered > limits.wedged_s:
        age = machine.now() - answered
        return Verdict(False, f"/health answers, but no token for {age:.0f} s (limit {limits.wedged_s:.0f} s)")
    return Verdict(True, "/health answers")


def _loading(machine: Machine, limits: Limits, states: list[State], node: Node) -> Verdict:
    """Does a start advance, by its counts or, where it has none, by what its processes do?"""
    now, counting = machine.now(), [state for state in states if state.working]
    for state in counting:
        if now - state.monotonic_s > limits.stall_s:
            return Verdict(
                False,
                f"{_shown(state)}: no progress for {now - state.monotonic_s:.0f} s (limit {limits.stall_s:.0f} s)",
            )
    newest = _newest(states)
    age = now - newest.monotonic_s
    if counting or age <= limits.stall_s:
        return Verdict(True, f"{_shown(newest)}, {age:.0f} s ago")
    if age > limits.silent_s:
        return Verdict(False, f"{_shown(newest)}: silent for {age:.0f} s (limit {limits.silent_s:.0f} s)")
    if node.in_group:
        return Verdict(True, f"{_shown(newest)}: silent for {age:.0f} s, perhaps waiting for other nodes")
    if machine.active(_front(states).pid):
        return Verdict(True, f"{_shown(newest)}: silent for {age:.0f} s, but computing or reading")
    return Verdict(False, f"{_shown(newest)}: silent for {age:.0f} s, and neither computing nor reading")


def ready(machine: Machine, node: Node = ALONE) -> Verdict:
    """Does a request get a token? An engine that is only busy with others' requests stays in the Service."""
    if node.headless:
        return Verdict(_loaded(machine.states()), "of a node without HTTP: have all ranks loaded?")
    health = machine.health()
    if health != 200:
        return Verdict(False, f"/health: {health or 'no answer'}")
    if node.sweeps and (reason := _unswept(machine, node.strict)):
        return Verdict(False, reason)
    before = machine.steps()
    answer = machine.complete()
    if answer is not None and answer[0] != 200:
        return Verdict(False, f"completion: HTTP {answer[0]}: {answer[1][:200]}")
    if answer is None:
        after = machine.steps()
        if machine.marked_at(ANSWERED) is None:
            return Verdict(False, "completion: no answer in time, and none before")
        if before is None or after is None or after <= before:
            return Verdict(False, f"completion: no answer in time, and the engine rests at {after} steps")
        machine.mark(ANSWERED)
        return Verdict(True, f"busy: no answer in time, but the engine took {after - before:.0f} steps")
    machine.mark(ANSWERED)
    return Verdict(True, "one token")


def _unswept(machine: Machine, strict: bool) -> str:
    """Why the warm-up's requests keep this server from being ready; "" if they do not.

    One that failed does so in strict mode only. Else it is a fallback, logged, and nvfp4_phase{rank="sweep"} shows it.
    """
    sweep = machine.sweep()
    if sweep is None:
        return "the warm-up's requests have not begun"
    if sweep.phase == status.SWEPT:
        return ""
    if sweep.phase == status.SWEEPING and machine.alive(sweep):
        return _shown(sweep)
    reason = sweep.reason or f"process {sweep.pid}, which sent them, is gone without a result"
    return f"the warm-up's requests failed, and NVFP4_STRICT=1: {reason}" if strict else ""


def _front(states: list[State]) -> State:
    """The heartbeat of the process that all others are below."""
    return min(states, key=lambda state: state.rank)


def _loaded(states: list[State]) -> bool:
    """Have all ranks of this node loaded their weights?"""
    ranks = [state for state in states if state.rank != status.FRONT]
    return bool(ranks) and all(state.phase in THROUGH for state in ranks)


def _newest(states: list[State]) -> State:
    return max(states, key=lambda state: state.monotonic_s)


def _shown(state: State) -> str:
    """A heartbeat in few words."""
    who = {status.FRONT: "front", status.SWEEP: "warm-up"}.get(state.rank, f"rank {state.rank}")
    return f"{who} {state.phase}" + (f" {state.done} of {state.total} {state.unit}" if state.total else "")


def main(arguments: list[str]) -> int:
    """Entry point of `nvfp4 probe`."""
    from vllm_nvfp4 import probe_machine, probe_plan

    try:
        options = parser().parse_args(arguments)
    except SystemExit as leaving:
        return 64 if leaving.code else 0
    if options.command == "plan":
        return probe_plan.run(options)
    if not options.status_file:
        print(
            "nvfp4 probe: no status file: set NVFP4_STATUS_FILE as for the server, or give --status-file",
            file=sys.stderr,
        )
        return 64
    try:
        verdict = judge(probe_machine.RealMachine(options.status_file, options.port, options.completion_s), options)
    except ValueError as error:
        print(f"nvfp4 probe: {error}", file=sys.stderr)
        return 64
    print(f"{options.command}: {verdict.reason}")
    return 0 if verdict.passed else 1


def parser() -> argparse.ArgumentParser:
    """The flags of every probe."""
    from vllm_nvfp4 import probe_plan

    found = argparse.ArgumentParser(prog="nvfp4 probe", description=__doc__.splitlines()[0])
    commands = found.add_subparsers(dest="command", required=True)
    for name, judges in (("startup", startup), ("live", live), ("ready", ready)):
        command = commands.add_parser(name, help=(judges.__doc__ or "").splitlines()[0])
        command.add_argument("--status-file", default=env.text(env.STATUS_FILE), help="default: NVFP4_STATUS_FILE")
        command.add_argument("--port", type=int, default=8000, help="of vLLM's HTTP on this host")
        command.add_argument("--completion-s", type=float, default=5.0, help="limit of the completion")
        if name == "live":
            for field in ("stall_s", "silent_s", "wedged_s"):
                flag, default = f"--{field.replace('_', '-')}", getattr(Limits, field)
                command.add_argument(flag, type=float, default=default, help=f"default {default:g}")
    probe_plan.add_arguments(commands.add_parser("plan", help=(probe_plan.__doc__ or "").splitlines()[0]))
    return found


def judge(machine: Machine, options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Verdict:
    """The verdict; a LeaderWorkerSet says in the environment which node this is, as it does to scripts/serve.sh.

    Raises: ValueError - as Limits.validate, or a heartbeat file that holds something else.
    """
    index, size = environment.get("LWS_WORKER_INDEX") or 0, environment.get("LWS_GROUP_SIZE") or 1
    node = Node(
        headless=int(index) > 0,
        in_group=int(size) > 1,
        sweeps=environment.get(env.WARMUP.name) == "sweep",
        strict=environment.get(env.STRICT.name) == "1",
    )
    if options.command == "startup":
        return startup(machine)
    if options.command == "ready":
        return ready(machine, node)
    return live(machine, Limits(options.stall_s, options.silent_s, options.wedged_s), node)
