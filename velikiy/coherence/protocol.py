"""The two orders that matter, each in one place: lock, drop, commit; and check, then read, then fill.

Why nothing old is ever found in a cache: a reader fills what it read only if no writer was in flight before its
snapshot was taken. A fill whose snapshot lacks a write passed that check before the writer's lock, and so before its
drops: its lease in Redis, or its generation at the edge, is gone when it lands. PostgreSQL makes a commit visible
before it frees the lock. Redis is dropped before the edges, since an edge may store a body that came from Redis. A
cache that does not answer its drop is put out of use before the commit (`Caches.fence`).

No clock decides: a commit may be late, a writer may die, a cache may be emptied or restarted at any moment.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from functools import cache, lru_cache, partial
from typing import Generic, NamedTuple, TypeVar

from velikiy.coherence.edge_client import EdgeTier
from velikiy.coherence.entry import Entry, Path
from velikiy.coherence.group_commit import Drop, Group
from velikiy.coherence.membership import REDIS, Cache, Caches, Trust, now
from velikiy.coherence.redis_tier import DoesNotAnswer, Hit, Lease, RedisTier
from velikiy.postgres import Connection, Database, Deadlock, Row, Statement
from velikiy.settings import Settings

T = TypeVar("T")
U = TypeVar("U")


class Unasked(Enum):
    """Nobody has asked Redis yet."""

    UNASKED = auto()


UNASKED = Unasked.UNASKED


class Answer(NamedTuple):
    """An entry, whether caches in front of us may store it, and how the Redis tier took part (an RFC 9211 member)."""

    entry: Entry
    storable: bool
    cache_status: str


class Change(NamedTuple, Generic[T]):
    """What a write did in its transaction."""

    outcome: T
    touched: Sequence[Path] | None = ()
    """None is everything."""

    own: tuple[Path, Entry] | None = None
    """One of these paths, and its new entry: only where the writer's row lock keeps every other writer of the path
    waiting until the commit. Of a list a writer knows its own row, and not what others are about to commit."""

    def told_as(self, outcome: U) -> "Change[U]":
        return Change(outcome, self.touched, self.own)


class Dropped(NamedTuple):
    leases: dict[Path, Lease]
    """To fill what writers have asked for."""

    fenced: list[Cache]
    """Caches that are fenced, and may be in use still: they have to be waited out before the commit."""


class TooLate(Exception):
    """The write's deadline has passed: its client was already told that it failed. It was not carried out."""


def _in_time(until: float | None) -> None:
    """Raises: TooLate"""
    if until is not None and now() >= until:
        raise TooLate


TRIES = 3
"""Of a write that PostgreSQL has ended because it and others waited for each other."""


class Fence:
    def __init__(self, database: Database, caches: Caches, redis_tier: RedisTier, edge_tier: EdgeTier) -> None:
        self.database = database
        self.caches = caches
        self.redis_tier = redis_tier
        self.edge_tier = edge_tier
        self._group = Group[Dropped]()

    def read(
        self, path: Path, variant: str, load: Callable[[Connection], Entry], asked: Lease | Unasked | None = UNASKED
    ) -> Answer:
        """From Redis, else from PostgreSQL through `load`, and then into Redis. `asked`: what came of it where an edge
        has asked Redis already; the lease that it got, or none.

        Raises:
            DatabaseUnavailable: where Redis does not have it either, or may not be used any more.
        """
        found = self.redis_tier.read(path, variant) if isinstance(asked, Unasked) else asked
        if isinstance(found, Hit):
            return Answer(found.entry, True, f"redis; hit; ttl={found.ttl}")
        with self.database.autocommit() as connection:
            # Each statement has a snapshot of its own: the check comes before the one that counts.
            checked = connection.ahead(check(path))
            entry = load(connection)
            written = is_written(checked)
        if isinstance(found, Lease):
            self.redis_tier.fill(path, variant, found, None if written else entry)
        if written:
            return Answer(entry, False, "redis; fwd=uri-miss; detail=write-in-flight")
        return Answer(entry, True, "redis; fwd=uri-miss; stored" if isinstance(found, Lease) else "redis; fwd=bypass")

    def write(
        self,
        change: Callable[[Connection], Change[T]],
        times: float = 1,
        foreseen: Sequence[Path] = (),
        until: float | None = None,
    ) -> T:
        """Run `change` in a transaction; then lock the paths that it touched, drop them everywhere, commit. `times`:
        the time that PostgreSQL has for it, in those of one request. `foreseen`: of these paths those that are known
        before; locked as the transaction begins they cost no exchange of their own. `until`: the moment after which
        nothing is committed any more (`caches.now`).

        Raises:
            TooLate: nothing was done.
            DatabaseUnavailable: the outcome is unknown.
        """
        for _ in range(TRIES - 1):
            with suppress(Deadlock):
                return self._write(change, times, foreseen, until)
        return self._write(change, times, foreseen, until)

    def _write(
        self, change: Callable[[Connection], Change[T]], times: float, foreseen: Sequence[Path], until: float | None
    ) -> T:
        lease = None
        _in_time(until)
        with self.database.transaction(times, *locks(foreseen)) as connection:
            outcome, touched, own = change(connection)
            if touched is None or touched:
                lock(connection, touched, besides=foreseen)
                lease = self.drop(connection, touched, own[0] if own else None)
            # Last: a process that is stopped from here on holds the row, so that nobody can write over it, until it
            # goes on or PostgreSQL ends the transaction.
            _in_time(until)
        if own and lease:
            # After the commit only: before it, Redis would show what PostgreSQL does not, or never will. Readers
            # that came meanwhile wait for this, or have gone to PostgreSQL.
            self.redis_tier.fill(own[0], "", lease, own[1])
        return outcome

    def drop(
        self, connection: Connection, paths: Sequence[Path] | None, own: Path | None = None, *, wait: bool = True
    ) -> Lease | None:
        """These paths, or with None everything, in Redis and then at every edge; fences what does not answer, and
        waits until it is out of use: a commit has to come after that. What is committed already need not `wait`.

        Raises:
            DatabaseUnavailable
        """
        dropped = self._group.join(connection, Drop(paths, own), partial(self._drop_all, connection))
        if wait:
            self._wait_out(connection, dropped.fenced)
            if any(cache.name == REDIS for cache in dropped.fenced):
                # As long as Redis was in use an edge could get there what was to be dropped, and keep it.
                self._wait_out(connection, self._drop_at_edges(connection, paths))
        return dropped.leases.get(own) if own else None

    def _drop_all(self, connection: Connection, drops: Sequence[Drop]) -> Dropped:
        """For all these writers, each of whom has its locks. Nothing here waits for a fence: that is for each alone."""
        named = Counter(path for drop in drops for path in drop.paths or ())
        paths = None if any(drop.paths is None for drop in drops) else list(named)
        # A path that two drop here nobody fills: of two drops the later one takes the other's lease, and here is none.
        own = [drop.own for drop in drops if drop.own and named[drop.own] == 1] if paths is not None else []
        leases: dict[Path, Lease] = {}
        # The row is asked for after the locks: whoever uses Redis once it is back finds them held.
        redis = self.caches.redis(connection) if self.redis_tier.doubtful else None
        if redis is None or not redis.fenced:
            try:
                with connection.elsewhere():
                    leases = self.redis_tier.drop(paths, own)
                redis = None
            except DoesNotAnswer:
                redis = self.caches.redis(connection)
                self.caches.fence([redis])
        fenced = [redis] if redis and not redis.left_out else []
        return Dropped(leases, fenced + self._drop_at_edges(connection, paths))

    def _drop_at_edges(self, connection: Connection, paths: Sequence[Path] | None) -> list[Cache]:
        """Those that may be in use still: they are fenced. The list is read now, after the drop in Redis: an edge that
        registers later finds nothing old there."""
        edges = self.caches.edges(connection)
        with connection.elsewhere():
            silent = self.edge_tier.drop([edge for edge in edges if not edge.fenced], paths)
            self.caches.fence(silent)
        return [*silent, *(edge for edge in edges if edge.fenced)]

    def _wait_out(self, connection: Connection, fenced: Sequence[Cache]) -> None:
        with connection.elsewhere():
            self.caches.wait_out(fenced)


