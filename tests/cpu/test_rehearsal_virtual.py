"""The kubelet's view of every overlay, in virtual time: survive, restart or leave the Service as Kubernetes would do it.

The numbers are the manifests', the verdicts those of the real `nvfp4 probe`; only server and clock are models. The same with
real processes on the real clock: test_rehearsal.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubelet import Kubelet
from rehearsal import Model, Now, copy_of, environment, loading, pod_template, rendered, serving, watch
from vllm_nvfp4.status import FRONT

GB = 10**9
PRO_BYTES = 898 * GB
WARM_UP_S = 300
LOADED_AT = 20 + 898  # of the ordinary start at 1 GB/s
READY_AT = LOADED_AT + WARM_UP_S
HANG_LIMIT_S, WEDGE_LIMIT_S = 120, 30


SWEEP_S = 200


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rendered("b200-tp8", tmp_path_factory.mktemp("k8s"))


@pytest.fixture(scope="module")
def spec(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return pod_template(manifests)["spec"]


def ordinary(t: float) -> Now:
    return serving(t) if t >= READY_AT else loading(t, PRO_BYTES, GB)


def hung_load(t: float) -> Now:
    """At 400 s nothing moves any more: a dead disk."""
    if t < 400:
        return loading(t, PRO_BYTES, GB)
    front = (FRONT, "imports", 0, 0, t)
    return Now((front, (0, "loading", 380 * GB, PRO_BYTES, t - 400)), active=False)


def one_rank_hung(t: float) -> Now:
    now = loading(t, PRO_BYTES, GB)
    return Now((*now.beats, (5, "loading", 1, PRO_BYTES, max(t - 400, 0)))) if t >= 20 else now


def spinning_load(t: float) -> Now:
    """A count that rests is stuck, however busy its process is."""
    now = hung_load(t)
    return Now(now.beats, active=True)


def silent_load(t: float) -> Now:
    """20 minutes without a heartbeat, but reading."""
    if t >= 1260:
        return serving(t)
    if t < 30:
        return loading(t, PRO_BYTES, GB)
    return Now(((FRONT, "imports", 0, 0, t), (0, "constructing", 0, 0, t - 30)))


def hung_silently(t: float) -> Now:
    now = silent_load(min(t, 600))
    return now if t < 600 else Now(((FRONT, "imports", 0, 0, t), (0, "constructing", 0, 0, t - 30)), active=False)


def spinning_silently(t: float) -> Now:
    return silent_load(t) if t < 30 else Now(((FRONT, "imports", 0, 0, t), (0, "constructing", 0, 0, t - 30)))


def wedged(t: float) -> Now:
    """At 2000 s the engine stops; HTTP goes on."""
    return ordinary(t) if t < 2000 else Now(serving(t).beats, health=200)


def stopped_front(t: float) -> Now:
    return ordinary(t) if t < 2000 else Now(serving(t).beats, active=False)


def overloaded(t: float) -> Now:
    """From 2000 s on no probe gets its token in time, for an hour: others' requests do."""
    return ordinary(t) if t < 2000 else Now(serving(t).beats, health=200, steps=t)


def never_begins(t: float) -> Now:
    return Now(active=False)


def crashing(t: float) -> Now:
    return ordinary(t) if t < 2000 else Now(exit_code=1)


def refusing(t: float) -> Now:
    return ordinary(t) if t < READY_AT else Now(serving(t).beats, health=200, refusal=401)


def died_engine(t: float) -> Now:
    return ordinary(t) if t < 2000 else Now(serving(t).beats, health=503)


def sweeping(*after: Any) -> Callable[[float], Now]:
    """From READY_AT on requests are answered, but their sweep takes SWEEP_S; `after` is what it says then."""

    def behave(t: float) -> Now:
        sweep = after if t >= READY_AT + SWEEP_S else ("sweeping", 1, "") if t >= READY_AT + 5 else None
        return replace(ordinary(t), sweep=sweep)

    return behave


