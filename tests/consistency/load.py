"""Send random reads and writes without pauses, from processes of their own, and record them as a history.

Each write stores a name that no other write stores, so each read identifies the write that it shows. A process reports
its operations a few times a second, together with the time up to which its report is complete. Everything before the
earliest of these times can be judged.
"""

import contextlib
import multiprocessing
import multiprocessing.context
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import orjson
import psycopg

from tests.consistency.client import Client, NoResponse, NotSent, Response, problem_of
from tests.consistency.history import FOREVER, OUTSIDE, Kind, Operation, Outcome, Row

REPORT_INTERVAL_S = 0.2
"""Seconds between two reports of a process."""

EDGE_PAUSE_S = 0.2
"""Seconds for which a worker leaves an edge alone after an error; five times as long after a timeout."""

WRITE_TIMEOUT_S = 6.0
"""Seconds that a write waits for a response: a write may take 3 s while a cache is fenced."""

READ_TIMEOUT_S = 1.5
"""Seconds that a read waits for a response: an edge that hangs must not keep readers from the other edges."""

LIST_QUERIES = ("", "", "", "?limit=3", "?limit=5", "?sort=-id", "?sort=-created_at")
"""Queries of lists: whole or in pages, in several orders. Every peer supports the first five."""

KEPT_DELETED_IDS = 32
"""Deleted users that are still read now and then."""


@dataclass(frozen=True)
class Load:
    edges: tuple[str, ...]
    seed: int = 0
    writers: int = 2
    readers: int = 4
    users: int = 8
    """Users that exist at a time."""
    shared: bool = False
    """Let several writers write to one user; otherwise each writer has its own users."""
    lists: float = 0.1
    """Share of the reads that are lists."""
    pace: float = 0.0
    """Seconds that a writer pauses after each write."""
    database: str = ""
    """If set, another process writes straight to this database, to users of its own."""
    plain: bool = False
    """Leave out PATCH, batches and orders, which the cache-aside service does not have."""
    read_timeout: float = READ_TIMEOUT_S
    write_timeout: float = WRITE_TIMEOUT_S
    path: str = "/users"
    """The path of the resource. Another resource stands in for the users here; it needs a field `name`."""
    fields: Callable[[str], dict[str, Any]] = lambda name: {"email": f"{name.replace(' ', '.')}@example.com"}
    """Returns the other fields of a row with this name; they differ for each name."""


@dataclass
class Board:
    """Shared memory in which the processes publish users for the readers to read. It may lag behind."""

    slots: Any
    gone: Any
    highest: Any
    writing: Any
    reading: Any

    @classmethod
    def new(cls, users: int, context: multiprocessing.context.ForkContext) -> "Board":
        slots, gone = context.RawArray("q", users + 2), context.RawArray("q", KEPT_DELETED_IDS)
        board = cls(slots, gone, context.RawValue("q", 3), context.Event(), context.Event())
        board.writing.set()
        board.reading.set()
        return board

    def put(self, slot: int, user: int) -> None:
        before = self.slots[slot]
        self.slots[slot] = user
        if before:
            self.gone[before % KEPT_DELETED_IDS] = before
        self.highest.value = max(self.highest.value, user)


class Worker:
    """The common part of writers and readers: connections to all edges, and reports."""

    def __init__(self, name: str, timeout: float, load: Load, board: Board, report: "Connection[Any, Any]") -> None:
        self.name = name
        self.load = load
        self.board = board
        self.random = random.Random(f"{load.seed} {name}")
        self._report = report
        self._operations: list[Operation] = []
        self._next_report = time.monotonic_ns()
        self._edges = [Client(url, timeout) for url in load.edges]
        self._paused_until = [0] * len(self._edges)

    def work(self) -> None:
        raise NotImplementedError

    def clean_up(self) -> None:
        pass

    def record(self, operation: Operation) -> None:
        self._operations.append(operation)
        self.report_when_due()

    def report_when_due(self) -> None:
        """Report between two operations: a report states that no operation before its time is missing."""
        if (now := time.monotonic_ns()) >= self._next_report:
            self.report(now)

    def report(self, complete_until: int) -> None:
        self._report.send((complete_until, self._operations))
        self._operations = []
        self._next_report = time.monotonic_ns() + int(REPORT_INTERVAL_S * 1e9)

    def edge(self) -> int:
        """Return the index of an edge that has not failed just now, or of any edge if all have."""
        self.report_when_due()
        now = time.monotonic_ns()
        candidates = [n for n, until in enumerate(self._paused_until) if until <= now]
        if candidates:
            return self.random.choice(candidates)
        time.sleep(0.01)
        return self.random.randrange(len(self._edges))

    def _request(self, edge: int, method: bytes, target: str, body: bytes = b"") -> Response:
        try:
            response = self._edges[edge].request(method, target.encode(), body)
        except (NotSent, NoResponse) as error:
            timed_out = isinstance(error.__cause__, TimeoutError)
            self._paused_until[edge] = time.monotonic_ns() + int(EDGE_PAUSE_S * 1e9) * (5 if timed_out else 1)
            raise
        if response.status >= 500:
            self._paused_until[edge] = time.monotonic_ns() + int(EDGE_PAUSE_S * 1e9 / 10)
        return response


