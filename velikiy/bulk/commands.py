"""What is typed, and what is said when something goes wrong."""

import gzip
import json
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
import psycopg

from velikiy.bulk.exporter import export_to
from velikiy.bulk.importer import Import, seed_with
from velikiy.bulk.output_files import own_stream
from velikiy.bulk.progress import say
from velikiy.bulk.readers import Unreadable, by_name
from velikiy.bulk.signals import orderly
from velikiy.coherence import Gate
from velikiy.resources.base import Resource
from velikiy.resources.problems import SQLSTATES
from velikiy.settings import Settings


def commands(resource: Resource, opened: Callable[[], AbstractContextManager[tuple[Settings, Gate]]]) -> click.Group:
    """`opened` gives a fence to work with, and says what is wrong where PostgreSQL is away."""
    form = click.option(
        "--format", "form", type=click.Choice(["csv", "ndjson"]), help="Default: from the name of FILE."
    )

    @click.group(resource.name, help=f"Import, export and seed {resource.name}.")
    def group() -> None:
        pass

    @group.command("import")
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
    @form
    @click.option(
        "--rejects",
        metavar="PATH",
        help="File for rejected rows; - is stdout. Default: FILE.rejects.ndjson. An existing file is replaced if it"
        " contains rejected rows, and refused if it contains anything else.",
    )
    @click.option(
        "--restart", is_flag=True, help="Start at the first line, even if an earlier import of FILE was interrupted."
    )
    @click.option("--json", "as_json", is_flag=True, help="Print a summary for programs to stdout.")
    def import_(file: str, form: str | None, rejects: str | None, restart: bool, as_json: bool) -> None:
        """Create the rows in FILE: CSV or NDJSON, optionally compressed with gzip; - is stdin.

        Every row gets a new id, new times and a new version; for a backup use pg_dump.

        Exits with 0 if all rows were imported, 1 if some were rejected, 2 if FILE cannot be read. To continue after an
        interruption, run the same command again.
        """
        rejects = rejects or ("import.rejects.ndjson" if file == "-" else f"{file}.rejects.ndjson")
        began = time.monotonic()
        with _sentences(resource, "import"):
            if as_json and own_stream(rejects) is sys.stdout:
                raise click.UsageError("--json and --rejects both write to stdout: give --rejects another path")
            with opened() as (_, gate):
                state, after = Import(resource, gate, file, form, rejects, restart).run()
        if as_json:
            summary: dict[str, Any] = {
                "imported": state.imported,
                "rejected": state.rejected,
                "continued_after": after or None,
            }
            summary |= {"rejects": rejects if state.rejected else None, "seconds": round(time.monotonic() - began, 3)}
            click.echo(json.dumps(summary))
        where = "stdout" if rejects == "-" else rejects
        say(f"imported {state.imported:,}" + (f", rejected {state.rejected:,} → {where}" if state.rejected else ""))
        sys.exit(1 if state.rejected else 0)

    @group.command()
    @click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
    @form
    def export(file: str, form: str | None) -> None:
        """Write a snapshot of all rows into FILE, ordered by id; - is stdout.

        The format is CSV or NDJSON, compressed with gzip if the name of FILE ends in .gz. An existing FILE is replaced
        atomically, when the export is complete.
        """
        form = form or by_name(file) or ("csv" if file == "-" else None)
        if form is None:
            raise click.UsageError(f"'{file}' does not end in .csv or .ndjson: give --format")
        with _sentences(resource, "export"), opened() as (_, gate):
            rows = export_to(resource, gate, file, form)
        say(f"exported {rows:,}")

    @group.command()
    @click.option("--count", type=click.IntRange(min=1), required=True, help="Number of rows.")
    def seed(count: int) -> None:
        """Create made-up rows. Each differs from all others and from the existing rows."""
        with _sentences(resource, "seed"), opened() as (_, gate):
            seed_with(resource, gate, count)
        say(f"created {count:,}")

    return group


@contextmanager
def _sentences(resource: Resource, command: str) -> Iterator[None]:
    """What goes wrong is said in one, and the exit code tells which kind it is."""
    name = f"velikiy {resource.name} {command}"
    try:
        with orderly():
            yield
    except KeyboardInterrupt as signalled:
        say(f"{name}: interrupted")
        sys.exit(128 + (signalled.args or [signal.SIGINT])[0])
    except Unreadable as error:
        say(f"{name}: {error}")
        sys.exit(2)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        say(f"{name}: the compressed file is damaged or truncated: {error}")
        sys.exit(2)
    except OSError as error:
        say(f"{name}: {': '.join(map(str, filter(None, (error.filename, error.strerror or error))))}")
        sys.exit(2)
    except psycopg.Error as error:
        _, sentence = SQLSTATES.get(error.sqlstate or "", ("", f"PostgreSQL refused the statement ({error.sqlstate})."))
        sys.exit(f"{name}: {sentence}")
