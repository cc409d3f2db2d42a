"""Read a line of a log as data, whichever process has written it.

Apps, the relay, the metrics and the access log of an edge write JSON. PostgreSQL, Redis, supervisor and Nginx's own
messages are text, which supervisor wraps as JSON before it reaches a file (`velikiy/stack/supervisord.py`). A line of
an unknown form keeps its whole text as the message.

The module uses only the standard library: supervisor imports it.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error", "critical")

KNOWN_LEVELS = {
    **{level: level for level in LEVELS},
    **{"warn": "warning", "notice": "info", "crit": "critical", "emerg": "critical", "fatal": "critical"},
    "alert": "error",
    # supervisor
    **{"trac": "debug", "blat": "debug", "debg": "debug", "erro": "error"},
}

POSTGRES_LEVELS = {"INFO": "info", "NOTICE": "info", "LOG": "info", "WARNING": "warning", "PANIC": "critical"}
REDIS_LEVELS = {".": "debug", "-": "debug", "*": "info", "#": "warning"}
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

POSTGRES = re.compile(
    r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d\.\d+) \S+ \[(\d+)\] (?:(.*?) )?"
    r"(DEBUG\d?|INFO|NOTICE|LOG|WARNING|ERROR|FATAL|PANIC|DETAIL|HINT|QUERY|CONTEXT|LOCATION|STATEMENT):  (.*)",
    re.DOTALL,
)
REDIS = re.compile(r"(\d+):[XCSM] (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d:\d\d:\d\d\.\d+) ([.*#-]) (.*)", re.DOTALL)
REDIS_SIGNAL = re.compile(r"(\d+):signal-handler \((\d+)\) (.*)", re.DOTALL)
NGINX = re.compile(r"(\d{4})/(\d\d)/(\d\d) (\d\d:\d\d:\d\d) \[([a-z]+)\] (\d+)#\d+: (.*)", re.DOTALL)
NGINX_AT_START = re.compile(r"nginx: \[([a-z]+)\] (.*)", re.DOTALL)
SUPERVISOR = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ([A-Z]+) (.*)", re.DOTALL)

PROGRAM = re.compile(r"\b(postgres|redis|metrics|prometheus|relay|app\d+|edge\d+)\b")
"""The program that a message of supervisor is about: "exited: app1 (exit status 0; expected)"."""

ROUTINE = re.compile(
    r"oO0OoO0OoO0Oo|Redis version=|Configuration loaded|Server initialized|User requested shutdown"
    r"|Received SIG(TERM|INT) |Redis is now ready to exit|the database system is (starting up|shutting down)"
    r"|terminating connection due to administrator"
)
"""Messages of a start or a stop, to which Redis and PostgreSQL give higher levels."""

TERMINATED = re.compile(r"was terminated by signal|was not properly shut down")
"""PostgreSQL reports crashes with the level LOG."""


@dataclass(slots=True)
class Entry:
    """One line of a log, or several if the message has several."""

    time: float | None
    """Seconds since 1970, or None if the line does not say."""

    level: str
    process: str
    message: str
    fields: dict[str, Any]
    """The further fields of the line."""

    size: int = 0
    """Bytes of the line."""

    def json(self) -> str:
        known = {"time": iso(self.time), "level": self.level, "process": self.process, "message": self.message}
        return json.dumps({**known, **self.fields}, ensure_ascii=False, separators=(",", ":"), default=str)


def iso(moment: float | None) -> str | None:
    """Return the moment as the other lines have it: UTC, to the millisecond."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def entries(process: str, lines: Iterable[bytes]) -> Iterator[Entry]:
    """Return the entries of the lines, which are in their order."""
    return (parse(process, line) for line in joined(lines))


def joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Return the lines of each message together. PostgreSQL begins the further lines of a message with a tab."""
    pending: list[bytes] = []
    for line in lines:
        if pending and not (line.startswith(b"\t") and not pending[0].startswith(b"{")):
            yield b"\n".join(pending)
            pending = []
        pending.append(line)
    if pending:
        yield b"\n".join(pending)


def parse(process: str, line: bytes) -> Entry:
    """Return the line as data. Every line has a result."""
    text = line.decode(errors="backslashreplace")
    entry = _parsed_json(process, text) if text.startswith("{") else _parsed_text(process, text)
    entry = entry or Entry(None, "error", process, text, {})  # such as Python's own messages on stderr
    entry.size = len(line)
    return entry


# ---- JSON ----


def _parsed_json(process: str, text: str) -> Entry | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    process = str(fields.pop("process", None) or process)
    moment = _moment(fields.pop("time", None) or fields.pop("ts", None))  # "ts" and "msg" are Prometheus'
    if isinstance(exact := fields.pop("msec", None), float | int):  # Nginx' own ISO time has no fraction
        moment = float(exact)
    level = KNOWN_LEVELS.get(str(fields.pop("level", "")).lower()) or _level_of_request(fields)
    message = fields.pop("message", None) or fields.pop("msg", None) or _sentence(fields)
    return Entry(moment, level, process, str(message), fields)


def _moment(value: object) -> float | None:
    try:
        moment = datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _level_of_request(fields: dict[str, Any]) -> str:
    """The lines of an edge in which nothing failed have no level, to keep a hit cheap."""
    status = fields.get("status")
    return "error" if isinstance(status, int) and status >= 500 else "info"


def _sentence(fields: dict[str, Any]) -> str:
    if fields.get("event") != "request":
        return str(fields.get("text") or fields.get("event") or "")
    seconds = fields.get("seconds")
    duration = fields.get("milliseconds", seconds * 1000 if isinstance(seconds, float | int) else None)
    parts = [
        *(fields.get(name) for name in ("method", "path" if "path" in fields else "route", "status", "cache")),
        f"{duration:g} ms" if isinstance(duration, float | int) else None,
    ]
    return " ".join(str(part) for part in parts if part not in (None, ""))


# ---- text ----


def _parsed_text(process: str, text: str) -> Entry | None:
    if match := NGINX.fullmatch(text):
        year, month, day, clock, level, pid, message = match.groups()
        moment = _moment(f"{year}-{month}-{day}T{clock}")
        # The edge's own messages have the level emerg, because no message that quotes a client has it
        # (edge/conf/logging.conf).
        level = "error" if "[lua] " in message else KNOWN_LEVELS.get(level, "error")
        return Entry(moment, level, process, message, {"pid": int(pid)})
    if match := POSTGRES.fullmatch(text):
        return _postgres(process, *match.groups())
    if match := REDIS.fullmatch(text):
        pid, day, month, year, clock, mark, message = match.groups()
        number = MONTHS.index(month) + 1 if month in MONTHS else 0
        moment = _moment(f"{year}-{number:02}-{day}T{clock}")
        level = "info" if ROUTINE.match(message) else REDIS_LEVELS[mark]
        return Entry(moment, level, process, message, {"pid": int(pid)})
    if match := REDIS_SIGNAL.fullmatch(text):
        pid, seconds, message = match.groups()
        return Entry(float(seconds), "info", process, message, {"pid": int(pid)})
    if match := SUPERVISOR.fullmatch(text):
        clock, level, message = match.groups()
        return supervisor_entry(_local_moment(clock), level, message)
    if match := NGINX_AT_START.fullmatch(text):
        level, message = match.groups()
        return Entry(None, KNOWN_LEVELS.get(level, "error"), process, message, {})
    return None


def _postgres(process: str, day: str, clock: str, pid: str, session: str | None, severity: str, message: str) -> Entry:
    level = "debug" if severity.startswith("DEBUG") else POSTGRES_LEVELS.get(severity, "error")
    if severity == "LOG" and TERMINATED.search(message):
        level = "error"
    if ROUTINE.match(message):
        level = "info"
    fields: dict[str, Any] = {"severity": severity, "pid": int(pid)}
    if session:
        fields["session"] = session
    return Entry(_moment(f"{day}T{clock}"), level, process, message.replace("\n\t", "\n"), fields)


def supervisor_entry(moment: float | None, level: str, message: str) -> Entry:
    """Return what supervisor says about a program: its start, its end, its kill."""
    known = KNOWN_LEVELS.get(level.lower(), "info")
    if "without any HTTP authentication" in message:  # a socket that no other user may enter
        known = "info"
    if known == "info" and ("not expected" in message or "terminated by SIGKILL" in message):
        known = "warning"
    program = PROGRAM.search(message)
    return Entry(moment, known, "supervisor", message, {"program": program[1]} if program else {})


def _local_moment(clock: str) -> float | None:
    """supervisor wrote the local time before its lines were wrapped."""
    try:
        whole, milliseconds = clock.split(",")
        return time.mktime(time.strptime(whole, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000
    except (ValueError, OverflowError):
        return None


# ---- wrapping ----


def wrap(process: str, line: bytes, now: float) -> bytes:
    """Return the line as JSON. A line that is JSON stays as it is."""
    if line.startswith(b"{"):
        return line + b"\n"
    entry = parse(process, line)
    # Nginx writes whole seconds.
    if entry.time is None or (entry.time.is_integer() and 0 <= now - entry.time < MAX_LAG_S):
        entry.time = now
    return entry.json().encode() + b"\n"


MAX_LAG_S = 2.0
"""Between the time that Nginx notes and the time at which supervisor reads the line."""
