"""The file of rejected rows. An import replaces rejected rows of an earlier import there, and nothing else."""

import fcntl
import io
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import jiter
import orjson

from velikiy.bulk.atomic_file import standard_stream
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.parts import MAX_LINE_BYTES
from velikiy.bulk.progress import print_message
from velikiy.bulk.readers import Row
from velikiy.bulk.signals import defer_signals

MEMBERS = {"line", "errors", "row"}

MAX_REJECT_BYTES = 16 * MAX_LINE_BYTES
"""JSON may write a byte as six, and an unclosed quote makes several lines one row."""


class Rejects:
    """Rejected rows, one JSON object a line.

    A file is *owned* if the import created it, or if it begins with a rejected row. An owned file without rows is
    removed at the end. Rows are appended to a stream (a FIFO, a terminal, stdout).
    """

    def __init__(self, path: str, size: int, source: io.FileIO) -> None:
        """
        Args:
            size: Bytes of the rows whose chunks were committed. The file may contain more, from a chunk that was not.
            source: The file that is imported.

        Raises:
            CannotImport: The file is not owned, or cannot be written. Nothing was changed.
        """
        self.path = path
        self.size = size
        try:  # now, and not after half of the rows were imported
            stream = standard_stream(path)
            descriptor, created = (os.dup(stream.fileno()), False) if stream else _open(path)
        except OSError as error:
            raise CannotImport(
                f"{path}: {error.strerror or error}; choose another file for rejected rows with --rejects"
            ) from None
        self.file = io.FileIO(descriptor, "w")
        # Everything else is read from the descriptor, because the path may name another file by now.
        status = os.fstat(descriptor)
        self.is_regular = stat.S_ISREG(status.st_mode) and not stream
        beginning = os.pread(descriptor, MAX_REJECT_BYTES, 0) if self.is_regular else b""
        self.is_owned = created or _is_reject(beginning.partition(b"\n")[0])
        if stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(source.fileno())):
            self._refuse("is the file to import:")
        if beginning and not self.is_owned:
            self._refuse("does not begin with a rejected row, so it is not overwritten: move it away, or")
        if self.is_regular and not _lock(descriptor):
            self._refuse("is in use by another import: wait for its end, or")

    def _refuse(self, reason: str) -> NoReturn:
        self.file.close()
        raise CannotImport(f"{self.path} {reason} choose another file with --rejects")

    def __enter__(self) -> "Rejects":
        if self.is_regular:
            size = min(self.size, os.fstat(self.file.fileno()).st_size)
            while size and os.pread(self.file.fileno(), 1, size - 1) != b"\n":
                size -= 1  # the last row is incomplete
            if size < self.size:
                print_message(f"{self.path} no longer contains the rows that were rejected before the interruption")
            self.size = self.file.truncate(size)
        return self

    def __exit__(self, *_: object) -> None:
        with defer_signals(), self.file, suppress(OSError):
            status = os.fstat(self.file.fileno())
            removable = self.is_regular and self.is_owned and not status.st_size
            if removable and os.path.samestat(Path(self.path).lstat(), status):
                Path(self.path).unlink()  # while the lock is still held

    def write(self, rows: Sequence[Row]) -> int:
        """Append these rows after the committed rows, and return the new size of the file.

        The call comes before the COMMIT, so no row is lost. A retried transaction sends its rows twice to a stream.
        """
        if self.is_regular:
            self.file.truncate(self.size)
        if not rows:
            return self.size
        text = b"".join(map(_json_line, rows))
        try:
            unwritten = memoryview(text)
            while unwritten:
                unwritten = unwritten[os.write(self.file.fileno(), unwritten) :]
            if self.is_regular:
                os.fsync(self.file.fileno())  # the COMMIT acknowledges these rows
        except BaseException as error:
            if self.is_regular:
                with suppress(OSError):
                    self.file.truncate(self.size)  # after half a row the file would not count as owned
            if isinstance(error, OSError):
                error.filename = self.path
            raise
        return self.size + len(text) if self.is_regular else self.size


def _json_line(row: Row) -> bytes:
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


def _is_reject(line: bytes) -> bool:
    try:
        row = jiter.from_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.keys() == MEMBERS


def _lock(descriptor: int) -> bool:
    """Lock the file until it is closed. Return False if another import holds the lock or has removed the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return bool(os.fstat(descriptor).st_nlink)
