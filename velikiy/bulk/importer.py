"""What is read becomes chunks. Each is one transaction behind one fence, and keeps how far the file was read as well:
wherever an import is broken off, it can go on, and no row is lost or comes twice. While PostgreSQL works on one chunk,
a thread makes the next one."""

import atexit
import gc
import hashlib
import io
import itertools
import os
import queue
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple, TypeVar

import psycopg
from psycopg import sql

from velikiy.bulk.insert import BIG, vacuum, write
from velikiy.bulk.output_files import Rejects
from velikiy.bulk.progress import say, shown
from velikiy.bulk.readers import READERS, Lines, Row, Unreadable, by_content, by_name, checked, content
from velikiy.bulk.signals import to_the_end
from velikiy.coherence import CachePath, Gate
from velikiy.coherence.locks import lock_id
from velikiy.postgres import Connection
from velikiy.resources.base import Resource

T = TypeVar("T")


CHUNK = 10_000
"""Rows. Each chunk empties all caches and waits for the disk once, which much smaller ones would make felt. A client
who writes a value that is in a chunk waits until it has committed: much larger ones would make that a 503."""


KEPT = "30 days"
"""What was broken off longer ago cannot go on: the next import that ends forgets it."""


class Chunk(NamedTuple):
    rows: list[Row]
    lines: int
    """Of the file, up to the end of this chunk."""

    so_far: bytes
    """Digest of these lines."""

    position: int
    """In the file as it is on the disk, in bytes."""


class State(NamedTuple):
    """How far the import of a file is: a row of the table `imports`."""

    lines: int = 0
    so_far: bytes = b""
    imported: int = 0
    rejected: int = 0
    rejects_size: int = 0
    """Bytes that the file of rejects has, up to here."""


class Import:
    def __init__(
        self, resource: Resource, gate: Gate, file: str, form: str | None, rejects: str, restart: bool
    ) -> None:
        """`file`: `-` is stdin; `rejects`: where rows go that cannot be taken, `-` is stdout; `restart`: at the first
        line."""
        self.resource = resource
        self.gate = gate
        self.file = file
        self.form = form
        self.rejects = rejects
        self.restart = restart

    def run(self) -> tuple[State, int]:
        """What became of the whole file, and the line after which it went on if it was broken off before.

        Raises:
            Unreadable, DatabaseUnavailable, OSError, EOFError, zlib.error
        """
        with content(self.file) as (raw, whole, beginning):
            digest = hashlib.blake2b(beginning, digest_size=32).digest()
            lines = Lines(whole)
            rows = READERS[self.form or by_name(self.file) or by_content(beginning)](self.resource, lines)
            with self._alone(digest) as state:
                if not state.lines or lines.skip(state.lines) == state.so_far:
                    rejects = Rejects(self.rejects, state.rejects_size, raw)
                    if state.lines:
                        say(f"continuing after line {state.lines:,}")
                    return self._go_on(state, digest, ahead(chunks(rows, lines, raw)), rejects, raw), state.lines
        if self.file == "-":
            raise Unreadable(
                f"an import of this input was interrupted after line {state.lines:,}, and the input has changed since."
                " stdin cannot be rewound: pipe the input again, with --restart"
            )
        say(f"{self.file} has changed since its import was interrupted after line {state.lines:,}: starting at line 1")
        self.restart = True
        return self.run()

    @contextmanager
    def _alone(self, digest: bytes) -> Iterator[State]:
        """What is known of this file; nobody else imports it meanwhile."""
        which = (self.resource.name, digest)
        lock = lock_id(CachePath(f"import {self.resource.name} {digest.hex()}", ""))
        with self.gate.database.autocommit() as connection:
            [(alone,)] = connection.execute("SELECT pg_try_advisory_lock(%s)", (lock,)).fetchall()
            if not alone:
                raise Unreadable("another import of this file is running: wait for its end")
            try:
                found = connection.execute(
                    "SELECT lines, so_far, imported, rejected, rejects_size FROM imports"
                    " WHERE (resource, begins_with) = (%s, %s)",
                    which,
                ).fetchone()
                yield State(*found) if found and not self.restart else State()
            finally:
                connection.deadline = None  # of the beginning; this is the end
                with suppress(psycopg.Error):
                    connection.execute("SELECT pg_advisory_unlock(%s)", (lock,))

    def _go_on(self, state: State, digest: bytes, chunks: Iterator[Chunk], rejects: Rejects, raw: io.FileIO) -> State:
        file = os.fstat(raw.fileno())
        size = file.st_size if stat.S_ISREG(file.st_mode) else None
        try:
            with rejects, shown(f"importing {self.resource.name}", size, beside=rejects.file) as report:
                if self.restart:
                    self._forget(digest)
                for chunk in chunks:
                    with to_the_end():
                        state = self._take(chunk, state, digest, rejects)
                        rejects.size = state.rejects_size
                    report(chunk.position, state.imported + state.rejected)
        except BaseException:
            if state.lines:
                say(f"lines 1 to {state.lines:,} are done; to continue after them, run the same command again")
            raise
        self._forget(digest)
        if state.imported >= BIG:
            vacuum(self.resource, self.gate)
        return state

    def _forget(self, digest: bytes) -> None:
        with self.gate.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM imports WHERE (resource, begins_with) = (%s, %s) OR updated_at < now() - %s::interval",
                (self.resource.name, digest, KEPT),
            )

    def _take(self, chunk: Chunk, state: State, digest: bytes, rejects: Rejects) -> State:
        def keep(connection: Connection, refused: list[Row]) -> State:
            rejected = sorted([*(row for row in chunk.rows if row.errors), *refused], key=lambda row: row.line)
            new = State(
                chunk.lines,
                chunk.so_far,
                state.imported + len(chunk.rows) - len(rejected),
                state.rejected + sum(row.lines for row in rejected),
                rejects.write(rejected),
            )
            # Where there was a row, no new one: it may be gone since another import of this file has ended.
            kept = connection.execute(
                "UPDATE imports SET (lines, so_far, imported, rejected, rejects_size, updated_at)"
                " = (%s, %s, %s, %s, %s, now()) WHERE (resource, begins_with, lines) = (%s, %s, %s)"
                if state.lines
                else "INSERT INTO imports (lines, so_far, imported, rejected, rejects_size, resource, begins_with)"
                " SELECT %s, %s, %s, %s, %s, %s, %s WHERE %s = 0 ON CONFLICT DO NOTHING",
                (*new, self.resource.name, digest, state.lines),
            )
            if not kept.rowcount:
                # An import that was killed while it committed: its COMMIT came through after we had looked.
                raise Unreadable("an earlier import of this file was still committing: run the same command again")
            return new

        return write(self.resource, self.gate, [row for row in chunk.rows if not row.errors], keep)