SCENARIOS: dict[str, tuple[Callable[[float], Now], float]] = {
    "ordinary": (ordinary, 1400),
    "hung load": (hung_load, 600),
    "one rank hung": (one_rank_hung, 600),
    "spinning load": (spinning_load, 600),
    "silent load": (silent_load, 1400),
    "hung silently": (hung_silently, 800),
    "spinning silently": (spinning_silently, 3000),
    "wedged": (wedged, 2500),
    "stopped front": (stopped_front, 2200),
    "overloaded": (overloaded, 5600),
    "never begins": (never_begins, 200),
    "crashing": (crashing, 2100),
    "refusing": (refusing, 2000),
    "died engine": (died_engine, 2200),
    "slow probes": (silent_load, 1400),
}


def rehearse(spec: dict[str, Any], name: str) -> Kubelet:
    behave, seconds = SCENARIOS[name]
    # On a node that is short of cores, a probe takes seconds to begin.
    return watch(spec, Model(behave, python_s=4) if name == "slow probes" else Model(behave), seconds)


@pytest.mark.parametrize("name", ["ordinary", "silent load", "overloaded", "slow probes"])
def test_what_only_takes_long_survives(spec: dict[str, Any], name: str) -> None:
    kubelet = rehearse(spec, name)
    assert kubelet.restarts == 0
    assert kubelet.ready
    assert kubelet.at("unready") == []
    assert [what for _, what in kubelet.events] == ["running", "started", "ready"]


def test_ready_comes_with_the_first_token_and_not_before(spec: dict[str, Any]) -> None:
    (ready,) = rehearse(spec, "ordinary").at("ready")
    assert READY_AT <= ready <= READY_AT + 6


@pytest.mark.parametrize(
    ("name", "hung_at"),
    [("hung load", 400), ("one rank hung", 400), ("spinning load", 400), ("hung silently", 600), ("never begins", 0)],
)
def test_a_hang_is_gone_within_two_minutes(spec: dict[str, Any], name: str, hung_at: float) -> None:
    kubelet = rehearse(spec, name)
    died = kubelet.at("exited")[0]
    assert hung_at < died <= hung_at + HANG_LIMIT_S
    assert kubelet.restarts >= 1
    assert kubelet.at("ready") == []


def test_a_silent_phase_that_spins_for_ever_is_ended_by_its_limit(spec: dict[str, Any]) -> None:
    died = rehearse(spec, "spinning silently").at("exited")[0]
    assert 2700 < died <= 2700 + 30 + HANG_LIMIT_S


def test_a_wedged_engine_leaves_the_service_and_is_restarted_later(spec: dict[str, Any]) -> None:
    kubelet = rehearse(spec, "wedged")
    (unready,) = kubelet.at("unready")
    assert 2000 < unready <= 2000 + WEDGE_LIMIT_S
    (died,) = kubelet.at("exited")
    assert 2300 < died <= 2300 + 60


@pytest.mark.parametrize("name", ["stopped front", "died engine"])
def test_an_http_server_that_stops_answering_is_restarted(spec: dict[str, Any], name: str) -> None:
    kubelet = rehearse(spec, name)
    assert 2000 < kubelet.at("unready")[0] <= 2000 + WEDGE_LIMIT_S
    assert 2000 < kubelet.at("exited")[0] <= 2000 + HANG_LIMIT_S


def test_a_crash_is_a_restart(spec: dict[str, Any]) -> None:
    kubelet = rehearse(spec, "crashing")
    assert kubelet.restarts == 1
    assert kubelet.at("exited 1")[0] <= 2001


def test_a_refused_key_is_never_ready_and_no_reason_to_restart(spec: dict[str, Any]) -> None:
    kubelet = rehearse(spec, "refusing")
    assert kubelet.restarts == 0
    assert kubelet.at("ready") == []


def test_ready_waits_for_the_sweep(manifests: list[dict[str, Any]], spec: dict[str, Any]) -> None:
    kubelet = watch(spec, Model(sweeping("swept", 2, ""), environment=environment(manifests)), 2000)
    (ready,) = kubelet.at("ready")
    assert READY_AT + SWEEP_S <= ready <= READY_AT + SWEEP_S + 6
    assert kubelet.restarts == 0


