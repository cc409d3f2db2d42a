"""The reader of logs: every form of line, order, rotation, filters, damaged and long files."""

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from supervisor import loggers

from testkit.stack import wait_until
from velikiy.stack import log_files, log_lines, log_view, supervisord
from velikiy.stack.log_files import open_logs
from velikiy.stack.log_lines import parse
from velikiy.stack.log_view import Choice, show

Show = Callable[..., list[str]]

FORMS = {
    "app1": (
        b'{"request_id":"a-1","time":"2026-07-01T10:00:00.250000Z","event":"cache.fenced","level":"warning"}',
        ("2026-07-01T10:00:00.250Z", "warning", "cache.fenced"),
    ),
    "edge1": (
        b'{"time":"2026-07-01T10:00:00+00:00","msec":1782900000.125,"event":"request","request_id":"a-1","method":"GET",'
        b'"path":"/users","status":503,"seconds":0.004,"cache":"MISS"}',
        ("2026-07-01T10:00:00.125Z", "error", "GET /users 503 MISS 4 ms"),
    ),
    "edge2": (
        b"2026/07/01 10:00:00 [emerg] 7#7: *5 [lua] renewal.lua:56: no lease, context: ngx.timer",
        ("2026-07-01T10:00:00.000Z", "error", "*5 [lua] renewal.lua:56: no lease, context: ngx.timer"),
    ),
    "edge3": (b"nginx: [emerg] bind() failed", (None, "critical", "bind() failed")),
    "redis": (
        b"12:M 01 Jul 2026 10:00:00.500 # Server initialized",
        ("2026-07-01T10:00:00.500Z", "info", "Server initialized"),
    ),
    "redis2": (
        b"12:signal-handler (1782900000) Received SIGTERM scheduling shutdown...",
        ("2026-07-01T10:00:00.000Z", "info", "Received SIGTERM scheduling shutdown..."),
    ),
    "postgres": (
        b"2026-07-01 10:00:00.750 UTC [12] velikiy writes ERROR:  division by zero",
        ("2026-07-01T10:00:00.750Z", "error", "division by zero"),
    ),
    "prometheus": (
        b'{"caller":"main.go:1","level":"warn","msg":"Slow","ts":"2026-07-01T10:00:00.100Z"}',
        ("2026-07-01T10:00:00.100Z", "warning", "Slow"),
    ),
    "relay": (b"Traceback (most recent call last):", (None, "error", "Traceback (most recent call last):")),
}


@pytest.mark.parametrize("process", FORMS)
def test_each_form_of_line_is_read_with_time_level_and_message(process: str) -> None:
    line, (moment, level, message) = FORMS[process]
    read = json.loads(parse(process, line).json())
    assert (read["time"], read["level"], read["process"], read["message"]) == (moment, level, process, message)


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b'{"level":5,"time":[],"status":"x"}', b"\xff\xfe\x00", b"\tat x"])
def test_line_of_an_unknown_form_is_shown_whole(line: bytes) -> None:
    read = json.loads(parse("app1", line).json())
    assert read["process"] == "app1"
    assert read["level"] in log_lines.LEVELS
    if not line.startswith(b'{"'):
        assert read["message"].encode().decode("unicode_escape").encode("latin-1") == line


def test_message_of_postgres_with_several_lines_is_one_entry() -> None:
    lines = (b"2026-07-01 10:00:00.750 UTC [12] FATAL:  first\n\tsecond\n12:M 01 Jul 2026 10:00:00.500 * third").split(
        b"\n"
    )
    assert [entry.message for entry in log_lines.entries("postgres", lines)] == ["first\nsecond", "third"]


# ---- showing ----


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """Show the logs of `tmp_path`, and return the lines."""

    def show_logs(prefix: str = "", *, last: int | None = None, as_json: bool = False, **chosen: object) -> list[str]:
        show(tmp_path, Choice(prefix, **chosen), last=last, as_json=as_json, follow=False)  # type: ignore[arg-type]
        return capsys.readouterr().out.splitlines()

    return show_logs


