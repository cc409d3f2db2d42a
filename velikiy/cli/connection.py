"""The connection of a command to PostgreSQL and the caches."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import psycopg

from velikiy import coherence, logs
from velikiy.cli.errors import program, statement_sentence, unavailable_sentence
from velikiy.postgres import Database, DatabaseUnavailable
from velikiy.settings import Settings, load

TIMEOUT_S = 5
"""Seconds that PostgreSQL may take for a statement of a command."""


@contextmanager
def open_gate(*, exit_code: int = 1) -> Iterator[tuple[Settings, coherence.Gate]]:
    """Yield the settings and a gate. If PostgreSQL fails, end the command with one line for the operator and this exit
    code."""
    settings = load(Settings)
    # An operator reads the messages of a command, so log events below the level "error" are left out.
    logs.configure("error")
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    database = Database(settings.direct_url, size=2, timeout=TIMEOUT_S)
    gate = coherence.connect(database, settings)
    database.open()
    try:
        yield settings, gate
    except DatabaseUnavailable as error:
        click.echo(f"{_command()}: {unavailable_sentence(error, settings.direct_url)}", err=True)
        sys.exit(exit_code)
    except psycopg.Error as error:
        click.echo(f"{_command()}: {statement_sentence(error)}", err=True)
        sys.exit(exit_code)
    finally:
        database.close()


def _command() -> str:
    """Return the words of the running command: "velikiy cache show"."""
    return "velikiy" + click.get_current_context().command_path.removeprefix(program())
