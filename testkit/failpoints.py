"""Run an app in this process whose reads and writes stop at failpoints, behind an edge of its own.

PostgreSQL and Redis are those of a running stack, and the edge registers in its database like any other edge.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import Flask
from werkzeug.serving import make_server

from testkit.stack import EDGE_SECRET, ROOT, Stack, folder, free_ports, wait_until
from velikiy import http
from velikiy.coherence import Answer, CachePath, Caches, Change, EdgeTier, Entry, Gate, RedisTier
from velikiy.coherence.membership import Cache
from velikiy.coherence.redis_tier import FillLease
from velikiy.coherence.shards import ShardMap
from velikiy.http.auth import Auth
from velikiy.http.browsers import Browsers
from velikiy.postgres import Connection, Database
from velikiy.resources.base import registry
from velikiy.resources.idempotency import IdempotencyKeys
from velikiy.resources.repository import Repository
from velikiy.resources.users import NewUser
from velikiy.stack import local_http

T = TypeVar("T")
Action = Callable[[], None]

READER_FAILPOINTS = ("between probe and snapshot", "between snapshot and fill", "between fill and response")
"""The failpoints of a read that loads from PostgreSQL, in order."""

WRITER_FAILPOINTS = ("before the lock", "before the drops", "between the drops", "before the commit")
"""The failpoints of a write inside its transaction, in order: before the paths are locked, before the drop in Redis,
between the drops in Redis and at the edges, and before COMMIT. "after the commit" follows outside of the transaction."""


def do_nothing() -> None:
    pass


@dataclass
class Failpoints:
    """The failpoints of one app, by name."""

    actions: dict[str, Action] = field(default_factory=dict)
    """The first reader or writer that reaches a failpoint runs its action. The next one passes."""

    reached: list[str] = field(default_factory=list)
    """The name of each failpoint that was reached, in order."""

    def reach(self, failpoint: str) -> None:
        self.reached.append(failpoint)
        self.actions.pop(failpoint, do_nothing)()


class FailpointRedisTier(RedisTier):
    failpoints: Failpoints

    def drop(
        self, paths: Iterable[CachePath] | None, prefill: Sequence[CachePath] = (), *, shards: ShardMap
    ) -> dict[CachePath, FillLease]:
        self.failpoints.reach("before the drops")
        return super().drop(paths, prefill, shards=shards)


class FailpointGate(Gate):
    failpoints: Failpoints

    def read(
        self, path: CachePath, variant: str, load: Callable[[Connection], Entry], *more: Any, **options: Any
    ) -> Answer:
        def load_between_failpoints(connection: Connection) -> Entry:
            connection.query()  # send the probe now; usually it goes together with the statement that loads
            self.failpoints.reach("between probe and snapshot")
            entry = load(connection)
            self.failpoints.reach("between snapshot and fill")
            return entry

        answer = super().read(path, variant, load_between_failpoints, *more, **options)
        self.failpoints.reach("between fill and response")
        return answer

    def write(self, change: Callable[[Connection], Change[T]], *more: Any, **options: Any) -> T:
        def change_before_failpoint(connection: Connection) -> Change[T]:
            changed = change(connection)
            self.failpoints.reach("before the lock")
            return changed

        outcome = super().write(change_before_failpoint, *more, **options)
        self.failpoints.reach("after the commit")
        return outcome

    def _drop_at_edges(self, connection: Connection, *more: Any) -> list[Cache]:
        self.failpoints.reach("between the drops")
        fenced = super()._drop_at_edges(connection, *more)
        self.failpoints.reach("before the commit")
        return fenced


class Users:
    """Write users in this process, without HTTP."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.rows = Repository(registry()["users"], gate)

    def create(self, name: str, email: str) -> int:
        new = NewUser(name=name, email=email)
        return self.gate.write(lambda connection: self.rows.create(connection, new))[0]

    def update(self, user: int, name: str) -> None:
        changes = self.rows.resource.update_model.model_validate({"name": name})
        self.gate.write(lambda connection: self.rows.update(connection, user, changes, None))

    def delete(self, user: int) -> None:
        self.gate.write(lambda connection: self.rows.delete(connection, user, None))