def at(second: float, **fields: object) -> str:
    """Return the line of an app in this second of an hour."""
    moment = f"2026-07-01T10:{int(second) // 60:02}:{second % 60:09.6f}Z"
    return json.dumps({"time": moment, "level": "info", "event": "e", **fields}) + "\n"


def messages(lines: list[str]) -> list[str]:
    return [json.loads(line)["message"] for line in lines]


def test_logs_of_all_processes_are_merged_by_time(tmp_path: Path, shown: Show) -> None:
    (tmp_path / "app1.log").write_text(at(2, event="b") + at(4, event="d"))
    (tmp_path / "edge1.log").write_text(at(5, event="e") + at(3, event="c"))  # an edge writes a second of lines at once
    (tmp_path / "redis.log").write_text("12:M 01 Jul 2026 10:00:01.000 * a\n")
    assert messages(shown(as_json=True)) == ["a", "b", "c", "d", "e"]
    assert messages(shown(as_json=True, last=2)) == ["d", "e"]
    assert messages(shown("app", as_json=True)) == ["b", "d"]


def test_rotated_files_are_read_in_their_order(tmp_path: Path, shown: Show) -> None:
    for number in range(12):
        name = f"app1.log.{11 - number}" if number < 11 else "app1.log"
        (tmp_path / name).write_text(at(number, event=str(number)))
    assert messages(shown(as_json=True)) == [str(number) for number in range(12)]
    assert messages(shown(as_json=True, last=11)) == [str(number) for number in range(1, 12)]


def test_line_that_a_rotation_has_divided_is_whole(tmp_path: Path, shown: Show) -> None:
    line = at(1, event="whole")
    (tmp_path / "app1.log.1").write_text(at(0) + line[:20])
    (tmp_path / "app1.log").write_text(line[20:] + at(2))
    assert messages(shown(as_json=True)) == ["e", "whole", "e"]
    assert messages(shown(as_json=True, last=3)) == ["e", "whole", "e"]


def test_level_hides_the_lines_below(tmp_path: Path, shown: Show) -> None:
    (tmp_path / "app1.log").write_text(
        "".join(at(n, level=level, event=level) for n, level in enumerate(log_lines.LEVELS))
    )
    assert messages(shown(as_json=True, level="warning")) == ["warning", "error", "critical"]


def test_since_finds_its_place_in_a_long_file(tmp_path: Path, shown: Show) -> None:
    (tmp_path / "app1.log").write_text("".join(at(n / 10, event=str(n)) for n in range(30_000)))
    since = log_view.moment("2026-07-01T10:49:59Z")
    assert messages(shown(as_json=True, since=since)) == [str(n) for n in range(29_990, 30_000)]


def test_since_takes_spans_and_moments() -> None:
    assert log_view.moment("10m", now=1000) == 400
    assert log_view.moment("1h30m", now=10_000) == 4600
    assert log_view.moment("2026-07-01T10:00:00Z") == log_view.moment("2026-07-01T12:00:00+02:00")
    for wrong in ("soon", "10", "", "m", "1h junk"):
        with pytest.raises(ValueError, match="Invalid isoformat"):
            log_view.moment(wrong)


def test_request_is_found_in_all_logs_and_rotated_files(tmp_path: Path, shown: Show) -> None:
    own = {"request_id": "a-1"}
    (tmp_path / "edge1.log.2").write_text(at(10, event="request", method="PUT", path="/users/7", status=409, **own))
    (tmp_path / "edge1.log").write_text(at(50) + at(51, event="a-1"))
    (tmp_path / "app1.log.1").write_text(
        at(9, event="warned", **own) + at(10, event="done", milliseconds=900, postgres_pid=12, **own)
    )
    (tmp_path / "app1.log").write_text(at(60, request_id="a-12"))
    (tmp_path / "postgres.log").write_text(
        "2026-07-01 10:00:08.000 UTC [12] ERROR:  before\n"
        "2026-07-01 10:00:09.500 UTC [13] ERROR:  another session\n"
        "2026-07-01 10:00:09.500 UTC [12] ERROR:  duplicate key\n"
        "2026-07-01 10:00:19.500 UTC [12] ERROR:  after\n"
    )
    found = messages(shown(as_json=True, request="a-1"))
    assert found == ["warned", "duplicate key", "PUT /users/7 409", "done"] or found == [
        *("warned", "duplicate key", "done", "PUT /users/7 409")
    ]


