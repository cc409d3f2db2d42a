"""`velikiy users import`, `export` and `seed`, for every resource."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from velikiy.bulk.atomic_file import standard_stream
from velikiy.bulk.columns import Reading
from velikiy.bulk.exporter import export_to
from velikiy.bulk.importer import Import
from velikiy.bulk.input_file import CannotImport, format_by_name
from velikiy.bulk.progress import print_message
from velikiy.bulk.seeder import seed_with
from velikiy.bulk.signals import raise_on_signals
from velikiy.cli.connection import open_gate
from velikiy.cli.errors import os_sentence
from velikiy.resources.base import READ_ONLY, Resource


def resource_commands(resource: Resource) -> click.Group:
    """Return the group of commands for the rows of a resource."""
    format_option = click.option(
        "--format", "file_format", type=click.Choice(["csv", "ndjson"]), help="Default: from the name of FILE."
    )

    @click.group(resource.name, help=f"Import, export and seed {resource.name}.")
    def group() -> None:
        pass

    columns = (
        f"Columns of FILE: {' and '.join(resource.fields)}, in any order and case; {', '.join(READ_ONLY)} are ignored."
        " Exports of other programs are recognised by their columns."
    )

    @group.command("import", epilog=columns)
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
    @click.option(
        "--format",
        "file_format",
        type=click.Choice(["csv", "ndjson", "json"]),
        help="Default: from the content of FILE. ndjson and json are the same.",
    )
    @click.option(
        "--encoding", metavar="NAME", help="Encoding of FILE, such as windows-1251. Default: UTF-8, or UTF-16 if it is."
    )
    @click.option(
        "--map",
        "maps",
        multiple=True,
        metavar="COLUMN=FIELD",
        help='Column for a field: --map "E-mail 1 - Value=email". Several columns are joined with blanks:'
        ' --map "First Name+Last Name=name". Can be given once for each field.',
    )
    @click.option("--ignore-unknown", is_flag=True, help=f"Leave out columns that {resource.name} do not have.")
    @click.option(
        "--yes",
        is_flag=True,
        help="Import a file of another program with the columns that are recognised. Without this option a"
        " terminal shows them and waits for an answer.",
    )
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
    def import_(
        file: str,
        file_format: str | None,
        encoding: str | None,
        maps: tuple[str, ...],
        ignore_unknown: bool,
        yes: bool,
        rejects: str | None,
        restart: bool,
        as_json: bool,
    ) -> None:
        """Create the rows in FILE: CSV or JSON, optionally compressed (gzip, bzip2, xz, zip); - is stdin.

        Every row gets a new id, new times and a new version; for a backup use pg_dump.

        Exits with 0 if all rows were imported, 1 if some were rejected, 2 if FILE cannot be read. To continue after an
        interruption, run the same command again.
        """
        rejects_path = rejects or ("import.rejects.ndjson" if file == "-" else f"{file}.rejects.ndjson")
        started_at = time.monotonic()
        with _exit_codes(resource, "import"):
            if as_json and standard_stream(rejects_path) is sys.stdout:
                raise click.UsageError("--json and --rejects both write to stdout: give --rejects another path")
            with open_gate() as (_, gate):
                reading = Reading(_acceptance(yes), file_format, encoding, maps, ignore_unknown)
                state, continued_after = Import(resource, gate, file, reading, rejects_path, restart).run()
        if as_json:
            summary: dict[str, Any] = {
                "imported": state.imported,
                "rejected": state.rejected,
                "continued_after": continued_after or None,
            }
            summary |= {
                "rejects": rejects_path if state.rejected else None,
                "seconds": round(time.monotonic() - started_at, 3),
            }
            click.echo(json.dumps(summary))
        destination = "stdout" if rejects_path == "-" else rejects_path
        rejected = f", rejected {state.rejected:,} → {destination}" if state.rejected else ""
        print_message(f"imported {state.imported:,}{rejected}")
        sys.exit(1 if state.rejected else 0)

    @group.command()
    @click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
    @format_option
    def export(file: str, file_format: str | None) -> None:
        """Write a snapshot of all rows into FILE, ordered by id; - is stdout.

        The format is CSV or NDJSON, compressed with gzip if the name of FILE ends in .gz. An existing FILE is replaced
        atomically, when the export is complete.
        """
        file_format = file_format or format_by_name(file) or ("csv" if file == "-" else None)
        if file_format is None:
            raise click.UsageError(f"'{file}' does not end in .csv or .ndjson: give --format")
        with _exit_codes(resource, "export"), open_gate() as (_, gate):
            rows = export_to(resource, gate, file, file_format)
        print_message(f"exported {rows:,}")

    @group.command()
    @click.option("--count", type=click.IntRange(min=1), required=True, help="Number of rows.")
    def seed(count: int) -> None:
        """Create made-up rows. Each differs from all others and from the existing rows."""
        with _exit_codes(resource, "seed"), open_gate() as (_, gate):
            seed_with(resource, gate, count)
        print_message(f"created {count:,}")

    return group


def _acceptance(yes: bool) -> Callable[[str], None]:
    """Return a function that shows the columns that were recognised, and refuses them unless they are accepted."""
    accepted = yes

    def accept(columns: str) -> None:
        nonlocal accepted
        print_message(columns)
        if not accepted and not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise CannotImport("add --yes to import these columns so, or choose others with --map")
        accepted = accepted or click.confirm("Import these columns so?", err=True)
        if not accepted:
            raise CannotImport("nothing was imported. Choose other columns with --map")

    return accept


@contextmanager
def _exit_codes(resource: Resource, command: str) -> Iterator[None]:
    """Turn an error into one line for the operator and an exit code (docs/import-export.md)."""
    name = f"velikiy {resource.name} {command}"
    try:
        with raise_on_signals():
            yield
    except KeyboardInterrupt as interruption:
        print_message(f"{name}: interrupted")
        sys.exit(128 + (interruption.args or [signal.SIGINT])[0])
    except CannotImport as error:
        print_message(f"{name}: {error}")
        sys.exit(2)
    except OSError as error:
        print_message(f"{name}: {os_sentence(error)}")
        sys.exit(2)
