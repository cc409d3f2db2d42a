"""deploy/swarm without an Engine: the stack files agree with the settings and with compose.yaml."""

from typing import Any

import yaml

from velikiy.settings import ServiceSettings

from .engine import CHECKOUT


def services() -> dict[str, Any]:
    files = [CHECKOUT / f"deploy/swarm/{name}.yml" for name in ("stack", "servers")]
    found: dict[str, Any] = {}
    for file in files:
        found |= yaml.safe_load(file.read_text())["services"]
    return found


def test_settings_reach_the_services_of_a_swarm() -> None:
    of_the_launcher = {"redis_direct", "tls_cert", "tls_key", "tls_hsts"}
    for name in ("app", "relay", "edge"):
        environment = services()[name]["environment"]
        assert {field.upper() for field in ServiceSettings.model_fields.keys() - of_the_launcher} <= environment.keys()


def test_services_of_a_swarm_are_confined_and_have_secrets_of_their_own() -> None:
    for name, service in services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert {"memory", "cpus"} <= service["deploy"]["resources"]["limits"].keys(), name
        assert service["deploy"]["endpoint_mode"] == "dnsrr", name
        assert "healthcheck" in service or name == "migrate", name
        owner = service["user"].split(":")[0]
        assert {(secret["uid"], secret["mode"]) for secret in service["secrets"]} == {(owner, 0o400)}, name


def test_services_of_a_swarm_replace_their_tasks_one_by_one_and_go_back() -> None:
    for name in ("app", "relay", "edge"):
        deploy = services()[name]["deploy"]
        assert deploy["update_config"]["parallelism"] == 1
        assert deploy["update_config"]["failure_action"] == "rollback"
        assert deploy["update_config"]["order"] == ("stop-first" if name == "edge" else "start-first")


def test_swarm_and_compose_run_the_same_images_and_commands() -> None:
    compose = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())["services"]
    for name, service in services().items():
        assert service["user"] == compose[name]["user"], name
        own, other = (it[name]["image"].removeprefix("${REGISTRY:-}") for it in (services(), compose))
        assert own == other, name
    for name in ("postgres", "redis", "migrate"):
        assert services()[name]["command"] == compose[name]["command"], name
