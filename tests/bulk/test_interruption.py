"""Imports and exports that are killed, interrupted by a signal, or lose their terminal."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from testkit.stack import ROOT, Stack, clean_environment, wait_until
from tests.bulk.commands import (
    EXIT_CODES,
    LONG_NAME,
    count_users,
    csv_of_people,
    names_in_order,
    read_rejects,
    run_import,
    start_import_and_await_progress,
    start_users,
    stderr_of,
    with_invalid_lines,
)


def test_killed_import_continues_without_losing_or_repeating_a_row(bulk_stack: Stack, tmp_path: Path) -> None:
    content, rejects = with_invalid_lines(csv_of_people(35_000, LONG_NAME), 3, 15_000, 34_000), tmp_path / "aside"
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    process.kill()
    process.wait()
    assert 20_000 - 2 <= count_users(bulk_stack) < 30_000
    with rejects.open("a") as file:
        file.write('{"line": 20005, "errors"')  # half of a row, from a chunk that was not committed
    (tmp_path / "a.csv").write_bytes(content)
    completed = run_import(bulk_stack, tmp_path / "a.csv", "--rejects", rejects, "--json", code=1)
    assert "continuing after line 20,001\n" in stderr_of(completed)
    summary = json.loads(completed.stdout)
    assert (summary["imported"], summary["rejected"], summary["continued_after"]) == (34_997, 3, 20_001)
    assert [reject["line"] for reject in read_rejects(rejects)] == [3, 15_000, 34_000]
    assert bulk_stack.sql("SELECT count(*), count(DISTINCT email) FROM users") == [(34_997, 34_997)]
    assert bulk_stack.sql("SELECT lines FROM imports") == []


def test_import_that_was_killed_during_a_chunk_continues(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv_of_people(50_000)))
    process = start_users(bulk_stack, "import", tmp_path / "a.csv.gz")
    wait_until(lambda: bulk_stack.sql("SELECT lines FROM imports"), every=0.01)
    process.kill()
    process.wait()
    assert "continuing after line" in stderr_of(run_import(bulk_stack, tmp_path / "a.csv.gz"))
    assert bulk_stack.sql("SELECT count(*), count(DISTINCT email) FROM users") == [(50_000, 50_000)]


@pytest.mark.parametrize("changed", ["gone", "empty", "cut in a row", "cut"])
def test_import_continues_if_its_rejects_were_lost_and_reports_the_loss(
    bulk_stack: Stack, tmp_path: Path, changed: str
) -> None:
    content, rejects = with_invalid_lines(csv_of_people(35_000, LONG_NAME), 3, 5, 34_000), tmp_path / "aside"
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    process.kill()
    process.wait()
    first = len(rejects.read_bytes().splitlines(keepends=True)[0])
    if changed == "gone":
        rejects.unlink()
    else:
        os.truncate(rejects, {"empty": 0, "cut in a row": first + 20, "cut": first}[changed])
    (tmp_path / "a.csv").write_bytes(content)
    completed = run_import(bulk_stack, tmp_path / "a.csv", "--rejects", rejects, code=1)
    assert "continuing after line 20,001\n" in stderr_of(completed)
    assert f"{rejects} does not contain the rows that were rejected before the interruption\n" in stderr_of(completed)
    assert [reject["line"] for reject in read_rejects(rejects)] == [34_000]
    kept = tmp_path / "aside.1"
    assert kept.exists() == ("cut" in changed)
    if kept.exists():
        assert f"kept the rejected rows of another import as {kept}\n" in stderr_of(completed)
        assert json.loads(kept.read_bytes()[:first])["line"] == 3


@pytest.mark.parametrize("signal_number", EXIT_CODES)
def test_signal_ends_an_import_after_its_chunk_with_advice_how_to_continue(
    bulk_stack: Stack, tmp_path: Path, signal_number: signal.Signals
) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of_people(30_000))
    with psycopg.connect(bulk_stack.postgres) as other:
        other.execute("INSERT INTO users (name, email) VALUES ('Other', 'person5@example.com')")
        process = start_users(bulk_stack, "import", tmp_path / "a.csv")
        wait_until(lambda: bulk_stack.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(signal_number)
        other.rollback()
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODES[signal_number]
    assert b"lines 1 to 10,001 are done; to continue after them, run the same command again" in error
    assert error.endswith(b"interrupted\n")
    assert b"Traceback" not in error
    assert count_users(bulk_stack) == 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert "continuing after line 10,001" in stderr_of(run_import(bulk_stack, tmp_path / "a.csv"))
    assert names_in_order(bulk_stack) == [f"Person {n}" for n in range(30_000)]


def test_ctrl_c_ends_an_import_that_waits_for_a_silent_pipe(bulk_stack: Stack) -> None:
    process = start_import_and_await_progress(bulk_stack, csv_of_people(35_000, LONG_NAME)[:2_400_000])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_import_under_nohup_survives_the_end_of_its_terminal(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of_people(30_000))
    with psycopg.connect(bulk_stack.postgres) as other:
        other.execute("INSERT INTO users (name, email) VALUES ('Other', 'person5@example.com')")
        process = subprocess.Popen(
            ["nohup", ROOT / "run", "velikiy", "users", "import", tmp_path / "a.csv"],
            env=clean_environment(DATA=str(bulk_stack.data)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: bulk_stack.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(signal.SIGHUP)
        other.rollback()
    assert process.wait(timeout=60) == 0
    assert count_users(bulk_stack) == 30_000


def test_changed_file_is_imported_from_its_first_line(bulk_stack: Stack, tmp_path: Path) -> None:
    content = csv_of_people(35_000, LONG_NAME)
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000])
    process.kill()
    process.wait()
    changed = content.replace(b"person19999@", b"changed@")
    assert "with --restart" in stderr_of(run_import(bulk_stack, "-", given=changed, code=2))
    (tmp_path / "a.csv").write_bytes(changed)
    completed = run_import(bulk_stack, tmp_path / "a.csv", code=1)
    assert "has changed since its import was interrupted after line 20,001: starting at line 1" in stderr_of(completed)
    assert f"imported {35_000 - 20_000 + 1:,}, rejected 19,999" in stderr_of(completed)


def test_file_that_is_being_imported_is_refused_to_another_import(bulk_stack: Stack, tmp_path: Path) -> None:
    content = csv_of_people(35_000, LONG_NAME)
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000])
    (tmp_path / "a.csv").write_bytes(content)
    assert "another import of this file is running" in stderr_of(run_import(bulk_stack, tmp_path / "a.csv", code=2))
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert count_users(bulk_stack) == 35_000


EXIT_WHILE_PREFETCHING = """
import itertools, sys
from velikiy.resources.base import registry
from velikiy.bulk.prefetch import prefetch
from velikiy.bulk.seeder import _seed_chunks
for rows in prefetch(_seed_chunks(registry()["users"], itertools.count(1))):
    sys.exit(130)
