"""Errors as sentences for the operator: the failure, its cause, and the next step."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from velikiy.bulk.progress import print_message
from velikiy.bulk.signals import raise_on_signals
from velikiy.postgres import CONNECT_OPTIONS, DatabaseUnavailable, Deadlock
from velikiy.resources.problems import SQLSTATES
from velikiy.settings import BadSetting

NEXT_STEPS = {
    "42P01": "Create them with {velikiy} migrate, and check that DATABASE_URL names the right database",
    "42703": "Bring them up to date with {velikiy} migrate, and check that DATABASE_URL names the right database",
    "42501": "Run {velikiy} migrate as their owner (MIGRATION_DATABASE_URL), which grants the rights",
    "25006": "Let DATABASE_URL name the primary server",
}
"""The next step of the operator, by SQLSTATE."""


def program() -> str:
    """Return the words that start `velikiy`, as they can be pasted. `./run velikiy` adds the folder of the stack."""
    return os.environ.get("VELIKIY_COMMAND") or "velikiy"


def command_of_run(word: str) -> str:
    """Return a command of `./run` for the stack of this command (velikiy/stack/commands/clients.py)."""
    run = os.environ.get("VELIKIY_RUN", "./run")
    option = os.environ.get("VELIKIY_COMMAND", "").removeprefix(f"{run} velikiy")
    return f"{run} {word}{option}"


SENTENCES = {
    "42P01": "The database is not migrated: its tables are missing",
    "42703": "The tables of the database belong to another version: a column is missing",
}
"""Causes that deserve another sentence here than in a response to a client of the API, by SQLSTATE."""


FILE_NEXT_STEPS = {
    errno.ENOENT: "Check the spelling of the path, and that its folder exists",
    errno.EACCES: "Run the command as a user that may read and write there, or choose another path",
    errno.EROFS: "Choose a path on a file system that can be written",
    errno.ENOTDIR: "Check the spelling of the path: a part of it is a file, and not a folder",
    errno.EEXIST: "Choose another path, or move the existing file away",
}
"""The next step of the operator, by error number of the system."""


def statement_sentence(error: psycopg.Error) -> str:
    """Return a sentence about a statement that PostgreSQL refused, without the values in it: they are personal data."""
    state = error.sqlstate or "no SQLSTATE"
    _, detail = SQLSTATES.get(state, ("", f"PostgreSQL refused the statement ({state})"))
    sentence = SENTENCES.get(state, detail.rstrip("."))
    return f"{sentence}. {NEXT_STEPS[state].format(velikiy=program())}" if state in NEXT_STEPS else f"{sentence}."


def unavailable_sentence(error: DatabaseUnavailable, dsn: str) -> str:
    """Return a sentence about a PostgreSQL that does not serve the command."""
    if isinstance(error, Deadlock):
        return "PostgreSQL aborted the transaction: it and another transaction waited for each other. Run it again"
    if getattr(error.__cause__, "sqlstate", None):
        failure = f"PostgreSQL cancelled the statement ({error})"
    elif refusal := _connection_refusal(dsn):
        return f"PostgreSQL refuses the connection: {refusal}. Check DATABASE_URL and the state of the server"
    else:
        failure = f"PostgreSQL does not answer ({error})"
    return f"{failure}. Check with {command_of_run('status')} that the stack runs"


def _connection_refusal(dsn: str) -> str | None:
    """Return the reason for which the server refuses a connection, such as a wrong password, or None.

    A pool hides the reason: a server that refuses connections looks like a server that does not answer.
    """
    try:
        psycopg.connect(dsn, **CONNECT_OPTIONS).close()
    except psycopg.Error as error:
        _, fatal, reason = str(error).strip().rpartition("FATAL:")
        return reason.strip().splitlines()[0] if fatal else None
    return None


def setting_sentence(error: BadSetting) -> str:
    """Return a sentence about a setting that is missing or wrong."""
    run = os.environ.get("VELIKIY_RUN", "./run")
    return f"{error}\nStart a stack with {run} up, or select its folder with {run} velikiy --data DIR."


def os_sentence(error: OSError) -> str:
    """Return a sentence about a file, folder or stream that cannot be used."""
    if error.errno == errno.EBADF:
        return "stdout is closed"
    path = f"{error.filename}: " if error.filename else ""
    advice = f". {FILE_NEXT_STEPS[error.errno]}" if error.errno in FILE_NEXT_STEPS else ""
    return f"{path}{error.strerror or error}{advice}"


@contextmanager
def ending_on_signals(name: str) -> Iterator[None]:
    """End the command of this name with one line and the exit code of the signal, if a signal interrupts the block."""
    try:
        with raise_on_signals():
            yield
    except KeyboardInterrupt as interruption:
        print_message(f"{name}: interrupted")
        sys.exit(128 + (interruption.args or [signal.SIGINT])[0])
