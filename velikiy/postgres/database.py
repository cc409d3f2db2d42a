"""Three pools of connections. SQL stands with the resource that it is about."""

import math
import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import psycopg
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from velikiy import metrics
from velikiy.postgres.leader import CONFIRM, Leader
from velikiy.postgres.pipeline import Connection, Statement

log = structlog.get_logger()

CONNECT_OPTIONS: dict[str, Any] = {
    # A standby answers reads with an older state: of several hosts only the primary is used.
    "target_session_attrs": "read-write",
    "connect_timeout": 2,  # seconds for each host, the least that libpq knows
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""Settings of every connection that this project opens. They win over those in the DSN."""

SESSION = {
    "TimeZone": "UTC",  # times leave PostgreSQL as JSON, always with +00:00
    # Each statement needs a snapshot of its own: a lock is probed before the row is read.
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
    "client_min_messages": "warning",  # PostgreSQL warns of a commit whose wait for its standby was cancelled
    "idle_session_timeout": "0",
    # A search takes one core: PostgreSQL would add two processes to each, and the share of the searches
    # (velikiy/server/shares.py) would bound a third of what they take.
    "max_parallel_workers_per_gather": "0",
    "velikiy.passes_gate": "on",  # the app invalidates its own writes; the relay need not
}
"""Settings that each session of the pools needs. They win over those of the role, the database and the address."""

PATIENT = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "10s",
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "standard_conforming_strings": "on",  # the migrations have strings with escapes of Unicode
    "client_min_messages": "warning",
}
"""Settings of the sessions of commands and the relay, which have deadlines of their own. They win over those of the
role and the database, and not over those of the address."""

KEEP = """
SELECT set_config(
    'synchronous_commit',
    CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
    false
)
"""
"""An acknowledged write has to survive a crash and a failover, and so has a fence: `off`, `local` and `remote_write`
are too weak, and `remote_apply` is stronger. The statement sets the value even if it is right already: a later reload
of the server's settings does not change it."""

IDLE_S = 2
"""Seconds that a transaction may be idle in addition to the time of a request: twice the time of two drops. Then
PostgreSQL ends it. Otherwise a stopped process would keep its row and its paths locked for good. A writer that has to
wait for a fence gets more (`allow_idle`)."""

LOCK_SHARE = 0.8
"""The share of its time that a request may wait for a lock. Less than STATEMENT_SHARE, so that the error names the lock
(lock_not_available) and not only the time (query_canceled)."""

STATEMENT_SHARE = 0.9
"""The share of its time that a request may wait for a statement. Less than all, because this process gives up a
connection that does not answer in time. A writer in a row's queue waits for two locks: of the row, then of the
transaction that has changed it."""

AT_ONCE = 0.98
"""The share of its time that a request still has if it got its connection at once."""

CHECK_SHARE = 0.25
"""The share of its time that a request waits for the answer of a connection that may be dead."""

SET_TIMEOUTS = """
SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true),
    set_config('idle_in_transaction_session_timeout', $3, true)
"""

ALLOW_IDLE = "SELECT set_config('idle_in_transaction_session_timeout', $1, true)"

_IN_TIME = "SELECT 1 / (clock_timestamp() < {} + $1::interval)::int"
IN_TIME = _IN_TIME.format("now()")
IN_TIME_AFTER_MARK = _IN_TIME.format("current_setting('velikiy.mark')::timestamptz")
"""Fails (division_by_zero) once so much time has passed since BEGIN, or since the locks were taken. It travels with
COMMIT, which PostgreSQL does not run after an error. So a process that is stopped before it sends COMMIT commits
nothing when it continues too late. If the clock of PostgreSQL steps forward, the writes of that moment are refused."""

UNAVAILABLE = (
    PoolTimeout,
    TooManyRequests,
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.IdleInTransactionSessionTimeout,  # the connection is lost, though psycopg has another class for it
)

MIGRATION_LOCK = 0x76656C696B6979
"""The advisory lock of a migration ("velikiy" in ASCII). Other processes wait for it and find nothing left to do."""

RESERVED_CONNECTIONS = 2
"""Connections for leases and health checks, which must not wait for requests."""


YOUNG_S = 5.0
"""The age below which a session is not supposed to end."""

ENDED_WITHIN_S = 5.0
"""Seconds for which the end of a young session counts (`Database.young_ends`)."""


class DatabaseUnavailable(Exception):
    """PostgreSQL did not answer in time or at all."""

    def __init__(self, cause: str = "", *, may_be_committed: bool = False, is_silent: bool = False) -> None:
        """
        Args:
            may_be_committed: The COMMIT of a write was sent, and its outcome is unknown.
            is_silent: Meanwhile PostgreSQL has answered no other request of this process either.
        """
        super().__init__(cause)
        self.may_be_committed = may_be_committed
        self.is_silent = is_silent


class TooLate(Exception):
    """The write's deadline has passed, and its client has received an error or is gone. The write was not carried
    out."""


class Deadlock(DatabaseUnavailable):
    """PostgreSQL aborted this transaction to break a deadlock. It had no effect and can be retried."""


def forgets(connection: psycopg.Connection) -> list[str]:
    """Return the server's settings with which a crash can lose acknowledged writes. No session can change them."""
    switched_off = connection.execute(
        "SELECT name || '=off' FROM unnest(ARRAY['fsync', 'full_page_writes']) name WHERE current_setting(name) = 'off'"
    )
    return [setting for (setting,) in switched_off]


def options(settings: Mapping[str, str]) -> str:
    """Return the settings as options of a connection."""
    return " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())


def patient(dsn: str) -> str:
    """Return the address for a session with the settings of PATIENT."""
    return make_conninfo(dsn, options=f"{options(PATIENT)} {conninfo_to_dict(dsn).get('options') or ''}".strip())


class Pool(ConnectionPool[Connection]):
    """A pool that tracks by itself whether PostgreSQL is away: for another pool, exhaustion would look the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.away = False
        self.probe = threading.Lock()
        self.answered_at = 0.0
        """The moment (time.monotonic) at which PostgreSQL has answered a request of this pool."""

    def _get_ready_connection(self, timeout: float | None) -> Connection | None:
        """Forget requests that have given up, before the library counts them; it holds its lock here.

        The library forgets them only when it has a connection to lend. An outage that lasted longer than `max_waiting`
        timeouts would fill the queue, each request would be refused at once, and none would let the pool connect again:
        the process would stay without PostgreSQL until its restart.
        """
        if len(self._waiting) >= self.max_waiting:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.error is None)
        return super()._get_ready_connection(timeout)


class Database:
    """Reads and writes have separate pools, because writers wait for row locks and reads must not wait for writers.
    Leases and health checks have a third pool, because they must wait for neither."""

    def __init__(self, dsn: str, *, size: int, timeout: float, pooled: bool = False) -> None:
        """
        Args:
            size: Connections for reads, and as many for writes: one for each thread.
            timeout: Seconds for one request.
            pooled: Whether the DSN leads to PgBouncer in transaction mode, whose sessions are set up there
                (POOLED_SETTINGS).
        """
        self.dsn = dsn
        self.timeout = timeout
        self._lost_at = 0.0
        """The moment (time.monotonic) at which a request lost its connection, and no other of its pool got an answer
        meanwhile."""
        self.is_silent = False
        """PostgreSQL does not answer this process, although it may answer others (velikiy/server/watch.py)."""
        self._pooled = pooled
        self._configure = _configure_pooled if pooled else _configure
        self._leader = Leader(dsn, CONNECT_OPTIONS, self._configure)
        self._reads = self._pool(dsn, "reads", size, waiting=10 * size)
        self._writes = self._pool(dsn, "writes", size, waiting=10 * size)
        self._reserved = self._pool(dsn, "reserved", RESERVED_CONNECTIONS, waiting=10 * size)
        self._young_ends: deque[float] = deque(maxlen=1000)

    def _pool(self, dsn: str, name: str, size: int, *, waiting: int) -> Pool:
        # Our own deadline closes the connection, but a backend that waits for a lock does not notice that: each such
        # request would leave a backend behind, up to max_connections.
        timeouts = _timeouts_of(self.timeout)
        given = str(conninfo_to_dict(dsn).get("options") or "")
        return Pool(
            self._leader.conninfo,
            connection_class=Connection,
            kwargs={
                **CONNECT_OPTIONS,
                "autocommit": True,
                # `query` prepares what is worth it; after a rollback psycopg would run DEALLOCATE ALL, which also
                # removes ours.
                "prepare_threshold": None,
                "application_name": f"velikiy {name}",
                "client_encoding": "utf8",  # a row's bytes go to clients as they come
                **({} if self._pooled else {"options": f"{given} {options(SESSION | timeouts)}"}),
            },
            configure=self._configure_or_close,
            min_size=1,
            max_size=size,
            timeout=self.timeout,
            max_waiting=waiting,  # beyond that a 503 at once is kinder than a 503 after the timeout
            # A pool stops reconnecting after this long and tries again at the next request. The default backs off
            # for up to minutes, in which a server that is back goes unnoticed.
            reconnect_timeout=1.0,
            open=False,
            name=name,
        )

    def _configure_or_close(self, connection: Connection) -> None:
        """The library leaves a connection that fails here to the garbage collector, and its session to the server."""
        try:
            self._configure(connection)
        except psycopg.Error:
            connection.close()
            raise

    def conninfo(self) -> str:
        """Return where the leader is, for a connection that is kept.

        Raises:
            psycopg.OperationalError: No host leads.
        """
        return self._leader.conninfo()

    def believers(self) -> list[str]:
        """Return the hosts that believe to be the leader."""
        return self._leader.believers()

    def open(self) -> None:
        """Start connecting in the background. Call it after fork: threads and sockets do not survive a fork."""
        for pool in (self._reads, self._writes, self._reserved):
            pool.open(wait=False)
        metrics.watch(self._sample)

    def _sample(self) -> None:
        for pool in (self._reads, self._writes, self._reserved):
            state = pool.get_stats()
            idle = state.get("pool_available", 0)
            metrics.POOL_CONNECTIONS.labels(pool.name, "idle").set(idle)
            metrics.POOL_CONNECTIONS.labels(pool.name, "busy").set(state.get("pool_size", 0) - idle)
            metrics.POOL_WAITING.labels(pool.name).set(state.get("requests_waiting", 0))

    def young_ends(self) -> int:
        """Return how often sessions have ended in the last ENDED_WITHIN_S that were not older than YOUNG_S, though this
        process did not close them. Sessions that had all begun by then, such as one of each pool, may have ended
        together, in one restart of PostgreSQL: they count once."""
        since = time.monotonic() - ENDED_WITHIN_S
        return sum(moment > since for moment in self._young_ends.copy())

    def _note_end(self, connection: Connection) -> None:
        now = time.monotonic()
        is_young = connection.closed and not connection.given_up and now - connection.began < YOUNG_S
        if is_young and not (self._young_ends and connection.began <= self._young_ends[-1]):
            self._young_ends.append(now)

    def close(self) -> None:
        for pool in (self._reads, self._writes, self._reserved):
            pool.close()

    def autocommit(self) -> AbstractContextManager[Connection]:
        """Lend a connection in autocommit mode: each statement sees what was committed when it began, and commits.

        Raises:
            DatabaseUnavailable
        """
        return self._borrow(self._reads)

    def reserved(self) -> AbstractContextManager[Connection]:
        """Lend a connection from the pool for leases and health checks, for a few statements at a time.

        Raises:
            DatabaseUnavailable
        """
        return self._borrow(self._reserved)

    @contextmanager
    def transaction(
        self, timeout_factor: float = 1, until: float | None = None, *first: Statement
    ) -> Iterator[Connection]:
        """Commit when the block ends; roll back when it raises.

        Args:
            timeout_factor: The time of the transaction, in times of one request.
            until: The moment (CLOCK_BOOTTIME) after which PostgreSQL does not commit.
            first: Statements that travel with BEGIN.

        Raises:
            TooLate: The moment has passed.
            DatabaseUnavailable: The COMMIT may have happened all the same (`may_be_committed`).
        """
        with self._borrow(self._writes, timeout_factor) as connection:
            try:
                connection.enqueue(Statement("BEGIN"), *self._timeouts(connection), *first)
                yield connection
            except BaseException as error:
                connection.enqueue()  # statements that were not sent yet need no rollback
                with suppress(psycopg.Error):  # a connection that cannot roll back is closed, here or by the pool
                    connection.rollback()
                if not connection.closed and isinstance(error, Exception):
                    connection.query(CONFIRM)  # a refusal shows what was read: an old leader may refuse wrongly
                raise
            _commit(connection, until)

    def _timeouts(self, connection: Connection) -> list[Statement]:
        """Return the statement that sets the timeouts of a transaction, or nothing if those of its session fit.

        They fit a transaction that has the time of one request and did not have to wait for its connection. Not every
        pooler sets timeouts for its sessions.
        """
        assert connection.deadline is not None, "a request has a deadline"
        left = connection.deadline - time.monotonic()
        session_fits = self.timeout * AT_ONCE < left <= self.timeout and not self._pooled
        return [] if session_fits else [Statement(SET_TIMEOUTS, list(_timeouts_of(max(left, 0.01)).values()))]

    @contextmanager
    def _borrow(self, pool: Pool, timeout_factor: float = 1) -> Iterator[Connection]:
        connection: Connection | None = None
        began = time.monotonic()
        may_be_committed = is_lost = False
        try:
            connection = self._working(pool, time.monotonic() + self.timeout)
            assert connection.deadline is not None, "a request has a deadline"
            connection.deadline += (timeout_factor - 1) * self.timeout
            connection.commit_was_sent = False
            connection.marked_at = None
            try:
                yield connection
            finally:
                # Before another thread gets the connection.
                may_be_committed, is_lost = connection.commit_was_sent, connection.closed
                pool.answered_at = max(pool.answered_at, connection.answered_at)
                self._note_end(connection)
                connection.deadline = None
                connection.enqueue()
                connection.behind = ()
                pool.putconn(connection)
        except psycopg.errors.DeadlockDetected as error:
            metrics.DEADLOCKS.inc()
            raise Deadlock(_cause(error)) from error
        except UNAVAILABLE as error:
            metrics.DATABASE_FAILURES.labels(pool.name, _cause(error)).inc()
            if connection is not None:
                if is_lost and pool.answered_at < began:  # under overload, others get answers meanwhile
                    self._lost_at = time.monotonic()
                self._leader.doubt(connection, self._reconnect)
            is_silent = not isinstance(error, TooManyRequests) and self._answered_at() < began
            raise DatabaseUnavailable(_cause(error), may_be_committed=may_be_committed, is_silent=is_silent) from error

    def _answered_at(self) -> float:
        return max(pool.answered_at for pool in (self._reads, self._writes, self._reserved))

    def _reconnect(self) -> None:
        for pool in (self._reads, self._writes, self._reserved):
            pool.drain()

    def _working(self, pool: Pool, deadline: float) -> Connection:
        """Return a connection that works, as far as that shows without a round trip, before the deadline.

        While the server is away, one request at a time probes it and the others fail at once. If each request waited,
        every thread would, and requests that need no database would queue behind them.
        """
        probing = pool.away
        if probing and not pool.probe.acquire(blocking=False):
            raise PoolTimeout("it did not answer a moment ago")
        try:
            while True:
                connection = pool.getconn(timeout=max(0.0, deadline - time.monotonic()))
                connection.deadline = deadline
                try:
                    # A restarted server would cost one failed request for each connection of the pool. A broken
                    # connection is readable (its end), an idle one is not, so only readable ones are checked. The
                    # pool's own check costs a round trip each time, and pauses for a second after a failure.
                    if _is_readable(connection):
                        pool.check_connection(connection)
                    elif connection.answered_at < self._lost_at:
                        # Another connection was lost since: this one may lead to nowhere, too, if a host or a firewall
                        # has forgotten all. Each would cost a request its whole time.
                        connection.deadline = min(deadline, time.monotonic() + self.timeout * CHECK_SHARE)
                        pool.check_connection(connection)
                        connection.deadline = deadline
                except BaseException as error:  # any: a connection that is not returned is missing for good
                    self._note_end(connection)
                    connection.deadline = None
                    pool.putconn(connection)
                    if time.monotonic() >= deadline or not isinstance(error, psycopg.Error):
                        raise
                    continue
                pool.away = False
                return connection
        except TooManyRequests:  # which says nothing about the server
            raise
        except UNAVAILABLE:
            # A lock cannot lead here: the check reads no table.
            pool.away = True
            raise
        finally:
            if probing:
                pool.probe.release()


def _timeouts_of(seconds: float) -> dict[str, str]:
    """Return PostgreSQL's timeouts, in milliseconds, for a request with so much time, in the order of SET_TIMEOUTS."""
    return {
        "statement_timeout": f"{math.ceil(seconds * STATEMENT_SHARE * 1000)}",
        "lock_timeout": f"{math.ceil(seconds * LOCK_SHARE * 1000)}",
        "idle_in_transaction_session_timeout": f"{(math.ceil(seconds) + IDLE_S) * 1000}",
    }


def allow_idle(connection: Connection, seconds: float) -> None:
    """Let the transaction be idle for so long, because it waits for something other than PostgreSQL."""
    connection.query(Statement(ALLOW_IDLE, (f"{math.ceil(seconds * 1000)}",)))


def _configure(connection: Connection) -> None:
    """Raises: psycopg.Error. This server is an old leader, or its standby does not answer."""
    connection.execute(KEEP)
    connection.query(CONFIRM)


POOLED_SETTINGS = {
    "velikiy.passes_gate": "on",
    "TimeZone": "UTC",
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
}
"""The settings that PgBouncer has to give to each session (`connect_query`): in transaction mode a client has no
session of its own that could be set up. The timeouts belong there, too, and are not required
(docs/scaling-postgresql.md)."""

LACKING = """
SELECT name || '=' || value FROM unnest(%s::text[], %s::text[]) AS required (name, value)
WHERE current_setting(name, true) IS DISTINCT FROM value
    AND (name, current_setting(name, true)) IS DISTINCT FROM ('synchronous_commit', 'remote_apply')
UNION ALL
SELECT 'client_min_messages=warning' WHERE current_setting('client_min_messages') = 'error'
"""


def _configure_pooled(connection: Connection) -> None:
    """Raises: psycopg.Error. The same as for `_configure`, or the pooler does not set up its sessions."""
    connection.prepares = False
    if settings := lacking_settings(connection):
        log.error("postgres.pooler_lacks_settings", settings=settings, advice="set them in connect_query of PgBouncer")
        raise psycopg.OperationalError(f"the pooler's sessions lack {', '.join(settings)}")
    connection.query(CONFIRM)


def lacking_settings(connection: psycopg.Connection) -> list[str]:
    """Return the settings that the sessions of a pooler lack."""
    lacking = connection.execute(LACKING, (list(POOLED_SETTINGS), list(POOLED_SETTINGS.values()))).fetchall()
    return [setting for (setting,) in lacking]


def _commit(connection: Connection, until: float | None) -> None:
    """
    Raises:
        TooLate
        psycopg.Error
    """
    if connection.info.transaction_status == TransactionStatus.INERROR:
        # PostgreSQL answers ROLLBACK to this COMMIT, and no error: the write would be acknowledged and not done.
        connection.rollback()
        raise psycopg.errors.InFailedSqlTransaction("an error in this transaction was ignored")
    in_time = []
    if until is not None:
        # A statement reaches PostgreSQL before its result arrives here, so PostgreSQL counts at least as much as
        # passes. BEGIN travels with the statement that waits for the row: counted from BEGIN, the wait would
        # count twice.
        text, arrived_at = IN_TIME, connection.queue_arrived_at
        if connection.marked_at is not None:
            text, arrived_at = IN_TIME_AFTER_MARK, connection.marked_at
        in_time = [Statement(text, (f"{until - arrived_at:.3f} s",))]
    connection.commit_was_sent = True
    try:
        connection.query(*in_time, Statement("COMMIT"))
    except psycopg.errors.DivisionByZero:
        connection.commit_was_sent = False
        with suppress(psycopg.Error):
            connection.rollback()
        metrics.LATE_WRITES.inc()
        raise TooLate from None


def _is_readable(connection: Connection) -> bool:
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def _cause(error: Exception) -> str:
    """Return the kind of error, without the statement's values: they may be personal data."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__
