"""`velikiy users import`, `export`, `seed`: many rows at once."""

import csv
import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from testkit.outages import hanging, refusing
from testkit.stack import ROOT, Stack, clean_environment, running, wait_until
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.readers import Row
from velikiy.bulk.rejects import Rejects


@pytest.fixture(scope="module")
def own() -> Iterator[Stack]:
    """A stack whose users may be counted."""
    with running("--edges", "2") as stack:
        yield stack


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    """No users and no traces of imports, and nothing of the test before in the caches."""
    if "own" in request.fixturenames:
        own: Stack = request.getfixturevalue("own")
        own.sql("DELETE FROM imports")
        own.sql("DELETE FROM users")
        wait_until(lambda: all(requests.get(f"{edge}/users", timeout=5).json() == [] for edge in own.edges))


Done = subprocess.CompletedProcess[bytes]


def users(stack: Stack, *arguments: object, given: bytes = b"", cwd: Path | None = None) -> Done:
    return subprocess.run(
        [ROOT / "run", "velikiy", "users", *map(str, arguments)],
        env=clean_environment(DATA=str(stack.data)),
        cwd=cwd,
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
    )


def in_a_shell(stack: Stack, command: str, **names: object) -> Done:
    """`$users` is the command, `$name` what is named."""
    return subprocess.run(
        ["bash", "-c", command.replace("$users", f"{ROOT}/run velikiy users")],
        env=clean_environment(DATA=str(stack.data), **{name: str(value) for name, value in names.items()}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


def began(stack: Stack, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [ROOT / "run", "velikiy", "users", *map(str, arguments)],
        env=clean_environment(DATA=str(stack.data)),
        cwd=stack.data.parent,  # where rejects of stdin go
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def said(done: Done) -> str:
    return done.stderr.decode()


def imported(stack: Stack, *arguments: object, given: bytes = b"", code: int = 0) -> Done:
    done = users(stack, "import", *arguments, given=given)
    assert done.returncode == code, said(done)
    return done


def table(count: int, name: str = "Person") -> bytes:
    """CSV."""
    return b"name,email\n" + b"".join(b"%s %d,person%d@example.com\n" % (name.encode(), n, n) for n in range(count))


def rejects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(stack: Stack) -> list[str]:
    return [name for (name,) in stack.sql("SELECT name FROM users ORDER BY id")]


def count(stack: Stack) -> int:
    return int(stack.sql("SELECT count(*) FROM users")[0][0])


# ---- formats ----


TWO = [{"name": 'Zoë; the "first"', "email": "zoe@example.com"}, {"name": "Ян", "email": "yan@example.com"}]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_ndjson(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", as_csv(TWO)),
        ("a.CSV", as_csv(TWO).rstrip()),
        ("windows.csv", b"\xef\xbb\xbf" + as_csv(TWO, end="\r\n")),
        ("excel.csv", b"\xef\xbb\xbf" + as_csv(TWO, delimiter=";")),
        ("tabs", as_csv(TWO, delimiter="\t")),
        ("a.ndjson", as_ndjson(TWO)),
        ("a.jsonl", b"\n" + as_ndjson(TWO).rstrip()),
        ("unnamed", b"\xef\xbb\xbf \n" + as_ndjson(TWO)),
        ("a.csv.gz", gzip.compress(as_csv(TWO), mtime=0)),
        ("compressed", gzip.compress(as_ndjson(TWO)[:20], mtime=0) + gzip.compress(as_ndjson(TWO)[20:], mtime=0)),
        ("-", as_csv(TWO)),
        ("-", gzip.compress(as_ndjson(TWO), mtime=0)),
    ],
)
def test_csv_and_ndjson_are_read_compressed_or_not(own: Stack, tmp_path: Path, file: str, content: bytes) -> None:
    if file != "-":
        (tmp_path / file).write_bytes(content)
        file = str(tmp_path / file)
    done = imported(own, file, given=content)
    assert said(done) == "imported 2\n"
    assert done.stdout == b""
    assert [
        {"name": name, "email": email} for name, email in own.sql("SELECT name, email FROM users ORDER BY id")
    ] == TWO
    assert not list(tmp_path.glob("*reject*"))


def test_the_format_can_be_given(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_ndjson(TWO))
    imported(own, "--format", "ndjson", tmp_path / "a.csv")
    assert count(own) == 2


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("a.csv", b"name,phone\n", "users have no column 'phone'; the columns are name, email"),
        ("a.csv", b"name\nAlice\n", "lacks email"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"name,email,name\n", "names the column name twice"),
        ("a.csv", "имя,email\n".encode("cp1251"), "line 1 is not UTF-8 (byte 0xe8)"),
        ("a.csv", as_csv(TWO).decode().encode("utf-16"), "the file is UTF-16"),
        ("a.csv", as_csv(TWO).decode().encode("utf-16-le"), "line 1 contains a NUL byte"),
        ("a.csv", b'"name,email\n', "line 1 is not CSV"),
        ("a.csv", b"x" * 2_000_000, "line 1 is longer than 1,048,576 bytes"),
        ("unnamed", json.dumps(TWO).encode(), "the file is a JSON array"),
        ("a.csv.gz", gzip.compress(table(50_000), mtime=0)[:-9], "the compressed file is damaged or truncated"),
    ],
)
def test_what_cannot_be_read_is_said_and_exits_with_2(
    own: Stack, tmp_path: Path, file: str, content: bytes, sentence: str
) -> None:
    (tmp_path / file).write_bytes(content)
    done = imported(own, tmp_path / file, code=2)
    assert sentence in said(done)
    assert "Traceback" not in said(done)


