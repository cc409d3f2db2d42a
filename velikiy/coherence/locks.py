"""Advisory locks on paths: how a reader finds out that a writer is in flight.

A writer holds the lock of each path that it invalidates until its transaction ends. A reader only tries it.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache

from velikiy.coherence.entry import CachePath
from velikiy.postgres import Connection, Row, Statement

MAX_PATH_LOCKS = 64
"""Paths. Each lock takes a place in a table of some thousands that all sessions share (max_locks_per_transaction)."""

EVERYTHING = CachePath("*", "")
"""What a write of many paths locks: readers look at this lock too."""


def lock(connection: Connection, paths: Sequence[CachePath] | None, already_locked: Sequence[CachePath] = ()) -> None:
    """Until the transaction ends; those in `already_locked` are locked, or will be by the next statement."""
    connection.query(*locks(None if paths is None else [path for path in paths if path not in already_locked]))


def locks(paths: Sequence[CachePath] | None) -> tuple[Statement, ...]:
    """The statement for it; none, for no paths. Shared: writers of one path do not wait for each other here.

    For many paths it is one lock, and the other way round: readers try it shared, so that they do not take each other
    for a writer, and writers of many paths follow one another.
    """
    if paths is None or len(paths) > MAX_PATH_LOCKS:
        return (Statement("SELECT pg_advisory_xact_lock($1)", (lock_id(EVERYTHING),)),)
    if not paths:
        return ()
    return (Statement(_each(len(paths)), [lock_id(path) for path in paths]),)


@cache
def _each(count: int) -> str:
    return f"SELECT {', '.join(f'pg_advisory_xact_lock_shared(${place})' for place in range(1, count + 1))}"


CHECK = """
SELECT CASE WHEN pg_try_advisory_lock($1) THEN NOT pg_advisory_unlock($1) ELSE true END
    OR CASE WHEN pg_try_advisory_lock_shared($2) THEN NOT pg_advisory_unlock_shared($2) ELSE true END
"""


def check(path: CachePath) -> Statement:
    """Whether a transaction that has locked the path, or everything, has not ended.

    By trying to get the lock for ourselves, and giving it back at once. Two readers may meet here and each take the
    other for a writer: then one fill is left out.
    """
    return Statement(CHECK, (lock_id(path), lock_id(EVERYTHING)))


def is_written(checked: list[list[Row]]) -> bool:
    """What came of one check; what was not asked at all passes for a writer."""
    return checked != [[(b"f",)]]


def writer_in_flight(connection: Connection, path: CachePath) -> bool:
    """For people, who want to know nothing else."""
    return is_written(connection.query(check(path)))


@lru_cache(maxsize=4096)
def lock_id(path: CachePath) -> int:
    """Of the path's advisory lock: 64 bits, signed. Two paths with the same lock_id would cost speed only."""
    return int.from_bytes(hashlib.blake2b(path.path.encode(), digest_size=8).digest(), signed=True)
