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


def test_import_keeps_earlier_rejects_and_leaves_no_file_if_it_rejects_no_row(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file, rejects = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    rejects.write_bytes(REJECTED_LINE * 1000)
    rejects.chmod(0o640)
    first = run_import(bulk_stack, file, code=1)
    assert [reject["line"] for reject in read_rejects(rejects)] == [3]
    kept = [tmp_path / f"a.csv.rejects.{n}.ndjson" for n in (1, 2, 3)]
    assert f"kept the rejected rows of another import as {kept[0]}\n" in stderr_of(first)
    assert kept[0].read_bytes() == REJECTED_LINE * 1000
    run_import(bulk_stack, file, code=1)
    assert [reject["line"] for reject in read_rejects(kept[1])] == [3]
    assert [reject["line"] for reject in read_rejects(rejects)] == [2, 3]
    assert mode_of(rejects) == 0o640
    file.write_bytes(csv_of_people(5))
    run_import(bulk_stack, file)
    assert not rejects.exists()
    assert [reject["line"] for reject in read_rejects(kept[2])] == [2, 3]
    assert [mode_of(path) for path in kept] == [0o640] * 3


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
        Rejects(str(rejects), 0, b"", raw)
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
    with io.FileIO(tmp_path / "a.csv") as raw, Rejects(str(tmp_path / "aside"), 0, b"", raw) as rejects:
        rejects.write([Row(7, {}, [], [])])
    assert [reject["line"] for reject in read_rejects(tmp_path / "aside")] == [7]


def test_rejected_row_that_exceeds_the_disk_leaves_no_rejects_file(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_bytes(b'{"name": "%s", "email": ""}\n' % (b"x" * 50_000))
    completed = run_in_shell(bulk_stack, "ulimit -f 16; $users import $file", file=file)
    assert (completed.returncode, "File too large" in stderr_of(completed)) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ndjson"]
    run_import(bulk_stack, file, code=1)


def test_full_disk_ends_an_import_with_3_and_keeps_the_rejects_of_committed_chunks(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file, rejects = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    lines = csv_of_people(20_000).splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"bad,row\n", *lines[1:15_000], *[b"%s,bad\n" % (b"x" * 90)] * 500]))
    completed = run_in_shell(bulk_stack, "ulimit -f 16; $users import $file", file=file)
    assert completed.returncode == 3
    assert "lines 1 to 10,001 are done" in stderr_of(completed)
    assert [reject["line"] for reject in read_rejects(rejects)] == [2]
    run_import(bulk_stack, file, code=1)
    assert len(read_rejects(rejects)) == 501
    assert [path.name for path in tmp_path.iterdir() if path not in (file, rejects)] == []


