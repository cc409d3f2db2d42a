"""An app in this process whose reads and writes stop where a test wants them to, behind an edge of its own.

The servers are those of a running stack; the edge registers in its database like any other.
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
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from flask import Flask
from werkzeug.serving import make_server

from testkit.stack import ROOT, Stack, folder, free_ports, status_of, wait_until
from velikiy.coherence import NOT_TRIED, Answer, CachePath, Caches, Change, EdgeTier, Entry, Gate, NotTried, RedisTier
from velikiy.coherence.membership import Cache
from velikiy.coherence.redis_lease import RedisLease
from velikiy.coherence.redis_tier import Lease
from velikiy.http import edge_leases, middleware, problems, routes
from velikiy.postgres import Connection, Database
from velikiy.resources.base import registry
from velikiy.resources.repository import Repository
from velikiy.resources.users import NewUser

T = TypeVar("T")
Step = Callable[[], None]


def nothing() -> None:
    pass


@dataclass
class Steps:
    """What is done at each place, by whoever comes there first; the next one passes."""

    steps: dict[str, Step] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)

    def at(self, place: str) -> None:
        self.passed.append(place)
        self.steps.pop(place, nothing)()


class SteppedRedis(RedisTier):
    steps: Steps

    def drop(self, paths: Iterable[CachePath] | None, mine: Sequence[CachePath] = ()) -> dict[CachePath, Lease]:
        self.steps.at("before the drops")
        return super().drop(paths, mine)


class SteppedGate(Gate):
    steps: Steps

    def read(
        self,
        path: CachePath,
        variant: str,
        load: Callable[[Connection], Entry],
        from_edge: Lease | NotTried | None = NOT_TRIED,
    ) -> Answer:
        def stepped(connection: Connection) -> Entry:
            connection.query()  # the check, which else goes with the statement that loads
            self.steps.at("between check and snapshot")
            entry = load(connection)
            self.steps.at("between snapshot and fill")
            return entry

        answer = super().read(path, variant, stepped, from_edge)
        self.steps.at("between fill and answer")
        return answer

    def write(
        self,
        change: Callable[[Connection], Change[T]],
        timeout_factor: float = 1,
        lock_first: Sequence[CachePath] = (),
        until: float | None = None,
    ) -> T:
        def stepped(connection: Connection) -> Change[T]:
            done = change(connection)
            self.steps.at("before the lock")
            return done

        outcome = super().write(stepped, timeout_factor, lock_first, until)
        self.steps.at("after the commit")
        return outcome

    def _drop_at_edges(self, connection: Connection, paths: Sequence[CachePath] | None) -> list[Cache]:
        self.steps.at("between the drops")
        fenced = super()._drop_at_edges(connection, paths)
        self.steps.at("before the commit")
        return fenced


class Users:
    """Users, written in this process and without HTTP."""

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
class SteppedApp:
    stack: Stack
    edge: str
    data: str
    """The edge's folder."""
    steps: Steps
    users: Users
    url: str
    """Of the app itself."""


def stepped_gate(postgres: str, redis_url: str, steps: Steps) -> SteppedGate:
    database = Database(postgres, size=8, timeout=10)
    caches = Caches(database, threads=8)
    redis_tier = SteppedRedis(redis_url, RedisLease(caches.redis_is_fenced), ttl=60, timeout=1)
    gate = SteppedGate(database, caches, redis_tier, EdgeTier())
    redis_tier.steps = gate.steps = steps
    return gate


@contextmanager
def stepped_app(stack: Stack, **settings: str) -> Iterator[SteppedApp]:
    """`settings`: of its edge. With a REDIS_URL the edge reads Redis itself, and without one through the app."""
    steps = Steps()
    gate = stepped_gate(stack.postgres, stack.redis_url, steps)
    with serving(gate) as url, edge_of(urlsplit(url).netloc, ROOT / "edge", **settings) as (edge, data):
        yield SteppedApp(stack, edge, data, steps, Users(gate), url)
    gate.database.close()


@contextmanager
def dying_writer(stack: Stack, user: int, name: str, place: str = "") -> Iterator[SpawnProcess]:
    """Start a process that writes to this user, as an app's worker does, and is killed at this place. Without a place
    the test may kill the process. When the block ends the process is gone in any case."""
    # Spawned: a fork of this process would have our connections, and would end them as it dies.
    writer = get_context("spawn").Process(
        target=_write_and_die, args=(stack.postgres, stack.redis_url, user, name, place)
    )
    writer.start()
    try:
        yield writer
    finally:
        writer.kill()
        writer.join()


def _write_and_die(postgres: str, redis_url: str, user: int, name: str, place: str) -> None:
    steps = Steps({place: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    gate = stepped_gate(postgres, redis_url, steps)
    gate.database.open()
    Users(gate).update(user, name)


@contextmanager
def serving(gate: Gate) -> Iterator[str]:
    """The address of an app in this process with this fence."""
    app = Flask("in this process")
    middleware.install(app)
    problems.install(app)
    routes.install(app, registry(), gate)
    edge_leases.install(app, registry(), gate.caches)
    gate.database.open()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()


def caching(edge: str) -> bool:
    """It has a lease."""
    return not requests.get(f"{edge}/.edge", timeout=5).text.endswith(" 0")


@contextmanager
def edge_of(apps: str, home: Path = ROOT / "edge", **settings: str) -> Iterator[tuple[str, str]]:
    """An edge before these apps: its address and its folder. `home` is where its code is."""
    first = free_ports(2)
    with folder() as data:
        settings = {
            "REDIS_URL": "",
            "EDGE_DATA": str(data),
            "EDGE_LISTEN": f"127.0.0.1:{first}",
            "EDGE_CONTROL": f"127.0.0.1:{first + 1}",
            "EDGE_APPS": apps,
            "EDGE_WORKERS": "1",
            "DATABASE_TIMEOUT": "10",
            **settings,
        }
        with (data / "log").open("w") as log:
            edge = subprocess.Popen(
                [str(home / "start")], env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                url = f"http://127.0.0.1:{first}"
                wait_until(lambda: status_of(f"{url}/.edge") == 200, what=(data / "log").read_text())
                yield url, str(data)
            finally:
                edge.terminate()
                edge.wait(10)
