"""The rules for the manifests of deploy/kubernetes. Each rule yields a sentence for each violation."""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from testkit.stack import ROOT
from tests.kubernetes.kustomize import Manifest, pod_template
from velikiy.server.stopping import LEAVING_S
from velikiy.settings import ServiceSettings

NAME = "app.kubernetes.io/name"

Rule = Callable[[list[Manifest]], Iterator[str]]

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


# ---- what the rules look at ----


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {it["metadata"]["name"]: it for it in manifests if it["kind"] in kinds}


def workloads(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the pod of each Deployment, StatefulSet and Job, by its name."""
    return {it["metadata"]["name"]: template for it in manifests if (template := pod_template(it))}


def containers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for name, template in workloads(manifests).items():
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
            yield name, container


def settings(manifests: list[Manifest], name: str) -> dict[str, str]:
    """Return the environment of a part that is written in its manifest and in the map that it names."""
    maps = of_kind(manifests, "ConfigMap")
    found: dict[str, str] = {}
    for container in workloads(manifests)[name]["spec"]["containers"]:
        for source in container.get("envFrom", []):
            found |= maps[source["configMapRef"]["name"]]["data"]
        found |= {it["name"]: it.get("value", "") for it in container.get("env", [])}
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


# ---- the restricted Pod Security Standard, and more ----


@rule
def pods_are_restricted(manifests: list[Manifest]) -> Iterator[str]:
    for name, template in workloads(manifests).items():
        spec, context = template["spec"], template["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name} may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name} may use every system call"
        if any(spec.get(it) for it in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name} shares a namespace of its node"
        if any("hostPath" in volume for volume in spec.get("volumes", [])):
            yield f"{name} mounts a folder of its node"
    for name, container in containers(manifests):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain rights"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} has capabilities"
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{name} may write into its image"
        if context.get("privileged") or any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name} reaches its node"
    for namespace in of_kind(manifests, "Namespace").values():
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted standard"


@rule
def no_pod_speaks_to_the_api(manifests: list[Manifest]) -> Iterator[str]:
    for name, template in workloads(manifests).items():
        if template["spec"].get("automountServiceAccountToken") is not False:
            yield f"{name} gets a token of the API"
        if template["spec"].get("enableServiceLinks") is not False:
            yield f"{name} gets variables of all services, such as REDIS_PORT"
    if of_kind(manifests, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield "rights on the API are granted"


@rule
def memory_is_bounded_and_cpu_is_requested(manifests: list[Manifest]) -> Iterator[str]:
    for name, container in containers(manifests):
        resources = container.get("resources", {})
        if "memory" not in resources.get("limits", {}):
            yield f"{name} may use all memory of its node"
        if "cpu" not in resources.get("requests", {}):
            yield f"{name} requests no CPU, by which it is placed and scaled"
        if "cpu" in resources.get("limits", {}):
            yield f"{name} is throttled, so it may lose its lease or delay others while it holds a lock"
    for name, template in workloads(manifests).items():
        for volume in template["spec"].get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name} may fill the disk of its node with {volume['name']}"


@rule
def images_have_a_version(manifests: list[Manifest]) -> Iterator[str]:
    tags: dict[str, set[str]] = defaultdict(set)
    for name, container in containers(manifests):
        image, _, tag = container["image"].rpartition(":")
        if not image or tag == "latest":
            yield f"{name} runs an image without a version"
        tags["ours" if "velikiy-" in image else image].add(tag)
    if len(tags["ours"]) > 1:
        yield f"apps and edges have different versions: {sorted(tags['ours'])}"


# ---- secrets ----


@rule
def each_part_has_a_secret_of_its_own(manifests: list[Manifest]) -> Iterator[str]:
    if of_kind(manifests, "Secret"):
        yield "a Secret is part of the manifests"
    for name, template in workloads(manifests).items():
        secrets = [it["secret"]["secretName"] for it in template["spec"].get("volumes", []) if "secret" in it]
        if secrets != [name]:
            yield f"{name} mounts the secrets {secrets}"
    for name, container in containers(manifests):
        for it in container.get("env", []):
            if "secretKeyRef" in it.get("valueFrom", {}):
                yield f"{name} has a secret in its environment, which every child inherits"
            if re.search("PASSWORD$|SECRET$|_URL$", it["name"]):
                yield f"{name} has {it['name']} in its manifest"
        if any("secretRef" in it for it in container.get("envFrom", [])):
            yield f"{name} has secrets in its environment"


@rule
def settings_exist(manifests: list[Manifest]) -> Iterator[str]:
    known = {name.upper() for name in ServiceSettings.model_fields} | {"PGREQUIREAUTH", "POD_IP", "POD_NAMESPACE"}
    known |= set(re.findall(r'^: "\$\{([A-Z_]+):=', (ROOT / "edge/start").read_text(), re.MULTILINE))
    for name in ("app", "relay", "edge"):
        if unknown := settings(manifests, name).keys() - known:
            yield f"{name} has settings that do not exist: {sorted(unknown)}"
        if "AUTH" not in settings(manifests, name):
            yield f"{name} has no AUTH"


# ---- who speaks to whom ----


def reachable(manifests: list[Manifest], source: str | None, target: str, port: int) -> bool:
    """Return whether the policies let `source` (None: a program outside of the namespace) reach this port of
    `target`."""
    pods = {name: template["metadata"]["labels"] for name, template in workloads(manifests).items()}
    policies = list(of_kind(manifests, "NetworkPolicy").values())
    leaves = source is None or _permits(policies, "Egress", "to", pods[source], pods[target], port)
    return leaves and _permits(policies, "Ingress", "from", pods[target], pods[source] if source else None, port)


def _permits(
    policies: list[Manifest], direction: str, side: str, labels: dict[str, str], other: dict[str, str] | None, port: int
) -> bool:
    selected = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], labels)
    ]
    if not selected:
        return True
    for spec in selected:
        for way in spec.get(direction.lower(), []):
            ports = [it["port"] for it in way.get("ports", [])]
            peers = way.get(side)
            if (not ports or port in ports) and (peers is None or any(_is_peer(peer, other) for peer in peers)):
                return True
    return False


def _is_peer(peer: dict[str, Any], labels: dict[str, str] | None) -> bool:
    if labels is None or "ipBlock" in peer or "namespaceSelector" in peer:
        return False
    return matches(peer["podSelector"], labels)


WAYS = {
    ("edge", "app", 5000),
    ("edge", "edge", 8081),
    ("edge", "redis", 6379),
    ("app", "edge", 8081),
    ("app", "postgres", 5432),
    ("app", "redis", 6379),
    ("relay", "edge", 8081),
    ("relay", "postgres", 5432),
    ("relay", "redis", 6379),
    ("migrate", "postgres", 5432),
}
"""As the networks of compose.yaml, and narrower: by port."""

PORTS = {"edge": (8080, 8081), "app": (5000,), "postgres": (5432,), "redis": (6379,)}


@rule
def inside_is_closed(manifests: list[Manifest]) -> Iterator[str]:
    parts = workloads(manifests).keys()
    for target, ports in PORTS.items():
        for port in ports if target in parts else ():
            for source in (*parts, None):
                # Clients of the edge may be anywhere, and a pod that sends nothing to it needs no way.
                open_to_clients = (target, port) == ("edge", 8080)
                wanted = (source, target, port) in WAYS
                found = reachable(manifests, source, target, port)
                if found != wanted and not (open_to_clients and source is None):
                    verb = "reaches" if found else "does not reach"
                    yield f"{source or 'a stranger'} {verb} {target}:{port}"


# ---- instances that come and go ----


@rule
def probes_ask_the_right_part(manifests: list[Manifest]) -> Iterator[str]:
    pods = workloads(manifests)
    for name, port in (("app", "http"), ("edge", "control")):
        [container] = pods[name]["spec"]["containers"]
        for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
            if container.get(probe, {}).get("httpGet") != {"path": path, "port": port}:
                yield f"the {probe} of {name} does not ask {path} at the port {port}"
    if "exec" not in pods["relay"]["spec"]["containers"][0].get("readinessProbe", {}):
        yield "nothing looks at the heartbeat of the relay"


@rule
def shutdown_has_its_time(manifests: list[Manifest]) -> Iterator[str]:
    pods = workloads(manifests)
    source = ast.parse((ROOT / "velikiy/server/gunicorn.conf.py").read_text())
    [graceful_s] = [
        it.value.value
        for it in source.body
        if isinstance(it, ast.Assign) and ast.unparse(it.targets[0]) == "graceful_timeout"
        if isinstance(it.value, ast.Constant)
    ]
    if pods["app"]["spec"].get("terminationGracePeriodSeconds", 30) <= LEAVING_S + float(str(graceful_s)):
        yield "an app is killed before it has finished its requests"
    [edge] = pods["edge"]["spec"]["containers"]
    command = edge.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
    leave_s = float(command[1])
    if command[0] != "/edge/leave" or leave_s < 5:
        yield "an edge does not leave before it is stopped"
    write_s = float(settings(manifests, "edge")["DATABASE_TIMEOUT"]) // 1 + 9
    if pods["edge"]["spec"].get("terminationGracePeriodSeconds", 30) <= leave_s + 6 + 3 + write_s:
        yield "an edge is killed before its last write is answered"


@rule
def drains_and_rollouts_keep_the_service(manifests: list[Manifest]) -> Iterator[str]:
    deployments, scalers = of_kind(manifests, "Deployment"), of_kind(manifests, "HorizontalPodAutoscaler")
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name in ("app", "edge", "relay"):
        spec = deployments[name]["spec"]
        rolling = spec.get("strategy", {}).get("rollingUpdate", {})
        if rolling.get("maxUnavailable") != 0 or not rolling.get("maxSurge"):
            yield f"a rollout takes an instance of {name} away before its successor is ready"
        budget = budgets.get(name, {"spec": {}})["spec"]
        if budget.get("maxUnavailable") != 1 or not matches(
            budget.get("selector", {"matchLabels": {NAME: ""}}), spec["template"]["metadata"]["labels"]
        ):
            yield f"a drain may take every instance of {name} at once, or none"
        keys = {it["topologyKey"] for it in spec["template"]["spec"].get("topologySpreadConstraints", [])}
        if "kubernetes.io/hostname" not in keys:
            yield f"all instances of {name} may be on one node"
        if name in scalers and "replicas" in spec:
            yield f"each kubectl apply resets the number of {name}"


@rule
def autoscalers_follow_the_cpu_within_the_limits(manifests: list[Manifest]) -> Iterator[str]:
    for name, scaler in of_kind(manifests, "HorizontalPodAutoscaler").items():
        spec = scaler["spec"]
        if spec["scaleTargetRef"]["name"] not in of_kind(manifests, "Deployment") or spec["minReplicas"] < 2:
            yield f"{name} may have a single instance"
        if [metric["resource"]["name"] for metric in spec["metrics"]] != ["cpu"]:
            yield f"{name} is scaled by something else than its CPU time"
        if spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] < 300:
            yield f"{name} shrinks at once, and the caches of a new instance are empty"
    edges = of_kind(manifests, "HorizontalPodAutoscaler")["edge"]["spec"]["maxReplicas"]
    if edges + 1 > int(settings(manifests, "edge")["MAX_EDGES"]):
        yield "a rollout has more edges than MAX_EDGES"
    apps = of_kind(manifests, "HorizontalPodAutoscaler")["app"]["spec"]["maxReplicas"]
    [allowed] = re.findall(r"^max_connections = (\d+)", (ROOT / "deploy/postgres/postgresql.conf").read_text(), re.M)
    wanted = settings(manifests, "app")
    threads = int(wanted.get("APP_THREADS", ServiceSettings.model_fields["app_threads"].default))
    if (apps + 1) * int(wanted["APP_WORKERS"]) * (2 * threads + 2) > int(allowed) - 10:
        yield "a rollout of apps takes more connections than PostgreSQL has"


@rule
def services_lead_to_their_pods(manifests: list[Manifest]) -> Iterator[str]:
    pods = workloads(manifests)
    for name, service in of_kind(manifests, "Service").items():
        spec = service["spec"]
        selected = [
            pod for pod, it in pods.items() if matches({"matchLabels": spec["selector"]}, it["metadata"]["labels"])
        ]
        if len(selected) != 1:
            yield f"the service {name} leads to {selected}"
            continue
        names = [it["name"] for it in pods[selected[0]]["spec"]["containers"][0]["ports"]]
        if any(port["targetPort"] not in names or port["targetPort"] == "control" for port in spec["ports"]):
            yield f"the service {name} leads to a port that is closed to clients, or to none"
    if of_kind(manifests, "Service")["app"]["spec"].get("clusterIP") != "None":
        yield "edges see one address for all apps"
    environment = settings(manifests, "edge")
    if environment["EDGE_ADDRESS"] != "$(POD_IP)":
        yield "edges register under an address that is not their own"
    if environment["EDGE_APPS"] != "app.$(POD_NAMESPACE).svc.cluster.local:5000":
        yield "edges follow no app"


def rules_broken(manifests: list[Manifest]) -> list[str]:
    return [violation for it in RULES for violation in it(manifests)]
