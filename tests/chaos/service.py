"""The service under test: two edges, two apps, a relay, Redis and PostgreSQL, and what faults may take hold of."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
import psycopg
import redis

from testkit.stack import Stack, running
from testkit.tcp_proxy import TcpProxy
from tests.consistency.client import Client, NoResponse, NotSent, Response
from velikiy.coherence.membership import RECORD
from velikiy.findings import Finding
from velikiy.stack import reaper, status
from velikiy.stack.plan import Plan

T = TypeVar("T")

OWN_ROWS = "fault "
"""Names of users that faults write begin with this. The checker does not judge them."""

WAIT_S = 0.02


class Interrupted(Exception):
    """Raised in a fault that waits when the run ends, so that the fault is undone at once."""


class Missing(Exception):
    """Raised by a kind of service that cannot start here, and by a fault that cannot be injected here, with the reason
    as a sentence."""


def need_programs(*names: str) -> None:
    """
    Raises:
        Missing: This machine lacks some of them.
    """
    if lacking := [name for name in names if not shutil.which(name)]:
        raise Missing(f"programs are missing: {', '.join(lacking)}")


@dataclass(frozen=True)
class Kind:
    """A kind of service. Faults that need other servers than the native stack bring a kind of their own."""

    name: str
    start: "Callable[[], AbstractContextManager[Service]]"


@dataclass
class Service:
    stack: Stack
    """The stack that `./run up` has started: its data folder, addresses, secrets, supervisor, logs."""

    edges: list[str]
    """The addresses of the edges as clients reach them. The first is `edge1`."""

    proxies: Mapping[str, TcpProxy] = field(default_factory=dict)
    """Proxies between servers, by a name such as `postgres`, if this kind of service has them."""

    ending: threading.Event = field(default_factory=threading.Event)
    """Set when the run ends: faults that wait are undone at once."""

    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    """Further parts of a kind of service, for its own faults."""

    # ---- processes ----

    def pids(self, name: str) -> list[int]:
        """Return the process ids of `edge1`, `app2`, `relay`, `redis` or `postgres`: the master, then the others by
        their ids. It does not call supervisor, which may be stopped."""
        found = sorted(reaper.leftovers(self.stack.data / name))
        masters = [pid for pid in found if _parent(pid) not in found]
        return [*masters, *(pid for pid in found if pid not in masters)]

    def master(self, name: str) -> int:
        """Return the process id of the master, waiting for a restart that is going on."""
        return self.until(lambda: self.pids(name), within=20, what=f"{name} runs")[0]

    def workers(self, name: str) -> list[int]:
        """Return the children of the master by their ids."""
        return self.pids(name)[1:]

    @contextmanager
    def stopped(self, *pids: int) -> Iterator[None]:
        """Stop these processes (SIGSTOP), and let them go on at the end."""
        try:
            for pid in pids:
                send_signal(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                send_signal(pid, signal.SIGCONT)

    def kill(self, *pids: int, number: int = signal.SIGKILL) -> None:
        for pid in pids:
            send_signal(pid, number)

    def call_supervisor(self, method: str, *arguments: object) -> Any:
        """Call supervisor: `stopProcess`, `startProcess`, `signalProcess` with the name of a process."""
        return getattr(self.stack.supervisor.rpc, method)(*arguments)

    @property
    def plan(self) -> Plan:
        return self.stack.supervisor.plan

    # ---- servers ----

    def connect(self, role: str = "owner", **options: Any) -> "psycopg.Connection[Any]":
        """Return a new connection to PostgreSQL itself, in autocommit. It bypasses all proxies.

        Args:
            role: `owner` of the tables, or `app`, the role of the services.
        """
        dsn = self.stack.postgres if role == "owner" else self.stack.secret("database_url")
        options = {"autocommit": True, "connect_timeout": 5, "application_name": "chaos", **options}
        return psycopg.connect(dsn, **options)

    def redis(self, **options: Any) -> "redis.Redis":
        """Return a client of Redis itself."""
        return redis.Redis.from_url(
            self.stack.redis_url, **{"socket_timeout": 2, "socket_connect_timeout": 2, **options}
        )

    # ---- requests of faults ----

    def request(
        self, edge: int, method: str, path: str, body: object = None, *, timeout: float = 10
    ) -> Response | None:
        """Send a request through the edge with this index, and return the response, or None without one."""
        client = Client(self.edges[edge], timeout)
        try:
            return client.request(method.encode(), path.encode(), b"" if body is None else orjson.dumps(body))
        except (NotSent, NoResponse):
            return None
        finally:
            client.close()

    @contextmanager
    def row(self, edge: int = 0) -> Iterator[int]:
        """Create a user for this fault, yield its id, and delete it. A fault may write only such users; their
        names begin with OWN_ROWS."""
        name = f"{OWN_ROWS}{time.monotonic_ns()}"
        body = {"name": name, "email": f"{name.replace(' ', '.')}@example.com"}
        response = self.request(edge, "POST", "/users", body)
        assert response and response.status == 201, f"a row could not be created: {response and response.status}"
        user = int(orjson.loads(response.body)["id"])
        try:
            yield user
        finally:
            self.request(edge, "DELETE", f"/users/{user}")

    @contextmanager
    def threads(self, count: int, work: Callable[[threading.Event], object]) -> Iterator[None]:
        """Call the function in so many threads. It has to return soon after its event is set, at the end."""
        end = threading.Event()
        threads = [threading.Thread(target=work, args=(end,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            end.set()
            for thread in threads:
                thread.join(20)

    @contextmanager
    def repeat(self, step: Callable[[threading.Event], object], pause_s: float = 0.0) -> Iterator[None]:
        """Call the function again and again in a thread, with pauses, until the block ends. It gets the event of the
        end."""

        def work(end: threading.Event) -> None:
            while not end.is_set():
                step(end)
                end.wait(pause_s)

        with self.threads(1, work):
            yield

    # ---- time ----

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the run lasts.

        Raises:
            Interrupted
        """
        if self.ending.wait(seconds):
            raise Interrupted

    def until(self, condition: Callable[[], T], *, within: float = 20, what: str = "") -> T:
        """Return the first true value of the condition.

        Raises:
            Interrupted
            AssertionError: The condition did not become true in time.
        """
        deadline = time.monotonic() + within
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {within:g} s: {what or condition}"
            self.wait(WAIT_S)
        return value

    def forget(self) -> None:
        """Forget the fences and the restarts that faults have caused: a cache that was fenced again and again would
        stay out of use for a minute, and the next fault would find another service than the one before."""
        with suppress(psycopg.Error), self.connect(connect_timeout=2) as connection:
            connection.execute("DELETE FROM caches WHERE kind = 'redis' AND starts_with(name, %s)", (RECORD,))
        long_ago = time.time() - 3600
        for noted in (self.plan.home / "run").glob("*.spawned"):
            noted.write_text(f"1\n{long_ago}\n")  # the start of the stack (velikiy/stack/reaper.py)
            os.utime(noted, (long_ago, long_ago))

    # ---- what is seen ----

    def findings(self) -> list[Finding]:
        """Return what `./run status` shows now. Takes up to 1.4 s while a part does not answer."""
        return status.look(self.plan).findings

    def violation(self, sentence: str) -> None:
        """Report that the service broke a promise that only this fault can see. The run then fails."""
        self.violations.append(sentence)

    def note(self, figure: str) -> None:
        """Add a figure of this fault to its row in the table."""
        self.notes.append(figure)


def send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def native() -> Iterator[Service]:
    with running("--edges", "2", "--apps", "2") as stack:
        yield Service(stack, stack.edges)


NATIVE = Kind("native", native)
"""The stack of `./run up`, with Unix sockets between its servers."""