def test_wrong_usage_exits_with_2(own: Stack, tmp_path: Path) -> None:
    there = tmp_path / "a.csv"
    there.write_bytes(as_csv(TWO))
    assert "does not exist" in said(imported(own, tmp_path / "none.csv", code=2))
    assert "is the file to import" in said(imported(own, there, "--rejects", there, code=2))
    assert "No such file" in said(imported(own, there, "--rejects", tmp_path / "no" / "folder", code=2))
    done = users(own, "export", tmp_path / "a.xlsx")
    assert done.returncode == 2
    assert "give --format" in said(done)


# ---- rejects ----


def test_bad_rows_are_put_aside_with_their_lines_and_the_others_taken(own: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"email,name,id\n"
        b'a@example.com,"of two\nlines",7\n'  # 2 and 3: a name has no control characters
        b"a@example.com,Alice,7\n"
        b"\n"
        b"A@EXAMPLE.com,Again,8\n"  # 6
        b"none,,9\n"
        b"b@example.com,Bob\n"
        b"b@example.com,B\xf6b,1\n"
        b'b@example.com,"B"ob,1\n'  # 10
        b"c@example.com,Carol,1"
    )
    done = imported(own, file, code=1)
    aside = tmp_path / "a.csv.rejects.ndjson"
    assert said(done) == f"imported 2, rejected 6 → {aside}\n"
    assert names(own) == ["Alice", "Carol"]
    by_line = {reject["line"]: reject for reject in rejects(aside)}
    assert list(by_line) == [2, 6, 7, 8, 9, 10]
    assert by_line[2]["row"] == {"email": "a@example.com", "name": "of two\nlines", "id": "7"}
    assert by_line[2]["errors"] == [{"field": "name", "detail": "must not contain control characters"}]
    assert by_line[6]["errors"] == [{"field": "email", "detail": "is taken by another user"}]
    assert [error["field"] for error in by_line[7]["errors"]] == ["name", "email"]
    assert "has 2 values for 3 columns" in by_line[8]["errors"][0]["detail"]
    assert "line 9 is not UTF-8 (byte 0xf6)" in by_line[9]["errors"][0]["detail"]
    assert "is not CSV" in by_line[10]["errors"][0]["detail"]


def test_a_quote_that_is_not_closed_takes_lines_along_and_all_of_them_are_put_aside(own: Stack, tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    lines = table(9).decode().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], '"open,open@example.com\n', *lines[4:]]))
    done = imported(own, file, code=1)
    assert "imported 3, rejected 7" in said(done)
    [rejected] = rejects(tmp_path / "some.csv.rejects.ndjson")
    assert rejected["line"] == 5
    assert "(lines 5 to 11: a quote in line 5 may be unclosed)" in rejected["errors"][0]["detail"]
    assert rejected["row"] == "".join(['"open,open@example.com\n', *lines[4:]])


def test_bad_lines_of_ndjson_are_put_aside(own: Stack, tmp_path: Path) -> None:
    file, aside = tmp_path / "a.ndjson", tmp_path / "aside"
    big = b'{"name": "Big", "email": "big@example.com", "id": 123456789012345678901234567890}'
    latin = '{"name": "Böb", "email": "bob@example.com"}'.encode("latin-1")
    lines = [b"[1]", b'{"name": 7}', b'{"name": "A", "name": "B"}', b"{", b'{"name": "\\u0000"}', latin, b"", big]
    file.write_bytes(b"\n".join(lines))
    done = imported(own, file, "--rejects", aside, "--json", code=1)
    summary = json.loads(done.stdout)
    assert (summary["imported"], summary["rejected"], summary["rejects"]) == (1, 6, str(aside))
    assert [reject["line"] for reject in rejects(aside)] == [1, 2, 3, 4, 5, 6]
    assert rejects(aside)[1]["errors"][0] == {"field": "name", "detail": "must be a string"}
    assert rejects(aside)[1]["row"] == {"name": 7}
    assert "is not JSON" in rejects(aside)[2]["errors"][0]["detail"]
    assert rejects(aside)[5]["errors"][0]["detail"] == "line 6 is not UTF-8 (byte 0xf6)"
    assert names(own) == ["Big"]


