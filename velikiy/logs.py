"""Log one JSON object a line to stdout. The lines of the libraries have the same form."""

import atexit
import contextlib
import logging
import sys
import threading
import time
from typing import Any

import orjson
import structlog

_stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")

EVENT_PROCESSORS: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _stamp]


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str).decode()


def _without_messages(_: Any, __: str, event: Any) -> Any:
    for exception in event.get("exception", ()):
        exception.pop("exc_value", None)
        exception.pop("exc_notes", None)
    return event


# Tracebacks as data, without messages and the values of local variables: both quote names and e-mails.
RENDER_PROCESSORS: list[Any] = [
    structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
    ),
    _without_messages,
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
    the lines are lost and no request fails.
    """

    WRITE_INTERVAL_S = 0.2

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None
        atexit.register(self._write)

    def write(self, text: str) -> None:
        self._lines.append(text)
        # Start the thread with the first line: a thread does not survive the fork that creates a worker.
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


def request(level: str, **fields: Any) -> None:
    """Log the line of a request in the form of structlog's lines. That takes a quarter of structlog's time."""
    if _number(level) >= _min_level:
        _stdout.write(_dumps(_stamp(None, level, {**fields, "event": "request", "level": level})) + "\n")


def _number(level: str) -> int:
    return int(getattr(logging, level.upper()))