@dataclass
class FailpointApp:
    stack: Stack
    """The stack whose PostgreSQL and Redis the app uses."""

    edge: str
    """The address of the edge in front of the app."""

    data: str
    """The folder of that edge."""

    failpoints: Failpoints
    users: Users
    url: str
    """The address of the app itself."""


def failpoint_gate(postgres: str, redis_url: str, failpoints: Failpoints) -> FailpointGate:
    database = Database(postgres, size=8, timeout=10)
    caches = Caches(database, threads=8)
    redis_tier = FailpointRedisTier(redis_url, caches.in_use, ttl=60, timeout=1)
    gate = FailpointGate(database, caches, redis_tier, EdgeTier(EDGE_SECRET))
    redis_tier.failpoints = gate.failpoints = failpoints
    return gate


@contextmanager
def failpoint_app(stack: Stack, **settings: str) -> Iterator[FailpointApp]:
    """Run an app with failpoints and an edge with these settings.

    With a REDIS_URL the edge reads Redis itself; without one it reads Redis through the app.
    """
    failpoints = Failpoints()
    gate = failpoint_gate(stack.postgres, stack.redis_url, failpoints)
    with running_app(gate) as url, running_edge(urlsplit(url).netloc, ROOT / "edge", **settings) as (edge, data):
        yield FailpointApp(stack, edge, data, failpoints, Users(gate), url)
    gate.database.close()


@contextmanager
def writer_process(stack: Stack, user: int, name: str, kill_at: str = "") -> Iterator[SpawnProcess]:
    """Start a process that writes to this user, as a worker of an app does, and kills itself at the failpoint `kill_at`.

    Without a failpoint the test may kill the process. The process is gone when the block ends.
    """
    # Spawn, do not fork: a fork would inherit the connections of this process, and close them when it dies.
    writer = get_context("spawn").Process(
        target=_write_until_killed, args=(stack.postgres, stack.redis_url, user, name, kill_at)
    )
    writer.start()
    try:
        yield writer
    finally:
        writer.kill()
        writer.join()


def _write_until_killed(postgres: str, redis_url: str, user: int, name: str, kill_at: str) -> None:
    failpoints = Failpoints({kill_at: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    gate = failpoint_gate(postgres, redis_url, failpoints)
    gate.database.open()
    Users(gate).update(user, name)


@contextmanager
def running_app(gate: Gate) -> Iterator[str]:
    """Run an app with this gate in this process; yield its address."""
    app = Flask("in this process")
    http.install(app, registry(), gate, Browsers(), Auth("off", gate), IdempotencyKeys(0))
    gate.database.open()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()


def lease_ms(edge: str) -> int:
    """Return the milliseconds that are left of the edge's cache lease."""
    return int(local_http.get_signed(f"{edge}/.edge", EDGE_SECRET).split()[1])


def has_cache_lease(edge: str) -> bool:
    return lease_ms(edge) > 0


@contextmanager
def running_edge(
    apps: str, home: Path = ROOT / "edge", program: str = "start", **settings: str
) -> Iterator[tuple[str, str]]:
    """Run an edge in front of these apps, with the code in `home`; yield its address and its folder.

    `program`: `start`, or `container` for an edge that leaves before it stops.
    """
    first_port = free_ports(2)
    with folder() as data:
        settings = {
            "REDIS_URL": "",
            "EDGE_SECRET": EDGE_SECRET,
            "EDGE_DATA": str(data),
            "EDGE_LISTEN": f"127.0.0.1:{first_port}",
            "EDGE_CONTROL": f"127.0.0.1:{first_port + 1}",
            "EDGE_APPS": apps,
            "EDGE_WORKERS": "1",
            "DATABASE_TIMEOUT": "10",
            **settings,
        }
        with (data / "log").open("w") as log:
            edge = subprocess.Popen(
                [str(home / program)], env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                url = f"http://127.0.0.1:{first_port}"
                wait_until(lambda: local_http.answers(f"{url}/.edge", EDGE_SECRET), what=(data / "log").read_text())
                yield url, str(data)
            finally:
                edge.terminate()
                edge.wait(10)