"""


def test_process_exits_cleanly_while_a_thread_prefetches() -> None:
    for _ in range(5):  # an exit that is not clean crashes in more than half of the runs
        completed = subprocess.run(
            [sys.executable, "-P", "-c", EXIT_WHILE_PREFETCHING], cwd=ROOT, capture_output=True, check=False
        )
        assert (completed.returncode, completed.stderr) == (130, b"")


@pytest.mark.parametrize("signal_number", EXIT_CODES)
@pytest.mark.parametrize("before", ["before", None])
def test_signal_ends_an_export_and_leaves_the_old_file_and_no_partial_file(
    bulk_stack: Stack, tmp_path: Path, signal_number: signal.Signals, before: str | None
) -> None:
    folder, file = tmp_path / "exports", tmp_path / "exports" / "a.csv.gz"
    folder.mkdir()
    if before:
        file.write_text(before)
    with psycopg.connect(bulk_stack.postgres) as other:
        other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        process = start_users(bulk_stack, "export", file)
        wait_until(lambda: [path for path in folder.iterdir() if path != file], what="a partial file")
        wait_until(lambda: bulk_stack.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(signal_number)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (EXIT_CODES[signal_number], b"velikiy users export: interrupted\n")
    assert {path.name: path.read_text() for path in folder.iterdir()} == ({file.name: before} if before else {})


def test_end_of_the_terminal_ends_an_export_and_leaves_the_old_file(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("before")
    terminal, end = os.openpty()
    with psycopg.connect(bulk_stack.postgres) as other:
        other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            ["setsid", "--ctty", ROOT / "run", "velikiy", "users", "export", file],
            env=clean_environment(DATA=str(bulk_stack.data), TERM="xterm"),
            stdin=end,
            stdout=end,
            stderr=end,
        )
        os.close(end)
        wait_until(lambda: bulk_stack.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        os.close(terminal)  # the progress bar and the last message have no terminal left
        assert process.wait(timeout=20) == EXIT_CODES[signal.SIGHUP]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "before"}