class Writer(Worker):
    def __init__(self, number: int, *rest: Any) -> None:
        load: Load = rest[0]
        super().__init__(f"w{number}", load.write_timeout, *rest)
        self.number = number
        self._count = 0
        # Names of later runs against the same database must differ.
        self._run = f"{self.load.seed:x}.{time.time_ns() // 10**9 % 10**7:x}"

    def work(self) -> None:
        own = [slot for slot in range(self.load.users) if slot % self.load.writers == self.number]
        writable = list(range(self.load.users)) if self.load.shared else own
        while self.board.writing.is_set():
            slot = self.random.choice(writable)
            chance = self.random.random()
            if not self.board.slots[slot]:
                if slot in own:
                    self._create(slot)
                else:
                    time.sleep(0.001)
                    self.report_when_due()
            elif chance < 0.03 and slot in own:
                self._delete(slot)
            elif chance < 0.05:
                self._send_invalid(slot)
            else:
                self._update(slot)
            if self.load.pace:
                time.sleep(self.load.pace)

    def clean_up(self) -> None:
        for slot in range(self.load.users):
            if slot % self.load.writers == self.number and self.board.slots[slot]:
                self._delete(slot)

    def _name(self) -> str:
        self._count += 1
        return f"{self._run} {self.name} {self._count}"

    def _create(self, slot: int) -> None:
        name = self._name()
        body = {"name": name, **self.load.fields(name)}
        response = self._write("create", self.load.path, body, None, name)
        if response and response.status == 201:
            self.board.put(slot, orjson.loads(response.body)["id"])

    def _update(self, slot: int) -> None:
        user = self.board.slots[slot]
        if not user:
            return
        name = self._name()
        body = {"name": name}
        if self.random.random() < 0.2:
            body |= self.load.fields(name)
        response = self._write("update", f"{self.load.path}/{user}", body, user, name)
        if response and response.status == 404 and not self.load.shared:
            self.board.put(slot, 0)  # a deletion by this writer with unknown outcome has happened

    def _send_invalid(self, slot: int) -> None:
        """Send a write that the service must refuse, so that no read may show its name."""
        user, name = self.board.slots[slot], self._name()
        body = {"name": name, "unknown": 1} if self.random.random() < 0.5 else {"name": name, "name ": name}
        self._write("update", f"{self.load.path}/{user}", body, user, name)

    def _delete(self, slot: int) -> None:
        user = self.board.slots[slot]
        response = self._write("delete", f"{self.load.path}/{user}", None, user, "")
        if response and response.status in (200, 404):
            self.board.put(slot, 0)

    def _write(self, kind: Kind, path: str, body: Any, user: int | None, name: str) -> Response | None:
        edge = self.edge()
        response, status = None, 0
        outcome: Outcome = "unknown"
        method = {"create": b"POST", "update": b"PUT", "delete": b"DELETE"}[kind]
        target = path
        if self.load.plain:
            pass
        elif kind == "update" and self.random.random() < 0.5:
            method = b"PATCH"
        elif user and self.random.random() < 0.2:
            method, target = b"POST", f"{self.load.path}/batch"
            body = {"operations": [{"op": kind, "id": user, **(body or {})}]}
        sent = orjson.dumps(body) if body is not None else b""
        invoke = time.monotonic_ns()
        try:
            response = self._request(edge, method, target, sent)
            status = response.status
            outcome = "ok" if status < 300 else "failed" if status < 500 else "unknown"
        except NotSent:
            outcome = "failed"
        except NoResponse:
            pass
        returned = time.monotonic_ns()
        if response and kind == "create" and outcome == "ok":
            user = orjson.loads(response.body)["id"]
        written = Operation(
            invoke, returned, kind, path, outcome, status, f"edge{edge + 1}", worker=self.name, name=name
        )
        self.record(written._replace(user=user, problem=problem_of(response)))
        return response


