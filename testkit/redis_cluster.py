"""Clusters, replicas and Sentinels of real Redis servers, on addresses of this machine."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from testkit.databases import answers
from testkit.stack import folder, free_ports, wait_until

NODE_TIMEOUT_MS = 2000

SLOTS = 16_384


class Node:
    """A Redis, or a Sentinel, that a test may kill, stop and start again."""

    def __init__(self, home: Path, port: int, program: str, options: Sequence[str], password: str = "") -> None:
        self.home, self.port, self.options, self.program = home, port, options, program
        self.client = Redis(port=port, password=password or None, socket_timeout=2)
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir(exist_ok=True)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [self.program, *self.options]
        self.process = subprocess.Popen(command, cwd=self.home, stdout=subprocess.DEVNULL)
        wait_until(lambda: answers(self.client))

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        self.client.connection_pool.disconnect()

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.client.close()

    def command(self, *command: str | bytes | int) -> Any:
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def cluster(self, *command: str | int) -> str:
        """Run a subcommand of CLUSTER."""
        reply = self.command("CLUSTER", *command)
        return reply.decode() if isinstance(reply, bytes) else str(reply)

    @property
    def id(self) -> str:
        return self.cluster("MYID")

    def owns_with(self, other: "Node") -> bool:
        """Return whether one of both is the replica of the other."""
        return other is self or self.primary_id == other.id or other.primary_id == self.id

    @property
    def primary_id(self) -> str:
        """The id of the primary of this replica."""
        return next(line for line in self.cluster("NODES").splitlines() if "myself" in line).split()[3]

    @property
    def is_primary(self) -> bool:
        with suppress(RedisError):
            return bool(self.client.info("replication")["role"] == "master")
        return False


class Cluster:
    def __init__(self, nodes: list[Node], password: str = "") -> None:
        self.nodes = nodes
        self.password = password

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}{','.join(node.place for node in self.nodes)}/0"

    def primaries(self) -> list[Node]:
        return [node for node in self.nodes if node.is_primary]

    def owner(self, slot: int) -> Node:
        """Return the primary that holds this slot by its own account."""
        for node in self.primaries():
            for line in node.cluster("NODES").splitlines():
                fields = line.split()
                if "myself" in fields[2]:
                    ends = [part.split("-") for part in fields[8:] if not part.startswith("[")]
                    if any(int(it[0]) <= slot <= int(it[-1]) for it in ends):
                        return node
        raise AssertionError(f"no server holds the slot {slot}")

    def owner_if_any(self, slot: int) -> Node | None:
        try:
            return self.owner(slot)
        except AssertionError:
            return None

    def move_slots(self, slots: Sequence[int], target: Node, pause: float = 0.0) -> None:
        """Move these slots with their keys as `redis-cli --cluster reshard` does."""
        for slot in slots:
            source = self.owner(slot)
            self.open_slot(slot, source, target)
            self.move_keys(slot, source, target)
            time.sleep(pause)
            for node in (target, source, *self.primaries()):
                node.cluster("SETSLOT", slot, "NODE", target.id)

    def open_slot(self, slot: int, source: Node, target: Node) -> None:
        target.cluster("SETSLOT", slot, "IMPORTING", source.id)
        source.cluster("SETSLOT", slot, "MIGRATING", target.id)

    def move_keys(self, slot: int, source: Node, target: Node) -> None:
        login = ("AUTH", self.password) if self.password else ()
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            command = ("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, *login, "KEYS", *keys)
            source.command(*command)


@contextmanager
def cluster(
    primaries: int = 3,
    replicas: int = 0,
    *,
    program: str = "redis-server",
    password: str = "",
    options: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Run a cluster. Each replica is one of the primary with its number; node `n` is a primary if n < primaries."""
    count = primaries * (1 + replicas)
    with folder() as home:
        first = free_ports(2 * count)
        nodes = []
        for number in range(count):
            port = first + number
            given = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--cluster-enabled", "yes"]
            given += ["--cluster-port", str(port + count)]
            given += ["--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--repl-diskless-sync-delay", "0"]
            given += ["--requirepass", password, "--masterauth", password] if password else []
            nodes.append(Node(home / str(port), port, program_path(program), [*given, *options], password))
        running = Cluster(nodes, password)
        try:
            for node in nodes:
                node.start()
            _join(running, primaries)
            yield running
        finally:
            for node in nodes:
                node.end()


def _join(running: Cluster, primaries: int) -> None:
    nodes = running.nodes
    for number, node in enumerate(nodes):
        node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number < primaries:
            first, last = SLOTS * number // primaries, SLOTS * (number + 1) // primaries - 1
            node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
    for node in nodes[1:]:
        node.cluster("MEET", "127.0.0.1", nodes[0].port, nodes[0].port + len(nodes))
    wait_until(lambda: all(len(node.cluster("NODES").splitlines()) == len(nodes) for node in nodes))
    for number, node in enumerate(nodes[primaries:]):
        primary = nodes[number % primaries].id
        wait_until(lambda node=node, primary=primary: _replicate(node, primary))  # type: ignore[misc]
    wait_until(lambda: all("cluster_state:ok" in node.cluster("INFO") for node in nodes))
    for node in nodes[primaries:]:
        wait_until(lambda node=node: node.client.info("replication")["master_link_status"] == "up")  # type: ignore[misc]


def _replicate(node: Node, primary: str) -> bool:
    with suppress(RedisError):
        node.cluster("REPLICATE", primary)
        return True
    return False


@contextmanager
def sentinels(primary: Node, name: str, count: int = 3) -> Iterator[list[Node]]:
    """Run Sentinels that watch this primary and promote one of its replicas a second after they cannot reach it."""
    with folder() as home:
        first = free_ports(count)
        nodes = []
        for number in range(count):
            port = first + number
            file = home / f"{port}.conf"
            file.write_text(
                f"port {port}\nbind 127.0.0.1\nsentinel monitor {name} 127.0.0.1 {primary.port} 2\n"
                f"sentinel down-after-milliseconds {name} 1000\nsentinel failover-timeout {name} 5000\n"
            )
            nodes.append(Node(home / str(port), port, "redis-server", [str(file), "--sentinel"]))
        try:
            for node in nodes:
                node.start()
            wait_until(lambda: all(_knows(node, name, count - 1) for node in nodes))
            yield nodes
        finally:
            for node in nodes:
                node.end()


def _knows(sentinel: Node, name: str, others: int) -> bool:
    facts: Any = sentinel.client.sentinel_master(name)
    return bool(facts["num-other-sentinels"] == others and facts["num-slaves"])


def program_path(program: str) -> str:
    """Return the path of a server; empty if it is not installed. VALKEY_SERVER names a valkey-server that is elsewhere."""
    return shutil.which(program) or os.environ.get(program.upper().replace("-", "_"), "")


@contextmanager
def replicas(count: int) -> Iterator[list[Node]]:
    """Run a primary, the first one, and so many replicas."""
    with folder() as home:
        first = free_ports(count + 1)
        options = ["--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0"]
        nodes = [
            Node(home / str(port), port, "redis-server", ["--port", str(port), *options])
            for port in range(first, first + count + 1)
        ]
        try:
            for node in nodes:
                node.start()
            for node in nodes[1:]:
                node.client.replicaof("127.0.0.1", str(first))
            for node in nodes[1:]:
                wait_until(lambda node=node: node.client.info("replication")["master_link_status"] == "up")  # type: ignore[misc]
            yield nodes
        finally:
            for node in nodes:
                node.end()
