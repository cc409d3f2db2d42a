"""The file of rejected rows: which files are replaced, refused, locked and removed."""

import errno
import fcntl
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testkit.stack import ROOT, Stack, clean_environment
from tests.bulk.commands import (
    CSV_WITH_A_REJECTED_LINE,
    LONG_NAME,
    REJECTED_LINE,
    count_users,
    csv_of_people,
    fingerprint,
    mode_of,
    names_in_order,
    read_rejects,
    run_import,
    run_in_shell,
    run_users,
    start_import_and_await_progress,
    stderr_of,
    with_invalid_lines,
)
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.readers import Row
from velikiy.bulk.rejects import Rejects


def test_rejects_of_stdin_are_written_into_the_working_directory(bulk_stack: Stack, tmp_path: Path) -> None:
    completed = run_users(bulk_stack, "import", "-", given=b"name,email\nA,b\n", cwd=tmp_path)
    assert stderr_of(completed) == "imported 0, rejected 1 → import.rejects.ndjson\n"
    assert read_rejects(tmp_path / "import.rejects.ndjson")[0]["line"] == 2


@pytest.mark.parametrize(
    "content",
    [
        b"notes\n",
        b"\n" + REJECTED_LINE,
        b'{"name": "Alice", "email": "alice@example.com"}\n',
        b'{"line": 1, "errors": [], "row": {}, "mine": true}\n',
        b'["line", "errors", "row"]\n',
        b'{"line":1,"errors":[],"row":',
        b"\x1f\x8b\0\xff",
        b"[" * 100_000,
    ],
)
def test_file_without_rejected_rows_is_refused_as_rejects_and_unchanged(
    bulk_stack: Stack, tmp_path: Path, content: bytes
) -> None:
    file, notes = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    notes.write_bytes(content)
    notes.chmod(0o604)
    before = fingerprint(notes)
    completed = run_import(bulk_stack, file, code=2)
    assert stderr_of(completed) == (
        f"velikiy users import: {notes} does not begin with a rejected row, so it is not overwritten: move it away, or"
        " choose another file with --rejects\n"
    )
    assert fingerprint(notes) == before
    assert count_users(bulk_stack) == 0


