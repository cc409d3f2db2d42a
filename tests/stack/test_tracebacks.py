"""Exceptions in the log: the message and a readable traceback, without personal data."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from testkit.stack import ROOT, Stack
from velikiy import tracebacks

EMPTY: dict[str, str] = {}
NAME, EMAIL = "Rumpelstilzchen", "rumpel@example.com"


def rendered(raises: Callable[[], object]) -> str:
    try:
        raises()
    except Exception:
        return tracebacks.render(sys.exc_info())
    raise AssertionError("nothing was raised")


def missing_attribute() -> object:
    row = None
    return row.name  # type: ignore[attr-defined]


def own_sentence() -> None:
    raise RuntimeError(f"The pool of {NAME} ({EMAIL}) has 3 connections too few")


def test_traceback_is_pythons_own_form() -> None:
    lines = rendered(missing_attribute).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "AttributeError: 'NoneType' object has no attribute 'name'"
    assert any(line.endswith("in missing_attribute") for line in lines)
    assert "    return row.name  # type: ignore[attr-defined]" in lines


@pytest.mark.parametrize(
    ("raises", "message"),
    [
        (lambda: EMPTY["user_id"], "KeyError: 'user_id'"),
        (lambda: EMPTY[EMAIL], "KeyError: '…'"),
        (lambda: int(NAME), "ValueError: invalid literal for int() with base 10: '…'"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (own_sentence, "RuntimeError: The pool of … … has 3 connections too few"),
        (lambda: Path(f"/nonexistent/{NAME}").read_text(), "FileNotFoundError: [Errno 2] No such file or directory"),
    ],
)
def test_message_keeps_the_words_of_the_code_and_no_values(raises: Callable[[], object], message: str) -> None:
    text = rendered(raises)
    assert text.splitlines()[-1] == message
    assert not [value for value in (NAME.lower(), EMAIL) if value in text.lower()]


def test_causes_are_shown_too() -> None:
    def fail() -> None:
        try:
            missing_attribute()
        except AttributeError as error:
            raise LookupError("no row") from error

    text = rendered(fail)
    assert "AttributeError: 'NoneType'" in text
    assert "direct cause" in text
    assert text.endswith("LookupError: no row")


def test_error_of_postgres_names_the_constraint_and_not_the_row(stack: Stack) -> None:
    def duplicate() -> None:
        with psycopg.connect(stack.postgres) as connection:
            connection.execute("CREATE TEMPORARY TABLE t (email text CONSTRAINT t_email_key UNIQUE)")
            for _ in range(2):
                connection.execute("INSERT INTO t VALUES (%s)", [EMAIL])

    text = rendered(duplicate)
    assert text.endswith('UniqueViolation: duplicate key value violates unique constraint "t_email_key"')
    assert EMAIL not in text


def test_uncaught_exception_of_a_service_is_one_line_with_its_traceback() -> None:
    code = "import sys; from velikiy import logs; logs.configure_service('info'); {}[sys.argv[1]]"
    ended = subprocess.run([sys.executable, "-c", code, EMAIL], cwd=ROOT, capture_output=True, text=True, check=False)
    line = json.loads(ended.stdout)
    assert (line["event"], line["level"]) == ("uncaught", "critical")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("KeyError: '…'")
    assert ended.stderr == ""