class SqlWriter(Worker):
    """Writes that bypass the app, with pauses: reads of such a user are not judged for a while after each write."""

    def __init__(self, *rest: Any) -> None:
        super().__init__("sql", WRITE_TIMEOUT_S, *rest)
        self._run = f"{self.load.seed:x}.{time.time_ns() // 10**9 % 10**7:x}"
        self._connection: psycopg.Connection[Any] | None = None
        self._count = 0

    def work(self) -> None:
        slots = (self.load.users, self.load.users + 1)
        while self.board.writing.is_set():
            slot = self.random.choice(slots)
            user = self.board.slots[slot]
            if not user:
                self._run_sql("create", slot, 0, "INSERT INTO users (name, email) VALUES (%s, %s) RETURNING id")
            elif self.random.random() < 0.1:
                self._run_sql("delete", slot, user, "DELETE FROM users WHERE id = %s RETURNING id")
            else:
                self._run_sql("update", slot, user, "UPDATE users SET name = %s WHERE id = %s RETURNING id")
            until = time.monotonic() + self.random.uniform(0.1, 3)
            while self.board.writing.is_set() and time.monotonic() < until:
                time.sleep(0.05)
                self.report_when_due()

    def clean_up(self) -> None:
        for slot in (self.load.users, self.load.users + 1):
            if self.board.slots[slot]:
                self._run_sql("delete", slot, self.board.slots[slot], "DELETE FROM users WHERE id = %s RETURNING id")

    def _run_sql(self, kind: Kind, slot: int, user: int, statement: str) -> None:
        self._count += 1
        name = "" if kind == "delete" else f"{self._run} sql {self._count}"
        email = f"{name.replace(' ', '.')}@example.com"
        values = {"create": (name, email), "update": (name, user), "delete": (user,)}[kind]
        outcome: Outcome = "unknown"
        invoke = time.monotonic_ns()
        try:
            if self._connection is None or self._connection.closed:
                self._connection = psycopg.connect(self.load.database, autocommit=True, connect_timeout=2)
            row = self._connection.execute(statement, values).fetchone()
            outcome = "ok" if row else "failed"
            user = row[0] if row else user
        except psycopg.Error:
            self._connection = None
        path = "/users" if kind == "create" else f"/users/{user}"
        written = Operation(invoke, time.monotonic_ns(), kind, path, outcome, edge=OUTSIDE, worker=self.name, name=name)
        self.record(written._replace(user=user or None))
        if outcome != "unknown":
            self.board.put(slot, user if kind != "delete" and outcome == "ok" else 0)


class Reader(Worker):
    def __init__(self, number: int, *rest: Any) -> None:
        load: Load = rest[0]
        super().__init__(f"r{number}", load.read_timeout, *rest)

    def work(self) -> None:
        while self.board.reading.is_set():
            if self.random.random() < self.load.lists:
                self._list(self.random.choice(LIST_QUERIES[:5] if self.load.plain else LIST_QUERIES))
            else:
                self._read(self._pick_user(), self.edge())
        # The last acknowledged writes are read, too, through every edge.
        for edge in range(len(self.load.edges)):
            for user in [*self.board.slots, *self.board.gone]:
                if user:
                    self._read(user, edge)

    def _pick_user(self) -> int:
        """Return mostly one of a few popular users, and now and then a user that is gone or does not exist yet."""
        chance = self.random.random()
        if chance < 0.03:
            user = self.random.choice(self.board.gone)
        elif chance < 0.06:
            user = 0
        else:
            user = self.board.slots[int(len(self.board.slots) * self.random.random() ** 2)]
        return int(user) or self.board.highest.value + self.random.randint(1, 2)

    def _read(self, user: int, edge: int) -> None:
        path = f"{self.load.path}/{user}"
        operation, response = self._get("read", path, edge)
        if response and response.status == 200:
            shown = orjson.loads(response.body)
            operation = operation._replace(rows=(Row(shown["id"], shown["version"], shown["name"]),))
        self.record(operation._replace(user=user))

    def _list(self, query: str) -> None:
        """Read a whole list, or page by page; each page is a read of its own."""
        path, after = self.load.path + query, 0
        for _ in range(20):
            operation, response = self._get("list", path, self.edge())
            if not response or response.status != 200:
                self.record(operation if operation.outcome == "unknown" else operation._replace(outcome="failed"))
                return
            rows = tuple(sorted(Row(row["id"], row["version"], row["name"]) for row in orjson.loads(response.body)))
            following = re.search('<([^>]+)>; rel="next"', response.header(b"Link"))
            until = rows[-1].user if following else None
            self.record(operation._replace(rows=rows, after=after, until=until))
            if not following or until is None:
                return
            path, after = following[1], until

    def _get(self, kind: Kind, path: str, edge: int) -> tuple[Operation, Response | None]:
        response, status, tier, cache_status = None, 0, "", ""
        invoke = time.monotonic_ns()
        outcome: Outcome = "failed"
        try:
            response = self._request(edge, b"GET", path)
        except NotSent:
            pass
        except NoResponse:
            outcome = "unknown"
        returned = time.monotonic_ns()
        if response:
            status = response.status
            tier, cache_status = response.header(b"X-Cache-Status"), response.header(b"Cache-Status")
            outcome = "ok" if status in (200, 404) else "failed"
        operation = Operation(invoke, returned, kind, path, outcome, status, f"edge{edge + 1}", tier, cache_status)
        return operation._replace(worker=self.name, problem=problem_of(response)), response


