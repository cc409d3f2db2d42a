"""Start the project's Compose stack for tests, under a project name of its own and on a free port."""

import json
import os
import random
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import requests

from .engine import CHECKOUT, DEBIAN, PROJECT_PREFIX, docker, remove_project, run

T = TypeVar("T")

SERVICES = ("postgres", "redis", "app", "relay", "edge")
ONE_SHOTS = ("secrets", "migrate")

PERSONAL_SETTINGS = (
    *("BIND", "PORT", "REDIS_TTL", "EDGE_TTL", "APP_WORKERS", "APP_THREADS", "EDGE_WORKERS", "LOG_LEVEL"),
    *("APP_FIRST_CPU", "APP_WORKER_CLASS", "DATABASE_TIMEOUT", "REDIS_TIMEOUT", "COMPOSE_FILE", "COMPOSE_PROFILES"),
    *(
        "POSTGRES_IMAGE",
        "REDIS_IMAGE",
        "PROMETHEUS_IMAGE",
        "PYTHON_IMAGE",
        "DEBIAN_IMAGE",
        "HTTPS_PORT",
        "TLS_FOLDER",
        "TLS_HSTS",
    ),
)


def wait_until(condition: Callable[[], T], what: str, limit: float = 60) -> T:
    """Return the first true value of the condition. A server that does not answer yet counts as false."""
    deadline = time.monotonic() + limit
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = value = condition()
            if value:
                return value
        except requests.RequestException as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {limit:.0f} s: {what} (the last was {last!r})")


def two_free_ports() -> int:
    """Return the first of two neighbouring ports, for two edges."""
    # Below the range from which Linux gives ports to clients: a client could take a port before the Engine does.
    for port in random.sample(range(10_000, 20_000), 500):
        if is_free(port) and is_free(port + 1):
            return port
    raise OSError("no two free ports between 10000 and 20000")


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def clean_copy(folder: Path) -> Path:
    """Copy the files that git knows, as they are in the work tree now, as a clone would contain them."""
    for name in filter(None, run("git", "ls-files", "-z", cwd=CHECKOUT).split("\0")):
        source, target = CHECKOUT / name, folder / name
        if source.is_file():  # a deleted file may not be committed yet
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


class Stack:
    """A Compose stack of a checkout."""

    def __init__(self, compose: Sequence[str], checkout: Path, image_tag: str = "test") -> None:
        """Describe the stack. `compose` is the beginning of Compose's command line.

        The images stay when the stack is removed, as a cache for the builds of the next run.
        """
        self.command = list(compose)
        self.image_tag = image_tag
        self.checkout = checkout
        self.project = f"{PROJECT_PREFIX}{uuid.uuid4().hex[:8]}"
        self.port = two_free_ports()
        self.url = f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, settings: Mapping[str, str] = {}, limit: float = 300) -> str:
        """Run Compose with the settings in its environment, and return its output. An empty PORT means the default."""
        environment = self.environment() | dict(settings)
        return run(*self.command, *arguments, limit=limit, cwd=self.checkout, env=environment)

    def environment(self) -> dict[str, str]:
        """Return the environment of Compose."""
        environment = {key: value for key, value in os.environ.items() if key not in PERSONAL_SETTINGS}
        return environment | {
            "COMPOSE_PROJECT_NAME": self.project,
            "IMAGE_TAG": self.image_tag,
            "PORT": str(self.port),
        }

    def up(self, *arguments: str, settings: Mapping[str, str] = {}) -> None:
        self.compose("up", "--detach", *arguments, settings=settings, limit=900)
        self.wait_until_it_works()

    def remove(self) -> None:
        try:
            self.compose("down", "--volumes", "--remove-orphans")
        finally:
            remove_project(self.project)

    # --- containers

    def containers(self, service: str) -> list[dict[str, Any]]:
        """Return the Engine's description of each container of a service, including ended containers."""
        ids = docker(
            *("ps", "--all", "--quiet", "--no-trunc"),
            *("--filter", f"label=com.docker.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).split()
        return list(json.loads(docker("inspect", *ids))) if ids else []

    def containers_in_order(self, service: str) -> list[dict[str, Any]]:
        """Return the containers in the order of the numbers that Compose gave them."""
        number = "com.docker.compose.container-number"
        return sorted(self.containers(service), key=lambda container: int(container["Config"]["Labels"][number]))

    def container(self, service: str) -> dict[str, Any]:
        (only,) = self.containers(service)
        return only

    def execute(self, service: str, *command: str) -> str:
        return docker("exec", self.container(service)["Id"], *command)

    def sql(self, query: str) -> str:
        """Run SQL from outside the app, as a person with psql would."""
        return self.execute("postgres", "psql", "-U", "postgres", "-d", "velikiy", "-Atc", query)

    def kill(self, service: str) -> None:
        """Kill the container's first process from outside: after `docker kill` the Engine would not restart it."""
        pid = str(self.container(service)["State"]["Pid"])
        docker("run", "--rm", "--pid", "host", "--network", "none", DEBIAN, "bash", "-c", f"kill -9 {pid}")

    def describe(self) -> str:
        """Return the state and the last log lines of the stack, for the message of a failed test."""
        states = docker("ps", "--all", "--filter", f"label=com.docker.compose.project={self.project}")
        return f"{states}\n{self.compose('logs', '--no-color', '--tail=15')}"

    # --- the service

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=5)

    def create(self, name: str) -> int:
        """Return the id of a new user, or 0 if the service cannot create a user now."""
        user = {"name": name, "email": f"{uuid.uuid4().hex}@example.com"}
        response = requests.post(f"{self.url}/users", json=user, timeout=5)
        return int(response.json()["id"]) if response.status_code == 201 else 0

    def rename(self, user: int, name: str, url: str = "") -> requests.Response:
        # Longer than a write that waits until two fenced caches are excluded.
        return requests.put(f"{url or self.url}/users/{user}", json={"name": name}, timeout=10)

    def name_of(self, user: int, url: str = "") -> str:
        return str(requests.get(f"{url or self.url}/users/{user}", timeout=5).json().get("name"))

    def warm(self, user: int, url: str = "") -> None:
        """Read the user until Nginx answers from its own cache."""
        address = f"{url or self.url}/users/{user}"
        wait_until(lambda: requests.get(address, timeout=5).headers["X-Cache-Status"] == "HIT", "a hit in Nginx")

    def reads(self, user: int) -> bool:
        return self.get(f"/users/{user}").status_code == 200

    def has_no_warnings(self) -> bool:
        response = self.get("/readyz")
        return response.status_code == 200 and "warnings" not in response.json()

    def wait_until_it_works(self) -> int:
        """Wait until users can be created and read, and no warning is left. Return the id of the user."""
        try:
            user = wait_until(lambda: self.create("Вера"), "a user can be created")
            wait_until(lambda: self.reads(user), "the new user can be read")
            wait_until(self.has_no_warnings, "the service works without warnings")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None
        return user
