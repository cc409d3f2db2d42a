"""Build an overlay of deploy/kubernetes without a binary: the part of Kustomize that its files use.

A test compares the result with `kubectl kustomize` where kubectl is installed. Differences that are meant: a generated
ConfigMap keeps its plain name, without the digest at its end.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from testkit.stack import ROOT

OVERLAYS = ROOT / "deploy/kubernetes/overlays"
KNOWN = {"apiVersion", "kind", "namespace", "resources", "labels", "images", "configMapGenerator", "patches"}
CLUSTER_WIDE = ("Namespace",)

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """Return the manifests of a folder with a kustomization.yaml."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - KNOWN
    assert not unknown, f"{folder}: tests/kubernetes/kustomize.py does not know {unknown}"
    found = (
        [manifest for name in kustomization["resources"] for manifest in _resource(folder / name)]
        if ("resources" in kustomization)
        else []
    )
    for generator in kustomization.get("configMapGenerator", []):
        _generate(found, folder, generator)
    for patch in kustomization.get("patches", []):
        targets = [manifest for manifest in found if _is_target(manifest, patch["target"])]
        assert targets, f"{folder}: nothing is patched by {patch['target']}"
        for target in targets:
            patched(target, yaml.safe_load(patch["patch"]))
    for manifest in found:
        for image in kustomization.get("images", []):
            _set_image(manifest, image)
        for labels in kustomization.get("labels", []):
            _label(manifest, labels)
        if "namespace" in kustomization and manifest["kind"] not in CLUSTER_WIDE:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
    return found


def _resource(path: Path) -> Iterator[Manifest]:
    if path.is_dir():
        yield from build(path)
    else:
        yield from yaml.safe_load_all(path.read_text())


def _generate(found: list[Manifest], folder: Path, generator: dict[str, Any]) -> None:
    data = dict(literal.split("=", 1) for literal in generator.get("literals", []))
    data |= {name: (folder / name).read_text() for name in generator.get("files", [])}
    if generator.get("behavior") == "merge":
        [existing] = [it for it in found if (it["kind"], it["metadata"]["name"]) == ("ConfigMap", generator["name"])]
        existing["data"] |= data
    else:
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data})


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    return manifest["kind"] == target["kind"] and target.get("name") in (None, manifest["metadata"]["name"])


def patched(manifest: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    """Apply operations of a JSON patch (RFC 6902): add, replace, remove."""
    for operation in operations:
        *path, last = operation["path"].strip("/").split("/")
        parent: Any = manifest
        for step in path:
            parent = parent[int(step)] if isinstance(parent, list) else parent[step.replace("~1", "/")]
        key: Any = int(last) if isinstance(parent, list) else last.replace("~1", "/")
        if operation["op"] == "remove":
            del parent[key]
        elif operation["op"] == "replace" and not isinstance(parent, list):
            assert key in parent, f"nothing to replace at {operation['path']}"
            parent[key] = copy.deepcopy(operation["value"])
        elif operation["op"] == "add" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(operation["value"]))
        else:
            parent[key] = copy.deepcopy(operation["value"])
    return manifest


def pod_template(manifest: Manifest) -> Manifest | None:
    template = manifest.get("spec", {}).get("template")
    return template if template and "spec" in template else None


def _set_image(manifest: Manifest, image: dict[str, str]) -> None:
    for container in (pod_template(manifest) or {"spec": {"containers": []}})["spec"]["containers"]:
        if container["image"] == image["name"]:
            container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"


def _label(manifest: Manifest, labels: dict[str, Any]) -> None:
    marked = [manifest]
    if labels.get("includeTemplates") and (template := pod_template(manifest)):
        marked.append(template)
    for it in marked:
        it.setdefault("metadata", {}).setdefault("labels", {}).update(labels["pairs"])
