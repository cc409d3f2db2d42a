"""`velikiy users import`: formats, invalid rows, and the effect on reads."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from testkit.outages import hanging, refusing
from testkit.stack import ROOT, Stack, clean_environment, wait_until
from tests.bulk.commands import (
    count_users,
    csv_of_people,
    names_in_order,
    read_rejects,
    run_import,
    run_users,
    stderr_of,
)

TWO_USERS = [{"name": 'Zoë; the "first"', "email": "zoe@example.com"}, {"name": "Ян", "email": "yan@example.com"}]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", content)
    return stream.getvalue()


def as_ndjson(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", as_csv(TWO_USERS)),
        ("a.CSV", as_csv(TWO_USERS).rstrip()),
        ("windows.csv", b"\xef\xbb\xbf" + as_csv(TWO_USERS, end="\r\n")),
        ("excel.csv", b"\xef\xbb\xbf" + as_csv(TWO_USERS, delimiter=";")),
        ("tabs", as_csv(TWO_USERS, delimiter="\t")),
        ("a.ndjson", as_ndjson(TWO_USERS)),
        ("a.jsonl", b"\n" + as_ndjson(TWO_USERS).rstrip()),
        ("unnamed", b"\xef\xbb\xbf \n" + as_ndjson(TWO_USERS)),
        ("a.csv.gz", gzip.compress(as_csv(TWO_USERS), mtime=0)),
        (
            "compressed",
            gzip.compress(as_ndjson(TWO_USERS)[:20], mtime=0) + gzip.compress(as_ndjson(TWO_USERS)[20:], mtime=0),
        ),
        ("-", as_csv(TWO_USERS)),
        ("-", gzip.compress(as_ndjson(TWO_USERS), mtime=0)),
    ],
)
def test_import_reads_csv_and_ndjson_compressed_or_not(
    bulk_stack: Stack, tmp_path: Path, file: str, content: bytes
) -> None:
    if file != "-":
        (tmp_path / file).write_bytes(content)
        file = str(tmp_path / file)
    completed = run_import(bulk_stack, file, given=content)
    assert stderr_of(completed) == "imported 2\n"
    assert completed.stdout == b""
    assert [
        {"name": name, "email": email} for name, email in bulk_stack.sql("SELECT name, email FROM users ORDER BY id")
    ] == TWO_USERS
    assert not list(tmp_path.glob("*reject*"))


def test_format_option_overrides_the_file_name(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_ndjson(TWO_USERS))
    run_import(bulk_stack, "--format", "ndjson", tmp_path / "a.csv")
    assert count_users(bulk_stack) == 2


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("a.csv", b"name,email,phone\n", "users have no column 'phone'; the columns are name, email"),
        ("a.csv", b"name\nAlice\n", "lacks email"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"name,email,name\n", "names the column name twice"),
        ("a.csv", "имя,email\n".encode("cp1251"), "the file is not UTF-8 (line 1, byte 0xe8)"),
        ("a.csv", b"na\0me,email\n", "line 1 contains a NUL byte"),
        ("a.csv", b'"name,email\n', "line 1 is not CSV"),
        ("a.csv", b"x" * 2_000_000, "line 1 is longer than 1,048,576 bytes"),
        ("a.csv.gz", gzip.compress(csv_of_people(50), mtime=0)[:-9], "the compressed file is damaged or truncated"),
    ],
)
def test_unreadable_file_is_reported_and_exits_with_2(
    bulk_stack: Stack, tmp_path: Path, file: str, content: bytes, sentence: str
) -> None:
    (tmp_path / file).write_bytes(content)
    completed = run_import(bulk_stack, tmp_path / file, code=2)
    assert sentence in stderr_of(completed)
    assert "Traceback" not in stderr_of(completed)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, as_zip])
def test_archive_that_is_damaged_exits_with_3_if_rows_were_imported_before_and_else_with_2(
    bulk_stack: Stack, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    for size, code, done in ((50, 2, ""), (50_000, 3, "lines 1 to ")):
        content = bytearray(compress(csv_of_people(size)))
        place = len(content) // 2 if size == 50 else len(content) * 9 // 10
        content[place] ^= 255
        content[place + 1] ^= 255
        (tmp_path / f"{size}").write_bytes(content)
        completed = run_import(bulk_stack, tmp_path / f"{size}", code=code)
        assert stderr_of(completed).startswith(done or "velikiy users import: the compressed file")
        assert "the compressed file is damaged or truncated" in stderr_of(completed)
        assert bool(count_users(bulk_stack)) == bool(done)


def test_file_that_is_no_table_after_some_rows_were_imported_exits_with_3(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(csv_of_people(40_000).replace(b"person", b"other") + b"x" * 2_000_000)
    completed = run_import(bulk_stack, tmp_path / "b.csv", code=3)
    assert "line 40,002 is longer than 1,048,576 bytes" in stderr_of(completed)


def test_wrong_usage_exits_with_2(bulk_stack: Stack, tmp_path: Path) -> None:
    existing = tmp_path / "a.csv"
    existing.write_bytes(as_csv(TWO_USERS))
    assert "does not exist" in stderr_of(run_import(bulk_stack, tmp_path / "none.csv", code=2))
    assert "is the file to import" in stderr_of(run_import(bulk_stack, existing, "--rejects", existing, code=2))
    assert "No such file" in stderr_of(
        run_import(bulk_stack, existing, "--rejects", tmp_path / "no" / "folder", code=2)
    )
    completed = run_users(bulk_stack, "export", tmp_path / "a.xlsx")
    assert completed.returncode == 2
    assert "give --format" in stderr_of(completed)


def test_invalid_csv_rows_are_rejected_with_their_lines_and_the_others_imported(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"email,name,id\n"
        b'a@example.com,"of two\nlines",7\n'  # lines 2 and 3: a name must not contain control characters
        b"a@example.com,Al\xc3\xafce,7\n"
        b"\n"
        b"A@EXAMPLE.com,Again,8\n"  # line 6
        b"none,,9\n"
        b"b@example.com,Bob\n"
        b"b@example.com,B\xf6b,1\n"
        b'b@example.com,"B"ob,1\n'  # line 10
        b"c@example.com,Carol,1"
    )
    completed = run_import(bulk_stack, file, code=1)
    rejects = tmp_path / "a.csv.rejects.ndjson"
    assert stderr_of(completed) == f"imported 2, rejected 6 → {rejects}\n"
    assert names_in_order(bulk_stack) == ["Alïce", "Carol"]
    by_line = {reject["line"]: reject for reject in read_rejects(rejects)}
    assert list(by_line) == [2, 6, 7, 8, 9, 10]
    assert by_line[2]["row"] == {"email": "a@example.com", "name": "of two\nlines", "id": "7"}
    assert by_line[2]["errors"] == [{"field": "name", "detail": "must not contain control characters"}]
    assert by_line[6]["errors"] == [{"field": "email", "detail": "is taken by another user"}]
    assert [error["field"] for error in by_line[7]["errors"]] == ["name", "email"]
    assert "has 2 values for 3 columns" in by_line[8]["errors"][0]["detail"]
    assert "line 9 is not UTF-8 (byte 0xf6)" in by_line[9]["errors"][0]["detail"]
    assert "is not CSV" in by_line[10]["errors"][0]["detail"]


def test_unclosed_quote_rejects_every_line_that_it_includes(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    lines = csv_of_people(9).decode().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], '"open,open@example.com\n', *lines[4:]]))
    completed = run_import(bulk_stack, file, code=1)
    assert "imported 3, rejected 7" in stderr_of(completed)
    [rejected] = read_rejects(tmp_path / "some.csv.rejects.ndjson")
    assert rejected["line"] == 5
    assert "(lines 5 to 11: a quote in line 5 may be unclosed)" in rejected["errors"][0]["detail"]
    assert rejected["row"] == "".join(['"open,open@example.com\n', *lines[4:]])


def test_invalid_ndjson_lines_are_rejected(bulk_stack: Stack, tmp_path: Path) -> None:
    file, rejects = tmp_path / "a.ndjson", tmp_path / "aside"
    big = b'{"name": "B\xc3\xafg", "email": "big@example.com", "id": 123456789012345678901234567890}'
    latin = '{"name": "Böb", "email": "bob@example.com"}'.encode("latin-1")
    lines = [b"[1]", b'{"name": 7}', b'{"name": "A", "name": "B"}', b"{", b'{"name": "\\u0000"}', latin, b"", big]
    file.write_bytes(b"\n".join(lines))
    completed = run_import(bulk_stack, file, "--rejects", rejects, "--json", code=1)
    summary = json.loads(completed.stdout)
    assert (summary["imported"], summary["rejected"], summary["rejects"]) == (1, 6, str(rejects))
    assert [reject["line"] for reject in read_rejects(rejects)] == [1, 2, 3, 4, 5, 6]
    assert read_rejects(rejects)[1]["errors"][0] == {"field": "name", "detail": "must be a string"}
    assert read_rejects(rejects)[1]["row"] == {"name": 7}
    assert "is not JSON" in read_rejects(rejects)[2]["errors"][0]["detail"]
    assert read_rejects(rejects)[5]["errors"][0]["detail"] == "line 6 is not UTF-8 (byte 0xf6)"
    assert names_in_order(bulk_stack) == ["Bïg"]


def test_existing_value_rejects_its_row_even_in_the_second_chunk(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    bulk_stack.sql("INSERT INTO users (name, email) VALUES ('First', 'PERSON12345@example.com')")
    file.write_bytes(csv_of_people(20_000))
    run_import(bulk_stack, file, code=1)
    (reject,) = read_rejects(tmp_path / "a.csv.rejects.ndjson")
    assert reject["line"] == 12345 + 2
    assert count_users(bulk_stack) == 20_000
    run_import(bulk_stack, file, code=1)
    assert len(read_rejects(tmp_path / "a.csv.rejects.ndjson")) == 20_000


def test_row_that_only_postgresql_refuses_is_found_and_rejected(bulk_stack: Stack, tmp_path: Path) -> None:
    bulk_stack.sql("ALTER TABLE users ADD CONSTRAINT no_7 CHECK (name NOT LIKE '%% 7')")
    try:
        (tmp_path / "a.csv").write_bytes(csv_of_people(100))
        run_import(bulk_stack, tmp_path / "a.csv", code=1)
    finally:
        bulk_stack.sql("ALTER TABLE users DROP CONSTRAINT no_7")
    (reject,) = read_rejects(tmp_path / "a.csv.rejects.ndjson")
    assert (reject["line"], reject["errors"][0]["detail"]) == (9, "A value violates a constraint of the table.")
    assert names_in_order(bulk_stack) == [f"Person {n}" for n in range(100) if n != 7]


@pytest.mark.parametrize("row_count", [3, 1500])
def test_reads_return_imported_rows_as_soon_as_the_import_ends(
    bulk_stack: Stack, tmp_path: Path, row_count: int
) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of_people(row_count))
    (tmp_path / "b.csv").write_bytes(csv_of_people(row_count).replace(b"person", b"other"))
    run_import(bulk_stack, tmp_path / "a.csv")
    last = bulk_stack.sql("SELECT max(id) FROM users")[0][0]
    for edge in bulk_stack.edges:
        for path in ("/users?limit=1", f"/users/{last}", f"/users/{last + 1}"):
            wait_until(lambda: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # noqa: B023
        for path in ("/users?limit=1&sort=-id", "/users/count"):
            wait_until(lambda: "hit" in requests.get(edge + path, timeout=5).headers["Cache-Status"])  # noqa: B023
        assert requests.get(f"{edge}/users/{last + 1}", timeout=5).status_code == 404
    run_import(bulk_stack, tmp_path / "b.csv")
    for edge in bulk_stack.edges:
        assert requests.get(f"{edge}/users/count", timeout=5).json() == {"count": 2 * row_count}
        assert requests.get(f"{edge}/users/{last + 1}", timeout=5).json()["email"] == "other0@example.com"
        newest = requests.get(f"{edge}/users?limit=1&sort=-id", timeout=5).json()
        assert newest[0]["email"] == f"other{row_count - 1}@example.com"


def test_import_waits_for_the_exclusion_of_a_hanging_redis(own_stack: Stack) -> None:
    with hanging(own_stack, "redis"):
        run_import(own_stack, "-", given=csv_of_people(10))
    assert requests.get(f"{own_stack.edge}/users/count", timeout=5).json() == {"count": 13}


def test_bulk_commands_without_postgresql_fail_with_one_line(own_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of_people(5))
    with refusing(own_stack, "postgres"):
        for arguments in (("import", tmp_path / "a.csv"), ("export", "-"), ("seed", "--count", 5)):
            completed = run_users(own_stack, *arguments)
            assert completed.returncode == 3
            assert stderr_of(completed).startswith(f"velikiy users {arguments[0]}: PostgreSQL does not answer")
            assert stderr_of(completed).count("\n") == 1


def test_terminal_shows_a_progress_bar(bulk_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of_people(20_000))
    command = f"{ROOT}/run velikiy users import {tmp_path / 'a.csv'}"
    completed = subprocess.run(
        ["script", "--quiet", "--return", "--command", command, "/dev/null"],
        env=clean_environment(DATA=str(bulk_stack.data), TERM="xterm", COLUMNS="120"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"importing users" in completed.stdout
    assert b"20,000 rows" in completed.stdout
    assert b"imported 20,000" in completed.stdout


@pytest.mark.parametrize("size", [5, 2000])
def test_import_passes_by_ids_that_sql_has_taken(bulk_stack: Stack, size: int) -> None:
    [(last,)] = bulk_stack.sql("SELECT nextval('users_id_seq')")
    for user_id in (last + 1, last + 3, last + size):
        bulk_stack.sql(
            "INSERT INTO users (id, name, email) VALUES (%s, 'Taken', %s)", user_id, f"t{user_id}@example.com"
        )
    run_import(bulk_stack, "-", given=csv_of_people(size))
    assert count_users(bulk_stack) == size + 3
