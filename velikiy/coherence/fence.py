"""The two orders that matter, each in one place: lock, drop, commit; and check, then read, then fill.

Why nothing old is ever found in Redis: a reader fills what it read only if no writer was in flight before its
snapshot was taken. A fill whose snapshot lacks a write passed that check before the writer's lock, and so before its
drop: its lease is gone when it lands. PostgreSQL makes a commit visible before it frees the lock. No clock is
involved: a commit may be late, a writer may die, Redis may be emptied at any moment.

Nginx' copies still run out by themselves (EDGE_TTL): ARCHITECTURE.md names what a read may miss for it.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from velikiy.coherence.entry import Entry, Path
from velikiy.coherence.redis_tier import Lease, RedisTier
from velikiy.postgres import Connection, Database

T = TypeVar("T")


class Answer(NamedTuple):
    """An entry, whether caches in front of us may store it, and how the Redis tier took part (an RFC 9211 member)."""

    entry: Entry
    storable: bool
    cache_status: str


class Fence:
    def __init__(self, database: Database, redis_tier: RedisTier) -> None:
        self.database = database
        self.redis_tier = redis_tier

    def read(self, path: Path, variant: str, load: Callable[[Connection], Entry]) -> Answer:
        """From Redis, else from PostgreSQL through `load`, and then into Redis.

        Raises:
            DatabaseUnavailable: where Redis does not have it either.
        """
        found = self.redis_tier.read(path, variant)
        if isinstance(found, Entry):
            return Answer(found, True, "redis; hit")
        with self.database.read() as connection:
            # In autocommit each statement has a snapshot of its own: the check comes before the one that counts.
            written = writer_in_flight(connection, path)
            entry = load(connection)
        stored = False
        if isinstance(found, Lease):
            stored = self.redis_tier.fill(path, variant, found, None if written else entry)
        if written:
            return Answer(entry, False, "redis; fwd=uri-miss; detail=write-in-flight")
        return Answer(entry, True, "redis; fwd=uri-miss; stored" if stored else "redis; fwd=bypass")

    def write(self, change: Callable[[Connection], tuple[T, tuple[Path, ...]]]) -> T:
        """Run `change` in a transaction; then lock the paths that it says it touched, drop them, commit.

        Raises:
            DatabaseUnavailable: the outcome is unknown.
        """
        with self.database.transaction() as connection:
            outcome, touched = change(connection)
            lock(connection, touched)
            self.redis_tier.drop(touched)
        return outcome


def lock(connection: Connection, paths: Iterable[Path]) -> None:
    """Until the transaction ends. Shared: writers of one path do not wait for each other here."""
    connection.execute(
        "SELECT pg_advisory_xact_lock_shared(key) FROM unnest(%s::bigint[]) key", ([number(path) for path in paths],)
    )


def writer_in_flight(connection: Connection, path: Path) -> bool:
    """Whether a transaction that has locked the path has not ended.

    By trying to get the lock for ourselves, and giving it back at once. Two readers may meet here and each take the
    other for a writer: then one fill is left out.
    """
    key = number(path)
    row = connection.execute(
        "SELECT CASE WHEN pg_try_advisory_lock(%s) THEN NOT pg_advisory_unlock(%s) ELSE true END", (key, key)
    ).fetchone()
    return row is None or bool(row[0])


def number(path: Path) -> int:
    """Of the path's advisory lock: 64 bits, signed. Two paths with the same number would cost speed only."""
    return int.from_bytes(hashlib.blake2b(path.path.encode(), digest_size=8).digest(), signed=True)
