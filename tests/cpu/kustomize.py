"""Render the overlays of k8s/ as `kubectl kustomize` does, as far as they use it; whatever else they use is refused.

Why: kustomize is no Python package, and these tests must run where only the locked environment is. What is done here is
held to real output in tests/data/kustomize, and to kubectl itself where there is one.
"""

import base64
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "components", "images", "patches", "secretGenerator"}
# Lists that strategic merge patches merge by a field; every other list is replaced.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "ports": "containerPort",
    "volumes": "name",
    "volumeMounts": "mountPath",
}


class UnsupportedError(ValueError):
    """A kustomization uses what this does not know."""


def render(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization folder, in no particular order."""
    found = _accumulate(folder, [])
    names = [identity(m) for m in found]
    if len(set(names)) != len(names):
        raise UnsupportedError(f"{folder}: two resources of one name: {sorted(names)}")
    return found


def identity(manifest: Manifest) -> tuple[str, str, str]:
    """What a patch is matched by."""
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def _accumulate(folder: Path, found: list[Manifest]) -> list[Manifest]:
    """One folder's work on the resources before it: resources, components, generators, patches, images."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(plan) - KNOWN:
        raise UnsupportedError(f"{folder}: {sorted(unknown)}; expected only {sorted(KNOWN)}")
    for name in plan.get("resources", []):
        path = folder / name
        found = found + (_accumulate(path, []) if path.is_dir() else _documents(path))
    for secret in plan.get("secretGenerator", []):
        found.append(_secret(folder, secret))
    for name in plan.get("components", []):
        found = _accumulate(folder / name, found)
    for patch in plan.get("patches", []):
        if set(patch) != {"path"}:
            raise UnsupportedError(f"{folder}: patch {patch}; expected only a path")
        for document in _documents(folder / patch["path"]):
            found = _patched(found, document, folder)
    for image in plan.get("images", []):
        _set_image(found, image, folder)
    return found


def _documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _secret(folder: Path, plan: dict[str, Any]) -> Manifest:
    options = plan.get("options", {})
    if set(plan) - {"name", "envs", "options"} or set(options) - {"disableNameSuffixHash", "labels"}:
        raise UnsupportedError(f"{folder}: secretGenerator {plan}")
    if options.get("disableNameSuffixHash") is not True:
        raise UnsupportedError(f"{folder}: secretGenerator without disableNameSuffixHash")
    data = {}
    for name in plan["envs"]:
        for line in (folder / name).read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                key, _, value = line.partition("=")
                data[key] = base64.b64encode(value.encode()).decode()
    metadata = {"name": plan["name"], "labels": options["labels"]}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}


def _patched(found: list[Manifest], patch: Manifest, folder: Path) -> list[Manifest]:
    targets = [m for m in found if identity(m) == identity(patch)]
    if len(targets) != 1:
        raise UnsupportedError(f"{folder}: patch of {identity(patch)} has {len(targets)} targets")
    if patch.get("$patch") == "delete":
        return [m for m in found if m is not targets[0]]
    return [merge(m, patch) if m is targets[0] else m for m in found]


def merge(base: Any, patch: Any, field: str = "") -> Any:
    """A strategic merge: objects by key, null deletes, some lists by MERGE_KEYS, the rest replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        if any(key.startswith("$") for key in patch):
            raise UnsupportedError(f"a directive in a patch: {patch}")
        result = {k: merge(v, patch[k], k) if k in patch else v for k, v in base.items() if patch.get(k, v) is not None}
        return result | {k: v for k, v in patch.items() if k not in base and v is not None}
    key = MERGE_KEYS.get(field)
    if isinstance(base, list) and isinstance(patch, list) and key and all(key in item for item in [*base, *patch]):
        bases = {item[key]: item for item in base}
        # The patch's items come first, in the patch's order.
        first = [merge(bases.pop(item[key]), item) if item[key] in bases else item for item in patch]
        return [*first, *bases.values()]
    return patch


def _set_image(found: list[Manifest], image: dict[str, str], folder: Path) -> None:
    if set(image) != {"name", "newTag"}:
        raise UnsupportedError(f"{folder}: image {image}; expected name and newTag")

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for key in ("containers", "initContainers"):
                for container in value.get(key) or []:
                    if container["image"].partition(":")[0] == image["name"]:
                        container["image"] = f"{image['name']}:{image['newTag']}"
            for item in value.values():
                visit(item)

    visit(found)
