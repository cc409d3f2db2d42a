"""PostgreSQL: three pools and a deadline. The truth lives there; SQL stands with the resource it is about."""

import itertools
import math
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

RV = TypeVar("RV")

OURS: dict[str, Any] = {
    # A standby answers reads, with a state of some time ago: of several hosts only the primary will do.
    "target_session_attrs": "read-write",
    "connect_timeout": 2,  # seconds for each host, the least that libpq knows
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""What each of our connections has, whatever its address asks for."""

KEEP = """
SELECT set_config('synchronous_commit', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)
"""
"""What was acknowledged has to survive a crash, and so does a fence. What waits for more than the log stays as it is.
It is set even where it is right already: a session keeps what it has set when the server's settings are read anew."""

IDLE_S = 9
"""Seconds that a transaction may be idle beyond the time of a request, in which it may wait for another writer of its
process: two fences of 3 s each, and 3 s of room. Then PostgreSQL ends it: a process that is stopped would keep its row
and its paths locked for as long."""

PATIENCE = """
SELECT set_config('statement_timeout', $1, true), set_config('idle_in_transaction_session_timeout', $2, true)
"""

UNAVAILABLE = (
    PoolTimeout,
    TooManyRequests,
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.IdleInTransactionSessionTimeout,  # the connection is lost, but psycopg counts it among others
)

RESERVED = 2
"""Connections for what must not wait for requests."""


class DatabaseUnavailable(Exception):
    """PostgreSQL did not answer in time, or not at all. After a write was sent its outcome is unknown."""


class Deadlock(DatabaseUnavailable):
    """Of writers who waited for each other PostgreSQL has ended this one: nothing was done, and it may begin again."""


class Statement(NamedTuple):
    """SQL that is asked again and again: each connection has it parsed once."""

    text: str
    """With `$1`, `$2` for the values."""

    values: Sequence[Any] = ()


PARSED = 200
"""Statements that a connection keeps, each some 30 kB in PostgreSQL: who may change any of a row's many fields makes as
many. What is more is parsed each time."""

Row = tuple[Any, ...]
"""Each value as text, in bytes, as PostgreSQL sent it; or None."""


class Connection(psycopg.Connection):
    """A connection, in autocommit mode, whose every wait ends at a deadline that this process keeps itself.

    A stopped server still acknowledges packets, so neither `statement_timeout` nor `tcp_user_timeout` would
    ever fire: only the client can notice. Whoever was interrupted has lost its place in the protocol, so the
    connection is closed and the pool makes a new one.
    """

    deadline: float | None = None
    """Of the request that holds the connection, on the monotonic clock; None: it is the pool's own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._parsed: dict[str, bytes] = {}
        self._numbers = itertools.count()
        self._ahead: Sequence[Statement] = ()
        self._heard: list[list[Row]] = []

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is waited for meanwhile is not PostgreSQL: the deadline moves by as much."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.wait_longer(time.monotonic() - began)

    def wait_longer(self, seconds: float) -> None:
        if self.deadline is not None:
            self.deadline += seconds

    def ahead(self, *statements: Statement) -> list[list[Row]]:
        """What is to be done before anything else, sent together with whatever is asked next; the answers are in the
        list by then. In two exchanges two statements cost nearly twice what they cost in one."""
        self._ahead, self._heard = statements, []
        return self._heard

    def ask(self, *statements: Statement) -> list[list[Row]]:
        """The rows of each, in one exchange (libpq's pipeline mode); none is carried out after one that failed.

        psycopg's own cursors and pipeline do the same in three to four times the CPU time.

        Raises:
            psycopg.Error
        """
        if not self._ahead and not statements:
            return []
        # A value that cannot be sent has to be found out while what is ahead is still to be sent with the next one.
        to_text = Transformer(self)
        spoken = [
            (text, to_text.dump_sequence(values, [PyFormat.TEXT] * len(values)))
            for text, values in (*self._ahead, *statements)
        ]
        ahead, self._ahead = len(self._ahead), ()
        answers = self._in_time(self._exchange(spoken))
        self._heard += answers[:ahead]
        return answers[ahead:]

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """By which all of psycopg's own ways lead."""
        self.ask()
        return self._in_time(gen, interval)

    def _in_time(self, gen: PQGen[RV], interval: float = 0.1) -> RV:
        deadline = self.deadline if self.deadline is not None else time.monotonic() + 1.0
        try:
            return super().wait(gen, interval, timeout=max(0.0, deadline - time.monotonic()))
        except psycopg.OperationalError:
            if time.monotonic() >= deadline:
                self.pgconn.finish()
            raise

    def _exchange(self, spoken: Sequence[tuple[str, Sequence[Any]]]) -> PQGen[list[list[Row]]]:
        libpq = self.pgconn
        libpq.enter_pipeline_mode()
        new: dict[str, bytes] = {}
        for text, values in spoken:
            name = self._parsed.get(text) or new.get(text)
            if name is None and len(self._parsed) + len(new) >= PARSED:
                libpq.send_query_params(text.encode(), values)
                continue
            if name is None:
                name = new[text] = b"statement_%d" % next(self._numbers)
                libpq.send_prepare(name, text.encode())
            libpq.send_query_prepared(name, values)
        libpq.pipeline_sync()
        yield from generators.send(libpq)
        results: list[PGresult] = []
        while not results or results[-1].status != ExecStatus.PIPELINE_SYNC:
            more = yield from generators.fetch_many(libpq)
            if not more:
                raise psycopg.OperationalError("the connection is lost")
            results += more
        libpq.exit_pipeline_mode()
        said = iter(results)
        answers = []
        for text, _ in spoken:
            if text in new:
                _good(next(said))
                self._parsed[text] = new.pop(text)  # whatever fails after it; it outlives a ROLLBACK
            rows = _good(next(said))
            columns = range(rows.nfields)
            answers.append([tuple([rows.get_value(n, column) for column in columns]) for n in range(rows.ntuples)])
        return answers


def _good(result: PGresult) -> PGresult:
    """Raises: psycopg.Error. Behind the first that failed there are those that were not carried out."""
    if result.status == ExecStatus.FATAL_ERROR:
        raise psycopg.errors.error_from_result(result)
    return result


def forgets(connection: psycopg.Connection) -> list[str]:
    """Return the server's settings by which a crash may take what it has acknowledged; no session can change them."""
    switched_off = connection.execute(
        "SELECT name || '=off' FROM unnest(ARRAY['fsync', 'full_page_writes']) name WHERE current_setting(name) = 'off'"
    )
    return [setting for (setting,) in switched_off]


class Pool(ConnectionPool[Connection]):
    """A pool that finds out for itself whether PostgreSQL is away: one that is merely exhausted looks the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.away = False
        self.probe = threading.Lock()


class Database:
    """Reads and writes have pools of their own: writers wait on row locks, and reads must not wait for them. Leases and
    health have a third: they must not wait for either."""

    def __init__(self, dsn: str, *, size: int, timeout: float) -> None:
        """`size`: connections for reads, and as many for writes, one for each thread; `timeout`: seconds for one
        request."""
        self.timeout = timeout
        self._reads = self._pool(dsn, size, "reads")
        self._writes = self._pool(dsn, size, "writes")
        self._reserved = self._pool(dsn, RESERVED, "reserved")

    def _pool(self, dsn: str, size: int, name: str) -> Pool:
        options: list[str] = [
            str(conninfo_to_dict(dsn).get("options") or ""),
            "-c timezone=UTC",  # times leave PostgreSQL as JSON, always with +00:00
            # What a check finds must be older than what the next statement reads, whatever the role's default.
            r"-c default_transaction_isolation=read\ committed",
            # Our own deadline closes the connection, but a backend that waits for a lock does not look at it:
            # without this each such request would leave one behind, up to max_connections.
            f"-c statement_timeout={math.ceil(self.timeout * 1000)}",
            f"-c idle_in_transaction_session_timeout={_idle(self.timeout)}",
            "-c velikiy.fenced=on",  # what we write we drop ourselves; the relay need not hear of it
        ]
        return Pool(
            dsn,
            connection_class=Connection,
            kwargs={
                **OURS,
                "autocommit": True,
                # What is worth it is prepared by `ask`; after a rollback psycopg would forget all that it has prepared,
                # and ours with it (DEALLOCATE ALL).
                "prepare_threshold": None,
                "application_name": f"velikiy {name}",
                "client_encoding": "utf8",  # a row's bytes go to clients as they come
                "options": " ".join(options),
            },
            configure=_configure,
            min_size=1,
            max_size=size,
            timeout=self.timeout,
            max_waiting=10 * size,  # beyond that a 503 at once is kinder than one after the timeout
            # A pool whose server went away gives up on it after this long and asks again at the next
            # request; the default backs off up to minutes, in which a server that is back goes unnoticed.
            reconnect_timeout=1.0,
            open=False,
            name=name,
        )

    def open(self) -> None:
        """Start connecting, in the background; call it after fork, since threads and sockets do not survive it."""
        for pool in (self._reads, self._writes, self._reserved):
            pool.open(wait=False)

    def close(self) -> None:
        for pool in (self._reads, self._writes, self._reserved):
            pool.close()

    def autocommit(self) -> AbstractContextManager[Connection]:
        """A connection in autocommit mode: each statement sees what was committed when it began, and commits.

        Raises:
            DatabaseUnavailable
        """
        return self._borrow(self._reads)

    def reserved(self) -> AbstractContextManager[Connection]:
        """The same, from a pool that requests cannot exhaust: for leases and health, a statement or a few at a time.

        Raises:
            DatabaseUnavailable
        """
        return self._borrow(self._reserved)

    @contextmanager
    def transaction(self, times: float = 1, *first: Statement) -> Iterator[Connection]:
        """A transaction that commits when the block ends and rolls back when it raises; `times`: the timeout of one
        request that it has; `first`: what it begins with. It goes to PostgreSQL with what the block asks first.

        Raises:
            DatabaseUnavailable: a COMMIT may have happened all the same.
        """
        with self._borrow(self._writes, times) as connection:
            try:
                seconds = times * self.timeout
                patience = Statement(PATIENCE, (f"{math.ceil(seconds * 1000)}", f"{_idle(seconds)}"))
                connection.ahead(Statement("BEGIN"), *([patience] if times > 1 else []), *first)
                yield connection
            except BaseException:
                connection.ahead()  # what was not sent yet need not be taken back
                with suppress(psycopg.Error):  # what cannot be rolled back is closed, here or by the pool
                    connection.rollback()
                raise
            _commit(connection)

    @contextmanager
    def _borrow(self, pool: Pool, times: float = 1) -> Iterator[Connection]:
        try:
            connection = self._working(pool, time.monotonic() + self.timeout)
            assert connection.deadline is not None  # a request has it
            connection.deadline += (times - 1) * self.timeout
            try:
                yield connection
            finally:
                connection.deadline = None
                connection.ahead()
                pool.putconn(connection)
        except psycopg.errors.DeadlockDetected as error:
            raise Deadlock(_cause(error)) from error
        except UNAVAILABLE as error:
            raise DatabaseUnavailable(_cause(error)) from error

    def _working(self, pool: Pool, deadline: float) -> Connection:
        """A connection that works, for all that can be told without asking, within the deadline of the request.

        While the server is away one request at a time finds out whether it is back, and the others are told at
        once: if each waited for itself, all threads would, and what needs no database would wait behind them.
        """
        probing = pool.away
        if probing and not pool.probe.acquire(blocking=False):
            raise PoolTimeout("it did not answer a moment ago")
        try:
            while True:
                connection = pool.getconn(timeout=max(0.0, deadline - time.monotonic()))
                connection.deadline = deadline
                try:
                    # A restarted server would cost one failed request for each connection of the pool: from one that is
                    # broken there is its end to be read, and from others nothing, so only those are asked. The pool's
                    # own check asks all, and rests for a second after the first that failed.
                    if _has_something_to_say(connection):
                        pool.check_connection(connection)
                except psycopg.OperationalError:
                    connection.deadline = None
                    pool.putconn(connection)
                    if time.monotonic() >= deadline:
                        raise
                    continue
                pool.away = False
                return connection
        except UNAVAILABLE:
            # A lock that somebody holds cannot lead here: nothing was asked but for a sign of life.
            pool.away = True
            raise
        finally:
            if probing:
                pool.probe.release()


def _idle(seconds: float) -> int:
    """Return the milliseconds that a transaction with so much time may be idle."""
    return (math.ceil(seconds) + IDLE_S) * 1000


def _configure(connection: Connection) -> None:
    connection.execute(KEEP)


def _commit(connection: Connection) -> None:
    if connection.info.transaction_status == TransactionStatus.INERROR:
        # To COMMIT PostgreSQL would answer ROLLBACK, which is no error: a write that was not done would be one.
        connection.rollback()
        raise psycopg.errors.InFailedSqlTransaction("an error in this transaction was passed over")
    connection.commit()


def _has_something_to_say(connection: Connection) -> bool:
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def _cause(error: Exception) -> str:
    """What happened, without the statement's values: they may be personal data."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__
