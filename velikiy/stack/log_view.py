"""Choose entries of the logs and show them, for people and for programs."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from velikiy.command_line import has_colours
from velikiy.stack.log_files import MAX_LINE, LineFilter, ProcessLog, merge, names, open_logs
from velikiy.stack.log_lines import LEVELS, Entry, iso, parse

POLL_S = 0.2

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")

COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}
PROCESS_COLOUR, FAINT = "36", "2"

IN_THE_SENTENCE = {"event", "method", "path", "route", "status", "cache", "seconds", "milliseconds", "text"}
"""The fields that the message of a request already contains."""

SEARCHED_BYTES = 1024 * 1024

WINDOW_S = 1.0
"""PostgreSQL and an app take the time of their lines a moment before they write them."""


def moment(text: str, now: float | None = None) -> float:
    """Return the seconds since 1970 of `10m` (ten minutes ago), `1h30m`, or a moment in ISO 8601.

    Raises:
        ValueError
    """
    spans = SPAN.findall(text)
    if spans and "".join(f"{number}{unit}" for number, unit in spans) == text:
        return (time.time() if now is None else now) - sum(float(number) * UNITS[unit] for number, unit in spans)
    return datetime.fromisoformat(text).timestamp()  # without a zone it is this machine's local time


@dataclass
class Choice:
    """The entries that someone wants to see."""

    prefix: str = ""
    """The beginning of the names of processes."""

    level: str = "debug"
    since: float | None = None
    request: str = ""
    """An id: the service's own, the client's, or the id of a trace."""

    sessions: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """The sessions of PostgreSQL that raised an error in the request, by their process id, and when."""

    def __contains__(self, entry: Entry) -> bool:
        return (
            LEVELS.index(entry.level) >= LEVELS.index(self.level)
            and (self.since is None or entry.time is None or entry.time >= self.since)
            and self._is_of_the_process(entry)
            and (not self.request or self._is_of_the_request(entry))
        )

    def _is_of_the_process(self, entry: Entry) -> bool:
        program = entry.fields.get("program") if entry.process == "supervisor" else None
        return entry.process.startswith(self.prefix) or str(program or " ").startswith(self.prefix)

    def _is_of_the_request(self, entry: Entry) -> bool:
        fields = entry.fields
        if self.request in (fields.get("request_id"), fields.get("client_request_id")):
            return True
        if "traceparent" in fields and self.request in str(fields["traceparent"]).split("-"):
            return True
        spans = self.sessions.get(fields.get("pid", 0), []) if "severity" in fields else []
        return any(start <= (entry.time or 0) <= end for start, end in spans)

    def line_filter(self, with_id: bool) -> LineFilter:
        """Return what tells lines that cannot be chosen, by their bytes. Programs write JSON without spaces.

        Args:
            with_id: A chosen line contains the id of the request.
        """
        id_of_request = self.request.encode() if with_id else b""
        too_low = [f'"level":"{level}"'.encode() for level in LEVELS[: LEVELS.index(self.level)]]
        return lambda line: id_of_request in line and not any(level in line for level in too_low)

    def find_sessions(self, logs: list[ProcessLog]) -> None:
        """Find the sessions of the request. Apps log them with the request, after PostgreSQL has logged its errors."""
        for log in logs:
            for entry in log.forwards(self.since, lambda line: b'"postgres_pid"' in line):
                self.note_session(entry)

    def note_session(self, entry: Entry) -> None:
        pid = entry.fields.get("postgres_pid")
        if isinstance(pid, int) and entry.time and self._is_of_the_request(entry):
            took = float(entry.fields.get("milliseconds") or 0) / 1000
            self.sessions.setdefault(pid, []).append((entry.time - took - WINDOW_S, entry.time + WINDOW_S))


def show(folder: Path, choice: Choice, *, last: int | None, as_json: bool, follow: bool) -> None:
    """Print the chosen entries that are there, in the order of their times, and with `follow` also the new ones.

    Args:
        folder: The folder of the logs.
        choice: The entries to print.
        last: Print only so many, the latest. None means all.
        as_json: One JSON object a line.
        follow: Go on until the process is interrupted.
    """
    write = _writer(as_json)
    logs = open_logs(folder, choice.prefix, following=follow)
    if choice.request:
        choice.find_sessions(open_logs(folder, "app"))
    for entry in _present(logs, choice, last):
        write(entry)
    sys.stdout.flush()
    if follow:
        _follow(folder, logs, choice, write, lambda: False)


def show_stream(stream: BinaryIO, choice: Choice, as_json: bool) -> None:
    """Print the chosen entries of lines in the order in which they come, each after the name of its container."""
    write, moment = _writer(as_json), None
    for line in iter(lambda: stream.readline(MAX_LINE), b""):
        process, text = PREFIX.fullmatch(line.rstrip(b"\r\n")).groups()  # type: ignore[union-attr]  # it matches all
        entry = parse((process or b"").decode(), text)
        moment = entry.time = moment if entry.time is None else entry.time
        choice.note_session(entry)
        if text and entry in choice:
            write(entry)
            sys.stdout.flush()


PREFIX = re.compile(rb"(?:([\w.-]+) +\| )?(?:\d{4}-\d\d-\d\dT[\d:.]+Z )?(.*)", re.DOTALL)
"""`docker compose logs` begins each line with the name of the container, and with --timestamps with the time."""


def follow_from(folder: Path, since: float, is_over: Callable[[], bool]) -> None:
    """Print the entries of all processes since this moment, and go on until `is_over` returns true."""
    write, choice = _writer(as_json=False), Choice(since=since)
    logs = open_logs(folder, following=True)
    for entry in _present(logs, choice, None):
        write(entry)
    sys.stdout.flush()
    _follow(folder, logs, choice, write, is_over)


def latest(folder: Path, count: int) -> list[str]:
    """Return the last lines of each log together, in the order of their times."""
    logs = open_logs(folder)
    found = [entry for log in logs for entry in islice(log.backwards(), count)]
    return [for_people(entry) for entry in merge([iter(sorted(found, key=lambda it: it.time or 0))])]


def latest_errors(folder: Path, count: int) -> list[Entry]:
    """Return the last entries of the level error and above. The search ends after some thousand lines of each log."""
    choice = Choice(level="error")
    filtered = choice.line_filter(False)
    merged = merge((log.backwards(filtered, SEARCHED_BYTES) for log in open_logs(folder)), True)
    return list(islice((entry for entry in merged if entry in choice), count))[::-1]


def _present(logs: list[ProcessLog], choice: Choice, last: int | None) -> Iterator[Entry]:
    if last is not None:
        since, merged = choice.since, merge((log.backwards(choice.line_filter(False)) for log in logs), True)
        late_enough = takewhile(lambda entry: since is None or (entry.time or since) >= since, merged)
        found = (entry for entry in late_enough if entry in choice)
        return reversed(list(islice(found, last)))
    # PostgreSQL's lines of a request do not contain its id.
    with_id = [log for log in logs if not (choice.sessions and log.process == "postgres")]
    streams = (log.forwards(choice.since, choice.line_filter(log in with_id)) for log in logs)
    return (entry for entry in merge(streams) if entry in choice)


def _follow(
    folder: Path, logs: list[ProcessLog], choice: Choice, write: Callable[[Entry], None], is_over: Callable[[], bool]
) -> None:
    known = set(names(folder))
    while not is_over():
        if added := set(names(folder)) - known:  # an app or an edge that was added
            logs += [log for log in open_logs(folder, choice.prefix) if log.file.stem in added]
            known |= added
        found = sorted((entry for log in logs for entry in log.new()), key=lambda entry: entry.time or 0)
        for entry in found:
            if choice.request:
                choice.note_session(entry)
        for entry in found:
            if entry in choice:
                write(entry)
        sys.stdout.flush()
        time.sleep(POLL_S)


# ---- for people ----


def _writer(as_json: bool) -> Callable[[Entry], None]:
    if as_json:
        return lambda entry: print(entry.json())
    colours = has_colours()
    return lambda entry: print(for_people(entry, colours=colours))


def for_people(entry: Entry, *, colours: bool = False) -> str:
    """Return the entry as a line, with further lines for a traceback."""

    def coloured(text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if colours and colour else text

    is_request = entry.fields.get("event") == "request"
    fields = {name: value for name, value in entry.fields.items() if value not in (None, "")}
    traceback = fields.pop("exception", None)
    if is_request:
        fields = {name: value for name, value in fields.items() if name not in IN_THE_SENTENCE}
    elif fields.get("event") == entry.message:
        del fields["event"]
    first, *more = _printable(entry.message).split("\n")
    parts = [
        coloured(iso(entry.time) or " " * 24, FAINT),
        coloured(f"{entry.process:<10}", PROCESS_COLOUR),
        coloured(f"{entry.level:<8}", COLOURS.get(entry.level, "")),
        coloured(first, COLOURS.get(entry.level, "")),
        coloured(" ".join(f"{name}={_value(value)}" for name, value in fields.items()), FAINT),
    ]
    if traceback is not None:
        more += _printable(traceback if isinstance(traceback, str) else json.dumps(traceback)).rstrip("\n").split("\n")
    return "\n".join([" ".join(part for part in parts if part).rstrip(), *(f"    {line}" for line in more)])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _printable(text if text and not re.search(r'[\s"=]', text) else json.dumps(text, ensure_ascii=False))


def _printable(text: str) -> str:
    """Return the text without characters that would command a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
