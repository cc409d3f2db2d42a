"""Many rows at once, of every resource: `velikiy users import FILE`, `export FILE`, `seed --count N`.

What is read becomes chunks. Each is one transaction behind one fence, and keeps how far the file was read as well: so
wherever an import is broken off, it can go on, and no row is lost or comes twice. While PostgreSQL works on one chunk,
a thread makes the next one.
"""

import csv
import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import queue
import shutil
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import click
import jiter
import orjson
import psycopg
from psycopg import sql
from pydantic import ValidationError

from velikiy import outgoing, pages
from velikiy.coherence import Change, Fence
from velikiy.coherence import Path as Address
from velikiy.coherence.fence import number
from velikiy.incoming import errors_of
from velikiy.postgres import Connection, DatabaseUnavailable
from velikiy.problems import SQLSTATES
from velikiy.resource import READ_ONLY, Body, Resource
from velikiy.rows import Taken
from velikiy.settings import Settings

T = TypeVar("T")

CHUNK = 10_000
"""Rows. Each chunk empties all caches and waits for the disk once, which much smaller ones would make felt. A client
who writes a value that is in a chunk waits until it has committed: much larger ones would make that a 503."""

FEW = 1000
"""Rows of a chunk up to which only their own addresses are dropped."""

PATIENCE = 120.0
"""Seconds that PostgreSQL may take for a chunk. A request gets less, but is one row."""

LONGEST = 1 << 20
"""Bytes of one line: what has longer ones is no table, and would have to fit into memory."""

BEGINNING = 1 << 20
"""Bytes, uncompressed, by whose digest a file is recognised."""

BIG = 100_000
"""Rows after which the table is vacuumed at once: until somebody does, a count reads all of it."""

KEPT = "30 days"
"""What was broken off longer ago cannot go on: the next import that ends forgets it."""

FORMATS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}


class Unreadable(Exception):
    """A file that cannot be imported, or not any further; the text says why."""


class Row(NamedTuple):
    line: int
    """Where it begins, from 1."""

    given: Any
    """As it came."""

    values: list[Any]
    """Of the resource's fields, where there are no errors."""

    errors: list[dict[str, str]]

    def refused(self, field: str, detail: str) -> "Row":
        return self._replace(errors=[{"field": field, "detail": detail}])


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


# ---- the commands ----


def commands(resource: Resource, opened: Callable[[], AbstractContextManager[tuple[Settings, Fence]]]) -> click.Group:
    """`opened` gives a fence to work with, and says what is wrong where PostgreSQL is away."""
    form = click.option("--format", "form", type=click.Choice(["csv", "ndjson"]), help="Default: by FILE's name.")

    @click.group(resource.name, help=f"Many {resource.name} at once.")
    def group() -> None:
        pass

    @group.command("import")
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
    @form
    @click.option("--rejects", metavar="PATH", help="Where rows go that cannot be taken. Default: FILE.rejects.ndjson")
    @click.option("--restart", is_flag=True, help="Begin at the first line, though it was broken off before.")
    @click.option("--json", "as_json", is_flag=True, help="A summary for programs, on stdout.")
    def import_(file: str, form: str | None, rejects: str | None, restart: bool, as_json: bool) -> None:
        """Create what FILE has: CSV or NDJSON, which may be compressed with gzip; - is stdin.

        Exits with 0 if all rows were taken, 1 if some were not, 2 if FILE cannot be read. The same command goes on
        with what was broken off.
        """
        path = Path(rejects or ("import.rejects.ndjson" if file == "-" else f"{file}.rejects.ndjson"))
        if file != "-" and path.exists() and path.samefile(file):
            raise click.UsageError("--rejects names the file that is imported")
        began = time.monotonic()
        with _sentences(resource, "import"), opened() as (_, fence):
            state, after = Import(resource, fence, file, form, path, restart).run()
        if as_json:
            summary: dict[str, Any] = {
                "imported": state.imported,
                "rejected": state.rejected,
                "continued_after": after or None,
            }
            summary |= {"rejects": str(path) if state.rejected else None, "seconds": round(time.monotonic() - began, 3)}
            click.echo(json.dumps(summary))
        say(f"imported {state.imported:,}" + (f", rejected {state.rejected:,} → {path}" if state.rejected else ""))
        sys.exit(1 if state.rejected else 0)

    @group.command()
    @click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
    @form
    def export(file: str, form: str | None) -> None:
        """Write all of one moment into FILE, by id: CSV or NDJSON, compressed if it ends in .gz; - is stdout.

        A FILE that is there is replaced, at the end and at once.
        """
        form = form or by_name(file) or ("csv" if file == "-" else None)
        if form is None:
            raise click.UsageError(f"'{file}' does not end in .csv or .ndjson: give --format")
        with _sentences(resource, "export"), opened() as (_, fence):
            rows = export_to(resource, fence, file, form)
        say(f"exported {rows:,}")

    @group.command()
    @click.option("--count", type=click.IntRange(min=1), required=True, help="How many.")
    def seed(count: int) -> None:
        """Create some that are made up, all different, and different from those that are there."""
        with _sentences(resource, "seed"), opened() as (_, fence):
            seed_with(resource, fence, count)
        say(f"created {count:,}")

    return group


