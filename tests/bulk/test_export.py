"""`velikiy users export`: the content of the file and the file that it replaces."""

import csv
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import requests

from testkit.outages import refusing
from testkit.stack import Stack
from tests.bulk.commands import mode_of, names_in_order, run_import, run_users, stderr_of


@pytest.mark.parametrize("name", ["a.csv", "a.ndjson", "a.csv.gz", "a.jsonl.gz"])
def test_export_can_be_imported(bulk_stack: Stack, tmp_path: Path, name: str) -> None:
    assert stderr_of(run_users(bulk_stack, "seed", "--count", 1234)) == "created 1,234\n"
    bulk_stack.sql("UPDATE users SET name = %s WHERE name LIKE '%% 7'", 'a "quoted", \\N one; ')
    file = tmp_path / name
    file.write_text("an older export")
    assert stderr_of(run_users(bulk_stack, "export", file)) == "exported 1,234\n"
    before = bulk_stack.sql("SELECT name, email FROM users ORDER BY id")
    bulk_stack.sql("DELETE FROM users")
    run_import(bulk_stack, file)
    after = bulk_stack.sql("SELECT name, email FROM users ORDER BY id")
    assert [(name.strip(), email) for name, email in before] == after
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_exported_ndjson_equals_the_responses_of_the_api(bulk_stack: Stack) -> None:
    run_users(bulk_stack, "seed", "--count", 20)
    lines = run_users(bulk_stack, "export", "--format", "ndjson").stdout.splitlines()
    assert len(lines) == 20
    for line in lines:
        assert requests.get(f"{bulk_stack.edge}/users/{json.loads(line)['id']}", timeout=5).content == line


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''+1", "＝1", "'tis", "a=1", '=HYPERLINK("x";"y")']


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "-"])
def test_export_for_excel_contains_no_formula_and_can_be_imported(bulk_stack: Stack, tmp_path: Path, name: str) -> None:
    rows = [(formula, f"{n}@example.com") for n, formula in enumerate(FORMULAS)] + [("Zoë", "=zoe@example.com")]
    for row in rows:
        bulk_stack.sql("INSERT INTO users (name, email) VALUES (%s, %s)", *row)
    file = tmp_path / name if name != "-" else "-"
    completed = run_users(bulk_stack, "export", "--excel", file)
    assert completed.returncode == 0, stderr_of(completed)
    content = completed.stdout if file == "-" else Path(file).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    assert text.startswith("\ufeffid,name,email,created_at,updated_at,version\n")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@＝\t\r"))]
    assert {"'=1+1", "''=1", "'tis", "a=1", "'=zoe@example.com"} <= set(cells)
    bulk_stack.sql("DELETE FROM users")
    run_import(bulk_stack, file, given=content)
    assert bulk_stack.sql("SELECT name, email FROM users ORDER BY id") == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_export_that_a_spreadsheet_has_saved_as_unicode_text_is_imported(
    bulk_stack: Stack, tmp_path: Path, encoding: str
) -> None:
    mark = "\ufeff" if encoding == "utf-8" else ""  # the codec of UTF-16 writes its own
    text = f"{mark}name\temail\r\n'=1+1\ta@example.com\r\n''=1\tb@example.com\r\n"
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    run_import(bulk_stack, tmp_path / "a.csv")
    assert names_in_order(bulk_stack) == ["=1+1", "'=1"]


def test_plain_export_and_import_leave_formulas_as_they_are(bulk_stack: Stack, tmp_path: Path) -> None:
    for n, formula in enumerate(FORMULAS):
        bulk_stack.sql("INSERT INTO users (name, email) VALUES (%s, %s)", formula, f"{n}@example.com")
    run_users(bulk_stack, "export", tmp_path / "a.csv")
    bulk_stack.sql("DELETE FROM users")
    run_import(bulk_stack, tmp_path / "a.csv")
    assert [name for (name,) in bulk_stack.sql("SELECT name FROM users ORDER BY id")] == FORMULAS


def test_excel_option_is_refused_for_ndjson(bulk_stack: Stack, tmp_path: Path) -> None:
    completed = run_users(bulk_stack, "export", "--excel", tmp_path / "a.ndjson")
    assert completed.returncode == 2
    assert "--excel writes CSV" in stderr_of(completed)
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_the_old_file(own_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("before")
    with refusing(own_stack, "postgres"):
        assert run_users(own_stack, "export", tmp_path / "a.csv").returncode == 3
    assert (tmp_path / "a.csv").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_export_keeps_the_mode_group_and_symlink_of_the_file_that_it_replaces(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file, link = tmp_path / "a.csv", tmp_path / "link.csv"
    file.write_text("before")
    shutil.chown(file, group=12345 if os.geteuid() == 0 else os.getgroups()[-1])
    file.chmod(0o664)
    link.symlink_to(file)
    group = file.stat().st_gid
    assert run_users(bulk_stack, "export", link).returncode == 0
    assert link.is_symlink()
    assert file.read_text().startswith("id,name,email")
    assert (mode_of(file), file.stat().st_gid) == (0o664, group)
