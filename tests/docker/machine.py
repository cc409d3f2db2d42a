"""Machines for tests: containers of a bare Debian, also with systemd as their first process."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import (
    DEBIAN,
    HOST_CA_BUNDLE,
    HOST_OWN_CAS,
    PROJECT_PREFIX,
    CommandFailed,
    Say,
    build,
    debian_13,
    docker,
)
from .stack import wait_until

BARE = Path(__file__).parent / "bare"
HOME = "/root/velikiy-flask"

DEBIAN_12, DEBIAN_13 = "bookworm", "trixie"
"""The systems that the project supports."""

SYSTEMD = "python3 systemd systemd-sysv dbus procps"
"""The packages of a machine that boots. Each installed Debian has procps, and HAProxy's unit needs its kill."""

# The variables by which programs find a proxy or a mirror.
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "pip_index_url", "uv_default_index")

BOOT = "mount -t tmpfs none /sys && mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec /lib/systemd/systemd"
"""systemd gets a hierarchy of control groups of its own. It works without any controller: on a machine with the older
hierarchies, all controllers belong to those."""

# systemd mounts and makes namespaces. A container without CAP_SYS_RESOURCE cannot raise limits, and --privileged would
# demand capabilities that a machine inside of another may not have.
MAY_BOOT = (
    *("--cap-add=SYS_ADMIN", "--cap-add=SYS_PTRACE", "--cap-add=SYS_NICE", "--cgroupns=private"),
    *(f"--security-opt={part}=unconfined" for part in ("seccomp", "apparmor", "systempaths")),
    *("--tmpfs=/run", "--tmpfs=/run/lock", "--env=container=docker"),
)


@dataclass
class Machine:
    name: str
    address: str = ""
    """The address of the service, as `./run up` printed it."""

    def run(self, command: str, check: bool = True, limit: float = 300, folder: str = HOME) -> str:
        return docker(*("exec", "--workdir", folder, self.name, "bash", "-c", command), check=check, limit=limit)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.run("./run status --json", check=False)))

    def is_booted(self) -> bool:
        state = self.run("systemctl is-system-running", check=False, folder="/")
        return state in ("running", "degraded")

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Send a request from inside, with the only HTTP client of a bare machine. Return the status and the body."""
        script = (
            "import sys, urllib.error, urllib.request as web\n"
            "method, url, body = sys.argv[1:]\n"
            "head = {'Content-Type': 'application/json'}\n"
            "try: response = web.urlopen(web.Request(url, body.encode() or None, head, method=method), timeout=10)\n"
            "except urllib.error.HTTPError as error: response = error\n"
            "print(response.status, response.read().decode())\n"
        )
        text = "" if body is None else json.dumps(body)
        output = docker("exec", self.name, "python3", "-c", script, method, self.address + path, text)
        status, _, response = output.partition(" ")
        return int(status), json.loads(response)


@contextmanager
def image(release: str, say: Say, packages: str = "python3") -> Iterator[str]:
    """Build the image of a bare machine, and yield its name."""
    name = f"velikiy-bare:{release}-{'boots' if packages == SYSTEMD else 'test'}"

    def built(base: str) -> str:
        say(f"Building the bare machine {name}.")
        arguments = [f"--build-arg=DEBIAN_IMAGE={base}", f"--build-arg=PACKAGES={packages}"]
        build(BARE, "--tag", name, *arguments)
        return name

    if release == DEBIAN_12:
        yield built(DEBIAN)
    else:
        with debian_13(say) as base:
            yield built(base)


@contextmanager
def machine(image: str, *options: str, boots: bool = False) -> Iterator[Machine]:
    """Start a machine; with `boots`, wait until systemd has started everything."""
    new = Machine(f"{PROJECT_PREFIX}-bare-{uuid.uuid4().hex[:8]}")
    options = (*_network_options(), *options)
    if boots:
        docker("run", "--detach", "--name", new.name, *MAY_BOOT, *options, image, "sh", "-c", BOOT)
    else:
        docker("run", "--detach", "--init", "--name", new.name, *options, image)
    try:
        if boots:
            wait_until(new.is_booted, "the machine has booted", limit=300)
        yield new
    finally:
        docker("rm", "--force", "--volumes", new.name)


def reboot(machine: Machine) -> None:
    """End all processes of the machine at once, as a power cut does, and boot again."""
    docker("kill", "--signal", "KILL", machine.name, check=False)
    docker("start", machine.name)
    wait_until(machine.is_booted, "the machine has booted", limit=300)


def _network_options() -> list[str]:
    options = []
    for name in PROXY_VARIABLES:
        for spelling in (name, name.upper()):
            if os.environ.get(spelling):
                options += ["--env", spelling]
    if any(HOST_OWN_CAS.glob("*.crt")):  # the machine needs the host's own CAs too
        bundle = "/opt/host-ca-bundle.crt"
        options += ["--volume", f"{HOST_CA_BUNDLE}:{bundle}:ro"]
        options += [f"--env={name}={bundle}" for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    return options


__all__ = [
    "BARE",
    "DEBIAN_12",
    "DEBIAN_13",
    "HOME",
    "SYSTEMD",
    "CommandFailed",
    "Machine",
    "image",
    "machine",
    "reboot",
]
