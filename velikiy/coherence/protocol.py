"""Keep both cache tiers consistent with PostgreSQL.

    Write:  SQL -> lock the paths -> drop them in Redis -> drop them at every edge -> COMMIT
    Read:   probe the lock -> load the row       -> fill Redis (and the edge)

Invariant: a cache entry that can be found equals the committed row.

Why it holds. A reader fills a cache only if no writer held the path's lock before the reader took its snapshot. If a
fill misses a write, the reader therefore probed the lock before that writer acquired it, and the writer dropped the
path afterwards: the reader's fill lease (Redis) or its generation (edge) no longer exists when the fill arrives.
PostgreSQL makes a commit visible before it releases the lock.

Redis is dropped before the edges, because an edge may copy an entry from Redis.

A cache that does not acknowledge a drop is fenced: its cache lease is not renewed, and the writer waits until every
lease that was already granted has expired (`timing.EXCLUSION_S`). A fenced cache that acknowledges costs no wait.

No step depends on comparing clocks of different machines. docs/protocol.md explains the whole.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import psycopg

from velikiy import metrics
from velikiy.coherence.deadline import Deadline
from velikiy.coherence.edge_client import EdgeTier
from velikiy.coherence.entry import CachePath, Entry
from velikiy.coherence.group_commit import Drop, GroupCommit
from velikiy.coherence.locks import check, is_replicated, is_written, lock, locks
from velikiy.coherence.membership import MISSING, REDIS, Cache, Caches
from velikiy.coherence.redis_connections import OtherServer
from velikiy.coherence.redis_tier import DoesNotAnswer, FillLease, Hit, RedisTier
from velikiy.coherence.shards import UNREGISTERED, ShardMap
from velikiy.coherence.slowness import Slowness
from velikiy.coherence.timing import EXCLUSION_S, now
from velikiy.postgres import CONFIRM, Connection, Database, DatabaseUnavailable, Deadlock, Statement, TooLate
from velikiy.postgres.database import allow_idle
from velikiy.settings import Settings

T = TypeVar("T")
U = TypeVar("U")


class NotTried(Enum):
    """Redis has not been read yet."""

    NOT_TRIED = auto()


NOT_TRIED = NotTried.NOT_TRIED


class Answer(NamedTuple):
    """An entry, whether a cache in front may store it, and the part of the Redis tier in it (an RFC 9211 member)."""

    entry: Entry
    storable: bool
    cache_status: str


class Change(NamedTuple, Generic[T]):
    """The result of a write inside its transaction."""

    outcome: T
    invalidates: Sequence[CachePath] | None = ()
    """None stands for every path."""

    prefill: tuple[CachePath, Entry] | None = None
    """One of these paths with its new entry. Set it only if the writer's row lock keeps every other writer of the path
    waiting until the commit. A writer of a list knows its own row, and not the rows that others are about to commit."""

    def with_outcome(self, outcome: U) -> "Change[U]":
        return Change(outcome, self.invalidates, self.prefill)


class Dropped(NamedTuple):
    leases: dict[CachePath, FillLease]
    """Fill leases for the paths that writers want to prefill."""

    fenced: list[Cache]
    """Caches that are fenced, may still be in use, and have not acknowledged the drop. The writer waits for their
    exclusion before it commits."""


MARGIN_S = 2.0
"""Seconds for a busy machine, within which a writer that has waited for an exclusion sends its next statement."""

SET_AUTHOR = "SELECT set_config('velikiy.author', $1, true)"

IN_USE = MISSING._replace(fenced=False)
"""Stands for Redis beside edges, without its row."""

MAX_ATTEMPTS = 3
"""Attempts at a write that PostgreSQL aborts to break a deadlock."""


class Gate:
    """Every read and every write of a cached path passes here. This class owns the order of the steps."""

    def __init__(self, database: Database, caches: Caches, redis_tier: RedisTier, edge_tier: EdgeTier) -> None:
        self.database = database
        self.caches = caches
        self.redis_tier = redis_tier
        self.edge_tier = edge_tier
        self._group = GroupCommit[Dropped]()
        self._locked_tables: dict[str, threading.Lock] = {}
        """The tables that another session has locked, each with the lock of the one read that tries it."""
        self._slowness = Slowness()

    def read(
        self,
        path: CachePath,
        variant: str,
        load: Callable[[Connection], Entry],
        from_edge: FillLease | NotTried | None = NOT_TRIED,
    ) -> Answer:
        """Return the entry from Redis, or else from PostgreSQL; then fill Redis with it.

        Args:
            load: Reads the entry from PostgreSQL.
            from_edge: The result of the edge's own read of Redis: the fill lease that it got, None without one, or
                NOT_TRIED.

        Raises:
            DatabaseUnavailable: Redis does not have the entry, or must not be used any longer, and PostgreSQL does not
                answer.
        """
        found = self.redis_tier.read(path, variant) if isinstance(from_edge, NotTried) else from_edge
        if isinstance(found, Hit):
            return Answer(found.entry, True, f"redis; hit; ttl={found.ttl}")
        with self._unless_locked(path.table, variant), self.database.autocommit() as connection:
            # Each statement has its own snapshot: the lock is probed before the snapshot that counts.
            checked, before = connection.enqueue(check(path)), connection.exchanges
            try:
                entry = load(connection)
            except psycopg.errors.OutOfMemory:
                # A session has filled the table of locks, so a writer in flight would not show: count on a writer.
                checked, entry = [], load(connection)
                connection.query(CONFIRM)
            written = is_written(checked)
            if connection.exchanges - before > 1 and is_replicated(checked):
                connection.query(CONFIRM)  # `check` has confirmed the first exchange only
        if isinstance(found, FillLease):
            self.redis_tier.fill(path, variant, found, None if written else entry)
        if written:
            return Answer(entry, False, "redis; fwd=uri-miss; detail=write-in-flight")
        return Answer(
            entry, True, "redis; fwd=uri-miss; stored" if isinstance(found, FillLease) else "redis; fwd=bypass"
        )

    @contextmanager
    def _unless_locked(self, table: str, variant: str) -> Iterator[None]:
        """Let one read at a time try a table that another session has locked, such as for ALTER TABLE. The others fail
        at once: else every thread would wait. A variant that begins with a slash reads another table.

        Raises:
            DatabaseUnavailable
        """
        table += "/" if variant.startswith("/") else ""
        turn = self._locked_tables.get(table)
        if turn and not turn.acquire(blocking=False):
            raise DatabaseUnavailable("another read waits for the locked table") from psycopg.errors.LockNotAvailable()
        try:
            yield
            if turn:
                self._locked_tables.pop(table, None)
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                self._locked_tables.setdefault(table, threading.Lock())
            raise
        finally:
            if turn:
                turn.release()

    def write(
        self,
        change: Callable[[Connection], Change[T]],
        timeout_factor: float = 1,
        known_paths: Sequence[CachePath] = (),
        deadline: Deadline | None = None,
        author: str = "",
    ) -> T:
        """Run `change` in a transaction, lock the paths that it invalidates, drop them in every cache, and commit.

        Args:
            timeout_factor: The time that PostgreSQL has for the write, as a multiple of the time for one request.
            known_paths: The paths that are known in advance. They are locked in the exchange in which `change` writes
                the row (`Connection.write`), and after it: a writer that waits for the row keeps no path uncached.
            deadline: The moment after which nothing is committed.
            author: Who writes, for the history of rows (migrations/sql/row_history.sql): `api:` and the name of an API
                key, or `command:` and the name of a command.

        Raises:
            TooLate: The deadline has passed; the write had no effect.
            DatabaseUnavailable: The outcome is unknown.
        """
        for _ in range(MAX_ATTEMPTS - 1):
            with suppress(Deadlock):
                return self._write(change, timeout_factor, known_paths, deadline, author)
        return self._write(change, timeout_factor, known_paths, deadline, author)

    def _write(
        self,
        change: Callable[[Connection], Change[T]],
        timeout_factor: float,
        known_paths: Sequence[CachePath],
        deadline: Deadline | None,
        author: str,
    ) -> T:
        lease = None
        _check_deadline(deadline)
        first = [Statement(SET_AUTHOR, (author,))] if author else []
        with self.database.transaction(timeout_factor, deadline.moment if deadline else None, *first) as connection:
            connection.behind = locks(known_paths)
            outcome, invalidates, prefill = change(connection)
            if invalidates is None or invalidates:
                lock(connection, invalidates, already_locked=() if connection.behind else known_paths)
                lease = self.drop(connection, invalidates, prefill[0] if prefill else None)
            else:
                connection.query(CONFIRM)  # a COMMIT of nothing would not wait for the standby
            # Last. A process that is stopped from here on holds the row lock, so no newer write can be acknowledged;
            # and PostgreSQL compares the deadline again when it receives the COMMIT.
            _check_deadline(deadline)
        if prefill and lease:
            # Only after the commit: before it, Redis would show a row that PostgreSQL does not show, or never will.
            # Readers that arrive in between wait for this fill or go to PostgreSQL.
            self.redis_tier.fill(prefill[0], "", lease, prefill[1])
        return outcome

    def drop(
        self,
        connection: Connection,
        paths: Sequence[CachePath] | None,
        prefill: CachePath | None = None,
        *,
        wait: bool = True,
    ) -> FillLease | None:
        """Drop these paths, or every path for None, in Redis and then at every edge.

        A cache that does not acknowledge is fenced, and the call returns only after its exclusion: a commit must come
        later. A change that is committed already does not need to `wait`.

        Returns:
            The fill lease for `prefill`, or None.

        Raises:
            DatabaseUnavailable
        """
        with metrics.DROP_DURATION.time():
            dropped = self._group.submit(connection, Drop(paths, prefill), partial(self._drop_all, connection))
        if wait:
            self._await_exclusion(connection, dropped.fenced)
            if any(cache.name == REDIS for cache in dropped.fenced):
                # Drop at the edges again: until its exclusion Redis had the old entry, and an edge could copy it.
                self._await_exclusion(connection, self._drop_at_edges(connection, paths, {}))
        return dropped.leases.get(prefill) if prefill else None

    def _drop_all(self, connection: Connection, drops: Sequence[Drop]) -> Dropped:
        """Drop for all of these writers; each holds its own locks. Each waits by itself for an exclusion."""
        metrics.DROP_ROUNDS.inc()
        named = Counter(path for drop in drops for path in drop.paths or ())
        paths = None if any(drop.paths is None for drop in drops) else list(named)
        # If two of the writers drop one path, neither may prefill it. In two rounds the later drop would take the fill
        # lease of the earlier drop away; in one round no drop is later.
        prefill = (
            [drop.prefill for drop in drops if drop.prefill and named[drop.prefill] == 1] if paths is not None else []
        )
        times: dict[Cache, float] = {}
        leases, redis = self._drop_in_redis(connection, paths, prefill, times)
        silent = [redis] if redis and not redis.excluded else []
        silent += self._drop_at_edges(connection, paths, times)
        self._fence_slow_caches(connection, times)
        return Dropped(leases, silent)

    def _fence_slow_caches(self, connection: Connection, times: dict[Cache, float]) -> None:
        """Take a cache that is slow again and again out of use, so that no write waits for it. This writer need not
        wait: the cache has acknowledged its drop."""
        for cache in self._slowness.slow(times):
            # If PostgreSQL lends no connection now, a later write fences the cache.
            with connection.deadline_paused(), suppress(DatabaseUnavailable):
                with self.database.autocommit() as other:
                    lately = self.caches.record(other, cache.name).lately
                    cache = self.caches.redis(other) if cache.name == REDIS else cache
                if not cache.fenced and self._slowness.is_repeated(cache, lately):
                    self.caches.fence([cache], counts=True, reason="it acknowledges slowly, again and again")

    def _drop_in_redis(
        self,
        connection: Connection,
        paths: Sequence[CachePath] | None,
        prefill: Sequence[CachePath],
        times: dict[Cache, float],
    ) -> tuple[dict[CachePath, FillLease], Cache | None]:
        """Return the fill leases, and Redis if it is fenced and has not acknowledged. Add the seconds that it took to
        `times`."""
        shards, is_silent = self.redis_tier.registered(), False
        for _ in range(2):  # the second time at the server that is registered meanwhile
            if shards is None:
                # Read after the locks were taken: a process that uses a readmitted Redis finds the locks. A lease
                # replaces the row, because no Redis is readmitted before every lease has expired.
                redis = self.caches.redis(connection)
                if redis.fenced:
                    return {}, None if self._drops_in_fenced_redis(connection, redis, paths) else redis
                shards = redis.shards or UNREGISTERED
            with connection.deadline_paused():
                try:
                    began = now()
                    leases = self.redis_tier.drop(paths, prefill, shards=shards)
                except DoesNotAnswer as error:
                    metrics.UNACKNOWLEDGED.labels(REDIS, str(error)).inc()
                    is_silent = True
                    break
                except OtherServer as error:
                    self.adopt(error.found)
                else:
                    times[IN_USE] = now() - began
                    return leases, None
            shards = None
        redis = self.caches.redis(connection)
        self.caches.fence([redis], counts=is_silent)
        return {}, redis

    def _drops_in_fenced_redis(self, connection: Connection, redis: Cache, paths: Sequence[CachePath] | None) -> bool:
        """Return whether a fenced Redis, which may still be in use, has acknowledged. A cluster may be fenced because a
        key has two copies, of which a drop reaches one."""
        shards = ShardMap.parse(redis.address) if redis.address else UNREGISTERED
        if redis.excluded or shards is UNREGISTERED or shards.is_cluster:
            return False
        with connection.deadline_paused(), suppress(DoesNotAnswer, OtherServer):
            self.redis_tier.drop(paths, shards=shards)
            return True
        return False

    def adopt(self, found: ShardMap) -> None:
        """Register the servers that this process reaches, if the registered server is surely gone; else announce them.

        Raises:
            DatabaseUnavailable
        """
        with self.database.autocommit() as connection:
            redis = self.caches.redis(connection)
        if redis.fenced or (redis.shards and redis.shards.id == found.id):
            return
        if redis.shards is None or self.redis_tier.is_surely_gone(redis.shards, found):
            with suppress(DoesNotAnswer):
                self.caches.adopt_redis(redis, self.redis_tier.empty())
        else:
            self.caches.announce(found)

    def _drop_at_edges(
        self, connection: Connection, paths: Sequence[CachePath] | None, times: dict[Cache, float]
    ) -> list[Cache]:
        """Return the edges that have not acknowledged and may still be in use, which are fenced by then. Add to `times`
        the seconds that each of the others took. The list of edges is read now, after the drop in Redis: an edge that
        registers later finds no old entry there.

        A fenced edge also gets the drop: if it acknowledges, it has forgotten the paths, whatever it may still use."""
        edges = self.caches.edges(connection)
        with connection.deadline_paused():
            silent = self.edge_tier.drop(edges, paths, times)
            self.caches.fence([edge for edge in silent if not edge.fenced], counts=True)
        return silent

    def _await_exclusion(self, connection: Connection, fenced: Sequence[Cache]) -> None:
        if not fenced:
            return
        allow_idle(connection, EXCLUSION_S + self.database.timeout + MARGIN_S)
        with connection.deadline_paused():
            self.caches.await_exclusion(fenced)


def _check_deadline(deadline: Deadline | None) -> None:
    """Raises: TooLate"""
    if deadline and deadline.is_over():
        metrics.LATE_WRITES.inc()
        raise TooLate


def connect(database: Database, settings: Settings) -> Gate:
    """Return the gate of this database. Nothing is sent yet."""
    caches = Caches(database, threads=settings.app_threads, max_edges=settings.max_edges)
    redis_tier = RedisTier(
        settings.redis_url,
        caches.in_use,
        ttl=settings.redis_ttl,
        timeout=settings.redis_timeout,
        direct=settings.redis_direct,
    )
    return Gate(database, caches, redis_tier, EdgeTier(settings.edge_secret))