def connect(database: Database, settings: Settings) -> Fence:
    """The fence of this database; nothing is asked yet."""
    caches = Caches(database, threads=settings.app_threads)
    trust = Trust(caches.redis_is_fenced)
    redis_tier = RedisTier(
        settings.redis_url,
        trust,
        ttl=settings.redis_ttl,
        timeout=settings.redis_timeout,
        direct=settings.redis_direct,
    )
    return Fence(database, caches, redis_tier, EdgeTier())


MANY = 64
"""Paths. Each lock takes a place in a table of some thousands that all sessions share (max_locks_per_transaction)."""

EVERYTHING = Path("*", "")
"""What a write of many paths locks: readers look at this lock too."""


def lock(connection: Connection, paths: Sequence[Path] | None, besides: Sequence[Path] = ()) -> None:
    """Until the transaction ends; those `besides` are locked already, or to be locked by what is asked next."""
    connection.ask(*locks(None if paths is None else [path for path in paths if path not in besides]))


def locks(paths: Sequence[Path] | None) -> tuple[Statement, ...]:
    """The statement for it; none, for no paths. Shared: writers of one path do not wait for each other here.

    For many paths it is one lock, and the other way round: readers try it shared, so that they do not take each other
    for a writer, and writers of many paths follow one another.
    """
    if paths is None or len(paths) > MANY:
        return (Statement("SELECT pg_advisory_xact_lock($1)", (number(EVERYTHING),)),)
    if not paths:
        return ()
    return (Statement(_each(len(paths)), [number(path) for path in paths]),)


@cache
def _each(count: int) -> str:
    return f"SELECT {', '.join(f'pg_advisory_xact_lock_shared(${place})' for place in range(1, count + 1))}"


CHECK = """
SELECT CASE WHEN pg_try_advisory_lock($1) THEN NOT pg_advisory_unlock($1) ELSE true END
    OR CASE WHEN pg_try_advisory_lock_shared($2) THEN NOT pg_advisory_unlock_shared($2) ELSE true END
"""


def check(path: Path) -> Statement:
    """Whether a transaction that has locked the path, or everything, has not ended.

    By trying to get the lock for ourselves, and giving it back at once. Two readers may meet here and each take the
    other for a writer: then one fill is left out.
    """
    return Statement(CHECK, (number(path), number(EVERYTHING)))


def is_written(checked: list[list[Row]]) -> bool:
    """What came of one check; what was not asked at all passes for a writer."""
    return checked != [[(b"f",)]]


def writer_in_flight(connection: Connection, path: Path) -> bool:
    """For people, who want to know nothing else."""
    return is_written(connection.ask(check(path)))


@lru_cache(maxsize=4096)
def number(path: Path) -> int:
    """Of the path's advisory lock: 64 bits, signed. Two paths with the same number would cost speed only."""
    return int.from_bytes(hashlib.blake2b(path.path.encode(), digest_size=8).digest(), signed=True)
