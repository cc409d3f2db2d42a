"""Requests that are timed: hits, misses and writes through each edge, in a steady pace, and what they show.

Each probe is a process that sends one kind of request through one edge and waits for each response, with a patience
beyond every limit. Availability is a share of time: an unanswered request counts from its beginning until the next
request is sent, so a probe that hangs for 5 s counts as 5 s and not as one request.
"""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import orjson
import psycopg

from tests.chaos.service import OWN_ROWS
from tests.consistency.client import NoResponse, NotSent, problem_of
from tests.consistency.history import OUTSIDE, Kind, Operation, Outcome, Row
from tests.consistency.load import Worker

What = Literal["hit", "miss", "write"]
PROBED: tuple[What, ...] = ("hit", "miss", "write")

INTERVAL_S: dict[What, float] = {"hit": 0.02, "miss": 0.05, "write": 0.05}
"""Seconds between two requests of a probe."""

TIMEOUT_S: dict[What, float] = {"hit": 6.0, "miss": 6.0, "write": 9.0}

NAME = "probe"

Connect = Callable[..., "psycopg.Connection[Any]"]

AUDIT_INTERVAL_S = 0.3
ALL_ROWS = "SELECT id, version, name FROM users ORDER BY id"

NO_USER = 10**12
"""No user has an id above this. A response about such an id is a miss, because each id is read once."""


class Probe(Worker):
    def __init__(self, what: What, edge: int, *rest: Any) -> None:
        super().__init__(f"{NAME} {what} {edge + 1}", TIMEOUT_S[what], *rest)
        self.what, self.number = what, edge
        self._user = 0
        self._count = 0
        self._run = f"{self.load.seed:x}.{time.time_ns() // 10**9 % 10**7:x}"

    def work(self) -> None:
        going_on = self.board.writing if self.what == "write" else self.board.reading
        while going_on.is_set():
            began = time.monotonic()
            if self.what == "miss":
                self._send("read", b"GET", f"/users/{NO_USER + self.random.randrange(NO_USER)}", "")
            elif not self._user:
                self._create()
            elif self.what == "hit":
                self._send("read", b"GET", f"/users/{self._user}", "")
            else:
                self._send("update", b"PUT", f"/users/{self._user}", self._name())
            left = INTERVAL_S[self.what] * self.random.uniform(0.6, 1.4) - (time.monotonic() - began)
            time.sleep(max(0.0, left))
            self.report_when_due()

    def clean_up(self) -> None:
        if self._user and self.what == "write":
            self._send("delete", b"DELETE", f"/users/{self._user}", "")

    def _name(self) -> str:
        self._count += 1
        return f"{self._run} {self.name} {self._count}"

    def _create(self) -> None:
        operation = self._send("create", b"POST", "/users", self._name())
        if operation.outcome == "ok":
            self._user = operation.user or 0

    def _send(self, kind: Kind, method: bytes, path: str, name: str) -> Operation:
        body = orjson.dumps({"name": name, "email": f"{name.replace(' ', '.')}@example.com"}) if name else b""
        operation = Operation(time.monotonic_ns(), 0, kind, path, "unknown", edge=f"edge{self.number + 1}", name=name)
        operation = operation._replace(worker=self.name, user=int(path.split("/")[2]) if path != "/users" else None)
        try:
            response = self._edges[self.number].request(method, path.encode(), body)
        except NotSent:
            operation = operation._replace(outcome="failed")
        except NoResponse:
            pass
        else:
            status = response.status
            outcome: Outcome = "ok" if status < 300 or (kind == "read" and status == 404) else "failed"
            if status >= 500 and kind != "read":
                outcome = "unknown"
            operation = operation._replace(outcome=outcome, status=status, tier=response.header(b"X-Cache-Status"))
            operation = operation._replace(problem=problem_of(response))
            if status < 300 and kind in ("read", "create"):
                shown = orjson.loads(response.body)
                operation = operation._replace(user=shown["id"])
                if kind == "read":
                    operation = operation._replace(rows=(Row(shown["id"], shown["version"], shown["name"]),))
        operation = operation._replace(returned=time.monotonic_ns())
        self.record(operation)
        return operation