def say(text: str) -> None:
    """To the person: stdout is for data."""
    click.echo(text, err=True)


def by_name(file: str) -> str | None:
    return FORMATS.get(Path(file.lower().removesuffix(".gz")).suffix)


@contextmanager
def _sentences(resource: Resource, command: str) -> Iterator[None]:
    """What goes wrong is said in one, and the exit code tells which kind it is."""
    name = f"velikiy {resource.name} {command}"
    try:
        yield
    except KeyboardInterrupt:
        say(f"{name}: broken off")
        sys.exit(130)
    except Unreadable as error:
        say(f"{name}: {error}")
        sys.exit(2)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        say(f"{name}: the compressed file is damaged or cut off: {error}")
        sys.exit(2)
    except OSError as error:
        say(f"{name}: {': '.join(map(str, filter(None, (error.filename, error.strerror or error))))}")
        sys.exit(2)
    except psycopg.Error as error:
        _, sentence = SQLSTATES.get(error.sqlstate or "", ("", f"PostgreSQL refuses it ({error.sqlstate})."))
        sys.exit(f"{name}: {sentence}")


# ---- import ----


class Import:
    def __init__(
        self, resource: Resource, fence: Fence, file: str, form: str | None, rejects: Path, restart: bool
    ) -> None:
        """`file`: `-` is stdin; `rejects`: where rows go that cannot be taken; `restart`: at the first line."""
        self.resource = resource
        self.fence = fence
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
            rows = READERS[self.form or by_name(self.file) or _by_content(beginning)](self.resource, lines)
            with self._alone(digest) as state:
                if not state.lines or lines.skip(state.lines) == state.so_far:
                    if state.lines:
                        say(f"continuing after line {state.lines:,}")
                    return self._go_on(state, digest, ahead(chunks(rows, lines, raw)), raw), state.lines
        if self.file == "-":
            raise Unreadable(
                f"this was broken off after line {state.lines:,}, and has changed since; what has passed on stdin is"
                " gone: give it once more, with --restart"
            )
        say(f"{self.file} was broken off after line {state.lines:,}, and has changed since: starting anew")
        self.restart = True
        return self.run()

    @contextmanager
    def _alone(self, digest: bytes) -> Iterator[State]:
        """What is known of this file; nobody else imports it meanwhile."""
        which = (self.resource.name, digest)
        lock = number(Address(f"import {self.resource.name} {digest.hex()}", ""))
        with self.fence.database.autocommit() as connection:
            if not _fetch(connection, "SELECT pg_try_advisory_lock(%s)", lock)[0]:
                raise Unreadable("this file is being imported at the moment")
            try:
                if self.restart:
                    connection.execute("DELETE FROM imports WHERE (resource, begins_with) = (%s, %s)", which)
                found = connection.execute(
                    "SELECT lines, so_far, imported, rejected, rejects_size FROM imports"
                    " WHERE (resource, begins_with) = (%s, %s)",
                    which,
                ).fetchone()
                yield State(*found) if found else State()
            finally:
                connection.deadline = None  # of the beginning; this is the end
                with suppress(psycopg.Error):
                    connection.execute("SELECT pg_advisory_unlock(%s)", (lock,))

    def _go_on(self, state: State, digest: bytes, chunks: Iterator[Chunk], raw: io.FileIO) -> State:
        file = os.fstat(raw.fileno())
        size = file.st_size if stat.S_ISREG(file.st_mode) else None
        try:
            with Rejects(self.rejects, state) as rejects, shown(f"importing {self.resource.name}", size) as report:
                for chunk in chunks:
                    with to_the_end():
                        state = self._take(chunk, state, digest, rejects)
                    report(chunk.position, state.imported + state.rejected)
        except BaseException:
            if state.lines:
                say(f"what was imported up to line {state.lines:,} stays; the same command goes on after it")
            raise
        with self.fence.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM imports WHERE (resource, begins_with) = (%s, %s) OR updated_at < now() - %s::interval",
                (self.resource.name, digest, KEPT),
            )
        if state.imported >= BIG:
            vacuum(self.resource, self.fence)
        return state

    def _take(self, chunk: Chunk, state: State, digest: bytes, rejects: "Rejects") -> State:
        def keep(connection: Connection, refused: list[Row]) -> State:
            rejected = sorted([*(row for row in chunk.rows if row.errors), *refused], key=lambda row: row.line)
            new = State(
                chunk.lines,
                chunk.so_far,
                state.imported + len(chunk.rows) - len(rejected),
                state.rejected + len(rejected),
                rejects.write(rejected),
            )
            kept = connection.execute(
                "INSERT INTO imports (resource, begins_with, lines, so_far, imported, rejected, rejects_size)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (resource, begins_with) DO UPDATE"
                " SET (lines, so_far, imported, rejected, rejects_size, updated_at) = (excluded.lines, excluded.so_far,"
                " excluded.imported, excluded.rejected, excluded.rejects_size, now()) WHERE imports.lines = %s",
                (self.resource.name, digest, *new, state.lines),
            )
            if not kept.rowcount:
                # An import that was killed while it committed: its COMMIT came through after we had looked.
                raise Unreadable("an earlier import of this file had not ended yet; the same command goes on after it")
            return new

        new = write(self.resource, self.fence, [row for row in chunk.rows if not row.errors], keep)
        rejects.size = new.rejects_size
        return new


