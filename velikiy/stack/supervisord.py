"""Become supervisord, which writes JSON only: each line of a program that is text becomes one (`log_lines.wrap`), and
so do supervisor's own.

Gains: programs that read the logs need one format, without a further process for each server.
Relies on: supervisor's RotatingFileHandler and POutputDispatcher, through which every line passes.
Remove when: the servers write JSON to stderr themselves.

A busy edge prints 30 MB/s of JSON, so a piece that is JSON already is only looked through for line ends.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from supervisor import dispatchers, loggers, supervisord

from velikiy.stack import log_lines

MAX_LINE = 1024 * 1024
"""Bytes. The end of a longer line is not waited for."""

LOOK_INTERVAL_S = 5.0


class JsonFile(loggers.RotatingFileHandler):  # type: ignore[misc]  # supervisor has no types
    """The log file of a program, or of supervisor."""

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
            self._write(record.level, self._as_json(text[:end]))
        else:
            level, message = loggers.LOG_LEVELS_BY_NUM[record.level], record.asdict()["message"]
            if not message.startswith("success: "):  # which follows "spawned" and adds nothing
                entry = log_lines.supervisor_entry(time.time(), level, message)
                self._write(record.level, entry.json().encode() + b"\n")

    def end(self) -> None:
        """Write a last line without an end. The program has ended."""
        text, self.incomplete = self.incomplete, b""
        self._write(loggers.LevelsByName.INFO, self._as_json(text))

    def _write(self, level: int, lines: bytes) -> None:
        if lines:
            super().emit(loggers.LogRecord(level, lines))

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