def test_supervisor_lines_about_a_process_are_shown_with_it(tmp_path: Path, shown: Show) -> None:
    (tmp_path / "app1.log").write_text(at(1))
    (tmp_path / "supervisord.log").write_text(
        "2026-07-01 10:00:00,123 WARN exited: app1 (terminated by SIGKILL; not expected)\n"
        "2026-07-01 10:00:00,124 INFO spawned: 'edge1' with pid 77\n"
    )
    lines = shown("app1", as_json=True)
    assert sorted(messages(lines)) == ["e", "exited: app1 (terminated by SIGKILL; not expected)"]
    assert len(shown("supervisor")) == 2


def test_line_for_people_has_no_commands_for_the_terminal(tmp_path: Path, shown: Show) -> None:
    (tmp_path / "app1.log").write_text(at(1, event="bad \x1b[2J", exception="Traceback:\n  File\nKeyError: \x9b"))
    first, *traceback = shown()
    assert first == r"2026-07-01T10:00:01.000Z app1       info     bad \x1b[2J"
    assert traceback == ["    Traceback:", "      File", r"    KeyError: \x9b"]


def test_colours_are_for_terminals_without_no_color(
    tmp_path: Path, shown: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app1.log").write_text(at(1, level="error"))
    assert "\033" not in shown()[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[31merror" in shown()[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown()[0]


def test_damaged_and_long_files_are_shown_and_take_little_memory(tmp_path: Path, shown: Show) -> None:
    with (tmp_path / "app1.log").open("wb") as file:
        file.write(at(1, event="first").encode())
        file.truncate(300_000_000)  # a hole of zeros, as after a crash
        file.seek(0, 2)
        file.write(b"\n" + at(2, event="last").encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [log] = open_logs(tmp_path)
    assert next(log.backwards()).message == "last"
    assert messages(shown(as_json=True, level="debug", last=1)) == ["last"]
    found = [entry.message[:5] for entry in log.forwards(may_matter=lambda line: b'"' in line)]
    assert found == ["first", "last"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # kB


def test_new_lines_are_followed_through_several_rotations_at_once(tmp_path: Path) -> None:
    file = tmp_path / "app1.log"
    file.write_text(at(0, event="old") + at(1)[:10])
    [log] = open_logs(tmp_path, following=True)
    with file.open("a") as stream:
        stream.write(at(1)[10:])
    assert [entry.message for entry in log.new()] == ["e"]
    with file.open("a") as stream:
        stream.write(at(2, event="2"))
    for number in (3, 4, 5):
        for old in (2, 1):
            if (older := tmp_path / f"app1.log.{old}").exists():
                older.rename(tmp_path / f"app1.log.{old + 1}")
        file.rename(tmp_path / "app1.log.1")
        file.write_text(at(number, event=str(number)))
    assert [entry.message for entry in log.new()] == ["2", "3", "4", "5"]
    assert log.new() == []


def test_foreground_shows_the_lines_since_the_start_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app1.log").write_text(at(1, event="of the run before") + at(61, event="started"))
    rounds = iter([False, True])

    def is_over() -> bool:
        with (tmp_path / "app1.log").open("a") as file:
            file.write(at(62, event="new"))
        return next(rounds)

    log_view.follow_from(tmp_path, log_view.moment("2026-07-01T10:01:00Z"), is_over)
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()] == ["started", "new"]


# ---- supervisor's side ----


def record(data: bytes) -> object:
    return loggers.LogRecord(20, data)


def test_supervisor_wraps_text_and_leaves_json_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = supervisord.JsonFile(str(tmp_path / "logs" / "redis.log"), "a", 10_000, 1)
    for piece in (b'{"a":1}\n', b'{"b"', b":2}\nplain", b" text\n", b"12:M 01 Jul 2026 10:00:00.500 * ready\nno end"):
        log.emit(record(piece))
    log.end()
    wait_until(lambda: "no end" in (tmp_path / "logs" / "redis.log").read_text())
    lines = (tmp_path / "logs" / "redis.log").read_text().splitlines()
    assert lines[:2] == ['{"a":1}', '{"b":2}']
    read = [json.loads(line) for line in lines[2:]]
    assert [line["message"] for line in read] == ["plain text", "ready", "no end"]
    assert read[1]["time"] == "2026-07-01T10:00:00.500Z"
    assert abs(log_view.moment(read[0]["time"]) - time.time()) < 5


def test_rotation_follows_the_settings_while_supervisor_runs(tmp_path: Path) -> None:
    logs, rotation = tmp_path / "logs", tmp_path / "run" / "log_rotation"
    logs.mkdir()
    rotation.parent.mkdir()
    rotation.write_text("1 3\n")
    log = supervisord.JsonFile(str(logs / "app1.log"), "a", 10_000_000, 10)
    for _ in range(5):
        log.emit(record(b'{"a":"' + b"x" * 1_000_000 + b'"}\n'))
    log.emit(record(b'{"last":1}\n'))
    wait_until(lambda: (logs / "app1.log").exists() and (logs / "app1.log").read_text() == '{"last":1}\n')
    assert log_files.names(logs) == ["app1"]
    assert sorted(file.name for file in logs.iterdir()) == ["app1.log", "app1.log.1", "app1.log.2"]
    rotation.write_text("1 1\n")
    log.next_look = 0
    log.emit(record(b'{"a":1}\n'))
    wait_until(lambda: [file.name for file in logs.iterdir()] == ["app1.log"])


def test_lines_that_a_stalled_disk_does_not_take_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    log = supervisord.JsonFile(str(tmp_path / "logs" / "app1.log"), "a", 10_000_000, 1)
    disk_goes_on = threading.Event()
    append = log.append
    monkeypatch.setattr(log, "append", lambda lines: disk_goes_on.wait(20) and append(lines))
    monkeypatch.setattr(supervisord, "MAX_WAITING_BYTES", 5 * supervisord.PIECE_BYTES)
    for number in range(50):
        log.emit(record(b'{"number":%d}\n' % number))
    disk_goes_on.set()
    file = tmp_path / "logs" / "app1.log"
    wait_until(lambda: "lost" in file.read_text())
    *written, report = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["number"] for line in written] == [0, 1, 2, 3]
    assert (report["message"], report["level"]) == ("lost 46 lines of app1: the disk of the logs stalled", "warning")


@pytest.mark.parametrize("end", [b'{"time":"3"}\n', b"\n"])
def test_line_of_an_edge_that_was_cut_off_is_reported(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "logs").mkdir()
    log = supervisord.JsonFile(str(tmp_path / "logs" / "edge1.log"), "a", 10_000_000, 1)
    log.emit(record(b'{"time":"1"}\n{"time":"2","pa' + end + b'{"time":"4"}\n'))
    file = tmp_path / "logs" / "edge1.log"
    wait_until(lambda: '{"time":"4"}' in file.read_text())
    read = [json.loads(line) for line in file.read_text().splitlines()]
    [report] = [line for line in read if "message" in line]
    assert (report["message"], report["level"]) == ("lost lines of edge1: the pipe to supervisor was full", "warning")
    assert [line["time"] for line in read if "message" not in line] == (["1", "3", "4"] if b"3" in end else ["1", "4"])
