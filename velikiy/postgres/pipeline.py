"""A connection with a deadline of its own, and statements that travel together.

Gains: two statements in one exchange take a third of the CPU time in the app and half of it in PostgreSQL, compared
with psycopg's cursors; psycopg's own pipeline takes more than no pipeline.
Relies on: libpq's pipeline mode, through psycopg's `pgconn` and generators.
Remove when: psycopg's pipeline gains as much (`./run bench --only miss,put`).
"""

import itertools
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, TypeVar

import psycopg
import structlog
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from velikiy import statement_waits, traces

POSTGRES_PID = "postgres_pid"
"""The field of a log line that names the session of PostgreSQL in which a statement of the request failed."""

RV = TypeVar("RV")

NOISE = (psycopg.DatabaseError, psycopg.NotSupportedError)
"""The errors, without an SQLSTATE, of bytes that make no sense to libpq, or that begin a COPY."""

MAX_PREPARED = 200
"""Prepared statements that a connection keeps, each some 30 kB in PostgreSQL. A client that may change any of a row's
many fields causes as many. Further statements are parsed each time."""

Row = tuple[Any, ...]
"""Each value as text in bytes, as PostgreSQL sent it, or None."""


MARK = "set_config('velikiy.mark', clock_timestamp()::text, true)"
"""An expression with which PostgreSQL remembers the moment, for this transaction (`Connection.marked_at`)."""


class Statement(NamedTuple):
    """SQL that runs again and again: each connection prepares it once."""

    text: str
    """With `$1`, `$2` for the values."""

    values: Sequence[Any] = ()


