"""Where rows are written to. Nothing is lost there but an older export, or rejects of an earlier import; what is new is
for its owner alone."""

import fcntl
import gzip
import io
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn, TextIO

import jiter
import orjson

from velikiy.bulk.progress import say
from velikiy.bulk.readers import LONGEST, Row, Unreadable
from velikiy.bulk.signals import to_the_end

MEMBERS = {"line", "errors", "row"}

LONGEST_REJECT = 16 * LONGEST
"""Bytes. JSON may write one byte as six, and a quote that is not closed takes lines along."""


def own_stream(file: str) -> TextIO | None:
    """Return stdout or stderr, if `file` names it: as `-`, as /dev/stdout, or as the file that a shell has redirected
    it into. The stream knows its place there; whoever opens that file anew would write over what is there.

    Raises:
        OSError: stdout is closed, or the path leads nowhere.
    """
    ours: list[TextIO | None] = [sys.stdout, sys.stderr]  # None where it is closed
    if file == "-":
        if not ours[0]:
            raise OSError("stdout is closed")
        return ours[0]
    with suppress(FileNotFoundError):
        there = Path(file).stat()
        for stream in ours:
            if stream and os.path.samestat(there, os.fstat(stream.fileno())):
                return stream
    return None


@contextmanager
def target(file: str) -> Iterator[IO[bytes]]:
    """Yield a new file that takes its place when the block ends well. What is a stream, our own or another, is written
    as it is."""
    if stream := own_stream(file):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us, as it does cat
        yield stream.buffer
        stream.buffer.flush()
        return
    path = Path(file)
    is_file = path.is_file() or not path.exists()
    with _new(path.resolve()) if is_file else os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as out:
        if file.endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=6) as compressed:
                yield compressed  # type: ignore[misc]
        else:
            yield out


@contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    beside: Path | None = None
    try:
        with to_the_end():
            number, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
            beside = Path(name)
        with os.fdopen(number, "wb") as out:
            yield out
            out.flush()
            _share(number, path)
            os.fsync(number)
        beside.replace(path)
    finally:
        with to_the_end():
            if beside:
                beside.unlink(missing_ok=True)


def _share(number: int, path: Path) -> None:
    """Let the group and others do what they may with the file whose place it takes; nothing, if there is none."""
    mode = 0o600
    with suppress(FileNotFoundError):
        before = path.stat()
        mode = stat.S_IMODE(before.st_mode) & 0o777
        try:
            os.fchown(number, -1, before.st_gid)
        except OSError:
            mode &= ~stat.S_IRWXG  # it would be of another group
    with suppress(OSError):  # where files have no modes
        os.fchmod(number, mode)


class Rejects:
    """Rows that could not be taken, one JSON object a line.

    A file is the import's own if the import created it, or if it begins with such a row; an own file that has no rows
    is removed. A stream (a FIFO, a terminal, our own stdout) is appended to.
    """

    def __init__(self, path: str, size: int, source: io.FileIO) -> None:
        """`size`: of the rows that are committed; what a file has beyond is of a chunk that was not. `source`: the file
        that is imported.

        Raises:
            Unreadable: it is somebody else's, or cannot be written. Nothing was changed.
        """
        self.path = path
        self.size = size
        try:  # now, and not when half of the rows are in
            stream = own_stream(path)
            number, created = (os.dup(stream.fileno()), False) if stream else _opened(path)
        except OSError as error:
            raise Unreadable(
                f"{path}: {error.strerror or error}; choose another file for rejected rows with --rejects"
            ) from None
        self.file = io.FileIO(number, "w")
        # All else is read from what is open: by now the path may name another file.
        there = os.fstat(number)
        self.regular = stat.S_ISREG(there.st_mode) and not stream
        beginning = os.pread(number, LONGEST_REJECT, 0) if self.regular else b""
        self.own = created or _is_reject(beginning.partition(b"\n")[0])
        if stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.fstat(source.fileno())):
            self._refuse("is the file to import:")
        if beginning and not self.own:
            self._refuse("does not begin with a rejected row, so it is not overwritten: move it away, or")
        if self.regular and not _locked(number):
            self._refuse("is in use by another import: wait for its end, or")

    def _refuse(self, why: str) -> NoReturn:
        self.file.close()
        raise Unreadable(f"{self.path} {why} choose another file with --rejects")

    def __enter__(self) -> "Rejects":
        if self.regular:
            size = min(self.size, os.fstat(self.file.fileno()).st_size)
            while size and os.pread(self.file.fileno(), 1, size - 1) != b"\n":
                size -= 1  # cut off within a row
            if size < self.size:
                say(f"{self.path} no longer contains the rows that were rejected before the interruption")
            self.size = self.file.truncate(size)
        return self

    def __exit__(self, *_: object) -> None:
        with to_the_end(), self.file, suppress(OSError):
            there = os.fstat(self.file.fileno())
            removable = self.regular and self.own and not there.st_size
            if removable and os.path.samestat(Path(self.path).lstat(), there):
                Path(self.path).unlink()  # before the lock is gone

    def write(self, rows: Sequence[Row]) -> int:
        """Append these behind the rows that are committed, and return how large the file is then.

        It comes before the COMMIT: no row is lost, and a stream gets one twice if the transaction has to begin again.
        """
        if self.regular:
            self.file.truncate(self.size)
        if not rows:
            return self.size
        text = b"".join(map(_line, rows))
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(self.file.fileno(), rest) :]
            if self.regular:
                os.fsync(self.file.fileno())  # PostgreSQL is about to promise that they are there
        except BaseException as error:
            if self.regular:
                with suppress(OSError):
                    self.file.truncate(self.size)  # half of a row would make it somebody else's file
            if isinstance(error, OSError):
                error.filename = self.path
            raise
        return self.size + len(text) if self.regular else self.size


def _line(row: Row) -> bytes:
    return orjson.dumps({"line": row.line, "errors": row.errors, "row": row.given}) + b"\n"


def _opened(path: str) -> tuple[int, bool]:
    """Return a descriptor, and whether the file was created; nothing of one that is there is changed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOCTTY
    try:
        number = os.open(path, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        there = Path(path)
        if there.exists() and not there.is_file():
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), False
        # With O_CREAT the kernel refuses what another user has laid in wait in /tmp (fs.protected_regular).
        return os.open(path, flags, 0o600), False
    with suppress(OSError):  # where files have no modes
        os.fchmod(number, 0o600)  # what the umask has taken away
    return number, True


def _is_reject(line: bytes) -> bool:
    try:
        row = jiter.from_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.keys() == MEMBERS


def _locked(number: int) -> bool:
    """Lock it until it is closed, unless another import has the lock, or has removed the file at its end."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return bool(os.fstat(number).st_nlink)
