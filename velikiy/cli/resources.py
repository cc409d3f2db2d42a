"""`velikiy users import`, `export`, `seed` and `erase`, for every resource."""

import errno
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import click

from velikiy.bulk.atomic_file import standard_stream
from velikiy.bulk.columns import Reading
from velikiy.bulk.exporter import export_to
from velikiy.bulk.importer import Import, Progress
from velikiy.bulk.input_file import CannotImport, format_by_name
from velikiy.bulk.insert import OnConflict
from velikiy.bulk.progress import print_message
from velikiy.bulk.seeder import seed_with
from velikiy.cli.connection import open_gate
from velikiy.cli.errors import ending_on_signals, os_sentence, setting_sentence
from velikiy.command_line import CommandGroup
from velikiy.resources import history
from velikiy.resources.base import MAX_ID, READ_ONLY, Resource
from velikiy.settings import BadSetting

REJECTED, UNUSABLE, ENDED_EARLY = 1, 2, 3
"""Exit codes. Click also exits with 2 if an option is wrong."""

ERASE_TIMEOUT_FACTOR = 12
"""Times of one statement of a command. A row may have many versions, and all stored responses are searched."""

FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.ESTALE}
"""Errors of a path that could be opened."""


def resource_commands(resource: Resource) -> click.Group:
    """Return the group of commands for the rows of a resource."""
    format_option = click.option(
        "--format", "file_format", type=click.Choice(["csv", "ndjson"]), help="Default: from the name of FILE."
    )

    @click.group(resource.name, cls=CommandGroup, help=f"Import, export, seed and erase {resource.name}.")
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
        help="File for rejected rows; - is stdout. Default: FILE.rejects.ndjson. An existing file with rejected rows is"
        " kept under another name, and any other file is refused.",
    )
    @click.option(
        "--restart", is_flag=True, help="Start at the first line, even if an earlier import of FILE was interrupted."
    )
    @click.option(
        "--on-conflict",
        type=click.Choice(get_args(OnConflict)),
        default="reject",
        show_default=True,
        help=f"Treatment of a row whose {' or '.join(resource.unique.values()) or 'unique value'} is taken: reject it,"
        " leave the existing row as it is, or give the existing row the values in FILE.",
    )
    @click.option(
        "--dry-run",
        is_flag=True,
        help="Print what an import would do, and write no row and no file. Exit codes are those of the import.",
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
        on_conflict: OnConflict,
        dry_run: bool,
        as_json: bool,
    ) -> None:
        """Create the rows in FILE: CSV or JSON, optionally compressed (gzip, bzip2, xz, zip); - is stdin.

        Every new row gets a new id, new times and a new version; for a backup use velikiy backup. Rejected rows can be
        corrected in their file, and that file can be imported as it is, without --map, --encoding and --yes.

        \b
        Exit codes:
          0    All rows were taken: created, updated, unchanged or skipped.
          1    The import is complete, and some rows were rejected.
          2    Nothing was imported: an option is wrong, or FILE or the file of
               rejected rows cannot be used.
          3    The import ended early: PostgreSQL does not answer, FILE is
               damaged, or the disk is full. Run the same command again to
               continue.
          130, 143, 129
               Interrupted by Ctrl-C, SIGTERM or the end of the terminal. Run
               the same command again to continue.
        """
        is_stream = file == "-" or file.startswith(("/dev/", "/proc/"))
        rejects_path = rejects or ("import.rejects.ndjson" if is_stream else f"{file}.rejects.ndjson")
        started_at = time.monotonic()
        with _exit_codes(resource, "import"):
            if as_json and standard_stream(rejects_path) is sys.stdout:
                raise click.UsageError("--json and --rejects both write to stdout: give --rejects another path")
            reading = Reading(_acceptance(yes), file_format, encoding, maps, ignore_unknown)
            with open_gate(exit_code=ENDED_EARLY) as (_, gate):
                run = Import(resource, gate, file, reading, rejects_path, restart, on_conflict, dry_run)
                try:
                    state, continued_after = run.run()
                except (CannotImport, OSError) as error:
                    raise (EndedEarly(error) if run.progress.lines else error) from error
        _print_import(state, continued_after, rejects_path, run, time.monotonic() - started_at, as_json=as_json)
        sys.exit(REJECTED if state.rejected else 0)

    @group.command()
    @click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
    @format_option
    @click.option(
        "--excel",
        "for_excel",
        is_flag=True,
        help="Write CSV that Excel opens with the right letters, and that contains no formula. It can be imported.",
    )
    def export(file: str, file_format: str | None, for_excel: bool) -> None:
        """Write a snapshot of all rows into FILE, ordered by id; - is stdout.

        The format is CSV or NDJSON, compressed with gzip if the name of FILE ends in .gz. An existing FILE is replaced
        atomically, when the export is complete.

        Exits with 0 if the export is complete, 2 if an option is wrong or FILE cannot be used, 3 if the export ended
        early, and 130, 143 or 129 if it was interrupted. An export that is not complete leaves an existing FILE as it
        was.
        """
        file_format = file_format or format_by_name(file) or ("csv" if file == "-" or for_excel else None)
        if file_format is None:
            raise click.UsageError(f"'{file}' does not end in .csv or .ndjson: give --format")
        if for_excel and file_format != "csv":
            raise click.UsageError("--excel writes CSV: give FILE a name that ends in .csv, or --format csv")
        with _exit_codes(resource, "export"), open_gate(exit_code=ENDED_EARLY) as (_, gate):
            rows = export_to(resource, gate, file, file_format, for_excel=for_excel)
        print_message(f"exported {rows:,}")

    @group.command()
    @click.option("--count", type=click.IntRange(min=1), required=True, help="Number of rows.")
    def seed(count: int) -> None:
        """Create made-up rows. Each differs from all others and from the existing rows."""
        with _exit_codes(resource, "seed"), open_gate(exit_code=ENDED_EARLY) as (_, gate):
            seed_with(resource, gate, count)
        print_message(f"created {count:,}")

    @group.command()
    @click.argument("ids", type=click.IntRange(1, MAX_ID), nargs=-1, required=True, metavar="ID...")
    @click.option("--delete", is_flag=True, help="Delete rows that exist. Without this option they are refused.")
    def erase(ids: tuple[int, ...], delete: bool) -> None:
        """Erase all that the service knows of deleted rows, for good.

        This removes their former versions from the history, and their values from stored responses to requests with an
        Idempotency-Key. Only the note remains that something was erased. Backups that exist are left as they are.

        Exits with 0 if nothing is left of the rows, 1 if a row exists, and 3 if PostgreSQL does not answer: run the
        command again.
        """
        command = f"velikiy {resource.name} erase"
        status = 0
        with _exit_codes(resource, "erase"), open_gate(exit_code=ENDED_EARLY) as (_, gate):
            for row_id in dict.fromkeys(ids):
                change = partial(history.erase, resource=resource, row_id=row_id, delete=delete, command=command)
                try:
                    erased = gate.write(change, ERASE_TIMEOUT_FACTOR, author=f"command:{command}")
                except history.StillExists:
                    print_message(f"{command}: {resource.singular} {row_id} exists. Delete it first, or add --delete")
                    status = 1
                    continue
                print_message(
                    f"nothing to erase of {resource.singular} {row_id}"
                    if erased is None
                    else f"erased {resource.singular} {row_id}: {erased:,} change{'' if erased == 1 else 's'}"
                )
        sys.exit(status)

    return group