def test_refused_rejects_file_keeps_the_progress_of_an_interrupted_import(bulk_stack: Stack, tmp_path: Path) -> None:
    content = csv_of_people(35_000, LONG_NAME)
    start_import_and_await_progress(bulk_stack, content[:2_400_000]).kill()
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "notes").write_bytes(b"notes\n")
    before = bulk_stack.sql("SELECT * FROM imports")
    for arguments in ((), ("--restart",)):
        completed = run_import(bulk_stack, tmp_path / "a.csv", "--rejects", tmp_path / "notes", *arguments, code=2)
        assert stderr_of(completed).count("\n") == 1
        assert bulk_stack.sql("SELECT * FROM imports") == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_imported_file_is_refused_as_rejects_under_any_name(
    bulk_stack: Stack, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    file, other = tmp_path / "a.ndjson", tmp_path / "other.ndjson"
    # Its content would pass as rejected rows, and it has the columns of users.
    file.write_bytes(REJECTED_LINE + b'{"name": "Alice", "email": "alice@example.com"}\n')
    link(file, other)
    before = fingerprint(file)
    for command in (
        "$users import $file --rejects $file",
        "$users import $file --rejects $other",
        "$users import $other --rejects $file",
        "$users import - --rejects $other < $file",
        "$users import $file --rejects /dev/fd/7 7< $file",
        "$users import $file --rejects - >> $file",
    ):
        completed = run_in_shell(bulk_stack, command, file=file, other=other)
        assert (completed.returncode, stderr_of(completed).count("\n")) == (2, 1)
        assert "is the file to import: choose another file with --rejects" in stderr_of(completed)
        assert fingerprint(file) == before
    assert count_users(bulk_stack) == 0


def test_symlink_to_rejects_remains_a_symlink(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    (tmp_path / "aside").write_bytes(REJECTED_LINE)
    (tmp_path / "link").symlink_to("aside")
    run_import(bulk_stack, tmp_path / "a.csv", "--rejects", tmp_path / "link", code=1)
    assert [reject["line"] for reject in read_rejects(tmp_path / "aside")] == [3]
    (tmp_path / "b.csv").write_bytes(csv_of_people(5))
    run_import(bulk_stack, tmp_path / "b.csv", "--rejects", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "aside").read_bytes() == b""


def test_import_replaces_earlier_rejects_and_removes_the_file_if_it_rejects_no_row(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file, rejects = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    rejects.write_bytes(REJECTED_LINE * 1000)
    rejects.chmod(0o640)
    run_import(bulk_stack, file, code=1)
    assert [reject["line"] for reject in read_rejects(rejects)] == [3]
    run_import(bulk_stack, file, code=1)
    assert [reject["line"] for reject in read_rejects(rejects)] == [2, 3]
    assert mode_of(rejects) == 0o640
    file.write_bytes(csv_of_people(5))
    run_import(bulk_stack, file)
    assert not rejects.exists()


def test_existing_empty_rejects_file_is_written_and_never_removed(bulk_stack: Stack, tmp_path: Path) -> None:
    file, rejects = tmp_path / "a.csv", tmp_path / "aside"
    rejects.touch()
    file.write_bytes(csv_of_people(5))
    run_import(bulk_stack, file, "--rejects", rejects)
    assert rejects.read_bytes() == b""
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    run_import(bulk_stack, file, "--rejects", rejects, code=1)
    assert [reject["line"] for reject in read_rejects(rejects)] == [3]


def test_file_that_was_renamed_over_the_rejects_is_not_removed(bulk_stack: Stack, tmp_path: Path) -> None:
    content, rejects = csv_of_people(35_000, LONG_NAME), tmp_path / "aside"
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    (tmp_path / "empty").touch()
    (tmp_path / "empty").rename(rejects)
    before = fingerprint(rejects)
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert fingerprint(rejects) == before


def test_rejects_file_swapped_before_its_opening_is_refused_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejects, notes, source = tmp_path / "aside", tmp_path / "notes", tmp_path / "a.csv"
    rejects.write_bytes(REJECTED_LINE)
    notes.write_bytes(b"notes\n")
    source.write_bytes(CSV_WITH_A_REJECTED_LINE)
    before = notes.read_bytes(), notes.stat().st_mtime_ns
    real_open = os.open

    def opened(path: str, flags: int, mode: int) -> int:
        if not flags & os.O_EXCL:
            notes.rename(rejects)  # between the check and the opening
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    with io.FileIO(source) as raw, pytest.raises(CannotImport, match="does not begin with a rejected row"):
        Rejects(str(rejects), 0, raw)
    assert (rejects.read_bytes(), rejects.stat().st_mtime_ns) == before


def test_rejects_file_of_a_running_import_is_refused_to_another_import(bulk_stack: Stack, tmp_path: Path) -> None:
    content, rejects = with_invalid_lines(csv_of_people(35_000, LONG_NAME), 3), tmp_path / "aside"
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    (tmp_path / "b.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    (tmp_path / "link").symlink_to(rejects)
    for name in ("aside", "link"):
        completed = run_import(bulk_stack, tmp_path / "b.csv", "--rejects", tmp_path / name, code=2)
        assert stderr_of(completed) == (
            f"velikiy users import: {tmp_path / name} is in use by another import: wait for its end, or choose"
            " another file with --rejects\n"
        )
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    assert [reject["line"] for reject in read_rejects(rejects)] == [3]
    assert "Alice" not in names_in_order(bulk_stack)
    run_import(bulk_stack, tmp_path / "b.csv", "--rejects", rejects, code=1)


def test_rejects_are_written_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    with io.FileIO(tmp_path / "a.csv") as raw, Rejects(str(tmp_path / "aside"), 0, raw) as rejects:
        rejects.write([Row(7, {}, [], [])])
    assert [reject["line"] for reject in read_rejects(tmp_path / "aside")] == [7]


def test_rejected_row_that_exceeds_the_disk_leaves_no_rejects_file(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_bytes(b'{"name": "%s", "email": ""}\n' % (b"x" * 50_000))
    completed = run_in_shell(bulk_stack, "ulimit -f 16; $users import $file", file=file)
    assert (completed.returncode, "File too large" in stderr_of(completed)) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ndjson"]
    run_import(bulk_stack, file, code=1)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_only_the_owner_can_read_new_rejects_and_exports(bulk_stack: Stack, tmp_path: Path, umask: int) -> None:
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    environment = clean_environment(PYTHONPATH=str(ROOT), SECRETS_DIR=str(bulk_stack.supervisor.plan.secrets_folder))
    for arguments in (("import", "a.csv"), ("export", "out.csv"), ("export", "out.ndjson.gz")):
        subprocess.run(
            [sys.executable, "-P", "-B", "-m", "velikiy", "users", *arguments],
            env=environment,
            cwd=tmp_path,
            umask=umask,
            capture_output=True,
            timeout=60,
            check=False,
        )
    for name in ("a.csv.rejects.ndjson", "out.csv", "out.ndjson.gz"):
        assert mode_of(tmp_path / name) == 0o600
    assert b"alice@example.com" in (tmp_path / "out.csv").read_bytes()