def _main(kind: Callable[..., Worker], *arguments: Any) -> None:
    """Run a process of the load."""
    worker = kind(*arguments)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        worker.work()
        worker.clean_up()
        worker.report(FOREVER)


@dataclass
class Running:
    """The processes of a load."""

    load: Load
    on_operations: Callable[[Iterable[Operation]], None]
    """Receives the operations that the processes report."""
    on_complete: Callable[[int], None]
    """Receives the time up to which all operations are reported."""
    more: "Iterable[Callable[[Load, Board, Connection[Any, Any]], Worker]]" = ()
    """Further workers."""
    _processes: list[BaseProcess] = field(default_factory=list)
    _reports: "dict[Connection[Any, Any], int]" = field(default_factory=dict)

    def start(self) -> None:
        # Forked: each of the many processes would need a second to import everything if it were spawned. They use
        # nothing of the parent process except their arguments.
        context = multiprocessing.get_context("fork")
        self.on_operations([self._initial()])
        self._board = Board.new(self.load.users, context)
        kinds: list[tuple[Any, ...]] = [(Writer, n) for n in range(self.load.writers)]
        kinds += [(Reader, n) for n in range(self.load.readers)]
        kinds += [(SqlWriter,)] if self.load.database else []
        kinds += [(kind,) for kind in self.more]
        for kind in kinds:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(*kind, self.load, self._board, send), daemon=True)
            process.start()
            send.close()
            self._processes.append(process)
            self._reports[receive] = 0

    def _initial(self) -> Operation:
        """Return the users that exist before the first write."""
        response = Client(self.load.edges[0], WRITE_TIMEOUT_S).request(b"GET", self.load.path.encode())
        rows = tuple(Row(row["id"], row["version"], row["name"]) for row in orjson.loads(response.body))
        now = time.monotonic_ns()
        return Operation(now, now, "initial", self.load.path, "ok", rows=rows)

    def pump(self, seconds: float) -> None:
        """Receive reports for this many seconds, or until all processes have ended."""
        until = time.monotonic() + seconds
        while self._reports and (left := until - time.monotonic()) > 0:
            for report in [report for report in wait(list(self._reports), timeout=left) if report in self._reports]:
                try:
                    complete, operations = report.recv()
                except EOFError:
                    if self._reports.pop(report) < FOREVER:
                        raise RuntimeError("a process of the load has died") from None
                    continue
                self.on_operations(operations)
                self._reports[report] = complete
                if complete == FOREVER:
                    del self._reports[report]
            self.on_complete(min(self._reports.values(), default=FOREVER))

    def stop(self, within: float = 60) -> None:
        """Stop the writers first, so that readers see their last writes. Writers then delete their users."""
        self._board.writing.clear()
        self._board.reading.clear()
        self.pump(within)
        assert not self._reports, f"the load did not end within {within:g} s"
        for process in self._processes:
            process.join(5)

    def end(self) -> None:
        """Kill every process that still runs."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
