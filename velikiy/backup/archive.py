"""An archive: a file that pg_dump has made in its custom format.

pg_restore turns it into SQL, of which only the rows (COPY) and the positions of sequences are used. So no statement of
a file is carried out, and the schema of the tables is always the schema that this version of the code has made.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from velikiy.postgres import client_programs
from velikiy.postgres.migrate import VERSION_TABLE

MAGIC = b"PGDMP"

NAME = rb'(?:"(?:[^"]|"")+"|[^",.() ]+)'
HEADER = re.compile(rb"COPY (%b)\.(%b) \((.*)\) FROM stdin;\n" % (NAME, NAME))
SETVAL = re.compile(rb"SELECT pg_catalog\.setval\('(%b)\.(%b)', (-?\d+), (true|false)\);\n" % (NAME, NAME))

BLOCK_BYTES = 256 * 1024

OTHER_KINDS = {
    b"\x1f\x8b": "is compressed. Unpack it first: gunzip FILE.gz",
    b"\xfd7zXZ": "is compressed. Unpack it first: unxz FILE.xz",
    b"\x28\xb5\x2f\xfd": "is compressed. Unpack it first: unzstd FILE.zst",
    b"BZh": "is compressed. Unpack it first: bunzip2 FILE.bz2",
    b"age-encryption": "is encrypted. Decrypt it first with age",
    b"-- \n-- PostgreSQL": "is a dump of pg_dump as SQL. Run it with psql in an empty database",
    b"--\n-- PostgreSQL": "is a dump of pg_dump as SQL. Run it with psql in an empty database",
}
"""Files that are taken for backups, by their beginning."""


class BadArchive(Exception):
    """The file cannot be used. The text is a sentence for the operator."""


class Section(NamedTuple):
    """The rows of a table."""

    table: str
    columns: tuple[str, ...]
    rows: Iterator[bytes]
    """Blocks of complete lines in the text format of COPY. Read all of them before the next section."""


class Archive:
    def __init__(self, file: Path, *, shown: str = "", descriptor: int | None = None) -> None:
        """
        Args:
            file: The path.
            shown: The name of the file in messages.
            descriptor: The open file, if it has another name yet.

        Raises:
            BadArchive
            OSError
        """
        self.file = file
        self.shown = shown or str(file)
        self._descriptor = descriptor
        self._path = str(file) if descriptor is None else f"/dev/fd/{descriptor}"
        with Path(self._path).open("rb") as opened:
            _check_beginning(self.shown, opened.read(32))
        self.schema, self.revision = self._version()
        self.sequences: dict[str, int] = {}
        """The last value of each sequence that a section read so far belongs to."""

    def sections(self, tables: Sequence[str]) -> Iterator[Section]:
        """Read the rows of these tables and the positions of these sequences, one section after the other. Without
        names, read everything.

        Raises:
            BadArchive: The file is damaged. Rows that were read before are no complete table.
        """
        with self._sql(tables) as lines:
            for line in lines:
                if (found := SETVAL.fullmatch(line)) and _name(found[1]) == self.schema:
                    self.sequences[_name(found[2])] = int(found[3]) if found[4] == b"true" else int(found[3]) - 1
                if not (found := HEADER.fullmatch(line)):
                    continue
                columns = tuple(map(_name, re.findall(NAME, found[3])))
                rows = self._rows(lines)
                if _name(found[1]) == self.schema:
                    yield Section(_name(found[2]), columns, rows)
                for _ in rows:  # of another schema
                    pass

    def _rows(self, lines: IO[bytes]) -> Iterator[bytes]:
        block: list[bytes] = []
        size = 0
        for line in lines:
            if line == b"\\.\n":
                if block:
                    yield b"".join(block)
                return
            block.append(line)
            size += len(line)
            if size >= BLOCK_BYTES:
                yield b"".join(block)
                block, size = [], 0
        raise BadArchive(f"{self.shown} is damaged: a table ends too early")

    def _version(self) -> tuple[str, str]:
        """Return the schema of the service's tables, and the revision that they have."""
        with self._sql([VERSION_TABLE]) as lines:
            for line in lines:
                if found := HEADER.fullmatch(line):
                    rows = b"".join(self._rows(lines)).decode().splitlines()
                    columns = [*map(_name, re.findall(NAME, found[3]))]
                    if len(rows) == 1 and "version_num" in columns:
                        return _name(found[1]), rows[0].split("\t")[columns.index("version_num")]
        raise BadArchive(
            f"{self.shown} is no backup of this service: it lacks the table {VERSION_TABLE}. Give a file that velikiy"
            " backup or pg_dump --format=custom has made of the database of the service"
        )

    @contextmanager
    def _sql(self, tables: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield the output of pg_restore.

        Raises:
            BadArchive
        """
        names = [f"--table={table}" for table in tables]
        command = [client_programs.find("pg_restore"), "--data-only", "--file=-", *names, self._path]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            pass_fds=() if self._descriptor is None else (self._descriptor,),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process:
            try:
                yield process.stdout
                process.stdout.read()  # nothing, unless the reader has stopped earlier
            except BadArchive as error:
                process.kill()
                raise self._damaged(process.stderr.read()) or error from None
            except BaseException:
                process.kill()
                raise
            complaint = process.stderr.read()
        if process.returncode:
            raise self._damaged(complaint) or BadArchive(f"{self.shown} is damaged")

    def _damaged(self, complaint: bytes) -> BadArchive | None:
        """Return the error for this output of pg_restore."""
        reason = complaint.decode(errors="replace").strip().rpartition("pg_restore: error: ")[2]
        if not reason:
            return None
        if "unsupported version" in reason:
            return BadArchive(f"{self.shown} was made by a newer pg_dump. Install a newer postgresql-client ({reason})")
        return BadArchive(f"{self.shown} is damaged: {reason}")


def _check_beginning(file: str, beginning: bytes) -> None:
    if beginning.startswith(MAGIC):
        return
    if not beginning:
        raise BadArchive(f"{file} is empty")
    for kind, sentence in OTHER_KINDS.items():
        if beginning.startswith(kind):
            raise BadArchive(f"{file} {sentence}")
    raise BadArchive(f"{file} is no backup: it was not made by velikiy backup or pg_dump --format=custom")


def _name(written: bytes) -> str:
    """Return a name as the catalogs have it."""
    name = written.decode()
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
