"""Import a file in chunks.

Each chunk is one transaction with one drop, and it also stores the progress of the file. So an interrupted import can
continue, and no row is lost or imported twice. While PostgreSQL works on a chunk, a thread reads the next chunk.
"""

import hashlib
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import psycopg

from velikiy.bulk.atomic_file import standard_stream
from velikiy.bulk.columns import Reading
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.insert import VACUUM_AFTER_ROWS, OnConflict, Outcome, rehearsal, vacuum, write
from velikiy.bulk.parts import Lines
from velikiy.bulk.prefetch import prefetch
from velikiy.bulk.progress import print_message, progress_bar
from velikiy.bulk.readers import Input, Row, read
from velikiy.bulk.rejects import Rejects
from velikiy.bulk.signals import defer_signals
from velikiy.bulk.unpack import open_input
from velikiy.coherence import Gate
from velikiy.coherence.locks import OTHERS, number_of
from velikiy.postgres import Connection
from velikiy.resources.base import Resource

CHUNK_ROWS = 10_000
"""Rows of one transaction. Each chunk empties all caches and waits for the disk once, which would cost much with far
smaller chunks. A client that writes a value which is also in the chunk waits for its COMMIT, and with far larger chunks
would receive a 503."""

PROGRESS_RETENTION = "30 days"
"""The time for which the progress of an interrupted import is kept. The end of any import deletes older progress."""

MAX_REASONS = 10
"""Reasons that a rehearsal lists. Its counts include all rejected rows."""


class Chunk(NamedTuple):
    rows: list[Row]
    lines: int
    """The number of lines of the file up to the end of this chunk; of objects if the file is JSON of another form."""

    digest: bytes
    """The digest of these lines, then that of the way in which they were read: encoding and columns."""

    position: int
    """The offset in the file on the disk, in bytes."""


class Progress(NamedTuple):
    """The progress of an import: a row of the table `imports`."""

    lines: int = 0
    digest: bytes = b""
    """The digest of these lines."""

    imported: int = 0
    """Rows that were created or updated."""

    updated: int = 0
    unchanged: int = 0
    skipped: int = 0
    rejected: int = 0
    """Lines of the rejected rows."""

    rejects_size: int = 0
    """Bytes of the file of rejected rows at this point."""

    rejects_digest: bytes = b""
    """The digest of these bytes."""

    @property
    def rows(self) -> int:
        return self.imported + self.unchanged + self.skipped + self.rejected


COLUMNS = "lines, so_far, imported, updated, unchanged, skipped, rejected, rejects_size, rejects_digest"
"""The columns of the table `imports`, in the order of Progress."""