@pytest.mark.parametrize(
    "after", [("sweep failed", 2, "a request failed"), ("sweeping", 2, "")], ids=["said", "killed"]
)
@pytest.mark.parametrize("strict", ["1", "0"])
def test_a_sweep_that_failed_keeps_a_strict_pod_out_of_the_service(
    manifests: list[dict[str, Any]], spec: dict[str, Any], after: Any, strict: str
) -> None:
    model = Model(sweeping(*after), environment=environment(manifests) | {"NVFP4_STRICT": strict})
    kubelet = watch(spec, model, 2000)
    assert (kubelet.ready, kubelet.restarts) == (strict == "0", 0)
    assert [t >= READY_AT + SWEEP_S for t in kubelet.at("ready")] == [True] * (strict == "0")


@pytest.mark.parametrize("mode", ["", "off", "steps"])
def test_without_a_sweep_nothing_waits_for_it(spec: dict[str, Any], mode: str) -> None:
    kubelet = watch(spec, Model(lambda t: replace(ordinary(t), sweep=None), environment={"NVFP4_WARMUP": mode}), 2000)
    assert READY_AT <= kubelet.at("ready")[0] <= READY_AT + 6


@pytest.mark.parametrize(("drain_s", "code"), [(0, 0), (60, 0), (89, 0), (200, 137)])
def test_deletion_leaves_time_to_finish(spec: dict[str, Any], drain_s: float, code: int) -> None:
    kubelet = watch(spec, Model(ordinary, drain_s=drain_s), 0, delete_at=2000)
    (signalled,), (exited,) = kubelet.at("SIGTERM"), kubelet.at(f"exited {code}")
    assert kubelet.at("unready")[0] == 2000, "out of the Service before SIGTERM"
    assert signalled == 2005
    assert exited <= 2000 + spec["terminationGracePeriodSeconds"]


def test_a_node_that_waits_for_others_is_not_hung(tmp_path: Path) -> None:
    spec = pod_template(rendered("multi-node", tmp_path))["spec"]

    def waiting(t: float) -> Now:
        return serving(t) if t > 700 else Now(((FRONT, "imports", 0, 0, t),), active=False)

    alone = watch(spec, Model(waiting), 800)
    assert alone.restarts >= 1
    grouped = watch(spec, Model(waiting, environment={"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}), 800)
    assert (grouped.restarts, grouped.ready) == (0, True)


def test_a_worker_node_serves_no_http_and_is_judged_by_its_load(tmp_path: Path) -> None:
    spec = pod_template(rendered("multi-node", tmp_path))["spec"]
    environment = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
    worker = watch(spec, Model(lambda t: loading(t, PRO_BYTES, GB), environment=environment), 3000)
    assert (worker.restarts, worker.ready) == (0, True)
    assert LOADED_AT <= worker.at("ready")[0] <= LOADED_AT + 6
    hung = watch(spec, Model(hung_load, environment=environment), 600)
    assert 400 < hung.at("exited")[0] <= 400 + HANG_LIMIT_S


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers below a value, also of those that are flags' texts."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in numbers(v, (*path, k))]
    if isinstance(value, list):
        return [p for k, v in enumerate(value) for p in numbers(v, (*path, k))]
    is_number = isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    return [path] if is_number else []


def test_every_number_of_the_probes_decides_something(spec: dict[str, Any]) -> None:
    """Three times or a third of any of them changes what happens in some scenario."""
    (server,) = spec["containers"]
    relevant = {k: server[k] for k in ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle")}
    paths = [p for p in numbers(relevant) if str(_at(relevant, p)) != "8000"]  # test_k8s.py holds ports together
    assert len(paths) == 16
    names = ["hung load", "spinning silently", "wedged", "stopped front", "never begins", "slow probes"]
    expected = {name: rehearse(spec, name).events for name in names}
    for path in paths:
        outcomes = []
        for factor in (3, 1 / 3):
            changed = copy_of(spec)
            value = _at(changed["containers"][0], path)
            new = max(1, round(int(value) * factor))
            if new == int(value):
                continue
            _set(changed["containers"][0], path, str(new) if isinstance(value, str) else new)
            outcomes.append(any(rehearse(changed, name).events != expected[name] for name in names))
        assert any(outcomes), f"{path} may be anything"


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(value: Any, path: tuple[Any, ...], new: Any) -> None:
    _at(value, path[:-1])[path[-1]] = new
