"""Become supervisord, which writes JSON only: each line of a program that is text becomes one (`log_lines.wrap`), and
so do supervisor's own.

Gains: programs that read the logs need one format, without a further process for each server.
Relies on: supervisor's RotatingFileHandler and POutputDispatcher, through which every line passes.
Remove when: the servers write JSON to stderr themselves.

A busy edge prints 30 MB/s of JSON, so a piece that is JSON already is only looked through for line ends.

A thread writes the files, and supervisor reads on while the disk stalls: otherwise the pipes would fill, and each
server that logs would wait for the disk. An edge would answer no hits.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from supervisor import dispatchers, loggers, supervisord

from velikiy.stack import log_lines

MAX_LINE = 1024 * 1024
"""Bytes. The end of a longer line is not waited for."""

LOOK_INTERVAL_S = 5.0

MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Bytes of one file that wait for the disk: half a second of a busy edge, or some minutes of an ordinary edge."""

PIECE_BYTES = 2048
"""Bytes that Python takes for each piece that waits."""

ACCESS_LINE = b'{"time":"'
"""The beginning of each line in the access log of an edge."""


class Writer:
    """Writes the lines of all log files on a thread, in their order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "log files")  # at exit, Python waits until it has written the last lines
        self._lock = threading.Lock()
        self._waiting: Counter[JsonFile] = Counter()
        """The bytes of each file that wait."""
        self._lost: Counter[JsonFile] = Counter()
        """The number of lines that each file has lost, and that no line has reported yet."""

    def add(self, file: "JsonFile", lines: bytes) -> None:
        """Queue these lines. If too many of this file wait, drop and count them. A later line reports the number."""
        size = len(lines) + PIECE_BYTES
        with self._lock:
            if self._waiting[file] + size > MAX_WAITING_BYTES:
                self._lost[file] += lines.count(b"\n")
                return
            lines = self._report(file) + lines
            self._waiting[file] += size
        self._executor.submit(self._write, file, lines, size)

    def _write(self, file: "JsonFile", lines: bytes, size: int) -> None:
        _append(file, lines)
        with self._lock:
            self._waiting[file] -= size
            report = b""
            if not self._waiting[file]:
                del self._waiting[file]  # each start of a program opens a file of its own
                report = self._report(file)
        if report:
            _append(file, report)

    def _report(self, file: "JsonFile") -> bytes:
        """Return a line that reports the lines that this file has lost, if any."""
        lost = self._lost.pop(file, 0)
        if not lost:
            return b""
        return _own_line("WARN", f"lost {lost} lines of {file.process}: the disk of the logs stalled")


def _append(file: "JsonFile", lines: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the file cannot be opened or rotated
        file.append(lines)


writer = Writer()


def _own_line(level: str, message: str) -> bytes:
    return log_lines.supervisor_entry(time.time(), level, message).json().encode() + b"\n"


class JsonFile(loggers.RotatingFileHandler):  # type: ignore[misc]  # supervisor has no types
    """The log file of a program, or of supervisor."""

    stream: Any

    def __init__(self, filename: str, *args: Any) -> None:
        super().__init__(filename, *args)
        self.process = Path(filename).stem
        self.incomplete = b""
        """The beginning of a line whose end was not received yet."""

        self.rotation = Path(filename).parent.parent / "run" / "log_rotation"
        self.next_look = 0.0

    def setFormat(self, fmt: str) -> None:  # noqa: N802
        """Keep supervisor's default format, in which bytes are written as they are."""

    def emit(self, record: Any) -> None:
        if isinstance(record.msg, bytes):
            text = self.incomplete + record.msg
            end = len(text) if len(text) > MAX_LINE else text.rfind(b"\n") + 1
            self.incomplete = text[end:]
            self._write(self._as_json(text[:end]))
        else:
            level, message = loggers.LOG_LEVELS_BY_NUM[record.level], record.asdict()["message"]
            if not message.startswith("success: "):  # which follows "spawned" and adds nothing
                self._write(_own_line(level, message))

    def end(self) -> None:
        """Write a last line without an end. The program has ended."""
        text, self.incomplete = self.incomplete, b""
        self._write(self._as_json(text))

    def _write(self, lines: bytes) -> None:
        if lines:
            writer.add(self, lines)

    def append(self, lines: bytes) -> None:
        """Write these lines, on the thread of the writer."""
        if self.stream.closed:  # supervisor ends, or a rotation has failed midway
            self.stream = open(self.baseFilename, self.mode)  # noqa: PTH123, SIM115  # as supervisor opens it
        super().emit(loggers.LogRecord(loggers.LevelsByName.INFO, lines))

    def doRollover(self) -> None:  # noqa: N802
        """Begin a new file if the current file is full. LOG_FILE_SIZE and LOG_FILES are read again: supervisor itself
        would follow a change only when it is started again."""
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LOOK_INTERVAL_S
            with contextlib.suppress(OSError, ValueError):
                megabytes, files = map(int, self.rotation.read_text().split())
                self.maxBytes, self.backupCount = megabytes * 1_000_000, files - 1
                self._remove_surplus()
        super().doRollover()

    def _remove_surplus(self) -> None:
        """Remove files that LOG_FILES allows no longer."""
        number = self.backupCount + 1
        while (file := Path(f"{self.baseFilename}.{number}")).exists():
            file.unlink()
            number += 1

    def _as_json(self, text: bytes) -> bytes:
        number = text.count(b"\n")
        is_json = text.startswith(b"{") and text.endswith(b"}\n") and text.count(b"\n{") == number - 1
        may_be_cut_off = text.startswith(ACCESS_LINE)
        if is_json and not (may_be_cut_off and (text.count(ACCESS_LINE), text.count(b'"}\n')) != (number, number)):
            return text
        now = time.time()
        lines = log_lines.joined(line for line in text.split(b"\n") if line)
        return b"".join(
            log_lines.wrap(self.process, line, now) if _is_whole(line) else self._rest(line) for line in lines
        )

    def _rest(self, line: bytes) -> bytes:
        """Return the line that follows a line whose end is missing. An edge cuts lines off if its pipe is full
        (edge/lua/log.lua)."""
        rest = line[line.rfind(ACCESS_LINE) :]
        report = _own_line("WARN", f"lost lines of {self.process}: the pipe to supervisor was full")
        return report + (rest + b"\n" if _is_whole(rest) else b"")


def _is_whole(line: bytes) -> bool:
    """Return whether the line is not the beginning of a line of an access log only."""
    if line.startswith(ACCESS_LINE):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
    return True


class Output(dispatchers.POutputDispatcher):  # type: ignore[misc]
    """Reads what a program prints."""

    def close(self) -> None:
        if not self.closed:
            for handler in self.normallog.handlers:
                handler.end()
        super().close()


if __name__ == "__main__":
    loggers.RotatingFileHandler = JsonFile
    dispatchers.POutputDispatcher = Output
    supervisord.main()