def test_what_is_there_already_is_taken_and_told_even_in_the_second_chunk(own: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    own.sql("INSERT INTO users (name, email) VALUES ('First', 'PERSON12345@example.com')")
    file.write_bytes(table(20_000))
    imported(own, file, code=1)
    (reject,) = rejects(tmp_path / "a.csv.rejects.ndjson")
    assert reject["line"] == 12345 + 2
    assert count(own) == 20_000
    imported(own, file, code=1)
    assert len(rejects(tmp_path / "a.csv.rejects.ndjson")) == 20_000


def test_what_only_postgresql_refuses_is_found_among_the_others(own: Stack, tmp_path: Path) -> None:
    own.sql("ALTER TABLE users ADD CONSTRAINT no_7 CHECK (name NOT LIKE '%% 7')")
    try:
        (tmp_path / "a.csv").write_bytes(table(100))
        imported(own, tmp_path / "a.csv", code=1)
    finally:
        own.sql("ALTER TABLE users DROP CONSTRAINT no_7")
    (reject,) = rejects(tmp_path / "a.csv.rejects.ndjson")
    assert (reject["line"], reject["errors"][0]["detail"]) == (9, "A value violates a constraint of the table.")
    assert names(own) == [f"Person {n}" for n in range(100) if n != 7]


def test_from_stdin_rejects_go_into_the_folder_where_one_is(own: Stack, tmp_path: Path) -> None:
    done = users(own, "import", "-", given=b"name,email\nA,b\n", cwd=tmp_path)
    assert said(done) == "imported 0, rejected 1 → import.rejects.ndjson\n"
    assert rejects(tmp_path / "import.rejects.ndjson")[0]["line"] == 2


# ---- whose file it is ----


BAD = b"name,email\nAlice,alice@example.com\n,none\n"
"""The third line is rejected."""

REJECTED = b'{"line":9,"errors":[{"field":"name","detail":"is of an earlier import"}],"row":{}}\n'


def untouched(path: Path) -> tuple[object, ...]:
    """What would show that it was touched."""
    there = path.stat()
    return path.read_bytes(), there.st_mode, there.st_mtime_ns, there.st_ctime_ns, there.st_ino


@pytest.mark.parametrize(
    "content",
    [
        b"notes\n",
        b"\n" + REJECTED,
        b'{"name": "Alice", "email": "alice@example.com"}\n',
        b'{"line": 1, "errors": [], "row": {}, "mine": true}\n',
        b'["line", "errors", "row"]\n',
        b'{"line":1,"errors":[],"row":',
        b"\x1f\x8b\0\xff",
        b"[" * 100_000,
    ],
)
def test_a_file_that_holds_anything_else_is_refused_and_stays_as_it_is(
    own: Stack, tmp_path: Path, content: bytes
) -> None:
    file, notes = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(BAD)
    notes.write_bytes(content)
    notes.chmod(0o604)
    before = untouched(notes)
    done = imported(own, file, code=2)
    assert said(done) == (
        f"velikiy users import: {notes} does not begin with a rejected row, so it is not overwritten: move it away, or"
        " choose another file with --rejects\n"
    )
    assert untouched(notes) == before
    assert count(own) == 0


def test_a_refused_file_of_rejects_leaves_what_was_broken_off_as_it_is(own: Stack, tmp_path: Path) -> None:
    content = table(35_000, LONG)
    halfway(own, content[:2_400_000]).kill()
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "notes").write_bytes(b"notes\n")
    before = own.sql("SELECT * FROM imports")
    for arguments in ((), ("--restart",)):
        done = imported(own, tmp_path / "a.csv", "--rejects", tmp_path / "notes", *arguments, code=2)
        assert said(done).count("\n") == 1
        assert own.sql("SELECT * FROM imports") == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_is_imported_is_no_place_for_rejects_by_no_name(
    own: Stack, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    file, other = tmp_path / "a.ndjson", tmp_path / "other.ndjson"
    file.write_bytes(REJECTED)  # it passes for one of ours
    link(file, other)
    before = untouched(file)
    for command in (
        "$users import $file --rejects $file",
        "$users import $file --rejects $other",
        "$users import $other --rejects $file",
        "$users import - --rejects $other < $file",
        "$users import $file --rejects /dev/fd/7 7< $file",
        "$users import $file --rejects - >> $file",
    ):
        done = in_a_shell(own, command, file=file, other=other)
        assert (done.returncode, said(done).count("\n")) == (2, 1)
        assert "is the file to import: choose another file with --rejects" in said(done)
        assert untouched(file) == before
    assert count(own) == 0


def test_a_link_to_rejects_stays_one(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(BAD)
    (tmp_path / "aside").write_bytes(REJECTED)
    (tmp_path / "link").symlink_to("aside")
    imported(own, tmp_path / "a.csv", "--rejects", tmp_path / "link", code=1)
    assert [reject["line"] for reject in rejects(tmp_path / "aside")] == [3]
    (tmp_path / "b.csv").write_bytes(table(5))
    imported(own, tmp_path / "b.csv", "--rejects", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "aside").read_bytes() == b""


def test_an_import_replaces_rejects_of_an_earlier_one_and_removes_them_where_it_has_none(
    own: Stack, tmp_path: Path
) -> None:
    file, aside = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(BAD)
    aside.write_bytes(REJECTED * 1000)
    aside.chmod(0o640)
    imported(own, file, code=1)
    assert [reject["line"] for reject in rejects(aside)] == [3]
    imported(own, file, code=1)
    assert [reject["line"] for reject in rejects(aside)] == [2, 3]
    assert mode(aside) == 0o640
    file.write_bytes(table(5))
    imported(own, file)
    assert not aside.exists()


def test_an_empty_file_that_was_there_may_be_written_and_is_not_removed(own: Stack, tmp_path: Path) -> None:
    file, aside = tmp_path / "a.csv", tmp_path / "aside"
    aside.touch()
    file.write_bytes(table(5))
    imported(own, file, "--rejects", aside)
    assert aside.read_bytes() == b""
    file.write_bytes(BAD)
    imported(own, file, "--rejects", aside, code=1)
    assert [reject["line"] for reject in rejects(aside)] == [3]


def test_another_file_that_has_come_into_the_place_of_rejects_is_not_removed(own: Stack, tmp_path: Path) -> None:
    content, aside = table(35_000, LONG), tmp_path / "aside"
    process = halfway(own, content[:2_400_000], "--rejects", aside)
    (tmp_path / "empty").touch()
    (tmp_path / "empty").rename(aside)
    before = untouched(aside)
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert untouched(aside) == before


def test_what_counts_is_the_file_that_was_opened_and_not_what_its_name_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside, notes, source = tmp_path / "aside", tmp_path / "notes", tmp_path / "a.csv"
    aside.write_bytes(REJECTED)
    notes.write_bytes(b"notes\n")
    source.write_bytes(BAD)
    before = notes.read_bytes(), notes.stat().st_mtime_ns
    really = os.open

    def opened(path: str, flags: int, mode: int) -> int:
        if not flags & os.O_EXCL:
            notes.rename(aside)  # between the look and the opening
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    with io.FileIO(source) as raw, pytest.raises(CannotImport, match="does not begin with a rejected row"):
        Rejects(str(aside), 0, raw)
    assert (aside.read_bytes(), aside.stat().st_mtime_ns) == before


def test_two_imports_do_not_write_into_one_file_of_rejects(own: Stack, tmp_path: Path) -> None:
    content, aside = bad_at(table(35_000, LONG), 3), tmp_path / "aside"
    process = halfway(own, content[:2_400_000], "--rejects", aside)
    (tmp_path / "b.csv").write_bytes(BAD)
    (tmp_path / "link").symlink_to(aside)
    for name in ("aside", "link"):
        done = imported(own, tmp_path / "b.csv", "--rejects", tmp_path / name, code=2)
        assert said(done) == (
            f"velikiy users import: {tmp_path / name} is in use by another import: wait for its end, or choose"
            " another file with --rejects\n"
        )
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    assert [reject["line"] for reject in rejects(aside)] == [3]
    assert "Alice" not in names(own)
    imported(own, tmp_path / "b.csv", "--rejects", aside, code=1)


def test_where_files_cannot_be_locked_rejects_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "a.csv").write_bytes(BAD)
    with io.FileIO(tmp_path / "a.csv") as raw, Rejects(str(tmp_path / "aside"), 0, raw) as aside:
        aside.write([Row(7, {}, [], [])])
    assert [reject["line"] for reject in rejects(tmp_path / "aside")] == [7]


def test_of_a_row_that_does_not_fit_on_the_disk_nothing_is_left(own: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_bytes(b'{"name": "%s", "email": ""}\n' % (b"x" * 50_000))
    done = in_a_shell(own, "ulimit -f 16; $users import $file", file=file)
    assert (done.returncode, "File too large" in said(done)) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ndjson"]
    imported(own, file, code=1)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_new_rejects_and_exports_are_for_their_owner_alone(own: Stack, tmp_path: Path, umask: int) -> None:
    (tmp_path / "a.csv").write_bytes(BAD)
    environment = clean_environment(PYTHONPATH=str(ROOT), SECRETS_DIR=str(own.supervisor.plan.passwords))
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
        assert mode(tmp_path / name) == 0o600
    assert b"alice@example.com" in (tmp_path / "out.csv").read_bytes()


# ---- streams ----


@pytest.mark.parametrize("stream", ["-", "/dev/stdout", "$log"])
@pytest.mark.parametrize("redirected", [">", ">>"])
def test_stdout_that_goes_into_a_file_is_appended_to(own: Stack, tmp_path: Path, stream: str, redirected: str) -> None:
    file, log = tmp_path / "a.csv", tmp_path / "log"
    file.write_bytes(BAD)
    log.write_bytes(b"is there\n" if redirected == ">>" else b"")
    command = f"{{ echo before; $users import $file --rejects {stream}; echo after; }} {redirected} $log"
    for lines in ([3], [2, 3]):
        there = log.read_bytes() if redirected == ">>" else b""
        done = in_a_shell(own, command, file=file, log=log)
        assert log.read_bytes().startswith(there + b"before\n{")
        first, *rows, last = log.read_bytes().removeprefix(there).splitlines()
        assert (first, last) == (b"before", b"after")
        assert [json.loads(row)["line"] for row in rows] == lines
        assert "rejected" in said(done)


def test_stderr_that_goes_into_a_file_is_appended_to(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(BAD)
    (tmp_path / "log").write_bytes(b"before\n")
    in_a_shell(own, "cd $folder; $users import a.csv --rejects /dev/stderr 2>> log", folder=tmp_path)
    before, row, summary = (tmp_path / "log").read_text().splitlines()
    assert (before, json.loads(row)["line"]) == ("before", 3)
    assert summary == "imported 1, rejected 1 → /dev/stderr"
    in_a_shell(own, "cd $folder; $users import a.csv --rejects - > out 2> said", folder=tmp_path)
    assert (tmp_path / "said").read_text() == "imported 0, rejected 2 → stdout\n"
    assert [reject["line"] for reject in rejects(tmp_path / "out")] == [2, 3]


@pytest.mark.parametrize("stream", ["-", "/dev/stdout"])
def test_a_summary_for_programs_does_not_share_stdout_with_rejects(own: Stack, tmp_path: Path, stream: str) -> None:
    (tmp_path / "a.csv").write_bytes(BAD)
    done = imported(own, tmp_path / "a.csv", "--json", "--rejects", stream, code=2)
    assert done.stdout == b""
    assert "--json and --rejects both write to stdout" in said(done)
    assert count(own) == 0


@pytest.mark.parametrize("command", ["$users import $file --rejects /dev/full", "$users import $file --rejects - | :"])
def test_rejects_that_nobody_takes_are_not_lost(own: Stack, tmp_path: Path, command: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(BAD)
    done = in_a_shell(own, f"set -o pipefail; {command}", file=file)
    assert done.returncode == 2
    assert said(done).rpartition(": ")[2] in ("No space left on device\n", "Broken pipe\n")
    assert count(own) == 0
    done = imported(own, file, "--rejects", "-", code=1)
    assert json.loads(done.stdout)["line"] == 3


def test_a_fifo_takes_rejects_and_exports_and_stays(own: Stack, tmp_path: Path) -> None:
    file, fifo = tmp_path / "a.csv", tmp_path / "fifo"
    file.write_bytes(BAD)
    os.mkfifo(fifo)
    for arguments, code, expected in (
        (("import", file, "--rejects", fifo), 1, b'{"line":3,'),
        (("export", "--format", "ndjson", fifo), 0, b'{"id":'),
    ):
        with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
            done = users(own, *arguments)
            assert done.returncode == code, said(done)
            assert reader.stdout is not None
            assert reader.stdout.read().startswith(expected)
    assert fifo.is_fifo()
    imported(own, file, "--rejects", "/dev/null", code=1)
    assert Path("/dev/null").is_char_device()


def test_an_export_goes_into_a_process_and_into_what_stdout_has_already(own: Stack, tmp_path: Path) -> None:
    users(own, "seed", "--count", 20)
    log, out = tmp_path / "log", tmp_path / "out"
    command = "{ echo before; $users export --format ndjson /dev/stdout; echo after; } > $log"
    assert in_a_shell(own, command, log=log).returncode == 0
    assert log.read_bytes().startswith(b'before\n{"id":')
    assert log.read_bytes().count(b"\n") == 22
    done = in_a_shell(own, "$users export --format ndjson >(cat > $out); code=$?; wait $!; exit $code", out=out)
    assert done.returncode == 0, said(done)
    assert out.read_bytes().count(b"\n") == 20


# ---- caches ----


@pytest.mark.parametrize("many", [3, 1500])
def test_caches_show_the_new_rows_right_afterwards(own: Stack, tmp_path: Path, many: int) -> None:
    (tmp_path / "a.csv").write_bytes(table(many))
    (tmp_path / "b.csv").write_bytes(table(many).replace(b"person", b"other"))
    imported(own, tmp_path / "a.csv")
    last = own.sql("SELECT max(id) FROM users")[0][0]
    for edge in own.edges:
        for path in ("/users?limit=1", f"/users/{last}", f"/users/{last + 1}"):
            wait_until(lambda: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # noqa: B023
        for path in ("/users?limit=1&sort=-id", "/users/count"):
            wait_until(lambda: "hit" in requests.get(edge + path, timeout=5).headers["Cache-Status"])  # noqa: B023
        assert requests.get(f"{edge}/users/{last + 1}", timeout=5).status_code == 404
    imported(own, tmp_path / "b.csv")
    for edge in own.edges:
        assert requests.get(f"{edge}/users/count", timeout=5).json() == {"count": 2 * many}
        assert requests.get(f"{edge}/users/{last + 1}", timeout=5).json()["email"] == "other0@example.com"
        newest = requests.get(f"{edge}/users?limit=1&sort=-id", timeout=5).json()
        assert newest[0]["email"] == f"other{many - 1}@example.com"


def test_a_cache_that_hangs_is_waited_out(own_stack: Stack) -> None:
    with hanging(own_stack, "redis"):
        imported(own_stack, "-", given=table(10))
    assert requests.get(f"{own_stack.edge}/users/count", timeout=5).json() == {"count": 13}


# ---- going on ----


def halfway(own: Stack, content: bytes, *options: object) -> subprocess.Popen[bytes]:
    """An import that has committed all whole chunks of this, and waits for what comes behind it."""
    process = began(own, "import", "-", *options)
    assert process.stdin is not None
    process.stdin.write(content)
    process.stdin.flush()
    wait_until(lambda: own.sql("SELECT lines FROM imports WHERE lines > 20000"))
    return process


def bad_at(content: bytes, *lines: int) -> bytes:
    parts = content.splitlines(keepends=True)
    for line in lines:
        parts[line - 1] = b"bad,row\n"
    return b"".join(parts)


LONG = "A person with quite a long name so that it takes a mebibyte"


def test_after_a_kill_no_row_comes_twice_and_none_is_lost(own: Stack, tmp_path: Path) -> None:
    content, aside = bad_at(table(35_000, LONG), 3, 15_000, 34_000), tmp_path / "aside"
    process = halfway(own, content[:2_400_000], "--rejects", aside)
    process.kill()
    process.wait()
    assert 20_000 - 2 <= count(own) < 30_000
    with aside.open("a") as file:
        file.write('{"line": 20005, "errors"')  # of a chunk that was not committed
    (tmp_path / "a.csv").write_bytes(content)
    done = imported(own, tmp_path / "a.csv", "--rejects", aside, "--json", code=1)
    assert "continuing after line 20,001\n" in said(done)
    summary = json.loads(done.stdout)
    assert (summary["imported"], summary["rejected"], summary["continued_after"]) == (34_997, 3, 20_001)
    assert [reject["line"] for reject in rejects(aside)] == [3, 15_000, 34_000]
    assert own.sql("SELECT count(*), count(DISTINCT email) FROM users") == [(34_997, 34_997)]
    assert own.sql("SELECT lines FROM imports") == []


def test_killed_at_work_it_goes_on_as_well(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table(50_000)))
    process = began(own, "import", tmp_path / "a.csv.gz")
    wait_until(lambda: own.sql("SELECT lines FROM imports"), every=0.01)
    process.kill()
    process.wait()
    assert "continuing after line" in said(imported(own, tmp_path / "a.csv.gz"))
    assert own.sql("SELECT count(*), count(DISTINCT email) FROM users") == [(50_000, 50_000)]


@pytest.mark.parametrize("changed", ["gone", "empty", "cut in a row", "cut"])
def test_it_goes_on_without_the_rows_that_were_rejected_before(own: Stack, tmp_path: Path, changed: str) -> None:
    content, aside = bad_at(table(35_000, LONG), 3, 5, 34_000), tmp_path / "aside"
    process = halfway(own, content[:2_400_000], "--rejects", aside)
    process.kill()
    process.wait()
    first = len(aside.read_bytes().splitlines(keepends=True)[0])
    if changed == "gone":
        aside.unlink()
    else:
        os.truncate(aside, {"empty": 0, "cut in a row": first + 20, "cut": first}[changed])
    (tmp_path / "a.csv").write_bytes(content)
    done = imported(own, tmp_path / "a.csv", "--rejects", aside, code=1)
    assert "continuing after line 20,001\n" in said(done)
    assert f"{aside} no longer contains the rows that were rejected before the interruption\n" in said(done)
    assert [reject["line"] for reject in rejects(aside)] == ([3, 34_000] if "cut" in changed else [34_000])


ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
"""Exit codes."""


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_it_after_the_chunk_and_it_says_how_to_go_on(
    own: Stack, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "a.csv").write_bytes(table(30_000))
    with psycopg.connect(own.postgres) as other:
        other.execute("INSERT INTO users (name, email) VALUES ('Other', 'person5@example.com')")
        process = began(own, "import", tmp_path / "a.csv")
        wait_until(lambda: own.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(number)
        other.rollback()
    _, error = process.communicate(timeout=60)
    assert process.returncode == ENDS[number]
    assert b"lines 1 to 10,001 are done; to continue after them, run the same command again" in error
    assert error.endswith(b"interrupted\n")
    assert b"Traceback" not in error
    assert count(own) == 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert "continuing after line 10,001" in said(imported(own, tmp_path / "a.csv"))
    assert names(own) == [f"Person {n}" for n in range(30_000)]


def test_ctrl_c_ends_it_while_a_pipe_is_silent(own: Stack) -> None:
    process = halfway(own, table(35_000, LONG)[:2_400_000])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_under_nohup_it_goes_on_when_its_terminal_is_gone(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table(30_000))
    with psycopg.connect(own.postgres) as other:
        other.execute("INSERT INTO users (name, email) VALUES ('Other', 'person5@example.com')")
        process = subprocess.Popen(
            ["nohup", ROOT / "run", "velikiy", "users", "import", tmp_path / "a.csv"],
            env=clean_environment(DATA=str(own.data)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: own.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(signal.SIGHUP)
        other.rollback()
    assert process.wait(timeout=60) == 0
    assert count(own) == 30_000


def test_a_file_that_was_changed_is_begun_anew(own: Stack, tmp_path: Path) -> None:
    content = table(35_000, LONG)
    process = halfway(own, content[:2_400_000])
    process.kill()
    process.wait()
    changed = content.replace(b"person19999@", b"changed@")
    assert "with --restart" in said(imported(own, "-", given=changed, code=2))
    (tmp_path / "a.csv").write_bytes(changed)
    done = imported(own, tmp_path / "a.csv", code=1)
    assert "has changed since its import was interrupted after line 20,001: starting at line 1" in said(done)
    assert f"imported {35_000 - 20_000 + 1:,}, rejected 19,999" in said(done)


def test_a_file_is_not_imported_twice_at_a_time(own: Stack, tmp_path: Path) -> None:
    content = table(35_000, LONG)
    process = halfway(own, content[:2_400_000])
    (tmp_path / "a.csv").write_bytes(content)
    assert "another import of this file is running" in said(imported(own, tmp_path / "a.csv", code=2))
    assert process.stdin is not None
    process.stdin.write(content[2_400_000:])
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert count(own) == 35_000


READS_AHEAD = """
import itertools, sys
from velikiy.resources.base import registry
from velikiy.bulk.prefetch import prefetch
from velikiy.bulk.seeder import _seed_chunks
for rows in prefetch(_seed_chunks(registry()["users"], itertools.count(1))):
    sys.exit(130)
"""


def test_python_ends_well_while_the_next_chunk_is_being_made() -> None:
    for _ in range(5):  # where it does not, it crashes more often than not
        done = subprocess.run([sys.executable, "-P", "-c", READS_AHEAD], cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (130, b"")


def test_without_postgresql_it_says_so(own_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table(5))
    with refusing(own_stack, "postgres"):
        for arguments in (("import", tmp_path / "a.csv"), ("export", "-"), ("seed", "--count", 5)):
            done = users(own_stack, *arguments)
            assert done.returncode == 1
            assert said(done).startswith(f"velikiy users {arguments[0]}: PostgreSQL does not answer")
            assert said(done).count("\n") == 1


# ---- export, seed ----


@pytest.mark.parametrize("name", ["a.csv", "a.ndjson", "a.csv.gz", "a.jsonl.gz"])
def test_what_was_exported_can_be_imported(own: Stack, tmp_path: Path, name: str) -> None:
    assert said(users(own, "seed", "--count", 1234)) == "created 1,234\n"
    own.sql("UPDATE users SET name = %s WHERE name LIKE '%% 7'", 'a "quoted", \\N one; ')
    file = tmp_path / name
    file.write_text("what was there before")
    assert said(users(own, "export", file)) == "exported 1,234\n"
    before = own.sql("SELECT name, email FROM users ORDER BY id")
    own.sql("DELETE FROM users")
    imported(own, file)
    after = own.sql("SELECT name, email FROM users ORDER BY id")
    assert [(name.strip(), email) for name, email in before] == after
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ndjson_is_what_the_api_gives(own: Stack) -> None:
    users(own, "seed", "--count", 20)
    lines = users(own, "export", "--format", "ndjson").stdout.splitlines()
    assert len(lines) == 20
    for line in lines:
        assert requests.get(f"{own.edge}/users/{json.loads(line)['id']}", timeout=5).content == line


def test_an_export_that_fails_leaves_what_was_there(own_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("before")
    with refusing(own_stack, "postgres"):
        assert users(own_stack, "export", tmp_path / "a.csv").returncode == 1
    assert (tmp_path / "a.csv").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("before", ["before", None])
def test_a_signal_ends_an_export_and_leaves_what_was_there_and_no_part(
    own: Stack, tmp_path: Path, number: signal.Signals, before: str | None
) -> None:
    folder, file = tmp_path / "exports", tmp_path / "exports" / "a.csv.gz"
    folder.mkdir()
    if before:
        file.write_text(before)
    with psycopg.connect(own.postgres) as other:
        other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        process = began(own, "export", file)
        wait_until(lambda: [path for path in folder.iterdir() if path != file], what="a part")
        wait_until(lambda: own.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (ENDS[number], b"velikiy users export: interrupted\n")
    assert {path.name: path.read_text() for path in folder.iterdir()} == ({file.name: before} if before else {})


def test_an_export_whose_terminal_is_gone_ends_as_with_any_other_signal(own: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("before")
    terminal, end = os.openpty()
    with psycopg.connect(own.postgres) as other:
        other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            ["setsid", "--ctty", ROOT / "run", "velikiy", "users", "export", file],
            env=clean_environment(DATA=str(own.data), TERM="xterm"),
            stdin=end,
            stdout=end,
            stderr=end,
        )
        os.close(end)
        wait_until(lambda: own.sql("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        os.close(terminal)  # the bar and the last words have nowhere to go
        assert process.wait(timeout=20) == ENDS[signal.SIGHUP]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "before"}


def test_an_export_keeps_the_mode_and_the_group_of_the_file_that_it_replaces_and_links_to_it(
    own: Stack, tmp_path: Path
) -> None:
    file, link = tmp_path / "a.csv", tmp_path / "link.csv"
    file.write_text("before")
    shutil.chown(file, group=12345 if os.geteuid() == 0 else os.getgroups()[-1])
    file.chmod(0o664)
    link.symlink_to(file)
    group = file.stat().st_gid
    assert users(own, "export", link).returncode == 0
    assert link.is_symlink()
    assert file.read_text().startswith("id,name,email")
    assert (mode(file), file.stat().st_gid) == (0o664, group)


def test_an_export_into_a_pipe_that_closes_ends_quietly(own: Stack) -> None:
    users(own, "seed", "--count", 5000)
    command = f"{ROOT}/run velikiy users export | head -n 2"
    done = subprocess.run(
        ["bash", "-c", command], env=clean_environment(DATA=str(own.data)), capture_output=True, timeout=60, check=True
    )
    assert done.stdout.startswith(b"id,name,email,created_at,updated_at,version\n")
    assert done.stdout.count(b"\n") == 2
    assert done.stderr == b""


def test_seeding_goes_on_after_what_is_there(own: Stack) -> None:
    own.sql(
        "INSERT INTO users (name, email) SELECT 'Other', 'user' || n || '@example.com' FROM generate_series(1, 9) n"
    )
    for total in (309, 609):
        assert users(own, "seed", "--count", 300).returncode == 0
        assert count(own) == total
        assert requests.get(f"{own.edge}/users/count", timeout=5).json() == {"count": total}


def test_progress_is_for_terminals(own: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table(20_000))
    command = f"{ROOT}/run velikiy users import {tmp_path / 'a.csv'}"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", command, "/dev/null"],
        env=clean_environment(DATA=str(own.data), TERM="xterm", COLUMNS="120"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"importing users" in done.stdout
    assert b"20,000 rows" in done.stdout
    assert b"imported 20,000" in done.stdout
