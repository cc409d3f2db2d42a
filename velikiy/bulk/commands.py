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
from velikiy.coherence import Fence
from velikiy.http.problems import SQLSTATES
from velikiy.resources.base import Resource
from velikiy.settings import Settings


def commands(resource: Resource, opened: Callable[[], AbstractContextManager[tuple[Settings, Fence]]]) -> click.Group:
    """`opened` gives a fence to work with, and says what is wrong where PostgreSQL is away."""
    form = click.option("--format", "form", type=click.Choice(["csv", "ndjson"]), help="Default: by FILE's name.")

    @click.group(resource.name, help=f"Import, export and seed {resource.name}.")
    def group() -> None:
        pass

    @group.command("import")
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
    @form
    @click.option(
        "--rejects",
        metavar="PATH",
        help="Where rows go that cannot be taken; - is stdout. Default: FILE.rejects.ndjson. A file that is there is"
        " replaced if it holds rejects, and refused if it holds anything else.",
    )
    @click.option(
        "--restart", is_flag=True, help="Begin at the first line, even if an earlier import of FILE was broken off."
    )
    @click.option("--json", "as_json", is_flag=True, help="A summary for programs, on stdout.")
    def import_(file: str, form: str | None, rejects: str | None, restart: bool, as_json: bool) -> None:
        """Create what FILE has: CSV or NDJSON, which may be compressed with gzip; - is stdin.

        Ids, times and versions are given anew; for a backup use pg_dump.

        Exits with 0 if all rows were taken, 1 if some were not, 2 if FILE cannot be read. The same command goes on
        with what was broken off.
        """
        rejects = rejects or ("import.rejects.ndjson" if file == "-" else f"{file}.rejects.ndjson")
        began = time.monotonic()
        with _sentences(resource, "import"):
            if as_json and own_stream(rejects) is sys.stdout:
                raise click.UsageError("--json and --rejects both name stdout: give --rejects another path")
            with opened() as (_, fence):
                state, after = Import(resource, fence, file, form, rejects, restart).run()
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
        """Write all of one moment into FILE, by id: CSV or NDJSON, compressed if it ends in .gz; - is stdout.

        A FILE that is there is replaced, at the end and at once.
        """
        form = form or by_name(file) or ("csv" if file == "-" else None)
        if form is None:
            raise click.UsageError(f"'{file}' does not end in .csv or .ndjson: give --format")
        with _sentences(resource, "export"), opened() as (_, fence):
            rows = export_to(resource, fence, file, form)
        say(f"exported {rows:,}")

    @group.command()
    @click.option("--count", type=click.IntRange(min=1), required=True, help="How many.")
    def seed(count: int) -> None:
        """Create some that are made up, all different, and different from those that are there."""
        with _sentences(resource, "seed"), opened() as (_, fence):
            seed_with(resource, fence, count)
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
        say(f"{name}: broken off")
        sys.exit(128 + (signalled.args or [signal.SIGINT])[0])
    except Unreadable as error:
        say(f"{name}: {error}")
        sys.exit(2)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        say(f"{name}: the compressed file is damaged or cut off: {error}")
        sys.exit(2)
    except OSError as error:
        say(f"{name}: {': '.join(map(str, filter(None, (error.filename, error.strerror or error))))}")
        sys.exit(2)
    except psycopg.Error as error:
        _, sentence = SQLSTATES.get(error.sqlstate or "", ("", f"PostgreSQL refuses it ({error.sqlstate})."))
        sys.exit(f"{name}: {sentence}")
