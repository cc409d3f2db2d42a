"""The file of rejected rows. An import writes into the file that it has made, and into no other."""

import fcntl
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NoReturn

import jiter
import orjson

from velikiy.bulk.atomic_file import copy_mode, standard_stream
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.parts import MAX_LINE_BYTES
from velikiy.bulk.progress import print_message
from velikiy.bulk.readers import Row, is_reject
from velikiy.bulk.signals import defer_signals

MAX_REJECT_BYTES = 16 * MAX_LINE_BYTES
"""JSON may write a byte as six, and an unclosed quote makes several lines one row."""

BLOCK_BYTES = 1 << 20

FIRST_BYTES = b'{"line":'
"""The beginning of a row."""


class Rejects:
    """Rejected rows, one JSON object a line.

    An import writes into a file that it creates, or that it has written before its interruption. A file with rejected
    rows of another import is kept under another name, and any other content is refused. A new file that stays empty is
    removed at the end. Rows are appended to a stream (a FIFO, a terminal, stdout).
    """

    def __init__(self, path: str, size: int, digest: bytes, source: io.FileIO) -> None:
        """
        Args:
            size: Bytes of the rows that this import has committed before. The file may contain more, from a chunk that
                was not committed.
            digest: The digest of these bytes.
            source: The file that is imported.

        Raises:
            CannotImport: The file must not be written, or cannot be written. Nothing was changed.
        """
        self.path = path
        self.size = size
        self._digest = digest
        self._hash = hashlib.blake2b(digest_size=32)
        self._written = self.size, self._hash
        try:  # now, and not after half of the rows were imported
            stream = standard_stream(path)
            descriptor, self.is_new = (os.dup(stream.fileno()), False) if stream else _open(path)
        except OSError as error:
            raise self._unusable(error) from None
        self.file = io.FileIO(descriptor, "w")
        # Everything else is read from the descriptor, because the path may name another file by now.
        status = os.fstat(descriptor)
        self.is_regular = stat.S_ISREG(status.st_mode) and not stream
        beginning = os.pread(descriptor, MAX_REJECT_BYTES, 0) if self.is_regular else b""
        if stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(source.fileno())):
            self._refuse("is the file to import:")
        if beginning and not _is_reject_line(beginning.partition(b"\n")[0]):
            self._refuse("does not begin with a rejected row, so it is not overwritten: move it away, or")
        if self.is_regular and not self._lock():
            self._refuse("is in use by another import: wait for its end, or")

    def _unusable(self, error: OSError) -> CannotImport:
        return CannotImport(
            f"{self.path}: {error.strerror or error}; choose another file for rejected rows with --rejects"
        )

    def _refuse(self, reason: str) -> NoReturn:
        self.file.close()
        raise CannotImport(f"{self.path} {reason} choose another file with --rejects")

    def _lock(self) -> bool:
        """Lock the file until it is closed. Return False if another import holds the lock, or has removed or renamed
        the file."""
        descriptor = self.file.fileno()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
        with suppress(FileNotFoundError):
            return os.path.samestat(Path(self.path).stat(), os.fstat(descriptor))
        return False

    def __enter__(self) -> "Rejects":
        if self.is_regular:
            if self._contains_committed_rows():
                self.file.truncate(self.size)
            else:
                if self.size:
                    print_message(f"{self.path} does not contain the rows that were rejected before the interruption")
                self.size, self._hash = 0, hashlib.blake2b(digest_size=32)
                if os.fstat(self.file.fileno()).st_size:
                    with defer_signals():
                        self._keep_rows_of_another_import()
        return self

    def _contains_committed_rows(self) -> bool:
        """Return whether the file contains the rows that this import has committed, and nothing else except rows of a
        chunk that was not committed."""
        remaining = self.size
        with open(self.file.fileno(), "rb", closefd=False) as content:
            content.seek(0)
            while remaining and (block := content.read(min(BLOCK_BYTES, remaining))):
                self._hash.update(block)
                remaining -= len(block)
            if not self.size or remaining or self._hash.digest() != self._digest:
                return False
            while line := content.readline(MAX_REJECT_BYTES):
                if not (_is_reject_line(line) or (line.startswith(FIRST_BYTES) and not line.endswith(b"\n"))):
                    return False
        return True

    def _keep_rows_of_another_import(self) -> None:
        """Rename the file, and continue with a new file that has its mode.

        Raises:
            CannotImport: The folder cannot be written. Nothing was changed.
        """
        try:
            path = Path(self.path).resolve(strict=True)
            kept = _reserve_name_beside(path)
            path.rename(kept)
            descriptor, self.is_new = _open(str(path))
        except OSError as error:
            raise self._unusable(error) from None
        copy_mode(descriptor, kept)
        earlier, self.file = self.file, io.FileIO(descriptor, "w")
        with earlier:  # its lock is held until the new file is locked
            if not self._lock():
                self._refuse("is in use by another import: wait for its end, or")
        print_message(f"kept the rejected rows of another import as {kept}")

    def __exit__(self, *_: object) -> None:
        with defer_signals(), self.file, suppress(OSError):
            status = os.fstat(self.file.fileno())
            removable = self.is_regular and self.is_new and not status.st_size
            if removable and os.path.samestat(Path(self.path).lstat(), status):
                Path(self.path).unlink()  # while the lock is still held

    def write(self, rows: Sequence[Row]) -> tuple[int, bytes]:
        """Append these rows after the committed rows. Return the new size of the file and the digest of its content.

        The call comes before the COMMIT, so no row is lost. A retried transaction sends its rows twice to a stream.
        """
        if self.is_regular:
            self.file.truncate(self.size)
        text = b"".join(map(json_line, rows))
        try:
            unwritten = memoryview(text)
            while unwritten:
                unwritten = unwritten[os.write(self.file.fileno(), unwritten) :]
            if text and self.is_regular:
                os.fsync(self.file.fileno())  # the COMMIT acknowledges these rows
        except BaseException as error:
            if self.is_regular:
                with suppress(OSError):
                    self.file.truncate(self.size)  # after half a row the file would not count as rejected rows
            if isinstance(error, OSError):
                error.filename = self.path
            raise
        if not self.is_regular:
            return self.size, self._digest
        extended = self._hash.copy()
        extended.update(text)
        self._written = self.size + len(text), extended
        return self._written[0], extended.digest()

    def commit(self) -> None:
        """Take the rows that were written last as committed."""
        if self.is_regular:
            self.size, self._hash = self._written


def json_line(row: Row) -> bytes:
    """Return a rejected row as a line of the file of rejected rows."""
    return orjson.dumps({"line": row.line, "errors": row.errors, "row": row.given}) + b"\n"


def _open(path: str) -> tuple[int, bool]:
    """Return a descriptor, and True if the file was created. An existing file is not changed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        existing = Path(path)
        if existing.exists() and not existing.is_file():
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), False
        # With O_CREAT the kernel refuses a file that another user has prepared in /tmp (fs.protected_regular).
        return os.open(path, flags, 0o600), False
    with suppress(OSError):  # a file system without modes
        os.fchmod(descriptor, 0o600)  # the umask may have removed rights
    return descriptor, True


def _reserve_name_beside(path: Path) -> Path:
    """Create an empty file with a free name, such as people.csv.rejects.1.ndjson, which a rename may replace."""
    for n in count(1):
        name = path.with_name(f"{path.stem}.{n}{path.suffix}")
        with suppress(FileExistsError):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return name
    raise AssertionError("numbers do not end")


def _is_reject_line(line: bytes) -> bool:
    try:
        return is_reject(jiter.from_json(line))
    except ValueError:
        return False
