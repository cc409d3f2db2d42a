"""Read the log files of a stack: forwards, backwards, and on while they grow. No file is read into memory as a whole.

supervisor renames `app1.log` to `app1.log.1` when the file is full, `app1.log.1` to `app1.log.2`, and so on. Here all
files of one process are one text.
"""

import contextlib
import heapq
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from velikiy.stack.log_lines import Entry, entries, parse

SUPERVISOR = "supervisord"
"""The name of supervisor's own log."""

BLOCK = 64 * 1024
MAX_LINE = 1024 * 1024
"""Bytes. A longer line, as in a damaged file, is returned in pieces."""

DISORDER_S = 3.0
"""The lines of one file are in order except for this: an edge writes the lines of a second together."""

MAX_UNORDERED_BYTES = 16 * 1024 * 1024
"""Memory for putting the lines of one process into order."""

FILE_NAME = re.compile(r"(.+)\.log(?:\.(\d+))?")


LineFilter = Callable[[bytes], bool]


def every_line(_: bytes) -> bool:
    return True


@dataclass
class _Part:
    """One file of a log. Lines behind `end` were written later."""

    stream: BinaryIO
    inode: int
    end: int


class ProcessLog:
    """The log of one process: the lines that are there when this object is created, and then the new lines."""

    def __init__(self, folder: Path, name: str, following: bool) -> None:
        """
        Args:
            folder: The folder of the logs.
            name: The name of the log without `.log`.
            following: Leave a last line whose end is not written yet to `new`.
        """
        self.file = folder / f"{name}.log"
        self.process = "supervisor" if name == SUPERVISOR else name
        self._parts = self._open()
        """The oldest file first."""

        if following and self._parts:
            self._parts[-1].end = _end_of_last_line(self._parts[-1])
        self._unread = self._parts[-1:]
        """The files in which `new` reads on."""

        self._rest = b""
        """The beginning of a line that `new` has read, and whose end is not written yet."""

    def _open(self) -> list[_Part]:
        """Open the newest file first: a file that is renamed meanwhile is then found twice, and none is missed."""
        parts: dict[int, _Part] = {}
        for file in _files(self.file):
            with contextlib.suppress(FileNotFoundError):
                stream = file.open("rb")
                status = os.fstat(stream.fileno())
                if status.st_ino in parts:
                    stream.close()
                else:
                    parts[status.st_ino] = _Part(stream, status.st_ino, status.st_size)
        return list(reversed(parts.values()))

    # ---- the lines that are there ----

    def forwards(self, since: float | None = None, may_matter: LineFilter = every_line) -> Iterator[Entry]:
        """Return the entries in the order of their times.

        Args:
            since: Seconds since 1970. Earlier entries are left out.
            may_matter: Tells which lines are worth parsing, which takes most of the time.
        """
        lines = (line for line in self._lines(since) if line and may_matter(line))
        for entry in _in_order(_with_times(entries(self.process, lines))):
            if since is None or entry.time is None or entry.time >= since:
                yield entry

    def _lines(self, since: float | None) -> Iterator[bytes]:
        line = b""
        for part in self._parts:
            if since is not None and os.fstat(part.stream.fileno()).st_mtime < since - DISORDER_S:
                continue
            position = 0 if since is None else self._first_since(part, since)
            since = None  # the following files are later
            part.stream.seek(position)
            while position < part.end and (piece := part.stream.readline(min(MAX_LINE, part.end - position))):
                position += len(piece)
                line += piece
                if piece.endswith(b"\n") or len(line) >= MAX_LINE:
                    yield line.rstrip(b"\n")
                    line = b""
        if line:
            yield line

    def _first_since(self, part: _Part, since: float) -> int:
        """Return where to begin to read, by bisection: the lines of a file are almost in order."""
        low, high = 0, part.end
        while high - low > BLOCK:
            middle = (low + high) // 2
            part.stream.seek(middle)
            part.stream.readline(MAX_LINE)  # the middle of a line
            moment = None
            while moment is None and part.stream.tell() < high and (line := part.stream.readline(MAX_LINE)):
                moment = parse(self.process, line.rstrip(b"\n")).time
            if moment is None or moment >= since - DISORDER_S:
                high = middle
            else:
                low = middle
        part.stream.seek(low)
        return low + len(part.stream.readline(MAX_LINE)) if low else 0

    def backwards(self, may_matter: LineFilter = every_line, at_most: float = math.inf) -> Iterator[Entry]:
        """Return the entries in the opposite order of their times.

        Args:
            may_matter: As for `forwards`.
            at_most: Bytes to read, in whole blocks.
        """
        return _in_order(_with_times(self._entries_backwards(may_matter, at_most)), direction=-1)

    def _entries_backwards(self, may_matter: LineFilter, at_most: float) -> Iterator[Entry]:
        lines: list[bytes] = []
        for line in filter(may_matter, self._lines_backwards(at_most)):
            lines.append(line)
            if not line.startswith(b"\t"):
                yield from entries(self.process, reversed(lines))
                lines = []
        yield from entries(self.process, reversed(lines))

    def _lines_backwards(self, at_most: float) -> Iterator[bytes]:
        rest, unread = b"", at_most
        for part in reversed(self._parts):
            position = part.end
            while position > 0:
                if unread <= 0:
                    return
                unread -= BLOCK
                start = max(0, position - BLOCK)
                part.stream.seek(start)
                first, *lines = (part.stream.read(position - start) + rest).split(b"\n")
                position = start
                yield from (line for line in reversed(lines) if line)
                rest = first
                if len(rest) >= MAX_LINE:
                    yield rest
                    rest = b""
        if rest:
            yield rest

    # ---- the lines that are new ----

    def new(self) -> list[Entry]:
        """Return entries that were written since this object was created or this method was called, through any number
        of rotations."""
        lines: list[bytes] = []
        while self._unread or self._open_later():
            part = self._unread[0]
            part.stream.seek(part.end)
            added = part.stream.read(MAX_UNORDERED_BYTES)
            part.end += len(added)
            *complete, self._rest = (self._rest + added).split(b"\n")
            lines += [line for line in complete if line]
            if len(added) == MAX_UNORDERED_BYTES:
                break  # the rest is returned by the next call
            if len(self._unread) > 1:
                self._unread.pop(0)
            elif not self._open_later():
                break
        return list(_with_times(entries(self.process, lines)))

    def _open_later(self) -> bool:
        """Open the files that supervisor has begun after the last one that is open. Return whether there are any."""
        last = self._unread[-1].inode if self._unread else None
        try:
            if last == self.file.stat().st_ino:
                return False
        except FileNotFoundError:  # not begun yet, or supervisor has renamed it a moment ago
            return False
        present = self._open()
        inodes = [part.inode for part in present]
        later = present[inodes.index(last) + 1 :] if last in inodes else present
        for part in later:
            part.end = 0
        self._unread += later
        return bool(later)