@pytest.mark.parametrize("spelling", ["a.csv", "./a.csv", "../{folder}/a.csv", "{path}"])
def test_imported_file_is_refused_as_rejects_in_any_spelling(bulk_stack: Stack, tmp_path: Path, spelling: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    before = fingerprint(file)
    rejects = spelling.format(folder=tmp_path.name, path=file)
    completed = run_users(bulk_stack, "import", "a.csv", "--rejects", rejects, cwd=tmp_path)
    assert completed.returncode == 2
    assert "is the file to import: choose another file with --rejects" in stderr_of(completed)
    assert fingerprint(file) == before
    assert count_users(bulk_stack) == 0


def test_rejects_that_cannot_be_created_are_refused_before_the_first_row(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE)
    for rejects, reason in ((tmp_path, "Is a directory"), (Path("/proc/rejects"), "No such file or directory")):
        completed = run_import(bulk_stack, file, "--rejects", rejects, code=2)
        assert f"{rejects}: {reason}; choose another file for rejected rows with --rejects" in stderr_of(completed)
    assert count_users(bulk_stack) == 0


def test_earlier_rejects_in_a_folder_without_write_permission_are_refused_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejects, source = tmp_path / "aside", tmp_path / "a.csv"
    rejects.write_bytes(REJECTED_LINE)
    source.write_bytes(CSV_WITH_A_REJECTED_LINE)
    real_open = os.open

    def opened(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL and not Path(path).exists():  # root may write everywhere
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    with io.FileIO(source) as raw, pytest.raises(CannotImport, match="Permission denied; choose another file"):
        Rejects(str(rejects), 0, b"", raw).__enter__()
    assert rejects.read_bytes() == REJECTED_LINE
    assert {path.name for path in tmp_path.iterdir()} == {"aside", "a.csv"}


def test_resumed_import_keeps_the_rejects_of_another_import(bulk_stack: Stack, tmp_path: Path) -> None:
    content, rejects, other = (
        with_invalid_lines(csv_of_people(35_000, LONG_NAME), 3, 34_000),
        tmp_path / "a",
        tmp_path / "b",
    )
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    process.kill()
    process.wait()
    others = REJECTED_LINE * 100  # more bytes than the import has written
    other.write_bytes(others)
    before = fingerprint(rejects)
    (tmp_path / "a.csv").write_bytes(content)
    completed = run_import(bulk_stack, tmp_path / "a.csv", "--rejects", other, code=1)
    assert f"{other} does not contain the rows that were rejected before the interruption\n" in stderr_of(completed)
    assert [reject["line"] for reject in read_rejects(other)] == [34_000]
    assert (tmp_path / "b.1").read_bytes() == others
    assert fingerprint(rejects) == before


def test_notes_behind_the_rejects_of_an_interrupted_import_are_kept(bulk_stack: Stack, tmp_path: Path) -> None:
    content, rejects = with_invalid_lines(csv_of_people(35_000, LONG_NAME), 3, 34_000), tmp_path / "aside"
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--rejects", rejects)
    process.kill()
    process.wait()
    with rejects.open("a") as file:
        file.write("call Alice about line 3\n")
    before = rejects.read_bytes()
    (tmp_path / "a.csv").write_bytes(content)
    run_import(bulk_stack, tmp_path / "a.csv", "--rejects", rejects, code=1)
    assert (tmp_path / "aside.1").read_bytes() == before
    assert [reject["line"] for reject in read_rejects(rejects)] == [34_000]


def test_corrected_rejects_are_imported_as_they_are(bulk_stack: Stack, tmp_path: Path) -> None:
    file, rejects = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(b"id,name,email\n7,,a@example.com\n8,Bob,bob\n9,Carol\n")
    run_import(bulk_stack, file, code=1)
    again = run_import(bulk_stack, rejects, code=1)
    assert stderr_of(again) == f"imported 0, rejected 3 → {rejects}.rejects.ndjson\n"
    rows = [(reject["line"], reject["row"]) for reject in read_rejects(rejects)]
    assert [(reject["line"] + 1, reject["row"]) for reject in read_rejects(Path(f"{rejects}.rejects.ndjson"))] == rows
    text = rejects.read_text().replace('"name":""', '"name":"Alice"').replace('"bob"', '"bob@example.com"')
    rejects.write_text(text.replace('["9","Carol"]', '{"name":"Carol","email":"carol@example.com"}'))
    assert stderr_of(run_import(bulk_stack, rejects)).endswith("imported 3\n")
    assert names_in_order(bulk_stack) == ["Alice", "Bob", "Carol"]


def test_corrected_rejects_of_ndjson_are_imported_as_they_are(bulk_stack: Stack, tmp_path: Path) -> None:
    file, rejects = tmp_path / "a.ndjson", tmp_path / "a.ndjson.rejects.ndjson"
    big = b'{"name": 7, "email": "a@example.com", "id": 123456789012345678901234567890}\n'
    file.write_bytes(big + b'{"name": "Bob", "email": "b@example.com", "role": "x"}\n[1]\n')
    run_import(bulk_stack, file, code=1)
    run_import(bulk_stack, rejects, code=1)
    assert "123456789012345678901234567890" in Path(f"{rejects}.rejects.ndjson").read_text()
    text = rejects.read_text().replace('"name": 7', '"name": "Alice"').replace(', "role": "x"', "")
    rejects.write_text("".join(text.splitlines(keepends=True)[:2]))
    run_import(bulk_stack, rejects)
    assert names_in_order(bulk_stack) == ["Alice", "Bob"]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        (
            "a.csv",
            b"Email Address,First Name,Last Name,MEMBER_RATING\nann,Ann,Lee,2\nben@example.com,,,1\n",
            ("--yes",),
        ),
        (
            "a.csv",
            b"First;Last;Mail;Note\nAnn;Lee;ann;x\n;;ben@example.com;x\n",
            ("--map", "First+Last=name", "--map", "Mail=email", "--ignore-unknown"),
        ),
        (
            "a.json",
            b'{"users": [{"email": "ann", "firstName": "Ann", "lastName": "Lee", "username": "a", "enabled": true},\n'
            b'{"email": "ben@example.com", "firstName": "", "lastName": "", "username": "b", "enabled": true}]}',
            ("--yes",),
        ),
        (
            "a.ndjson",
            b'{"profile": {"email": "ann"}, "name": "Ann Lee"}\n{"profile": {"email": "ben@example.com"}, "name": ""}\n',
            ("--map", "profile.email=email"),
        ),
        ("a.csv", b"ID,Name,E-MAIL\n1,Ann Lee,ann\n2,,ben@example.com\n", ("--map", "E-MAIL=email")),
        ("a.csv", b"ID,Name,EMail\n1,Ann Lee,ann\n2,,ben@example.com\n", ()),
        ("a.csv", "name\temail\r\nAnn Lee\tann\r\n\tben@example.com\r\n".encode("utf-16"), ()),
        ("a.csv", b"sep=;\rname;email;\rAnn Lee;ann;\r;ben@example.com;\r", ("--encoding", "cp1251")),
    ],
)
def test_corrected_rejects_of_a_file_in_any_form_need_no_options(
    bulk_stack: Stack, tmp_path: Path, name: str, content: bytes, options: tuple[str, ...]
) -> None:
    file, rejects = tmp_path / name, tmp_path / f"{name}.rejects.ndjson"
    file.write_bytes(content)
    run_import(bulk_stack, file, *options, code=1)
    again = run_import(bulk_stack, rejects, code=1)
    assert stderr_of(again) == f"imported 0, rejected 2 → {rejects}.rejects.ndjson\n"
    text = rejects.read_text()
    assert '"row":{"name":"Ann Lee","email":"ann"}' in text
    rejects.write_text(text.replace('"ann"', '"ann@example.com"').replace('"name":""', '"name":"Ben"'))
    assert stderr_of(run_import(bulk_stack, rejects)).endswith("imported 2\n")
    assert names_in_order(bulk_stack) == ["Ann Lee", "Ben"]


def test_rejected_rows_with_unknown_members_are_imported_with_ignore_unknown(bulk_stack: Stack, tmp_path: Path) -> None:
    file, rejects = tmp_path / "a.ndjson", tmp_path / "a.ndjson.rejects.ndjson"
    file.write_bytes(b'{"name": "Ann", "email": "a@example.com", "phone": "1"}\n')
    run_import(bulk_stack, file, code=1)
    run_import(bulk_stack, rejects, code=1)
    run_import(bulk_stack, rejects, "--ignore-unknown")
    assert names_in_order(bulk_stack) == ["Ann"]


def test_rejects_of_a_process_substitution_are_written_into_the_working_directory(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(CSV_WITH_A_REJECTED_LINE)
    for command in ("$users import <(cat a.csv)", "$users import /dev/stdin < a.csv"):
        completed = run_in_shell(bulk_stack, f"cd $folder; {command}", folder=tmp_path)
        assert completed.returncode == 1, stderr_of(completed)
        assert read_rejects(tmp_path / "import.rejects.ndjson")[-1]["line"] == 3


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
