"""`velikiy users import` of files of other programs: the columns are shown, confirmed, and kept after an interruption."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from testkit.stack import ROOT, Stack, clean_environment
from tests.bulk.commands import (
    LONG_NAME,
    count_users,
    csv_of_people,
    names_in_order,
    read_rejects,
    run_import,
    run_users,
    start_import_and_await_progress,
    stderr_of,
)

MAILCHIMP = b"Email Address,First Name,Last Name,MEMBER_RATING\nann@example.com,Ann,Lee,2\nben@example.com,Ben,Oz,2\n,No,Mail,1\n"
PROPOSAL = (
    "the columns look like those of Mailchimp:\n"
    "  name ← First Name + Last Name\n"
    "  email ← Email Address\n"
    "  ignored: MEMBER_RATING\n"
)


def test_export_of_another_program_is_imported_only_with_yes(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "audience.csv"
    file.write_bytes(MAILCHIMP)
    for arguments in ((file,), ("-",)):
        completed = run_import(bulk_stack, *arguments, given=MAILCHIMP, code=2)
        assert stderr_of(completed) == (
            f"{PROPOSAL}velikiy users import: add --yes to import these columns so, or choose others with --map\n"
        )
    assert run_import(bulk_stack, file, "--dry-run", code=2).stderr == completed.stderr
    dry = run_import(bulk_stack, file, "--dry-run", "--yes", code=1)
    assert stderr_of(dry).startswith(f"{PROPOSAL}line 4: email is not an e-mail address")
    assert stderr_of(dry).endswith("would import 2, rejected 1\n")
    assert count_users(bulk_stack) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["audience.csv"]
    completed = run_import(bulk_stack, file, "--yes", code=1)
    assert stderr_of(completed) == f"{PROPOSAL}imported 2, rejected 1 → {file}.rejects.ndjson\n"
    assert names_in_order(bulk_stack) == ["Ann Lee", "Ben Oz"]
    [reject] = read_rejects(tmp_path / "audience.csv.rejects.ndjson")
    assert reject["row"] == {"name": "No Mail", "email": ""}


@pytest.mark.parametrize(
    ("answer", "count", "code"), [("y\n", 2, 1), ("n\n", 0, 2), ("\x03", 0, 130), ("\x04", 0, 130)]
)
def test_terminal_is_asked_about_the_columns(
    bulk_stack: Stack, tmp_path: Path, answer: str, count: int, code: int
) -> None:
    (tmp_path / "a.csv").write_bytes(MAILCHIMP)
    command = f"{ROOT}/run velikiy users import {tmp_path}/a.csv"
    with subprocess.Popen(
        ["script", "--quiet", "--return", "--command", command, "/dev/null"],
        env=clean_environment(DATA=str(bulk_stack.data), TERM="xterm", COLUMNS="120"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout
        shown = b""
        while b"Import these columns so? [y/N]: " not in shown:  # an earlier Ctrl-C would end the start of the command
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, shown
            shown += piece
        # A Ctrl-C between the question and the read of the answer stays unnoticed until the next key.
        for _ in range(12):
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.stdin.write(answer.encode())
                process.stdin.flush()
                process.wait(5)
                break
        assert process.returncode == code
    assert count_users(bulk_stack) == count


def test_options_choose_columns_and_encoding_of_stdin(bulk_stack: Stack) -> None:
    content = "Имя;Фамилия;Почта;Телефон\nЗоя;Ли;zoya@example.com;1\n".encode("cp1251")
    assert "add --encoding windows-1251" in stderr_of(run_import(bulk_stack, "-", given=content, code=2))
    run_import(
        bulk_stack,
        "-",
        *("--encoding", "windows-1251", "--map", "Имя+Фамилия=name", "--map", "Почта=email", "--ignore-unknown"),
        given=content,
    )
    assert names_in_order(bulk_stack) == ["Зоя Ли"]


def test_help_names_the_columns(bulk_stack: Stack) -> None:
    text = " ".join(run_users(bulk_stack, "import", "--help").stdout.decode().split())
    assert "Columns of FILE: name and email, in any order and case; id, created_at, updated_at, version are" in text
    assert '--map "First Name+Last Name=name"' in text


def test_interrupted_import_continues_only_with_the_same_columns(bulk_stack: Stack, tmp_path: Path) -> None:
    content = csv_of_people(35_000, LONG_NAME).replace(b"name,email", b"who,mail", 1)
    columns = ("--map", "who=name", "--map", "mail=email")
    start_import_and_await_progress(bulk_stack, content[:2_400_000], *columns).kill()
    (tmp_path / "a.csv").write_bytes(content)
    exchanged = ("--map", "who=email", "--map", "mail=name")
    completed = run_import(bulk_stack, tmp_path / "a.csv", *exchanged, code=2)
    assert "was interrupted after line 20,001, and read the file in another way" in stderr_of(completed)
    assert "give the same --map, --encoding and --format again, or start over with --restart" in stderr_of(completed)
    assert "continuing after line 20,001\n" in stderr_of(run_import(bulk_stack, tmp_path / "a.csv", *columns))
    assert count_users(bulk_stack) == 35_000


def test_encoding_that_appears_late_stops_the_import_which_continues_with_the_option(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(csv_of_people(35_000, LONG_NAME) + "Зоя,zoya@example.com\n".encode("cp1251"))
    completed = run_import(bulk_stack, file, code=3)
    assert "lines 1 to 30,001 are done; to continue after them" in stderr_of(completed)
    assert "the file is not UTF-8 (line 35,002, byte 0xc7). It looks like windows-1251 ('Зоя')" in stderr_of(completed)
    completed = run_import(bulk_stack, file, "--encoding", "windows-1251")
    assert "continuing after line 30,001\n" in stderr_of(completed)
    assert names_in_order(bulk_stack)[-1] == "Зоя"
    assert count_users(bulk_stack) == 35_001


def test_interrupted_import_of_an_array_continues_after_its_last_object(bulk_stack: Stack, tmp_path: Path) -> None:
    rows = [{"name": f"{LONG_NAME} {n}", "email": f"person{n}@example.com"} for n in range(45_000)]
    content = json.dumps(rows).encode()
    start_import_and_await_progress(bulk_stack, content[:4_500_000]).kill()
    file = tmp_path / "a.json"
    file.write_bytes(content)
    completed = run_import(bulk_stack, file)
    assert "continuing after object 30,000\n" in stderr_of(completed)
    assert count_users(bulk_stack) == 45_000


def test_rejected_object_of_several_lines_is_one_line_of_the_rejects(bulk_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps([{"name": "Ann", "email": "ann@example.com"}, {"name": "Ben", "email": "ben"}], indent=2)
    )
    run_import(bulk_stack, file, code=1)
    [reject] = read_rejects(tmp_path / "a.json.rejects.ndjson")
    assert (reject["line"], reject["row"]) == (6, {"name": "Ben", "email": "ben"})
