"""deploy/kubernetes is valid, keeps its rules, and each rule finds its mistake."""

import copy
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from testkit.stack import ROOT
from tests.kubernetes.kustomize import OVERLAYS, Manifest, build, patched
from tests.kubernetes.rules import RULES, Rule, rules_broken, workloads

VERSIONS = ("1.35", "1.36", "1.37")
"""The versions that Kubernetes maintains."""


@pytest.fixture(scope="module", params=["trial", "production"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(OVERLAYS / request.param)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_and_has_no_unknown_field(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_manifests_keep_the_rule(manifests: list[Manifest], rule: Rule) -> None:
    assert list(rule(manifests)) == []


MISTAKES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "edge may write into its image": (
        "Deployment/edge",
        [
            {
                "op": "replace",
                "path": "/spec/template/spec/containers/0/securityContext/readOnlyRootFilesystem",
                "value": False,
            }
        ],
    ),
    "app may run as root": (
        "Deployment/app",
        [{"op": "remove", "path": "/spec/template/spec/securityContext/runAsNonRoot"}],
    ),
    "the namespace does not enforce the restricted standard": (
        "Namespace/velikiy",
        [{"op": "replace", "path": "/metadata/labels/pod-security.kubernetes.io~1enforce", "value": "baseline"}],
    ),
    "relay gets a token of the API": (
        "Deployment/relay",
        [{"op": "remove", "path": "/spec/template/spec/automountServiceAccountToken"}],
    ),
    "edge is throttled, so it may lose its lease or delay others while it holds a lock": (
        "Deployment/edge",
        [{"op": "add", "path": "/spec/template/spec/containers/0/resources/limits/cpu", "value": "1"}],
    ),
    "app runs an image without a version": (
        "Deployment/app",
        [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "velikiy-app"}],
    ),
    "edge mounts the secrets ['app']": (
        "Deployment/edge",
        [{"op": "replace", "path": "/spec/template/spec/volumes/0/secret/secretName", "value": "app"}],
    ),
    "app has DATABASE_URL in its manifest": (
        "Deployment/app",
        [
            {
                "op": "add",
                "path": "/spec/template/spec/containers/0/env/0",
                "value": {"name": "DATABASE_URL", "value": "x"},
            }
        ],
    ),
    "app has settings that do not exist: ['EGDE_TTL']": (
        "ConfigMap/settings",
        [{"op": "add", "path": "/data/EGDE_TTL", "value": "5"}],
    ),
    "a stranger reaches edge:8081": (
        "NetworkPolicy/edge",
        [{"op": "remove", "path": "/spec/ingress/1/from"}],
    ),
    "edge does not reach app:5000": (
        "NetworkPolicy/app",
        [{"op": "remove", "path": "/spec/ingress/0"}],
    ),
    "the readinessProbe of edge does not ask /readyz at the port control": (
        "Deployment/edge",
        [{"op": "replace", "path": "/spec/template/spec/containers/0/readinessProbe/httpGet/port", "value": "http"}],
    ),
    "an app is killed before it has finished its requests": (
        "Deployment/app",
        [{"op": "replace", "path": "/spec/template/spec/terminationGracePeriodSeconds", "value": 15}],
    ),
    "an edge does not leave before it is stopped": (
        "Deployment/edge",
        [{"op": "remove", "path": "/spec/template/spec/containers/0/lifecycle"}],
    ),
    "a rollout takes an instance of edge away before its successor is ready": (
        "Deployment/edge",
        [{"op": "replace", "path": "/spec/strategy/rollingUpdate/maxUnavailable", "value": 1}],
    ),
    "a drain may take every instance of app at once, or none": (
        "PodDisruptionBudget/app",
        [{"op": "replace", "path": "/spec/maxUnavailable", "value": 0}],
    ),
    "each kubectl apply resets the number of edge": (
        "Deployment/edge",
        [{"op": "add", "path": "/spec/replicas", "value": 3}],
    ),
    "a rollout has more edges than MAX_EDGES": (
        "HorizontalPodAutoscaler/edge",
        [{"op": "replace", "path": "/spec/maxReplicas", "value": 64}],
    ),
    "a rollout of apps takes more connections than PostgreSQL has": (
        "HorizontalPodAutoscaler/app",
        [{"op": "replace", "path": "/spec/maxReplicas", "value": 9}],
    ),
    "edges see one address for all apps": (
        "Service/app",
        [{"op": "remove", "path": "/spec/clusterIP"}],
    ),
    "the service edge leads to a port that is closed to clients, or to none": (
        "Service/edge",
        [{"op": "replace", "path": "/spec/ports/0/targetPort", "value": "control"}],
    ),
}
"""A violation, and the change of a manifest that causes it."""


@pytest.mark.parametrize("violation", MISTAKES)
def test_planted_mistake_is_found(violation: str) -> None:
    target, operations = MISTAKES[violation]
    manifests = copy.deepcopy(build(OVERLAYS / "trial"))
    [manifest] = [it for it in manifests if f"{it['kind']}/{it['metadata']['name']}" == target]
    patched(manifest, operations)
    assert violation in rules_broken(manifests)


def test_trial_has_each_file_that_its_postgresql_reads() -> None:
    [configuration] = [it for it in build(ROOT / "deploy/postgres") if it["kind"] == "ConfigMap"]
    script = (ROOT / "deploy/postgres/create-database.sh").read_text()
    assert set(re.findall(r"/etc/velikiy/([\w.-]+)", script)) <= configuration["data"].keys()


@pytest.mark.parametrize("name", ["migrate", "app", "relay", "edge", "postgres", "redis"])
def test_script_creates_each_secret_that_a_part_mounts(name: str) -> None:
    assert name in workloads(build(OVERLAYS / "trial"))
    script = (ROOT / "deploy/kubernetes/secrets.sh").read_text()
    assert re.search(rf"^ *create {name} ", script, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
@pytest.mark.parametrize("overlay", ["trial", "production"])
def test_kubectl_builds_the_same_manifests(overlay: str) -> None:
    text = subprocess.check_output(["kubectl", "kustomize", OVERLAYS / overlay], text=True)
    names = "|".join(it["metadata"]["name"] for it in build(OVERLAYS / overlay) if it["kind"] == "ConfigMap")
    text = re.sub(rf"\b({names})-[0-9a-z]{{10}}$", r"\1", text, flags=re.MULTILINE)
    assert by_name(list(yaml.safe_load_all(text))) == by_name(build(OVERLAYS / overlay))


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(it["kind"], it["metadata"]["name"]): it for it in manifests}
