"""A swarm of Docker Engines, one in each of several network namespaces, with deploy/swarm/stack.yml on it.

The clients are outside all nodes. The kernel of a test machine may lack IPVS, so only what the stack file uses is to be
had: names that lead to the addresses of tasks (dnsrr), and ports in host mode. The overlay networks are real (VXLAN).
The nodes share one kernel, so each further node has a time namespace, whose clocks run a day ahead.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from testkit.cluster import Cluster, Host, cluster

from .engine import CommandFailed, Say, build, docker, run
from .stack import T, clean_copy, wait_until

IMAGES = ("velikiy-app:swarm", "velikiy-edge:swarm", "postgres:15-alpine", "redis:7-alpine")
NAME = "velikiy"
PORT = 18680
SERVICES = ("postgres", "redis", "app", "relay", "edge")


class Node:
    """A machine with an Engine."""

    def __init__(self, host: Host, ahead_s: int = 0) -> None:
        """`ahead_s`: seconds by which the clocks that count from the boot are ahead of the first node's."""
        self.host = host
        self._ahead_s = ahead_s
        self.url = f"http://{host.address}:{PORT}"
        self._engine: subprocess.Popen[bytes] | None = None
        self._folder = host.folder / "docker"

    def start(self) -> None:
        """Start the Engine, as at a boot: its data are there, and the state of running containers is not."""
        self._end_everything()  # a run that was killed has left its containers
        runtime = self._folder / "run"
        shutil.rmtree(runtime, ignore_errors=True)
        runtime.mkdir(parents=True)
        clocks = (f"--boottime={self._ahead_s}", f"--monotonic={self._ahead_s}")
        self._engine = self.host.start(
            "dockerd",
            *(("unshare", "--time", *clocks, "--fork") if self._ahead_s else ()),
            *("dockerd", "--host", f"unix://{self._socket}", "--pidfile", str(runtime / "pid")),
            *("--data-root", str(self._folder / "data"), "--exec-root", str(runtime)),
            # The cgroup finds the containers of this node, which have network namespaces of their own.
            *("--cgroup-parent", f"/{self.host.name}", "--exec-opt", "native.cgroupdriver=cgroupfs"),
        )
        wait_until(self._answers, f"the Engine of {self.host.name} answers")

    @property
    def _socket(self) -> Path:
        return self._folder / "socket"

    def _answers(self) -> bool:
        with contextlib.suppress(CommandFailed):
            return bool(self.docker("version", "--format", "{{.Server.Version}}"))
        return False

    def docker(
        self, *arguments: str, limit: float = 120, check: bool = True, environment: Mapping[str, str] = {}
    ) -> str:
        own = {"DOCKER_HOST": f"unix://{self._socket}"}
        return run("docker", *arguments, limit=limit, check=check, env=os.environ | own | dict(environment))

    def kill(self) -> None:
        """Kill the Engine and every container: the machine has lost its power."""
        self._end_everything()
        assert self._engine
        self._engine.wait(10)
        self._unmount()

    def _end_everything(self) -> None:
        def is_dead() -> bool:
            for pid in [*self.host.processes(), *self._contained()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.host.processes() and not self._contained()

        wait_until(is_dead, f"{self.host.name} is dead")

    def _contained(self) -> list[int]:
        lists = [*Path("/sys/fs/cgroup").glob(f"*/{self.host.name}/**/cgroup.procs")]
        lists += Path("/sys/fs/cgroup").glob(f"{self.host.name}/**/cgroup.procs")
        pids: set[int] = set()
        for file in lists:
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in file.read_text().split()}
        return list(pids)

    def _unmount(self) -> None:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((it for it in mounts if it.startswith(f"{self._folder}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False)

    def remove(self) -> None:
        with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired):
            self.docker("swarm", "leave", "--force", limit=60)
        if self._engine and self._engine.poll() is None:
            self.host.signal(signal.SIGTERM, "dockerd --host")  # not `unshare`, which only waits
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._engine.wait(30)
        if self._engine:
            self.kill()
        subprocess.run(["rm", "-rf", str(self._folder)], check=False)  # some 10,000 files, faster than from Python
        folders = Path("/sys/fs/cgroup").glob(f"*/{self.host.name}/**/")
        for folder in sorted(folders, reverse=True):  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()

    def container(self, service: str) -> dict[str, Any] | None:
        """Return the description of the running container of a service on this node."""
        label = f"label=com.docker.swarm.service.name={NAME}_{service}"
        ids = self.docker("ps", "--quiet", "--filter", label).split()
        return dict(json.loads(self.docker("inspect", ids[0]))[0]) if ids else None

    def is_ready(self) -> bool:
        """Return whether the edge of this node serves from its cache."""
        with contextlib.suppress(requests.RequestException):
            response = requests.get(f"{self.url}/readyz", timeout=3)
            return response.status_code == 200 and "warnings" not in response.json()
        return False


class Swarm:
    def __init__(self, machines: Cluster, nodes: list[Node]) -> None:
        self.machines = machines
        self.nodes = nodes
        self.manager = nodes[0]

    def form(self, archive: Path) -> None:
        """Start the Engines, load the images, and join the nodes. The first node gets the data."""
        for node in self.nodes:
            node.start()
        loads = [
            subprocess.Popen(
                ["docker", "--host", f"unix://{node._socket}", "load", "--quiet", "--input", str(archive)],
                stdout=subprocess.DEVNULL,
            )
            for node in self.nodes
        ]
        assert [load.wait(300) for load in loads] == [0] * len(loads)
        for node in self.nodes:
            address = node.host.address
            where = ("--advertise-addr", address, "--listen-addr", f"{address}:2377")
            if node is self.manager:
                node.docker("swarm", "init", *where)
            else:
                token = self.manager.docker("swarm", "join-token", "--quiet", "worker")
                node.docker("swarm", "join", "--token", token, *where, f"{self.manager.host.address}:2377")
        self.manager.docker("node", "update", "--label-add", "velikiy.data=true", self.id_of(self.manager))

    def id_of(self, node: Node) -> str:
        return node.docker("info", "--format", "{{.Swarm.NodeID}}")

    def deploy(self, checkout: Path, *overlays: str, **settings: str) -> None:
        """Deploy the stack files of a checkout. The machine may be busy with other tests, so everything has more time than
        by default."""
        files = [f"--compose-file={checkout}/deploy/swarm/{name}.yml" for name in ("stack", "servers", *overlays)]
        patient = {"DATABASE_TIMEOUT": "3", "REDIS_TIMEOUT": "1"}
        given = {"AUTH": "off", "PORT": str(PORT), "RATE_REQUESTS": "0", "RATE_CONNECTIONS": "0", "IMAGE_TAG": "swarm"}
        given |= patient
        self.manager.docker("stack", "deploy", "--resolve-image=never", *files, NAME, environment=given | settings)

    def service(self, *arguments: str, limit: float = 120) -> str:
        return self.manager.docker("service", *arguments, limit=limit)

    def inspect(self, service: str) -> dict[str, Any]:
        return dict(json.loads(self.service("inspect", f"{NAME}_{service}"))[0])

    def update_state(self, service: str) -> str:
        return str((self.inspect(service).get("UpdateStatus") or {}).get("State", ""))

    def running(self, service: str) -> list[tuple[str, str]]:
        """Return the image and the node of each running task. A task that is not healthy yet is not running."""
        form = "{{.Image}} {{.Node}} {{.CurrentState}}"
        lines = self.service("ps", "--filter=desired-state=running", f"--format={form}", f"{NAME}_{service}")
        states = [line.split() for line in lines.splitlines()]
        return [(image, node) for image, node, state, *_ in states if state == "Running"]

    def sql(self, query: str) -> str:
        postgres = self.manager.container("postgres")
        assert postgres
        return self.manager.docker("exec", postgres["Id"], "psql", "-U", "postgres", "-d", "velikiy", "-Atc", query)

    def wait_until(self, condition: Callable[[], T], what: str, limit: float) -> T:
        """Return the first true value of the condition. Without one, name the tasks and their states."""
        try:
            return wait_until(condition, what, limit=limit)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None

    def wait_until_ready(self, limit: float = 180) -> None:
        """Wait until every edge has a lease, and Docker knows that it is healthy."""
        self.wait_until(lambda: all(node.is_ready() for node in self.nodes), "every edge has a lease", limit)
        self.wait_until(lambda: len(self.running("edge")) == len(self.nodes), "every edge is healthy", limit)

    def describe(self) -> str:
        form = "{{.Name}} {{.Image}} {{.DesiredState}} {{.CurrentState}} {{.Error}}"
        return self.manager.docker("stack", "ps", "--no-trunc", f"--format={form}", NAME, check=False)


@contextmanager
def swarm(say: Say, folder: Path, nodes: int = 2) -> Iterator[tuple[Swarm, Path]]:
    """Yield a swarm with the stack of this checkout, and the copy of the checkout."""
    checkout = clean_copy(folder / "checkout")
    stack_file = checkout / "deploy/swarm/stack.yml"
    stack_file.write_text(stack_file.read_text().replace("start_period: 60s", "start_period: 180s"))
    say("Building the images.")
    build(checkout, "--tag", "velikiy-app:swarm")
    build(checkout, "--tag", "velikiy-edge:swarm", "--file", str(checkout / "edge/Dockerfile"))
    for image, version in (("app", "next"), ("edge", "next"), ("app", "broken")):
        _derive(f"velikiy-{image}", version)
    archive = folder / "images.tar"
    derived = ("velikiy-app:next", "velikiy-edge:next", "velikiy-app:broken")
    docker("save", "--output", str(archive), *IMAGES, *derived, limit=300)
    with cluster(nodes) as machines:
        formed = Swarm(machines, [Node(host, 86_400 * n) for n, host in enumerate(machines.hosts)])
        try:
            say("Forming the swarm.")
            formed.form(archive)
            archive.unlink()
            create = str(checkout / "deploy/swarm/create-secrets")
            host = {"DOCKER_HOST": f"unix://{formed.manager._socket}", "IMAGE_TAG": "swarm"}
            run(create, env=os.environ | host)
            formed.deploy(checkout)
            formed.wait_until_ready()
            say("The service works on every node.")
            yield formed, checkout
        finally:
            machines.mend()
            for node in reversed(formed.nodes):
                node.remove()


def _derive(image: str, version: str) -> None:
    """Make another version of an image. `broken` never becomes healthy."""
    lines = [f"FROM {image}:swarm", f"LABEL version={version}"]
    if version == "broken":
        # Not CMD: the stack file has a command of its own.
        lines.append('ENTRYPOINT ["sh", "-c", "exec sleep infinity"]')
    command = ["docker", "build", "--quiet", "--tag", f"{image}:{version}", "-"]
    legacy = os.environ | {"DOCKER_BUILDKIT": "0"}
    subprocess.run(command, input="\n".join(lines), text=True, check=True, env=legacy, stdout=subprocess.DEVNULL)