class Connection(psycopg.Connection):
    """A connection in autocommit mode. Every wait ends at a deadline that this process keeps itself.

    A stopped server still acknowledges packets, so neither `statement_timeout` nor `tcp_user_timeout` fires: only the
    client can notice. An interrupted exchange leaves the protocol in an unknown state, so the connection is closed and
    the pool opens a new one.
    """

    deadline: float | None = None
    """The deadline of the request that holds the connection, on the monotonic clock; None while the pool holds the
    connection."""

    prepares = True
    """True if statements are prepared. A pooler may run each transaction in another session."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._statement_names: dict[str, bytes] = {}
        self._numbers = itertools.count()
        self._queued: Sequence[Statement] = ()
        self._queued_results: list[list[Row]] = []
        self.queue_arrived_at = 0.0
        """The moment (CLOCK_BOOTTIME) at which the results of the statements that were queued last, such as BEGIN, had
        arrived."""
        self.marked_at: float | None = None
        """The moment (CLOCK_BOOTTIME) at which the result of a statement with MARK had arrived, if this transaction has
        run one."""
        self.commit_was_sent = False
        """True once the COMMIT of the present request may have reached PostgreSQL."""
        self.began = time.monotonic()
        self.given_up = False
        """True once this process has closed the connection, because an answer did not arrive in time."""
        self.behind: Sequence[Statement] = ()
        """Statements that the next `write` sends behind its own, and then forgets."""
        self.exchanges = 0
        """Exchanges so far. Each is a transaction of its own in autocommit mode."""
        self.answered_at = time.monotonic()
        """The moment (time.monotonic) of the last answer."""
        self._unreplicated = False
        self.add_notice_handler(self._notice)

    @classmethod
    def connect(cls, conninfo: str = "", **options: Any) -> Self:
        """As in psycopg. A connection that is given up is closed at once.

        psycopg keeps it in a cycle of an error and its frames, until the garbage collector runs. A server that was
        silent and goes on would wait for the password of each such connection: in a minute of silence they took all
        its slots, and for another minute (authentication_timeout) it refused new ones.
        """
        try:
            return super().connect(conninfo, **options)
        except psycopg.Error as error:
            traceback.clear_frames(error.__traceback__)
            raise

    @contextmanager
    def deadline_paused(self) -> Iterator[None]:
        """Extend the deadline by the time that the block takes: it waits for something other than PostgreSQL."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.extend_deadline(time.monotonic() - began)

    def extend_deadline(self, seconds: float) -> None:
        if self.deadline is not None:
            self.deadline += seconds

    def enqueue(self, *statements: Statement) -> list[list[Row]]:
        """Send these statements with whatever runs next, and before it. The returned list holds their results by then.
        Two statements in two exchanges cost nearly twice as much as in one."""
        self._queued, self._queued_results = statements, []
        return self._queued_results

    def query(self, *statements: Statement) -> list[list[Row]]:
        """Run the statements in one exchange and return the rows of each. After one that fails no other runs.

        Raises:
            psycopg.Error
        """
        if not self._queued and not statements:
            return []
        # A value that cannot be encoded has to come to light while the queue can still be sent with the next call.
        to_text = Transformer(self)
        encoded = [
            (text, to_text.dump_sequence(values, [PyFormat.TEXT] * len(values)))
            for text, values in (*self._queued, *statements)
        ]
        queued, self._queued = len(self._queued), ()
        with traces.span("PostgreSQL", lambda: _described(encoded)):
            results = self._wait_until_deadline(self._exchange(encoded))
        if queued:
            self.queue_arrived_at = time.clock_gettime(time.CLOCK_BOOTTIME)
            self._queued_results += results[:queued]
        return results[queued:]

    def write(self, statement: Statement) -> list[Row]:
        """Run a statement that changes a row, and send the statements in `behind` with it. They run after the statement
        has got the row: a writer that waits for a row has not run them yet.

        Raises:
            psycopg.Error
        """
        behind, self.behind = self.behind, ()
        results = self.query(statement, *behind)
        self.note_mark(behind)
        return results[0]

    def note_mark(self, statements: Sequence[Statement]) -> None:
        """Note that the results of these statements have arrived, which contain MARK, if there are any."""
        if statements:
            self.marked_at = time.clock_gettime(time.CLOCK_BOOTTIME)

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Apply the deadline. psycopg routes every blocking operation through this method."""
        self.query()
        return self._wait_until_deadline(gen, interval)

    def _wait_until_deadline(self, gen: PQGen[RV], interval: float = 0.1) -> RV:
        deadline = self.deadline if self.deadline is not None else time.monotonic() + 1.0
        self.exchanges += 1
        statement_waits.begin()
        try:
            result = super().wait(gen, interval, timeout=max(0.0, deadline - time.monotonic()))
        except psycopg.Error as error:
            self._note_session()
            if error.sqlstate:  # a refusal is an answer
                self.answered_at = time.monotonic()
            elif type(error) in NOISE:
                self.pgconn.finish()
                raise psycopg.OperationalError(str(error)) from error
            if isinstance(error, psycopg.OperationalError) and time.monotonic() >= deadline:
                self.given_up = True
                self.pgconn.finish()
            raise
        finally:
            statement_waits.end()
        self.answered_at = time.monotonic()
        if self._unreplicated:
            self._unreplicated = False
            raise psycopg.OperationalError("the wait for the synchronous standby was cancelled")
        return result

    def _note_session(self) -> None:
        """Let the log lines of the request name this session: PostgreSQL names it in its line about the error, and does
        not know the request."""
        if "request_id" in structlog.contextvars.get_contextvars():
            structlog.contextvars.bind_contextvars(**{POSTGRES_PID: self.pgconn.backend_pid})

    def _notice(self, notice: psycopg.errors.Diagnostic) -> None:
        """Note that a commit was acknowledged although its wait for the standby was cancelled (pg_cancel_backend): a
        failover would lose it."""
        if notice.source_function == "SyncRepWaitForLSN":
            self._unreplicated = True

    def _exchange(self, encoded: Sequence[tuple[str, Sequence[Any]]]) -> PQGen[list[list[Row]]]:
        libpq = self.pgconn
        libpq.enter_pipeline_mode()
        new: dict[str, bytes] = {}
        for text, values in encoded:
            name = self._statement_names.get(text) or new.get(text)
            if name is None and not (self.prepares and len(self._statement_names) + len(new) < MAX_PREPARED):
                libpq.send_query_params(text.encode(), values)
                continue
            if name is None:
                name = new[text] = b"statement_%d" % next(self._numbers)
                libpq.send_prepare(name, text.encode())
            libpq.send_query_prepared(name, values)
        libpq.pipeline_sync()
        yield from generators.send(libpq)
        received: list[PGresult] = []
        while not received or received[-1].status != ExecStatus.PIPELINE_SYNC:
            more = yield from generators.fetch_many(libpq)
            if not more:
                raise psycopg.OperationalError("the connection is lost")
            received += more
        libpq.exit_pipeline_mode()
        remaining = iter(received)
        results = []
        for text, _ in encoded:
            if text in new:
                _checked(next(remaining))
                self._statement_names[text] = new.pop(text)  # even if a later statement fails: it survives a ROLLBACK
            rows = _checked(next(remaining))
            columns = range(rows.nfields)
            results.append([tuple([rows.get_value(n, column) for column in columns]) for n in range(rows.ntuples)])
        return results


def _described(encoded: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, str]:
    return {"db.system.name": "postgresql", "db.query.text": ";\n".join(text.strip() for text, _ in encoded)}


def _checked(result: PGresult) -> PGresult:
    """Raises: psycopg.Error. The results after the first error belong to statements that did not run."""
    if result.status == ExecStatus.FATAL_ERROR:
        raise psycopg.errors.error_from_result(result)
    return result
