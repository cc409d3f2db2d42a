"""Log one JSON object a line to stdout. The lines of the libraries have the same form."""

import atexit
import contextlib
import io
import logging
import logging.config
import os
import sys
import threading
import time
from functools import cache
from typing import Any, NoReturn

import orjson
import structlog

from velikiy import tracebacks

_stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")

EVENT_PROCESSORS: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _stamp]


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str).decode()


RENDER_PROCESSORS: list[Any] = [
    structlog.processors.ExceptionRenderer(tracebacks.render),
    structlog.processors.JSONRenderer(serializer=_dumps),
]


def dict_config(level: str) -> dict[str, Any]:
    """Return the configuration of the standard library's logging, which the libraries use, for
    `logging.config.dictConfig`."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": EVENT_PROCESSORS,
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *RENDER_PROCESSORS],
            }
        },
        "handlers": {"stdout": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
        "root": {"level": level.upper(), "handlers": ["stdout"]},
        "loggers": {
            # gunicorn's own logger does not propagate by default.
            "gunicorn.error": {"level": level.upper(), "handlers": [], "propagate": True},
            # The pool warns once a second while PostgreSQL is away. The request that fails logs that already.
            "psycopg.pool": {"level": "ERROR"},
        },
    }


class _Stdout:
    """Writes the lines of WRITE_INTERVAL_S seconds together.

    Gains: 40 µs for a line: each write wakes supervisor, which takes longer for a line than the app takes to format it.
    Relies on: a thread of its own in each process.
    Remove when: the reader of the log takes less time for a line.

    A killed process loses the lines that it has not written; the edge's line of the request is there. A line is never
    torn by the line of another thread. If the log cannot be written, because supervisor has died or the disk is full,
    the lines are lost and no request fails. If the reader of the log stalls, MAX_CHARACTERS wait for it. Further lines
    are lost and counted.
    """

    WRITE_INTERVAL_S = 0.2

    MAX_CHARACTERS = 8_000_000
    """A busy process logs a twentieth of this in an interval."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._characters = self._lost = 0
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None
        atexit.register(self._write)
        os.register_at_fork(after_in_child=self._begin_in_child)

    def _begin_in_child(self) -> None:
        """Leave the parent's lines to the parent. A thread does not survive a fork."""
        self._lines, self._writer, self._starting = [], None, threading.Lock()

    def write(self, text: str) -> None:
        if self._characters > self.MAX_CHARACTERS:
            self._lost += 1
            return
        self._lines.append(text)
        self._characters += len(text)
        # Start the thread with the first line: most processes that import this module write none.
        if self._writer is None:
            with self._starting:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._keep_writing, daemon=True)
                    self._writer.start()

    def flush(self) -> None:
        """Do nothing. structlog calls this method after each line; `_keep_writing` flushes."""

    def _keep_writing(self) -> None:
        while True:
            time.sleep(self.WRITE_INTERVAL_S)
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        lost, self._characters, self._lost = self._lost, 0, 0
        if lost:
            lines.append(_dumps(_stamp(None, "", {"event": "log.lost", "level": "warning", "lines": lost})) + "\n")
        if lines:
            with contextlib.suppress(OSError):
                sys.stdout.write("".join(lines))
                sys.stdout.flush()


_stdout = _Stdout()
_min_level = logging.INFO


def configure(level: str) -> None:
    """Configure the log of the app's own events, which `structlog.get_logger()` writes."""
    global _min_level
    _min_level = _number(level)
    structlog.configure(
        processors=[*EVENT_PROCESSORS, *RENDER_PROCESSORS],
        logger_factory=structlog.WriteLoggerFactory(_stdout),  # type: ignore[arg-type]
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


def configure_service(level: str) -> None:
    """Configure the whole log of a process, from its first line on: the app's own events, and the lines of libraries,
    uncaught exceptions, and whatever is printed to stderr."""
    configure(level)
    logging.config.dictConfig(dict_config(level))
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _uncaught(kind, error, trace)
    threading.excepthook = lambda it: _uncaught(it.exc_type, it.exc_value, it.exc_traceback)
    sys.unraisablehook = lambda it: _uncaught(it.exc_type, it.exc_value, it.exc_traceback)
    sys.stderr = _Stderr()


def cannot_start(reason: Exception | str) -> NoReturn:
    """End a process whose settings are not allowed, with a line for its operator."""
    structlog.get_logger().critical("cannot_start", reason=str(reason))
    sys.exit(1)


def _uncaught(kind: Any, error: Any, trace: Any) -> None:
    structlog.get_logger().critical("uncaught", exc_info=(kind, error, trace))


class _Stderr(io.TextIOBase):
    """Writes each line that is printed to stderr as JSON. Libraries print what they cannot log, such as tracebacks of a
    failed start."""

    def __init__(self) -> None:
        self._incomplete = ""

    def write(self, text: str) -> int:
        *lines, self._incomplete = (self._incomplete + text).split("\n")
        for line in lines:
            if line.strip():
                _stdout.write(_dumps(_stamp(None, "error", {"event": "stderr", "text": line, "level": "error"})) + "\n")
        return len(text)

    def fileno(self) -> int:
        return sys.__stderr__.fileno() if sys.__stderr__ else 2


def request(level: str, **fields: Any) -> None:
    """Log the line of a request in the form of structlog's lines. That takes a quarter of structlog's time."""
    if _number(level) >= _min_level:
        _stdout.write(_dumps(_stamp(None, level, {**fields, "event": "request", "level": level})) + "\n")


def audit(**fields: Any) -> None:
    """Log a write by an API key, whatever the level of the log is."""
    _stdout.write(_dumps(_stamp(None, "info", {**fields, "event": "audit", "level": "info"})) + "\n")


@cache
def _number(level: str) -> int:
    return int(getattr(logging, level.upper()))
