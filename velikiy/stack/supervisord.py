"""Become supervisord, which writes JSON only: each line of a program that is text becomes one (`log_lines.wrap`), and
so do supervisor's own.

Gains: programs that read the logs need one format, without a further process for each server.
Relies on: supervisor's RotatingFileHandler and POutputDispatcher, through which every line passes.
Remove when: the servers write JSON to stderr themselves.

A busy edge prints 30 MB/s of JSON, so a piece that is JSON already is only looked through for line ends.

A thread writes the files, and supervisor reads on while the disk stalls: otherwise the pipes would fill, and each
server that logs would wait for the disk, an edge with its hits too.
"""

import contextlib
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

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""Bytes that wait for the disk: a second of a busy edge, or some minutes of a usual one. Further lines are lost."""


class Writer:
    """Writes the lines of all log files on a thread, in their order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "log files")  # which writes the last lines when supervisor ends
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._lost: Counter[str] = Counter()
        """The lines of each process that were lost since its last piece."""

    def add(self, file: "JsonFile", lines: bytes) -> None:
        """Write these lines soon. If too many wait, lose them, and say so before the next ones."""
        with self._lock:
            if self._waiting_bytes + len(lines) > MAX_WAITING_BYTES:
                self._lost[file.process] += lines.count(b"\n")
                return
            if lost := self._lost.pop(file.process, 0):
                lines = _own_line("WARN", f"lost {lost} lines of {file.process}: the disk of the logs stalled") + lines
            self._waiting_bytes += len(lines)
        self._thread.submit(self._write, file, lines)

    def _write(self, file: "JsonFile", lines: bytes) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # a full disk
                file.append(lines)
        finally:
            with self._lock:
                self._waiting_bytes -= len(lines)


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
        if text.startswith(b"{") and text.endswith(b"}\n") and text.count(b"\n{") == text.count(b"\n") - 1:
            return text
        now = time.time()
        lines = log_lines.joined(line for line in text.split(b"\n") if line)
        return b"".join(log_lines.wrap(self.process, line, now) for line in lines)


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
