"""A command that cannot work ends with one line: the failure, its cause and the next step; never with a traceback."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from testkit.stack import ROOT, Stack, run

COMMANDS_WITH_DATABASE = [
    ("cache", "show", "/users/1"),
    ("cache", "purge", "/users/1"),
    ("cache", "purge", "--all"),
    ("users", "import", "people.csv"),
    ("users", "export", "-"),
    ("users", "seed", "--count", "3"),
]


@pytest.fixture
def people(tmp_path: Path) -> Path:
    file = tmp_path / "people.csv"
    file.write_text("name,email\nDora,dora@example.com\n")
    return file


def run_with_file(arguments: tuple[str, ...], people: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("velikiy", *(str(people) if it == people.name else it for it in arguments), **environment)


def only_line(completed: subprocess.CompletedProcess[str], arguments: tuple[str, ...]) -> str:
    """Return the message of a command that failed with one line. An import exits with 1 if it rejects a row."""
    assert completed.returncode == (3 if arguments[0] == "users" else 1), completed.stderr
    [line] = completed.stderr.splitlines()
    assert line.startswith(f"velikiy {' '.join(arguments[:2])}: ")
    return line


@pytest.mark.parametrize("arguments", COMMANDS_WITH_DATABASE, ids=" ".join)
def test_command_on_a_database_without_tables_advises_to_migrate(
    stack: Stack, people: Path, arguments: tuple[str, ...]
) -> None:
    without_tables = make_conninfo(stack.postgres, dbname="template1")
    completed = run_with_file(arguments, people, DATA=str(stack.data), DATABASE_URL=without_tables)
    line = only_line(completed, arguments)
    migrate = f"{ROOT}/run velikiy --data {stack.data} migrate"  # can be pasted
    assert f"The database is not migrated: its tables are missing. Create them with {migrate}, and check" in line


def test_commands_without_rights_on_the_tables_advise_to_grant_them(own_stack: Stack, people: Path) -> None:
    own_stack.sql("REVOKE ALL ON users, caches, imports FROM velikiy")
    for arguments in COMMANDS_WITH_DATABASE:
        line = only_line(run_with_file(arguments, people, DATA=str(own_stack.data)), arguments)
        migrate = f"{ROOT}/run velikiy --data {own_stack.data} migrate"
        assert f"The database denies the service access to its tables. Run {migrate} as their owner" in line


@pytest.mark.parametrize("arguments", COMMANDS_WITH_DATABASE, ids=" ".join)
def test_command_with_a_wrong_password_names_the_refusal_of_postgresql(
    stack: Stack, people: Path, arguments: tuple[str, ...]
) -> None:
    wrong = re.sub("(//[^:]+:)[^@]+@", r"\1wrong@", stack.secret("database_url"))
    completed = run_with_file(arguments, people, DATA=str(stack.data), DATABASE_URL=wrong)
    line = only_line(completed, arguments)
    assert 'PostgreSQL refuses the connection: password authentication failed for user "velikiy"' in line
    assert "Check DATABASE_URL" in line


def test_migrate_with_a_wrong_password_fails_with_one_line(stack: Stack) -> None:
    wrong = re.sub("(//[^:]+:)[^@]+@", r"\1wrong@", stack.postgres)
    completed = run("velikiy", "migrate", "--wait", "0", DATA=str(stack.data), DATABASE_URL=wrong)
    assert completed.returncode == 1
    assert completed.stderr.startswith("velikiy migrate: PostgreSQL accepted no connection within 0 s.")
    assert completed.stderr.count("\n") == 1


def test_migrate_await_waits_for_tables_and_makes_none(stack: Stack) -> None:
    await_migration = ("velikiy", "migrate", "--await", "--wait", "0")
    assert run(*await_migration, DATA=str(stack.data)).returncode == 0
    without_tables = make_conninfo(stack.postgres, dbname="template1")
    completed = run(*await_migration, DATA=str(stack.data), DATABASE_URL=without_tables)
    assert completed.returncode == 1
    assert completed.stderr.startswith("velikiy migrate: no migration within 0 s: there are no tables yet, and ")
    assert completed.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [*COMMANDS_WITH_DATABASE, ("migrate",), ("relay",)], ids=" ".join)
def test_command_without_secrets_names_the_missing_settings(
    tmp_path: Path, people: Path, arguments: tuple[str, ...]
) -> None:
    completed = run_with_file(arguments, people, SECRETS_DIR=str(tmp_path), DATABASE_URL="", REDIS_URL="")
    assert completed.returncode == (2 if arguments[0] == "users" else 1)
    # The relay logs, because its output is a log.
    assert "DATABASE_URL is not set" in (completed.stdout if arguments == ("relay",) else completed.stderr)
    assert "Traceback" not in completed.stdout + completed.stderr


def test_secrets_in_a_folder_that_cannot_exist_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    completed = run("velikiy", "secrets", str(tmp_path / "file" / "x"), "--postgres", "a:1", "--redis", "b:2")
    assert completed.returncode == 1
    assert completed.stderr.startswith(f"velikiy: {tmp_path}/file/x: Not a directory. ")
    assert completed.stderr.count("\n") == 1


def test_relay_with_an_impossible_heartbeat_file_fails_with_one_line(stack: Stack, tmp_path: Path) -> None:
    completed = run("velikiy", "relay", "--heartbeat", str(tmp_path / "none" / "file"), DATA=str(stack.data))
    assert completed.returncode == 1
    line = json.loads(completed.stdout.splitlines()[-1])
    assert line["event"] == "cannot_start"
    assert line["reason"] == (
        f"{tmp_path}/none/file: No such file or directory. Check the spelling of the path, and that its folder exists"
    )


def test_secrets_that_are_a_folder_instead_of_a_file_fail_without_a_traceback(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "database_url").mkdir()
    completed = run("velikiy", "cache", "show", "/users", SECRETS_DIR=str(tmp_path), DATABASE_URL="", REDIS_URL="")
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
