"""Rejected rows and exports on stdout, stderr, FIFOs and pipes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from testkit.stack import ROOT, Stack, clean_environment
from tests.bulk.commands import (
    CSV_WITH_A_REJECTED_LINE,
    count_users,
    read_rejects,
    run_import,
    run_in_shell,
    run_users,
    stderr_of,
)


@pytest.mark.parametrize("stream", ["-", "/dev/stdout", "$log"])
@pytest.mark.parametrize("redirected", [">", ">>"])
def test_rejects_are_appended_to_a_stdout_that_is_redirected_into_a_file(
    bulk_stack: Stack, tmp_path: Path, stream: str, redirected: str
) -> None:
    file, log = tmp_path / "a.csv", tmp_path / "log"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    log.write_bytes(b"an older line\n" if redirected == ">>" else b"")
    command = f"{{ echo before; $users import $file --rejects {stream}; echo after; }} {redirected} $log"
    for lines in ([3], [2, 3]):
        existing = log.read_bytes() if redirected == ">>" else b""
        completed = run_in_shell(bulk_stack, command, file=file, log=log)
        assert log.read_bytes().startswith(existing + b"before\n{")
        first, *rows, last = log.read_bytes().removeprefix(existing).splitlines()
        assert (first, last) == (b"before", b"after")
        assert [json.loads(row)["line"] for row in rows] == lines
        assert "rejected" in stderr_of(completed)


def test_rejects_are_appended_to_a_stderr_that_is_redirected_into_a_file(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    (tmp_path / "log").write_bytes(b"before\n")
    run_in_shell(bulk_stack, "cd $folder; $users import a.csv --rejects /dev/stderr 2>> log", folder=tmp_path)
    before, row, summary = (tmp_path / "log").read_text().splitlines()
    assert (before, json.loads(row)["line"]) == ("before", 3)
    assert summary == "imported 1, rejected 1 → /dev/stderr"
    run_in_shell(bulk_stack, "cd $folder; $users import a.csv --rejects - > out 2> messages", folder=tmp_path)
    assert (tmp_path / "messages").read_text() == "imported 0, rejected 2 → stdout\n"
    assert [reject["line"] for reject in read_rejects(tmp_path / "out")] == [2, 3]


@pytest.mark.parametrize("stream", ["-", "/dev/stdout"])
def test_json_summary_and_rejects_cannot_share_stdout(bulk_stack: Stack, tmp_path: Path, stream: str) -> None:
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    completed = run_import(bulk_stack, tmp_path / "a.csv", "--json", "--rejects", stream, code=2)
    assert completed.stdout == b""
    assert "--json and --rejects both write to stdout" in stderr_of(completed)
    assert count_users(bulk_stack) == 0


@pytest.mark.parametrize("command", ["$users import $file --rejects /dev/full", "$users import $file --rejects - | :"])
def test_import_has_no_effect_if_its_rejects_cannot_be_written(bulk_stack: Stack, tmp_path: Path, command: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    completed = run_in_shell(bulk_stack, f"set -o pipefail; {command}", file=file)
    assert completed.returncode == 3
    assert stderr_of(completed).rpartition(": ")[2] in ("No space left on device\n", "Broken pipe\n")
    assert count_users(bulk_stack) == 0
    completed = run_import(bulk_stack, file, "--rejects", "-", code=1)
    assert json.loads(completed.stdout)["line"] == 3


def test_fifo_receives_rejects_and_exports_and_remains(bulk_stack: Stack, tmp_path: Path) -> None:
    file, fifo = tmp_path / "a.csv", tmp_path / "fifo"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    os.mkfifo(fifo)
    for arguments, code, expected in (
        (("import", file, "--rejects", fifo), 1, b'{"line":3,'),
        (("export", "--format", "ndjson", fifo), 0, b'{"id":'),
    ):
        with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
            completed = run_users(bulk_stack, *arguments)
            assert completed.returncode == code, stderr_of(completed)
            assert reader.stdout is not None
            assert reader.stdout.read().startswith(expected)
    assert fifo.is_fifo()
    run_import(bulk_stack, file, "--rejects", "/dev/null", code=1)
    assert Path("/dev/null").is_char_device()


def test_export_writes_into_a_process_substitution_and_appends_to_stdout(bulk_stack: Stack, tmp_path: Path) -> None:
    run_users(bulk_stack, "seed", "--count", 20)
    log, out = tmp_path / "log", tmp_path / "out"
    command = "{ echo before; $users export --format ndjson /dev/stdout; echo after; } > $log"
    assert run_in_shell(bulk_stack, command, log=log).returncode == 0
    assert log.read_bytes().startswith(b'before\n{"id":')
    assert log.read_bytes().count(b"\n") == 22
    completed = run_in_shell(
        bulk_stack, "$users export --format ndjson >(cat > $out); code=$?; wait $!; exit $code", out=out
    )
    assert completed.returncode == 0, stderr_of(completed)
    assert out.read_bytes().count(b"\n") == 20


def test_export_ends_quietly_if_its_pipe_closes(bulk_stack: Stack) -> None:
    run_users(bulk_stack, "seed", "--count", 5000)
    command = f"{ROOT}/run velikiy users export | head -n 2"
    completed = subprocess.run(
        ["bash", "-c", command],
        env=clean_environment(DATA=str(bulk_stack.data)),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert completed.stdout.startswith(b"id,name,email,created_at,updated_at,version\n")
    assert completed.stdout.count(b"\n") == 2
    assert completed.stderr == b""
