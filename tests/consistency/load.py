"""Random reads and writes without pauses, from processes of their own, recorded as a history.

Each write leaves a name that nobody else writes, so each read says which write it saw. A process reports what it did a
few times a second, together with a moment up to which its report is complete; what lies before the earliest of these
moments can be judged.
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

from tests.consistency.client import Answer, Broken, Client, NotSent
from tests.consistency.history import FOREVER, OUTSIDE, Kind, Operation, Outcome, Row

REPORT = 0.2
"""Seconds between two reports of a process."""

QUIET = 0.2
"""Seconds for which an edge is left alone that has just failed; five times that where it did not answer at all."""

PATIENCE = 6.0
"""Seconds that a write waits: it may take 3 while a cache is being fenced."""

IMPATIENCE = 1.5
"""Seconds that a read waits for an answer: what hangs must not keep readers from those that work."""

LISTS = ("", "", "", "?limit=3", "?limit=5", "?sort=-id", "?sort=-created_at")
"""Whole or in pages, in one order or another; the first ones as every peer knows them."""

GONE_KEPT = 32
"""Ids of the deleted that are still read now and then."""


@dataclass(frozen=True)
class Load:
    edges: tuple[str, ...]
    seed: int = 0
    writers: int = 2
    readers: int = 4
    users: int = 8
    """That exist at a time."""
    shared: bool = False
    """Several writers write to one user; else each has its own."""
    lists: float = 0.1
    """Of the reads."""
    pace: float = 0.0
    """Seconds that a writer rests after each write."""
    database: str = ""
    """Where set, a process writes straight to PostgreSQL too, to users of its own."""
    plain: bool = False
    """Without PATCH, batches and orders, which the classic design does not have."""
    path: str = "/users"
    """Of another resource, what is said of users here is true of its own; it has to have a name."""
    fields: Callable[[str], dict[str, Any]] = lambda name: {"email": f"{name.replace(' ', '.')}@example.com"}
    """Those that one of this name has besides, each time others."""


@dataclass
class Board:
    """What the processes tell each other, so that readers know whom to read. It may be behind."""

    slots: Any
    gone: Any
    highest: Any
    writing: Any
    reading: Any

    @classmethod
    def new(cls, users: int, context: multiprocessing.context.ForkContext) -> "Board":
        slots, gone = context.RawArray("q", users + 2), context.RawArray("q", GONE_KEPT)
        board = cls(slots, gone, context.RawValue("q", 3), context.Event(), context.Event())
        board.writing.set()
        board.reading.set()
        return board

    def put(self, slot: int, user: int) -> None:
        before = self.slots[slot]
        self.slots[slot] = user
        if before:
            self.gone[before % GONE_KEPT] = before
        self.highest.value = max(self.highest.value, user)


class Worker:
    """What writers and readers have in common: connections to all edges, and reporting."""

    def __init__(self, name: str, patience: float, load: Load, board: Board, report: "Connection[Any, Any]") -> None:
        self.name = name
        self.load = load
        self.board = board
        self.random = random.Random(f"{load.seed} {name}")
        self._report = report
        self._operations: list[Operation] = []
        self._next_report = time.monotonic_ns()
        self._edges = [Client(url, patience) for url in load.edges]
        self._quiet_until = [0] * len(self._edges)

    def work(self) -> None:
        raise NotImplementedError

    def clean_up(self) -> None:
        pass

    def record(self, operation: Operation) -> None:
        self._operations.append(operation)
        self.report_when_due()

    def report_when_due(self) -> None:
        """Between two operations only: a report says that nothing is missing from before it."""
        if (now := time.monotonic_ns()) >= self._next_report:
            self.report(now)

    def report(self, complete_until: int) -> None:
        self._report.send((complete_until, self._operations))
        self._operations = []
        self._next_report = time.monotonic_ns() + int(REPORT * 1e9)

    def edge(self) -> int:
        """One of those that have not failed just now."""
        self.report_when_due()
        now = time.monotonic_ns()
        willing = [n for n, until in enumerate(self._quiet_until) if until <= now]
        if willing:
            return self.random.choice(willing)
        time.sleep(0.01)
        return self.random.randrange(len(self._edges))

    def ask(self, edge: int, method: bytes, target: str, body: bytes = b"") -> Answer:
        try:
            answer = self._edges[edge].request(method, target.encode(), body)
        except (NotSent, Broken) as error:
            silent = isinstance(error.__cause__, TimeoutError)
            self._quiet_until[edge] = time.monotonic_ns() + int(QUIET * 1e9) * (5 if silent else 1)
            raise
        if answer.status >= 500:
            self._quiet_until[edge] = time.monotonic_ns() + int(QUIET * 1e9 / 10)
        return answer


class Writer(Worker):
    def __init__(self, number: int, *rest: Any) -> None:
        super().__init__(f"w{number}", PATIENCE, *rest)
        self.number = number
        self._count = 0
        # Later runs against the same database must not meet the names of earlier ones.
        self._run = f"{self.load.seed:x}.{time.time_ns() // 10**9 % 10**7:x}"

    def work(self) -> None:
        mine = [slot for slot in range(self.load.users) if slot % self.load.writers == self.number]
        theirs = list(range(self.load.users)) if self.load.shared else mine
        while self.board.writing.is_set():
            slot = self.random.choice(theirs)
            chance = self.random.random()
            if not self.board.slots[slot]:
                if slot in mine:
                    self._create(slot)
                else:
                    time.sleep(0.001)
                    self.report_when_due()
            elif chance < 0.03 and slot in mine:
                self._delete(slot)
            elif chance < 0.05:
                self._refused(slot)
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
        answer = self._write("create", self.load.path, body, None, name)
        if answer and answer.status == 201:
            self.board.put(slot, orjson.loads(answer.body)["id"])

    def _update(self, slot: int) -> None:
        user = self.board.slots[slot]
        if not user:
            return
        name = self._name()
        body = {"name": name}
        if self.random.random() < 0.2:
            body |= self.load.fields(name)
        answer = self._write("update", f"{self.load.path}/{user}", body, user, name)
        if answer and answer.status == 404 and not self.load.shared:
            self.board.put(slot, 0)  # a deletion of ours with unknown outcome has happened

    def _refused(self, slot: int) -> None:
        """A write whose name must never be seen."""
        user, name = self.board.slots[slot], self._name()
        body = {"name": name, "unknown": 1} if self.random.random() < 0.5 else {"name": name, "name ": name}
        self._write("update", f"{self.load.path}/{user}", body, user, name)

    def _delete(self, slot: int) -> None:
        user = self.board.slots[slot]
        answer = self._write("delete", f"{self.load.path}/{user}", None, user, "")
        if answer and answer.status in (200, 404):
            self.board.put(slot, 0)

    def _write(self, kind: Kind, path: str, body: Any, user: int | None, name: str) -> Answer | None:
        edge = self.edge()
        answer, status = None, 0
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
            answer = self.ask(edge, method, target, sent)
            status = answer.status
            outcome = "ok" if status < 300 else "failed" if status < 500 else "unknown"
        except NotSent:
            outcome = "failed"
        except Broken:
            pass
        returned = time.monotonic_ns()
        if answer and kind == "create" and outcome == "ok":
            user = orjson.loads(answer.body)["id"]
        self.record(
            Operation(
                invoke, returned, kind, path, outcome, status, f"edge{edge + 1}", worker=self.name, user=user, name=name
            )
        )
        return answer


class Outsider(Worker):
    """Writes past the app, with pauses: what it has just written is not judged for a while."""

    def __init__(self, *rest: Any) -> None:
        super().__init__("sql", PATIENCE, *rest)
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
        super().__init__(f"r{number}", IMPATIENCE, *rest)

    def work(self) -> None:
        while self.board.reading.is_set():
            if self.random.random() < self.load.lists:
                self._list(self.random.choice(LISTS[:5] if self.load.plain else LISTS))
            else:
                self._read(self._somebody(), self.edge())
        # What was acknowledged last is read too, through every edge.
        for edge in range(len(self.load.edges)):
            for user in [*self.board.slots, *self.board.gone]:
                if user:
                    self._read(user, edge)

    def _somebody(self) -> int:
        """Mostly one of a few who are read more than others; now and then somebody gone or not yet there."""
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
        operation, answer = self._get("read", path, edge)
        if answer and answer.status == 200:
            shown = orjson.loads(answer.body)
            operation = operation._replace(rows=(Row(shown["id"], shown["version"], shown["name"]),))
        self.record(operation._replace(user=user))

    def _list(self, query: str) -> None:
        """All of it, in one order or another, or page by page: each page is a read of its own."""
        path, after = self.load.path + query, 0
        for _ in range(20):
            operation, answer = self._get("list", path, self.edge())
            if not answer or answer.status != 200:
                self.record(operation._replace(outcome="failed"))
                return
            rows = tuple(sorted(Row(row["id"], row["version"], row["name"]) for row in orjson.loads(answer.body)))
            following = re.search('<([^>]+)>; rel="next"', answer.header(b"Link"))
            until = rows[-1].user if following else None
            self.record(operation._replace(rows=rows, after=after, until=until))
            if not following or until is None:
                return
            path, after = following[1], until

    def _get(self, kind: Kind, path: str, edge: int) -> tuple[Operation, Answer | None]:
        answer, status, tier, cache_status = None, 0, "", ""
        invoke = time.monotonic_ns()
        with contextlib.suppress(NotSent, Broken):
            answer = self.ask(edge, b"GET", path)
        returned = time.monotonic_ns()
        if answer:
            status = answer.status
            tier, cache_status = answer.header(b"X-Cache-Status"), answer.header(b"Cache-Status")
        outcome: Outcome = "ok" if status in (200, 404) else "failed"
        operation = Operation(invoke, returned, kind, path, outcome, status, f"edge{edge + 1}", tier, cache_status)
        return operation._replace(worker=self.name), answer


def _main(kind: Callable[..., Worker], *arguments: Any) -> None:
    """A process of the load."""
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
    """Gets what they report."""
    on_complete: Callable[[int], None]
    """Gets the moment up to which that is all."""
    _processes: list[BaseProcess] = field(default_factory=list)
    _reports: "dict[Connection[Any, Any], int]" = field(default_factory=dict)

    def start(self) -> None:
        # Forked: a spawned process needs a second to import all this anew, and there are many. Nothing of the
        # caller's is used in them but what they are given.
        context = multiprocessing.get_context("fork")
        self.on_operations([self._initial()])
        self._board = Board.new(self.load.users, context)
        kinds: list[tuple[Any, ...]] = [(Writer, n) for n in range(self.load.writers)]
        kinds += [(Reader, n) for n in range(self.load.readers)]
        kinds += [(Outsider,)] if self.load.database else []
        for kind in kinds:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(*kind, self.load, self._board, send), daemon=True)
            process.start()
            send.close()
            self._processes.append(process)
            self._reports[receive] = 0

    def _initial(self) -> Operation:
        """Who is there before anybody of ours writes."""
        answer = Client(self.load.edges[0], PATIENCE).request(b"GET", self.load.path.encode())
        rows = tuple(Row(row["id"], row["version"], row["name"]) for row in orjson.loads(answer.body))
        now = time.monotonic_ns()
        return Operation(now, now, "initial", self.load.path, "ok", rows=rows)

    def pump(self, seconds: float) -> None:
        """Take reports in for so long, or until all processes are done."""
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
        """Writers first, so that readers see their last writes; what is theirs gets deleted."""
        self._board.writing.clear()
        self._board.reading.clear()
        self.pump(within)
        assert not self._reports, "the load does not come to an end"
        for process in self._processes:
            process.join(5)

    def end(self) -> None:
        """Whatever still runs."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
