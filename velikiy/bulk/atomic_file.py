"""A file that replaces an older file as a whole, when it is complete. Only its owner can read a new file."""

import gzip
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO

from velikiy.bulk.signals import defer_signals


def standard_stream(file: str) -> TextIO | None:
    """Return stdout or stderr if `file` names that stream, else None.

    `-` names stdout. A path names a stream as /dev/stdout, or as the file into which a shell has redirected the stream.
    Such a file must not be opened a second time: a new descriptor starts at offset 0 and would overwrite the content,
    while the stream has its own offset.

    Raises:
        OSError: stdout is closed, or the path leads nowhere.
    """
    streams: list[TextIO | None] = [sys.stdout, sys.stderr]  # None for a closed stream
    if file == "-":
        if not streams[0]:
            raise OSError("stdout is closed")
        return streams[0]
    with suppress(FileNotFoundError):
        status = Path(file).stat()
        for stream in streams:
            if stream and os.path.samestat(status, os.fstat(stream.fileno())):
                return stream
    return None


@contextmanager
def open_output(file: str) -> Iterator[IO[bytes]]:
    """Yield a file to write into. It replaces an existing file when the block ends without an error.

    A stream (stdout, a pipe, a terminal) is written directly, and never compressed if it is stdout or stderr.
    """
    if stream := standard_stream(file):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this process quietly, as it ends cat
        yield stream.buffer
        stream.buffer.flush()
        return
    path = Path(file)
    is_file = path.is_file() or not path.exists()
    with (
        _replacement(path.resolve()) if is_file else os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb")
    ) as output:
        if file.endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=output, mode="wb", compresslevel=6) as compressed:
                yield compressed  # type: ignore[misc]
        else:
            yield output


@contextmanager
def _replacement(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file in the same folder, and rename it to `path` when the block ends without an error."""
    new: Path | None = None
    try:
        with defer_signals():
            try:
                descriptor, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
            except OSError as error:  # which names the new file, of which its reader knows nothing
                raise OSError(error.errno, error.strerror, str(path)) from None
            new = Path(name)
        with os.fdopen(descriptor, "wb") as output:
            yield output
            output.flush()
            copy_mode(descriptor, path)
            os.fsync(descriptor)
        new.replace(path)
    finally:
        with defer_signals():
            if new:
                new.unlink(missing_ok=True)


def copy_mode(descriptor: int, path: Path) -> None:
    """Give the new file the owner, group and mode of this file. Without such a file only the owner may read."""
    mode = 0o600
    with suppress(FileNotFoundError):
        replaced = path.stat()
        mode = stat.S_IMODE(replaced.st_mode) & 0o777
        try:
            try:
                os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
            except OSError:  # only root may give a file away
                os.fchown(descriptor, -1, replaced.st_gid)
        except OSError:
            mode &= ~stat.S_IRWXG  # the new file keeps another group, which must gain no rights
    with suppress(OSError):  # a file system without modes
        os.fchmod(descriptor, mode)
