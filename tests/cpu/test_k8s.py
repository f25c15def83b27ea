"""The manifests: valid, restricted, of one piece, and with numbers that follow from what they stand for."""

import copy
import json
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kustomize
import pytest
import yaml
from rehearsal import K8S, pod_template, rendered
from vllm_nvfp4 import probe, probe_machine
from vllm_nvfp4.probe_plan import plan

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
DATA = Path(__file__).resolve().parents[1] / "data"
VERSIONS = ("1.32", kubernetes_validate.latest_version())
CUSTOM = {"LeaderWorkerSet": "leaderworkerset.json", "ServiceMonitor": "servicemonitor.json"}
HANG_LIMIT_S = 120
TEARDOWN_S = 30  # what vLLM needs to end after it drained; 10 to 12 s were seen on a CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k8s")


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    return rendered(request.param, folder)


@pytest.fixture
def spec(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return pod_template(manifests)["spec"]


@pytest.fixture
def server(spec: dict[str, Any]) -> dict[str, Any]:
    (found,) = spec["containers"]
    return found


def named(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


# ---- rendering


def by_identity(manifests: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {kustomize.identity(m): m for m in manifests}


def test_the_renderer_makes_what_kustomize_made() -> None:
    expected = yaml.safe_load_all((DATA / "kustomize" / "expected.yaml").read_text())
    assert by_identity(kustomize.render(DATA / "kustomize" / "overlay")) == by_identity(list(expected))


# Where there is a kubectl, it must agree on our own overlays too; elsewhere there is nothing to ask.
@pytest.mark.parametrize("overlay", OVERLAYS if shutil.which("kubectl") else [])
def test_the_renderer_makes_what_kubectl_makes(overlay: str, folder: Path) -> None:
    ours = rendered(overlay, folder)
    command = ["kubectl", "kustomize", str(folder / "k8s" / "overlays" / overlay)]
    theirs = yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert by_identity(ours) == by_identity(list(theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"namePrefix": "x-"}, "namePrefix"),
        ({"patches": [{"patch": "x", "target": {}}]}, "expected only a path"),
        ({"images": [{"name": "program", "newName": "x"}]}, "expected name and newTag"),
        ({"secretGenerator": [{"name": "s", "literals": ["a=b"]}]}, "secretGenerator"),
        ({"secretGenerator": [{"name": "s", "envs": ["s.env"]}]}, "disableNameSuffixHash"),
        ({"resources": ["../base", "../base"], "patches": []}, "two resources of one name"),
    ],
)
def test_the_renderer_refuses_what_it_does_not_know(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copytree(DATA / "kustomize", tmp_path / "k")
    path = tmp_path / "k" / "overlay" / "kustomization.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(kustomize.UnsupportedError, match=message):
        kustomize.render(path.parent)


def test_a_patch_without_a_target_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "kustomize", tmp_path / "k")
    patch = tmp_path / "k" / "overlay" / "patches.yaml"
    patch.write_text(patch.read_text().replace("name: gone", "name: absent"))
    with pytest.raises(kustomize.UnsupportedError, match="has 0 targets"):
        kustomize.render(patch.parent)


def test_without_an_api_key_nothing_is_rendered(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s", ignore=shutil.ignore_patterns("api-key.env"))
    with pytest.raises(FileNotFoundError, match=r"api-key\.env"):
        kustomize.render(tmp_path / "k8s" / "overlays" / "b200-tp8")


# ---- schemas


def validate(manifest: dict[str, Any]) -> None:
    """Against Kubernetes' schemas, or a custom resource's own and Kubernetes' for its pods."""
    if manifest["kind"] in CUSTOM:
        jsonschema.validate(manifest, json.loads((DATA / "k8s" / CUSTOM[manifest["kind"]]).read_text()))
        if manifest["kind"] == "LeaderWorkerSet":
            template = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]
            labels = {"matchLabels": template["metadata"]["labels"]}
            deployment = {"selector": labels, "template": template}
            validate({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {}, "spec": deployment})
        return
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_manifest_is_valid(manifests: list[dict[str, Any]]) -> None:
    assert len(manifests) >= 8
    for manifest in manifests:
        validate(manifest)


def test_the_service_monitor_is_valid_and_finds_its_service(folder: Path) -> None:
    rendered("b200-tp8", folder)
    overlay = folder / "k8s" / "overlays" / "monitored"
    overlay.mkdir(exist_ok=True)
    parts = {"resources": ["../b200-tp8"], "components": ["../../components/service-monitor"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    manifests = kustomize.render(overlay)
    for manifest in manifests:
        validate(manifest)
    monitor = named(manifests, "ServiceMonitor")["nvfp4"]["spec"]
    service = named(manifests, "Service")["nvfp4-metrics"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {e["port"] for e in monitor["endpoints"]} == {p["name"] for p in service["spec"]["ports"]}
    assert service["spec"]["publishNotReadyAddresses"] is True, "a load is watched before the pod is ready"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbe", "periodSecond"), 3),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbe", "periodSeconds"), "3"),
        ("Service", ("spec", "ports", 0, "port"), "x"),
        ("LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "restartPolicy"), "Always"),
        ("LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "container"), []),
    ],
)
def test_a_slip_of_the_pen_is_refused(folder: Path, kind: str, path: tuple[Any, ...], value: Any) -> None:
    overlay = "multi-node" if kind == "LeaderWorkerSet" else "b200-tp8"
    manifest = copy.deepcopy(next(m for m in rendered(overlay, folder) if m["kind"] == kind))
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


# ---- Pod Security "restricted", and a little more


def violations(spec: dict[str, Any]) -> list[str]:
    """What Pod Security's profile `restricted` (1.32) forbids in a PodSpec, and what we do beyond it."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found += [f"volume {v['name']}" for v in spec["volumes"] if set(v) - {"name"} - allowed]
    pod = spec.get("securityContext", {})
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        security = container.get("securityContext", {})
        merged = {**pod, **security}
        rules = {
            "runAsNonRoot": merged.get("runAsNonRoot") is True,
            "runAsUser": merged.get("runAsUser", 0) != 0,
            "seccompProfile": merged.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "privileged": not security.get("privileged"),
            "allowPrivilegeEscalation": security.get("allowPrivilegeEscalation") is False,
            "drop ALL": security.get("capabilities", {}).get("drop") == ["ALL"],
            "add": set(security.get("capabilities", {}).get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
            "procMount": security.get("procMount", "Default") == "Default",
            # Not asked by the profile:
            "readOnlyRootFilesystem": security.get("readOnlyRootFilesystem") is True,
            "memory limit": "memory" in container.get("resources", {}).get("limits", {}),
            "image tag": ":" in container["image"] and not container["image"].endswith(":latest"),
        }
        found += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    if spec.get("automountServiceAccountToken") is not False:
        found.append("automountServiceAccountToken")
    return found


def test_pods_are_restricted(spec: dict[str, Any]) -> None:
    assert violations(spec) == []


def _break(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        place: Any = spec
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (_break("hostNetwork", value=True), "hostNetwork"),
        (_break("volumes", 0, value={"name": "h", "hostPath": {"path": "/"}}), "volume h"),
        (_break("securityContext", "runAsNonRoot", value=False), "server: runAsNonRoot"),
        (_break("securityContext", "runAsUser", value=0), "server: runAsUser"),
        (_break("securityContext", "seccompProfile", value={"type": "Unconfined"}), "server: seccompProfile"),
        (
            _break("containers", 0, "securityContext", "allowPrivilegeEscalation", value=True),
            "server: allowPrivilegeEscalation",
        ),
        (_break("containers", 0, "securityContext", "capabilities", value={}), "server: drop ALL"),
        (
            _break("containers", 0, "securityContext", "readOnlyRootFilesystem", value=False),
            "server: readOnlyRootFilesystem",
        ),
        (_break("containers", 0, "image", value="nvfp4-deepseek-v4"), "server: image tag"),
        (_break("automountServiceAccountToken", value=True), "automountServiceAccountToken"),
    ],
)
def test_a_pod_that_is_not_restricted_is_noticed(
    folder: Path, change: Callable[[dict[str, Any]], None], violation: str
) -> None:
    spec = copy.deepcopy(pod_template(rendered("b200-tp8", folder))["spec"])
    change(spec)
    assert violation in violations(spec)


def test_the_key_is_in_the_secret_only(manifests: list[dict[str, Any]], server: dict[str, Any]) -> None:
    assert "--api-key" not in server["args"]
    (variable,) = server["env"]
    assert set(variable["valueFrom"]) == {"secretKeyRef"}
    for manifest in manifests:
        assert "a-key-for-the-rehearsal" not in json.dumps(manifest)
    assert named(manifests, "ConfigMap")["nvfp4"]["data"]["NVFP4_REQUIRE_API_KEY"] == "1"


# ---- of one piece


def test_what_is_referred_to_is_there(manifests: list[dict[str, Any]], spec: dict[str, Any]) -> None:
    assert spec["serviceAccountName"] in named(manifests, "ServiceAccount")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in named(manifests, "ConfigMap")
        for variable in container.get("env", []):
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in named(manifests, "Secret")[reference["name"]]["data"]
        volumes = {v["name"]: v for v in spec["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} <= set(volumes)
    claims = {v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    assert claims == set(named(manifests, "PersistentVolumeClaim"))


def test_selectors_find_the_pods(manifests: list[dict[str, Any]]) -> None:
    template = pod_template(manifests)
    labels = {**template["metadata"]["labels"], "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    for service in named(manifests, "Service").values():
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for manifest in named(manifests, kind).values():
            assert manifest["spec"][field]["matchLabels"].items() <= labels.items()
    for deployment in named(manifests, "Deployment").values():
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_images_are_of_this_version(manifests: list[dict[str, Any]], spec: dict[str, Any]) -> None:
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    has_gpus = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
    expected = f"nvfp4-deepseek-v4:{project['version']}{'' if has_gpus else '-cpu'}"
    images = {c["image"] for c in [*spec.get("initContainers", []), *spec["containers"]]}
    assert images == {expected}


def test_ports_agree(manifests: list[dict[str, Any]], server: dict[str, Any]) -> None:
    environment = named(manifests, "ConfigMap")["nvfp4"]["data"]
    ports = {port["name"]: str(port["containerPort"]) for port in server["ports"]}
    assert ports == {"http": environment["NVFP4_PORT"], "side": environment["NVFP4_SIDE_PORT"]}
    for kind in ("livenessProbe", "readinessProbe"):
        assert parsed(server, kind).port == int(ports["http"])


def test_a_group_of_nodes_has_the_pods_of_one(folder: Path) -> None:
    group = copy.deepcopy(pod_template(rendered("multi-node", folder)))
    alone = copy.deepcopy(pod_template(rendered("b200-tp8", folder)))
    group["spec"]["containers"][0].pop("args")
    alone["spec"]["containers"][0].pop("args")
    alone["spec"].pop("nodeSelector")
    assert group == alone


def test_a_groups_own_service_meets_none_of_ours(folder: Path) -> None:
    manifests = rendered("multi-node", folder)
    (group,) = named(manifests, "LeaderWorkerSet")
    assert group not in named(manifests, "Service")


# ---- numbers


def parsed(server: dict[str, Any], kind: str) -> Any:
    command = server[kind]["exec"]["command"]
    assert command[:2] == ["nvfp4", "probe"]
    return probe.parser().parse_args(command[2:])


def test_limits_follow_from_the_checkpoint_and_its_disk(
    manifests: list[dict[str, Any]], server: dict[str, Any]
) -> None:
    (workload,) = [m for m in manifests if m["kind"] in ("Deployment", "LeaderWorkerSet")]
    facts = {key: int(workload["metadata"]["annotations"][f"nvfp4/{key}"]) for key in FACTS}
    expected = plan(*facts.values())
    live = parsed(server, "livenessProbe")
    assert (live.stall_s, live.silent_s) == (expected.stall_s, expected.silent_s)
    if workload["kind"] == "Deployment":
        assert workload["spec"]["progressDeadlineSeconds"] == expected.progress_deadline_s


FACTS = ("checkpoint-bytes", "largest-tensor-bytes", "disk-bytes-per-s")


def test_a_hang_is_gone_within_two_minutes_at_worst(server: dict[str, Any]) -> None:
    raw, live = server["livenessProbe"], parsed(server, "livenessProbe")
    probes_s = raw["periodSeconds"] * raw["failureThreshold"] + raw["timeoutSeconds"]
    assert live.stall_s + probes_s + raw["terminationGracePeriodSeconds"] <= HANG_LIMIT_S
    raw = server["startupProbe"]
    probes_s = raw["periodSeconds"] * raw["failureThreshold"] + raw["timeoutSeconds"]
    assert probes_s + raw["terminationGracePeriodSeconds"] <= HANG_LIMIT_S


def test_probes_have_time_for_what_they_ask(server: dict[str, Any]) -> None:
    ready = parsed(server, "readinessProbe")
    needed = ready.completion_s + probe_machine.HEALTH_S + 2 * probe_machine.QUICK_S
    assert server["readinessProbe"]["timeoutSeconds"] > needed
    assert server["livenessProbe"]["timeoutSeconds"] > probe_machine.HEALTH_S + probe_machine.WATCH_S


def test_running_requests_may_finish(
    manifests: list[dict[str, Any]], spec: dict[str, Any], server: dict[str, Any]
) -> None:
    drain_s = int(named(manifests, "ConfigMap")["nvfp4"]["data"]["NVFP4_DRAIN_S"])
    pre_stop_s = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop_s > 0
    assert pre_stop_s + drain_s + TEARDOWN_S <= spec["terminationGracePeriodSeconds"]