def open_logs(folder: Path, prefix: str = "", *, following: bool = False) -> list[ProcessLog]:
    """Open the logs of the processes whose names start with the prefix, and supervisor's, which reports about them."""
    return [
        ProcessLog(folder, name, following) for name in names(folder) if name.startswith(prefix) or name == SUPERVISOR
    ]


def names(folder: Path) -> list[str]:
    """Return the names of the logs."""
    return sorted({match[1] for file in folder.glob("*.log*") if (match := FILE_NAME.fullmatch(file.name))})


def merge(streams: Iterable[Iterator[Entry]], backwards: bool = False) -> Iterator[Entry]:
    """Return the entries of all streams in the order of their times."""
    return heapq.merge(*streams, key=_time, reverse=backwards)


def _time(entry: Entry) -> float:
    return entry.time or 0.0


def _files(file: Path) -> list[Path]:
    """Return the files of the log, the newest first."""
    found = {
        int(match[2] or 0): other
        for other in file.parent.glob(f"{file.name}*")
        if (match := FILE_NAME.fullmatch(other.name)) and match[1] == file.stem
    }
    return [found[number] for number in sorted(found)]


def _end_of_last_line(part: _Part) -> int:
    start = max(0, part.end - MAX_LINE)
    part.stream.seek(start)
    return start + part.stream.read(part.end - start).rfind(b"\n") + 1


def _with_times(found: Iterable[Entry]) -> Iterator[Entry]:
    """Give an entry without a time the time of the entry before it."""
    time = None
    for entry in found:
        time = entry.time = time if entry.time is None else entry.time
        yield entry


def _in_order(found: Iterable[Entry], *, direction: int = 1) -> Iterator[Entry]:
    """Put entries into the order of their times that are almost in that order."""
    waiting: list[tuple[float, int, Entry]] = []
    size, latest = 0, -math.inf
    for number, entry in enumerate(found):
        moment = direction * _time(entry)
        heapq.heappush(waiting, (moment, number, entry))
        size, latest = size + entry.size, max(latest, moment)
        while waiting and (waiting[0][0] < latest - DISORDER_S or size > MAX_UNORDERED_BYTES):
            _, _, first = heapq.heappop(waiting)
            size -= first.size
            yield first
    while waiting:
        yield heapq.heappop(waiting)[2]
