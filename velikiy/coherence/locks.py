"""Advisory locks on paths. They show a reader that a writer is in flight.

A writer holds the lock of each path that it invalidates until its transaction ends. A reader only probes the lock.

PostgreSQL's advisory locks are numbers that all programs of a database share. The service uses the form with two
numbers, the first of which is its own, so that it never takes a lock of another program for a writer.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache

from velikiy.coherence.entry import CachePath
from velikiy.postgres import CONFIRMED, MARK, Connection, Row, Statement

PATHS = 0x76656C69
"""The first number of the locks of paths ("veli" in ASCII)."""

OTHERS = PATHS + 1
"""The first number of the other locks of the service: of imports, unique values and idempotency keys."""

MAX_PATH_LOCKS = 64
"""Locks of one write. Each lock takes one of some thousand entries in a table that all sessions share
(max_locks_per_transaction)."""

EVERYTHING = CachePath("*", "")
"""The path whose lock stands for every path. Readers probe it as well."""


def lock(connection: Connection, paths: Sequence[CachePath] | None, already_locked: Sequence[CachePath] = ()) -> None:
    """Lock these paths, or every path for None, until the transaction ends. The paths in `already_locked` are left
    out."""
    statements = locks(None if paths is None else [path for path in paths if path not in already_locked])
    connection.query(*statements)
    connection.note_mark(statements)


def locks(paths: Sequence[CachePath] | None) -> tuple[Statement, ...]:
    """Return the statement that locks these paths, or nothing for no paths. PostgreSQL also remembers when it has got
    them (MARK), because a write may wait for its row, and for these locks.

    The locks are shared, so writers of one path do not wait for each other here. The lock for every path is exclusive,
    so such writers follow one another. Readers probe the lock for every path in shared
    mode, so that they do not take each other for such a writer.
    """
    if paths is None or len(paths) > MAX_PATH_LOCKS:
        return (Statement(f"SELECT pg_advisory_xact_lock({PATHS}, $1), {MARK}", (lock_id(EVERYTHING),)),)
    if not paths:
        return ()
    return (Statement(_each(len(paths)), [lock_id(path) for path in paths]),)


@cache
def _each(count: int) -> str:
    return f"SELECT {', '.join(f'pg_advisory_xact_lock_shared({PATHS}, ${n})' for n in range(1, count + 1))}, {MARK}"


CHECK = f"""
SELECT CASE WHEN pg_try_advisory_lock({PATHS}, $1) THEN NOT pg_advisory_unlock({PATHS}, $1) ELSE true END
    OR CASE WHEN pg_try_advisory_lock_shared({PATHS}, $2) THEN NOT pg_advisory_unlock_shared({PATHS}, $2) ELSE true END,
    {CONFIRMED}
"""


def check(path: CachePath) -> Statement:
    """Return the statement that probes whether a transaction holds the lock of this path, or of every path.

    The statement tries to take each lock, and releases it at once. Two readers that probe the lock of one path
    at the same moment may take each other for a writer; then a fill is omitted.

    It also confirms the exchange that it is part of (velikiy/postgres/leader.py): the locks and rows of an old leader
    mean nothing.
    """
    return Statement(CHECK, (lock_id(path), lock_id(EVERYTHING)))


def is_written(checked: list[list[Row]]) -> bool:
    """Return whether the result of `check` shows a writer. A missing result counts as a writer."""
    return [row[:1] for rows in checked for row in rows] != [(b"f",)]


def is_replicated(checked: list[list[Row]]) -> bool:
    """Return whether PostgreSQL has synchronous standbys, so that each exchange has to be confirmed."""
    return any(row[1] == b"t" for rows in checked for row in rows)


def writer_in_flight(connection: Connection, path: CachePath) -> bool:
    """Return whether a writer is in flight, for people."""
    return is_written(connection.query(check(path)))


@lru_cache(maxsize=4096)
def lock_id(path: CachePath) -> int:
    """Return the number of the path's lock: 32 bits, signed. If two paths have one number, only speed suffers."""
    return number_of(path.path)


def number_of(name: str) -> int:
    """Return the second number of the lock with this name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), signed=True)