def chunks(rows: Iterator[Row], lines: "Lines", raw: io.FileIO) -> Iterator[Chunk]:
    while some := list(itertools.islice(rows, CHUNK)):
        yield Chunk(some, lines.number, lines.so_far(), raw.tell() if raw.seekable() else 0)


def seed_with(resource: Resource, gate: Gate, count: int) -> None:
    """Raises: DatabaseUnavailable"""
    with gate.database.autocommit() as connection:
        # A row has an id that is no less than its number here, so what comes after the last id is new.
        first_free = sql.SQL("SELECT coalesce(max(id), 0) + 1 FROM {}").format(sql.Identifier(resource.name))
        [(first,)] = connection.execute(first_free).fetchall()
    made = 0
    try:
        with shown(f"creating {resource.name}", count) as report:
            while made < count:
                numbers = iter(range(first, first := first + count - made))
                for rows in ahead(_samples(resource, numbers)):
                    with to_the_end():
                        made += len(rows) - write(resource, gate, rows, lambda _, refused: len(refused))
                    report(made, made)
    except BaseException:
        if made:
            say(f"{made:,} rows were created and stay")
        raise
    if made >= BIG:
        vacuum(resource, gate)


def _samples(resource: Resource, numbers: Iterator[int]) -> Iterator[list[Row]]:
    def row(n: int) -> Row:
        given = resource.seed_row(n)
        return checked(resource, n, given, partial(resource.create_model.model_validate, given))

    while some := [row(n) for n in itertools.islice(numbers, CHUNK)]:
        yield some


def ahead(made: Iterable[T]) -> Iterator[T]:
    """The same, made by a thread while the one before is at work; one waits, and no more."""
    waiting: queue.Queue[T | BaseException | None] = queue.Queue(1)
    over = threading.Event()

    def make() -> None:
        try:
            for one in made:
                waiting.put(one)
                if over.is_set():
                    return
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    # A daemon: it may be reading from a pipe that stays silent when somebody has had enough.
    maker = threading.Thread(target=make, daemon=True)

    def end() -> None:
        """Python ends a daemon wherever it is, and crashes where that is in Rust (jiter, pydantic). One that reads, it
        ends well: so it is waited for, and not for ever."""
        over.set()
        with suppress(queue.Empty):
            waiting.get_nowait()
        maker.join(1)

    gc.freeze()  # what is imported stays: else Python looks through all of it again and again, for a fifth of the time
    maker.start()
    atexit.register(end)
    while (one := waiting.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        yield one
    atexit.unregister(end)