def _acceptance(yes: bool) -> Callable[[str], None]:
    """Return a function that shows the columns that were recognised, and refuses them unless they are accepted."""
    accepted = yes

    def accept(columns: str) -> None:
        nonlocal accepted
        print_message(columns)
        if not accepted and not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise CannotImport("add --yes to import these columns so, or choose others with --map")
        try:
            accepted = accepted or click.confirm("Import these columns so?", err=True)
        except click.Abort:
            raise KeyboardInterrupt from None
        if not accepted:
            raise CannotImport("nothing was imported. Choose other columns with --map")

    return accept


def _print_import(
    state: Progress, continued_after: int, rejects_path: str, run: Import, seconds: float, *, as_json: bool
) -> None:
    is_written = state.rejected and not run.is_rehearsal
    if as_json:
        summary: dict[str, Any] = {
            "imported": state.imported,
            "created": state.imported - state.updated,
            "updated": state.updated,
            "unchanged": state.unchanged,
            "skipped": state.skipped,
            "rejected": state.rejected,
            "continued_after": continued_after or None,
            "rejects": rejects_path if is_written else None,
            "dry_run": run.is_rehearsal,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(summary))
    for reason in run.reasons:
        print_message(reason)
    if run.reasons and state.rejected > len(run.reasons):
        print_message("... and more")
    parts = [f"{'would import' if run.is_rehearsal else 'imported'} {state.imported:,}"]
    if state.updated:
        parts[0] += f" (created {state.imported - state.updated:,}, updated {state.updated:,})"
    parts += [f"unchanged {state.unchanged:,}"] if state.unchanged else []
    parts += [f"skipped {state.skipped:,}"] if state.skipped else []
    if state.rejected:
        destination = f" → {'stdout' if rejects_path == '-' else rejects_path}" if is_written else ""
        parts.append(f"rejected {state.rejected:,}{destination}")
    print_message(", ".join(parts))


class EndedEarly(Exception):
    """An import failed after it had committed rows. The cause is the first argument."""


@contextmanager
def _exit_codes(resource: Resource, command: str) -> Iterator[None]:
    """Turn an error into one line for the operator and an exit code (docs/import-export.md)."""
    name = f"velikiy {resource.name} {command}"
    try:
        with ending_on_signals(name):
            yield
    except BadSetting as error:
        print_message(f"{name}: {setting_sentence(error)}")
        sys.exit(UNUSABLE)
    except EndedEarly as error:
        print_message(f"{name}: {_sentence(error.args[0])}")
        sys.exit(ENDED_EARLY)
    except (CannotImport, OSError) as error:
        print_message(f"{name}: {_sentence(error)}")
        # A full disk or a closed pipe can happen at any time; a path that is wrong is noticed before the first row.
        sys.exit(ENDED_EARLY if isinstance(error, OSError) and error.errno in FAILURES else UNUSABLE)


def _sentence(error: Exception) -> str:
    return os_sentence(error) if isinstance(error, OSError) else str(error)
