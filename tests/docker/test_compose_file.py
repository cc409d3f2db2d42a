"""The rules that the Compose files and the Dockerfiles keep, read from their text without an Engine (docs/security.md)."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from testkit.stack import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOTS = {"secrets", "migrate", "backup"}
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "edge" / "Dockerfile"]

each_service = pytest.mark.parametrize("service", SERVICES)
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=["app", "edge"])

ISOLATION = {
    "privileged",
    "cap_add",
    "devices",
    "network",
    "pid",
    "ipc",
    "uts",
    "userns_mode",
    "cgroup",
    "cgroup_parent",
}
"""Keys with which a service would share something of the host, or get more rights."""


@each_service
def test_no_service_weakens_its_isolation(service: str) -> None:
    described = SERVICES[service]
    assert not ISOLATION & described.keys()
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]  # and not seccomp:unconfined
    assert described.get("network_mode", "none") == "none"
    assert not re.search(r":r?shared|propagation", str(described.get("volumes")))


@each_service
def test_every_service_has_limits_of_its_own(service: str) -> None:
    described = SERVICES[service]
    assert described["read_only"] is True
    assert {"mem_limit", "cpus", "pids_limit"} <= described.keys()
    assert described["ulimits"] == {"nofile": {"soft": 16384, "hard": 16384}, "nproc": 4096, "core": 0}
    user, _, group = described["user"].partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_limit_of_open_files_is_the_limit_that_nginx_sets_for_itself() -> None:
    assert "worker_rlimit_nofile 16384;" in (ROOT / "edge" / "nginx.conf").read_text()


@each_service
def test_every_service_has_a_health_check(service: str) -> None:
    assert ("healthcheck" in SERVICES[service]) is (service not in ONE_SHOTS)
    assert SERVICES[service].get("restart") == (None if service in ONE_SHOTS else "unless-stopped")


@each_service
def test_folders_of_the_host_are_files_of_the_checkout_and_read_only(service: str) -> None:
    for volume in SERVICES[service].get("volumes", []):
        source, _, *mode = volume.split(":")
        if source in COMPOSE["volumes"]:
            assert mode == ["ro"] or service == "secrets" or source in ("data", "prometheus", "backups"), volume
            continue
        assert (ROOT / source).is_file(), volume
        assert source.startswith("./"), volume
        assert mode == ["ro"], volume


def test_each_volume_of_secrets_has_one_reader() -> None:
    readers: dict[str, set[str]] = {}
    for service, described in SERVICES.items():
        for volume in described.get("volumes", []):
            source, target, *_ = volume.split(":")
            if service != "secrets" and target == "/run/secrets":
                readers.setdefault(source, set()).add(service)
    assert readers == {
        "app-secrets": {"app", "relay", "backup"},
        "migrate-secrets": {"migrate"},
        "postgres-secrets": {"postgres"},
        "redis-secrets": {"redis"},
        "edge-secrets": {"edge"},
    }


def test_only_the_edge_is_published_beyond_this_machine() -> None:
    published = {service for service, described in SERVICES.items() if "ports" in described}
    assert published == {"edge", "prometheus"}
    assert SERVICES["prometheus"]["ports"] == ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"]
    [port] = SERVICES["edge"]["ports"]
    assert port.startswith("${BIND:-127.0.0.1}:")
    assert port.endswith(":8080")


def test_services_share_networks_of_their_own() -> None:
    assert COMPOSE["networks"]["inside"] == COMPOSE["networks"]["database"] == {"internal": True}
    for service, described in SERVICES.items():
        assert described.get("networks") or described["network_mode"] == "none", service
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert "database" not in SERVICES["edge"]["networks"]


@each_service
def test_every_foreign_image_can_be_pinned_by_its_digest(service: str) -> None:
    image = SERVICES[service]["image"]
    assert re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[a-z/]+:[^}]+\}|velikiy-(app|edge|backup):\$\{IMAGE_TAG:-latest\}", image)
    assert image.startswith("${") or next(iter(SERVICES[service]["build"]["args"])).endswith("_IMAGE")


@each_dockerfile
def test_base_image_is_an_argument_whose_default_is_that_of_compose(dockerfile: Path) -> None:
    argument, default = re.findall(
        r"^ARG (\w+)=(\S+)\nFROM \$\{\1\}(?: AS app)?$", dockerfile.read_text(), re.MULTILINE
    )[0]
    assert f'{argument}: "${{{argument}:-{default}}}"' in (ROOT / "compose.yaml").read_text()
    assert f"\n{argument}={default}\n" in (ROOT / ".env.example").read_text()


@each_dockerfile
def test_dockerfiles_copy_and_contain_no_secret(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert not re.search(r"^ADD ", text, re.MULTILINE)
    assert not re.search(r"(?i)(password|secret|token)\w*=", text)
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", text, re.MULTILINE)


@each_dockerfile
def test_dockerfiles_install_without_recommended_packages(dockerfile: Path) -> None:
    for command in re.findall(r"^RUN ((?:.*\\\n)*.*)", dockerfile.read_text(), re.MULTILINE):
        if "apt-get" in command:
            assert "apt-get update" in command
            assert re.search(r"apt-get install --yes --no-install-recommends", command)
        if "pip install" in command:
            assert "--require-hashes" in command


@pytest.mark.parametrize("file", ["deploy/postgres/roles.sql", "migrations/sql/grants.sql"])
def test_single_user_server_reads_each_file_as_one_statement(file: str) -> None:
    assert (ROOT / file).read_text().split(";\n\n")[1:] == [""]