class Rejects:
    """The file of rows that could not be taken, one JSON object a line; none is left where there are none."""

    def __init__(self, path: Path, state: State) -> None:
        """What it has beyond the state is of a chunk that was not committed.

        Raises:
            Unreadable: it cannot be written.
        """
        self.path = path
        try:
            self.file = path.open("ab")  # now, and not when half of the rows are in
        except OSError as error:
            raise Unreadable(
                f"{path}: {error.strerror}; --rejects names another place for rows that cannot be taken"
            ) from None
        self.regular = stat.S_ISREG(os.fstat(self.file.fileno()).st_mode)
        self.size = min(state.rejects_size, os.fstat(self.file.fileno()).st_size)
        if self.regular and self.size < state.rejects_size:
            say(f"{path} does not have the rows any more that were rejected before")

    def __enter__(self) -> "Rejects":
        if self.regular:
            self.file.truncate(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        with self.file:
            empty = self.regular and not os.fstat(self.file.fileno()).st_size
        if empty:
            self.path.unlink(missing_ok=True)

    def write(self, rows: Sequence[Row]) -> int:
        """Behind those of the chunks that are committed; how large the file is then."""
        if not rows:
            return self.size
        if self.regular:
            self.file.truncate(self.size)
        size = self.size
        for row in rows:
            size += self.file.write(orjson.dumps({"line": row.line, "errors": row.errors, "row": row.given}) + b"\n")
        self.file.flush()
        if self.regular:
            os.fsync(self.file.fileno())  # PostgreSQL is about to promise that they are there
        return size


def chunks(rows: Iterator[Row], lines: "Lines", raw: io.FileIO) -> Iterator[Chunk]:
    while some := list(itertools.islice(rows, CHUNK)):
        yield Chunk(some, lines.number, lines.so_far(), raw.tell() if raw.seekable() else 0)


def ahead(made: Iterable[T]) -> Iterator[T]:
    """The same, made by a thread while the one before is at work; one waits, and no more."""
    waiting: queue.Queue[T | BaseException | None] = queue.Queue(1)

    def make() -> None:
        try:
            for one in made:
                waiting.put(one)
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    gc.freeze()  # what is imported stays: else Python looks through all of it again and again, for a fifth of the time
    # A daemon: it may be reading from a pipe that stays silent when somebody has had enough.
    threading.Thread(target=make, daemon=True).start()
    while (one := waiting.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        yield one


@contextmanager
def to_the_end() -> Iterator[None]:
    """Ctrl-C waits until the block is through; the second one does not."""
    asked = False

    def later(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


# ---- what is read ----


@contextmanager
def content(file: str) -> Iterator[tuple[io.FileIO, io.BufferedReader, bytes]]:
    """The file, what is in it when it is uncompressed, and how that begins."""
    with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as raw:
        magic, whole = _peeked(raw, 2)
        beginning, whole = _peeked(gzip.GzipFile(fileobj=whole) if magic == b"\x1f\x8b" else whole, BEGINNING)
        if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise Unreadable("it is UTF-16, and has to be UTF-8: iconv -f utf-16 -t utf-8")
        yield raw, whole, beginning


def _peeked(stream: Any, size: int) -> tuple[bytes, io.BufferedReader]:
    """Its first bytes, and all of it: a pipe cannot be wound back."""
    beginning = b""
    while len(beginning) < size and (more := stream.read(size - len(beginning))):
        beginning += more
    return beginning, io.BufferedReader(_Joined(io.BytesIO(beginning), stream), 1 << 17)


class _Joined(io.RawIOBase):
    def __init__(self, *streams: Any) -> None:
        self.streams = list(streams)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.streams:
            if size := self.streams[0].readinto(buffer):
                return int(size)
            del self.streams[0]
        return 0


def _by_content(beginning: bytes) -> str:
    first = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        raise Unreadable("it is a JSON array; NDJSON has one object on each line: jq -c '.[]'")
    return "ndjson" if first == b"{" else "csv"


class Lines:
    """The lines of a text, counted, and with a digest of all that was read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._digest = hashlib.blake2b(digest_size=32)
        self.number = 0
        """Of the last one, from 1."""

        self.flaw = ""
        """Why one is no text; to be reset by whoever has read it."""

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._read()
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # Excel marks UTF-8 so
        if b"\0" in line:
            self.flaw = f"line {self.number} holds a NUL byte"
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.flaw = f"line {self.number} is not UTF-8 (byte 0x{line[error.start]:02x})"
            return line.decode(errors="replace")

    def _read(self) -> bytes:
        line = self._stream.readline(LONGEST)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == LONGEST and line[-1:] != b"\n":
            raise Unreadable(f"line {self.number:,} is longer than {LONGEST:,} bytes")
        self._digest.update(line)
        return line

    def so_far(self) -> bytes:
        return self._digest.digest()

    def skip(self, to: int) -> bytes:
        """The digest up to this line, or to the end of a shorter file."""
        with suppress(StopIteration):
            while self.number < to:
                self._read()
        return self.so_far()


def _csv(resource: Resource, lines: Lines) -> Iterator[Row]:
    first = next(lines, "")
    if lines.flaw:
        raise Unreadable(lines.flaw)
    # No name of a column has one of these, so the one that is there separates: Excel takes ; in half of Europe.
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise Unreadable(f"line 1 is not CSV: {error}") from None
    optional = {name for name, field in resource.new.model_fields.items() if not field.is_required()}
    for name in header:
        if name not in resource.columns:
            raise Unreadable(
                f"line 1 has to name the columns, and {resource.name} have no {name!r}; they have "
                f"{', '.join(resource.fields)} (and {', '.join(READ_ONLY)}, which are left aside)"
            )
        if header.count(name) > 1:
            raise Unreadable(f"line 1 names the column {name} twice")
    if lacking := [name for name in resource.fields if name not in header and name not in optional]:
        raise Unreadable(f"line 1 has to name the columns, and does not name {', '.join(lacking)}")
    return _csv_rows(resource, lines, reader, header, optional)


def _csv_rows(resource: Resource, lines: Lines, reader: Any, header: list[str], optional: set[str]) -> Iterator[Row]:
    while True:
        line, lines.flaw = lines.number + 1, ""
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f" (up to line {lines.number})" if lines.number > line else ""
            yield Row(line, None, [], []).refused("", f"is not CSV: {error}{until}")
            continue
        if lines.flaw:
            yield Row(line, values, [], []).refused("", lines.flaw)
        elif values and len(values) != len(header):
            detail = f"has {len(values)} values, and the columns are {len(header)}"
            yield Row(line, values, [], []).refused("", detail)
        elif values:
            given = dict(zip(header, values, strict=True))
            sent = {name: value for name, value in given.items() if value or name not in optional}
            yield _row(resource, line, given, partial(resource.new.model_validate_strings, sent, strict=False))


def _ndjson(resource: Resource, lines: Lines) -> Iterator[Row]:
    for text in lines:
        flaw, lines.flaw = lines.flaw, ""
        sent = text.encode()
        if not sent.strip():
            continue
        try:
            jiter.from_json(sent, catch_duplicate_keys=True, allow_inf_nan=False)
        except ValueError as error:
            yield Row(lines.number, text, [], []).refused("", flaw or f"is not JSON: {error}")
            continue
        yield _row(
            resource, lines.number, orjson.Fragment(sent.strip()), partial(resource.new.model_validate_json, sent)
        )


READERS: dict[str, Callable[[Resource, Lines], Iterator[Row]]] = {"csv": _csv, "ndjson": _ndjson}


def _row(resource: Resource, line: int, given: Any, validated: Callable[[], Body]) -> Row:
    try:
        values = validated().model_dump()
    except ValidationError as error:
        return Row(line, given, [], errors_of(error))
    return Row(line, given, [values[field] for field in resource.fields], [])


# ---- what is written ----


def write(resource: Resource, fence: Fence, rows: list[Row], keep: Callable[[Connection, list[Row]], T]) -> T:
    """Insert these rows in one transaction; `keep` gets those that are refused, with their errors, and may do in the
    same transaction what belongs to it.

    Raises:
        DatabaseUnavailable: the outcome is unknown.
    """

    def change(connection: Connection) -> Change[T]:
        connection.deadline = time.monotonic() + PATIENCE
        connection.execute("SELECT set_config('statement_timeout', %s, true)", (f"{PATIENCE:.0f}s",))
        made, refused = _insert(connection, resource, rows) if rows else ([], [])
        outcome = keep(connection, refused)
        if len(refused) == len(rows):
            return Change(outcome)
        # Lists, counts, and 404s that are stored of the new ids: of so many, edges drop everything anyway.
        return Change(outcome, resource.touched_by(*made) if len(rows) <= FEW else None)

    again = 3
    while True:
        try:
            return fence.write(change)
        except DatabaseUnavailable as error:
            # Of two writers who wait for each other PostgreSQL ends one, and this one can begin again.
            again -= 1
            if not again or not isinstance(error.__cause__, psycopg.errors.DeadlockDetected):
                raise


def _insert(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    """The ids of those that were made, where they are FEW, and the others."""
    if len(rows) > FEW:
        # Nothing is faster, and mostly there is nothing to refuse. Where there is, it ends at the first one.
        with suppress(psycopg.IntegrityError, psycopg.DataError), connection.transaction():
            _copy(connection, resource.name, resource.fields, (row.values for row in rows))
            return [], []
    try:
        with connection.transaction():
            return _insert_at_once(connection, resource, rows)
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        if len(rows) == 1:
            _, detail = SQLSTATES.get(error.sqlstate or "22021", ("", "PostgreSQL does not take it."))
            return [], [rows[0].refused("", detail)]
    # PostgreSQL does not say which one it is.
    half = len(rows) // 2
    made, refused = _insert(connection, resource, rows[:half])
    more_made, more_refused = _insert(connection, resource, rows[half:])
    return made + more_made, refused + more_refused


def _insert_at_once(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    names = {
        "table": sql.Identifier(resource.name),
        "new": sql.Identifier(f"new_{resource.name}"),
        "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
    }
    connection.execute(
        sql.SQL(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {new} ON COMMIT DELETE ROWS AS"
            " SELECT 0 AS place, {fields} FROM {table} WITH NO DATA"
        ).format(**names)
    )
    connection.execute(sql.SQL("DELETE FROM {new}").format(**names))
    _copy(
        connection,
        f"new_{resource.name}",
        ("place", *resource.fields),
        ([n, *row.values] for n, row in enumerate(rows)),
    )
    # The ids are taken first: by them it shows which row is which, and a unique index may be of an expression.
    done = connection.execute(
        sql.SQL(
            """
            WITH numbered AS MATERIALIZED (
                SELECT nextval((SELECT pg_get_serial_sequence(%(name)s, 'id')::regclass)) AS id, sorted.*
                FROM (SELECT * FROM {new} ORDER BY place) sorted
            ), made AS (
                INSERT INTO {table} (id, {fields}) OVERRIDING SYSTEM VALUE SELECT id, {fields} FROM numbered
                ON CONFLICT DO NOTHING RETURNING id
            )
            SELECT place, id, id IN (SELECT id FROM made) AS made FROM numbered
            WHERE %(all)s OR id NOT IN (SELECT id FROM made) ORDER BY place
            """
        ).format(**names),
        {"name": resource.name, "all": len(rows) <= FEW},
    ).fetchall()
    taken = [rows[place] for place, _, made in done if not made]
    return [id_ for _, id_, made in done if made], [_taken(resource, row) for row in taken]


def _copy(connection: Connection, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _taken(resource: Resource, row: Row) -> Row:
    """ON CONFLICT does not say which index it was."""
    problem = outgoing.refused(resource, Taken(" or ".join(resource.unique.values())))
    return row._replace(errors=problem.errors or [])


def seed_with(resource: Resource, fence: Fence, count: int) -> None:
    """Raises: DatabaseUnavailable"""
    with fence.database.autocommit() as connection:
        # A row has an id that is no less than its number here, so what comes after the last id is new.
        (first,) = _fetch(
            connection, sql.SQL("SELECT coalesce(max(id), 0) + 1 FROM {}").format(sql.Identifier(resource.name))
        )
    made = 0
    try:
        with shown(f"creating {resource.name}", count) as report:
            while made < count:
                numbers = iter(range(first, first := first + count - made))
                for rows in ahead(_samples(resource, numbers)):
                    with to_the_end():
                        made += len(rows) - write(resource, fence, rows, lambda _, refused: len(refused))
                    report(made, made)
    except BaseException:
        if made:
            say(f"{made:,} were created, and stay")
        raise
    if made >= BIG:
        vacuum(resource, fence)


def _samples(resource: Resource, numbers: Iterator[int]) -> Iterator[list[Row]]:
    def row(n: int) -> Row:
        given = resource.sample(n)
        return _row(resource, n, given, partial(resource.new.model_validate, given))

    while some := [row(n) for n in itertools.islice(numbers, CHUNK)]:
        yield some


def vacuum(resource: Resource, fence: Fence) -> None:
    """Not waiting for its turn: PostgreSQL's own comes some minutes later."""
    with suppress(DatabaseUnavailable, psycopg.Error, KeyboardInterrupt), fence.database.autocommit() as connection:
        connection.deadline = math.inf
        connection.execute("SET statement_timeout = 0")
        connection.execute(sql.SQL("VACUUM (ANALYZE, SKIP_LOCKED) {}").format(sql.Identifier(resource.name)))


# ---- export ----


def export_to(resource: Resource, fence: Fence, file: str, form: str) -> int:
    """How many rows there were.

    Raises:
        DatabaseUnavailable, OSError
    """
    names = {"columns": pages.columns(resource), "table": sql.Identifier(resource.name)}
    rows = sql.SQL("SELECT {columns} FROM {table} ORDER BY id").format(**names)
    if form == "csv":
        statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv, HEADER, ENCODING 'UTF8')").format(rows)
    else:
        # JSON has no control characters, so nothing is quoted, and it comes as the API has it.
        statement = sql.SQL(
            "COPY (SELECT row_to_json(r)::text FROM ({}) r)"
            r" TO STDOUT (FORMAT csv, QUOTE e'\x01', DELIMITER e'\x02', ENCODING 'UTF8')"
        ).format(rows)
    written = 0
    with target(file) as out, fence.database.transaction() as connection:
        connection.execute("SET LOCAL statement_timeout = 0")
        (about,) = _fetch(connection, "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", resource.name)
        with (
            shown(f"exporting {resource.name}", about if about > 0 else None, beside=out) as report,
            connection.cursor().copy(statement) as copy,
        ):
            for written, row in enumerate(copy, start=0 if form == "csv" else 1):
                out.write(row)
                connection.deadline = time.monotonic() + PATIENCE
                if not written % CHUNK:
                    report(written, written)
    return written


@contextmanager
def target(file: str) -> Iterator[IO[bytes]]:
    """A new file that takes its place when the block ends well; stdout, and what is no file, as it is."""
    if file == "-":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us, as it does cat
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file).resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part") if path.is_file() or not path.exists() else path
    try:
        with beside.open("wb") as out:
            if file.endswith(".gz"):
                with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=6) as compressed:
                    yield compressed  # type: ignore[misc]
            else:
                yield out
            if beside != path:
                out.flush()
                os.fsync(out.fileno())
        if beside != path:
            if path.exists():
                shutil.copymode(path, beside)
            beside.replace(path)
    finally:
        if beside != path:
            beside.unlink(missing_ok=True)


# ---- small things ----


@contextmanager
def shown(what: str, whole: int | None, *, beside: IO[bytes] | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if stderr is one, and what comes `beside` does not go there too. It is told how far it is,
    in the unit of the whole, and rows up to there."""
    if not sys.stderr.isatty() or (beside is sys.stdout.buffer and sys.stdout.isatty()):
        yield lambda done, rows: None
        return
    from rich import progress
    from rich.console import Console

    columns = ("{task.description}", progress.BarColumn(), "{task.fields[rows]:,} rows, {task.fields[rate]:,.0f}/s,")
    with progress.Progress(*columns, progress.TimeRemainingColumn(), "left", console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=whole, rows=0, rate=0.0)
        began: list[float] = []

        def report(done: int, rows: int) -> None:
            began[:] = began or [time.monotonic(), rows]  # an import that goes on has rows from before
            seconds = time.monotonic() - began[0]
            bar.update(task, completed=done, rows=rows, rate=(rows - began[1]) / seconds if seconds else 0.0)

        yield report


def _fetch(connection: Connection, statement: Any, *values: Any) -> tuple[Any, ...]:
    row = connection.execute(statement, values).fetchone()
    assert row is not None  # what is asked for here always gives a row
    return row
