"""One JSON object a line on stdout, the libraries' lines included."""

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

SHARED: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _stamp]


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str).decode()


def _without_messages(_: Any, __: str, event: Any) -> Any:
    for exception in event.get("exception", ()):
        exception.pop("exc_value", None)
        exception.pop("exc_notes", None)
    return event


# Tracebacks as data, without messages and the values of local variables: both quote names and e-mails.
RENDER: list[Any] = [
    structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
    ),
    _without_messages,
    structlog.processors.JSONRenderer(serializer=_dumps),
]


def settings(level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: everything that uses the standard library's logging."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": SHARED,
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *RENDER],
            }
        },
        "handlers": {"stdout": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
        "root": {"level": level.upper(), "handlers": ["stdout"]},
        "loggers": {
            # gunicorn's own logger does not propagate unless told to.
            "gunicorn.error": {"level": level.upper(), "handlers": [], "propagate": True},
            # The pool warns once a second while PostgreSQL is away; the request that fails says so already.
            "psycopg.pool": {"level": "ERROR"},
        },
    }


class _Stdout:
    """Lines are written together, LATER at most: each write would wake whoever collects the logs, who takes longer for
    a line than it took to make it. What a killed process had not written is lost; the edge's line is there.

    Each line in one piece, since threads log at the same time; and a log that nobody takes any more, because the
    supervisor died or the disk is full, is no reason to fail a request.
    """

    LATER = 0.2
    """Seconds."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None
        atexit.register(self._write)

    def write(self, text: str) -> None:
        self._lines.append(text)
        # Not before the first line: threads do not survive the fork that makes a worker.
        if self._writer is None:
            with self._starting:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._keep_writing, daemon=True)
                    self._writer.start()

    def flush(self) -> None:
        """Of each line; what it is for is done by `_keep_writing`."""

    def _keep_writing(self) -> None:
        while True:
            time.sleep(self.LATER)
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            with contextlib.suppress(OSError):
                sys.stdout.write("".join(lines))
                sys.stdout.flush()


_stdout = _Stdout()
_least = logging.INFO


def configure(level: str) -> None:
    """For the app's own events: `structlog.get_logger()`."""
    global _least
    _least = _number(level)
    structlog.configure(
        processors=[*SHARED, *RENDER],
        logger_factory=structlog.WriteLoggerFactory(_stdout),  # type: ignore[arg-type]
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


def request(level: str, **said: Any) -> None:
    """The one line that each request has, as structlog would write it, in a quarter of its time."""
    if _number(level) >= _least:
        _stdout.write(_dumps(_stamp(None, level, {**said, "event": "request", "level": level})) + "\n")


def _number(level: str) -> int:
    return int(getattr(logging, level.upper()))