class Audit(Worker):
    """Reads all rows from PostgreSQL itself, again and again. The checker judges this as a read: it shows less than was
    acknowledged if an acknowledged write was lost."""

    def __init__(self, connect: Connect, *rest: Any) -> None:
        super().__init__("audit", 1.0, *rest)
        self._connect = connect
        self._connection: psycopg.Connection[Any] | None = None

    def work(self) -> None:
        while self.board.reading.is_set():
            self._read()
            until = time.monotonic() + AUDIT_INTERVAL_S
            while self.board.reading.is_set() and time.monotonic() < until:
                time.sleep(0.05)
                self.report_when_due()
        self._read()

    def _read(self) -> None:
        invoke = time.monotonic_ns()
        try:
            if self._connection is None or self._connection.closed:
                self._connection = self._connect(connect_timeout=2, application_name="audit")
            found = self._connection.execute(ALL_ROWS).fetchall()
        except psycopg.Error:
            self._connection = None
            return
        rows = tuple(Row(*row) for row in found)
        returned = time.monotonic_ns()
        read = Operation(
            invoke, returned, "list", "/users", "ok", edge=OUTSIDE, tier="SQL", worker=self.name, rows=rows
        )
        self.record(read)
        # Lists and single reads are judged each by their own; what either has shown may not be lost.
        for row in rows:
            self.record(read._replace(kind="read", path=f"/users/{row.user}", user=row.user, rows=(row,)))


def workers(edges: int, connect: Connect) -> list[Any]:
    """Return the probes of each edge and the audit, for `Running.more`."""
    probes = [partial(Probe, what, edge) for edge in range(edges) for what in PROBED]
    return [*probes, partial(Audit, connect)]


class Figures(NamedTuple):
    """The measures of a span of time."""

    reads: float
    writes: float
    """Availability, from 0 to 1."""

    slowest: dict[What, Operation]
    """The slowest request of each kind, answered or not."""

    errors: dict[str, int]
    """The number of 5xx by status and problem, and of requests without a response: of all clients."""

    def seconds(self, what: What) -> float:
        return _took(self.slowest[what]) / 1e9 if what in self.slowest else 0.0


KEPT_NS = 120 * 10**9


class Meter:
    """Collects the operations of all clients for the figures, and leaves out what the checker must not judge."""

    def __init__(self) -> None:
        self._probed: dict[tuple[What, str], deque[Operation]] = defaultdict(deque)
        self._errors: deque[tuple[int, str]] = deque()

    def watch(self, operation: Operation) -> Operation | None:
        if operation.worker.startswith(NAME):
            what = next(it for it in PROBED if it in operation.worker)
            seen = self._probed[what, operation.edge]
            seen.append(operation)
            while seen[0].returned < operation.returned - KEPT_NS:
                seen.popleft()
        if operation.status >= 500 or (operation.outcome != "ok" and not operation.status):
            self._errors.append((operation.returned, _error(operation)))
            while self._errors[0][0] < operation.returned - KEPT_NS:
                self._errors.popleft()
        if operation.user is not None and operation.user >= NO_USER:
            return None
        if operation.rows:
            rows = tuple(row for row in operation.rows if not row.name.startswith(OWN_ROWS))
            if not rows and operation.kind == "read":
                return None
            operation = operation._replace(rows=rows)
        return operation

    def figures(self, begin: int, end: int, victims: Iterable[str] = (), *, since: int) -> Figures:
        """Return the figures of a span of time (monotonic ns).

        Args:
            victims: The edges that do not count.
            since: Requests that were sent before do not count: the fault before may have cut them off.
        """
        spans, lost = Counter[str](), Counter[str]()
        slowest: dict[What, Operation] = {}
        for (what, edge), operations in self._probed.items():
            if edge in victims:
                continue
            group = "writes" if what == "write" else "reads"
            spans[group] += end - begin
            for operation, following in _with_following(operations):
                if operation.returned < begin or not since <= operation.invoke <= end:
                    continue
                slowest[what] = max(slowest.get(what, operation), operation, key=_took)
                if not _is_answered(operation):
                    until = following.invoke if following else operation.returned
                    lost[group] += max(0, min(until, end) - max(operation.invoke, begin))
        reads, writes = (1 - lost[it] / spans[it] if spans[it] else math.nan for it in ("reads", "writes"))
        errors = dict(Counter(error for at, error in self._errors if begin <= at <= end))
        return Figures(reads, writes, slowest, errors)

    def slowest_s(self, begin: int, end: int) -> dict[What, float]:
        """Return the seconds of the slowest request of each kind which was both sent and answered in a span of time.

        A request that is under way at the end does not count: the fault that begins then may have slowed it down.
        """
        slowest = dict.fromkeys(PROBED, 0.0)
        for (what, _), operations in self._probed.items():
            for operation in operations:
                if begin <= operation.invoke and operation.returned <= end:
                    slowest[what] = max(slowest[what], _took(operation) / 1e9)
        return slowest


def _took(operation: Operation) -> int:
    return operation.returned - operation.invoke


def _with_following(operations: "deque[Operation]") -> Iterable[tuple[Operation, Operation | None]]:
    return zip(operations, [*list(operations)[1:], None], strict=True)


def _is_answered(operation: Operation) -> bool:
    return 0 < operation.status < 500


def _error(operation: Operation) -> str:
    if operation.status:
        return f"{operation.status} {operation.problem}".strip()
    return "refused" if operation.outcome == "failed" else "no response"