class Import:
    def __init__(
        self,
        resource: Resource,
        gate: Gate,
        file: str,
        reading: Reading,
        rejects: str,
        restart: bool,
        on_conflict: OnConflict = "reject",
        is_rehearsal: bool = False,
    ) -> None:
        """
        Args:
            file: The path of the file; `-` is stdin.
            reading: The format, the encoding and the columns.
            rejects: The path of the file of rejected rows; `-` is stdout.
            restart: Start at the first line, whatever the progress of an earlier import.
            on_conflict: The treatment of a row that conflicts with an existing row.
            is_rehearsal: Only find out what an import would do. Write nothing except rejected rows, if `rejects` is a
                stream.
        """
        self.resource = resource
        self.gate = gate
        self.file = file
        self.reading = reading
        self.rejects = rejects
        self.restart = restart
        self.on_conflict = on_conflict
        self.is_rehearsal = is_rehearsal
        self.noun = Lines.noun
        self.progress = Progress()
        """The progress so far, also after an exception."""

        self.reasons: list[str] = []
        """The first reasons for which rows were rejected in a rehearsal."""

    def run(self) -> tuple[Progress, int]:
        """Import the file. Return the progress at its end, and the line after which an interrupted import continued.

        Raises:
            CannotImport, DatabaseUnavailable, OSError
        """
        with open_input(self.file) as (raw, content, beginning):
            file_digest = hashlib.blake2b(beginning, digest_size=32).digest()
            source = read(self.resource, self.file, content, beginning, self.reading, print_message)
            self.noun = source.parts.noun
            with self._exclusive(file_digest) as progress:
                if not progress.lines or source.continues(progress.lines, progress.digest):
                    rejects = self._rejects(progress, raw)
                    if progress.lines:
                        print_message(f"continuing after {self.noun} {progress.lines:,}")
                    chunks = prefetch(_chunks(source, raw))
                    return self._import(progress, file_digest, chunks, rejects, raw), progress.lines
        if self.file == "-":
            raise CannotImport(
                f"an import of this input was interrupted after {self.noun} {progress.lines:,}, and the input has"
                " changed since. stdin cannot be rewound: pipe the input again, with --restart"
            )
        print_message(
            f"{self.file} has changed since its import was interrupted after {self.noun} {progress.lines:,}:"
            " starting at line 1"
        )
        self.restart = True
        return self.run()

    @contextmanager
    def _exclusive(self, file_digest: bytes) -> Iterator[Progress]:
        """Yield the stored progress of this file, under a lock that keeps out other imports of the file."""
        key = (self.resource.name, file_digest)
        lock = (OTHERS, number_of(f"import {self.resource.name} {file_digest.hex()}"))
        with self.gate.database.autocommit() as connection:
            [(is_locked,)] = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", lock).fetchall()
            if not is_locked:
                raise CannotImport("another import of this file is running: wait for its end")
            try:
                stored = connection.execute(
                    f"SELECT {COLUMNS} FROM imports WHERE (resource, begins_with) = (%s, %s)",  # noqa: S608
                    key,
                ).fetchone()
                yield Progress(*stored) if stored and not self.restart else Progress()
            finally:
                connection.deadline = None  # the deadline was that of the first statement
                with suppress(psycopg.Error):
                    connection.execute("SELECT pg_advisory_unlock(%s, %s)", lock)

    def _rejects(self, progress: Progress, raw: io.FileIO) -> Rejects | None:
        """Return the destination of rejected rows; None for a file in a rehearsal."""
        if self.is_rehearsal and not standard_stream(self.rejects):
            path = Path(self.rejects)
            if path.is_file() or not path.exists():
                return None
        return Rejects(self.rejects, progress.rejects_size, progress.rejects_digest, raw)

    def _import(
        self, progress: Progress, file_digest: bytes, chunks: Iterator[Chunk], rejects: Rejects | None, raw: io.FileIO
    ) -> Progress:
        status = os.fstat(raw.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        title = f"{'checking' if self.is_rehearsal else 'importing'} {self.resource.name}"
        self.progress = progress
        with rejects or nullcontext(), progress_bar(title, size, output=rejects.file if rejects else None) as report:
            if self.is_rehearsal:
                self._rehearse(chunks, rejects, report)
                return self.progress
            assert rejects is not None
            try:
                if self.restart:
                    self._forget(file_digest)
                for chunk in chunks:
                    with defer_signals():
                        self.progress = self._import_chunk(chunk, file_digest, rejects)
                        rejects.commit()
                    report(chunk.position, self.progress.rows)
            except BaseException:
                if self.progress.lines:
                    print_message(
                        f"{self.noun}s 1 to {self.progress.lines:,} are done; to continue after them, run the same"
                        " command again"
                    )
                raise
        self._forget(file_digest)
        if self.progress.imported >= VACUUM_AFTER_ROWS:
            vacuum(self.resource, self.gate)
        return self.progress

    def _rehearse(self, chunks: Iterator[Chunk], rejects: Rejects | None, report: Callable[[int, int], None]) -> None:
        with rehearsal(self.resource, self.gate) as rehearse:
            for chunk in chunks:
                outcome = rehearse([row for row in chunk.rows if not row.errors], self.on_conflict)
                rejected = _rejected(chunk, outcome)
                for row in rejected[: MAX_REASONS - len(self.reasons)]:
                    self.reasons.append(f"line {row.line:,}: {'; '.join(map(_sentence, row.errors))}")
                if rejects:
                    rejects.write(rejected)
                self.progress = _progress_after(chunk, self.progress, outcome, rejected)
                report(chunk.position, self.progress.rows)

    def _forget(self, file_digest: bytes) -> None:
        """Delete the progress of this file, and progress that is too old."""
        with self.gate.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM imports WHERE (resource, begins_with) = (%s, %s) OR updated_at < now() - %s::interval",
                (self.resource.name, file_digest, PROGRESS_RETENTION),
            )

    def _import_chunk(self, chunk: Chunk, file_digest: bytes, rejects: Rejects) -> Progress:
        def record(connection: Connection, outcome: Outcome) -> Progress:
            rejected = _rejected(chunk, outcome)
            size, digest = rejects.write(rejected)
            new = _progress_after(chunk, self.progress, outcome, rejected)._replace(
                rejects_size=size, rejects_digest=digest
            )
            # After the first chunk only an UPDATE: if another import of this file has ended meanwhile, the row is gone.
            places = ", ".join(["%s"] * len(new))
            stored = connection.execute(
                f"UPDATE imports SET ({COLUMNS}, updated_at) = ({places}, now())"  # noqa: S608
                " WHERE (resource, begins_with, lines) = (%s, %s, %s)"
                if self.progress.lines
                else f"INSERT INTO imports ({COLUMNS}, resource, begins_with)"
                f" SELECT {places}, %s, %s WHERE %s = 0 ON CONFLICT DO NOTHING",
                (*new, self.resource.name, file_digest, self.progress.lines),
            )
            if not stored.rowcount:
                # An import was killed during its COMMIT, which succeeded after this import had read the progress.
                raise CannotImport("an earlier import of this file was still committing: run the same command again")
            return new

        rows = [row for row in chunk.rows if not row.errors]
        return write(self.resource, self.gate, rows, self.on_conflict, record, "import")


def _rejected(chunk: Chunk, outcome: Outcome) -> list[Row]:
    """Return the rejected rows of a chunk in the order of the file."""
    return sorted([*(row for row in chunk.rows if row.errors), *outcome.refused], key=lambda row: row.line)


def _progress_after(chunk: Chunk, progress: Progress, outcome: Outcome, rejected: list[Row]) -> Progress:
    return progress._replace(
        lines=chunk.lines,
        digest=chunk.digest,
        imported=progress.imported + outcome.created + outcome.updated,
        updated=progress.updated + outcome.updated,
        unchanged=progress.unchanged + outcome.unchanged,
        skipped=progress.skipped + outcome.skipped,
        rejected=progress.rejected + sum(row.lines for row in rejected),
    )


def _sentence(error: dict[str, str]) -> str:
    return f"{error['field']} {error['detail']}".strip()


def _chunks(source: Input, raw: io.FileIO) -> Iterator[Chunk]:
    while chunk := list(itertools.islice(source.rows, CHUNK_ROWS)):
        yield Chunk(chunk, source.parts.number, source.digest(), raw.tell() if raw.seekable() else 0)
