"""`velikiy backup` and `velikiy restore`."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from velikiy.bulk.progress import print_message, progress_bar
from velikiy.cli.connection import open_gate
from velikiy.cli.errors import command_of_run, ending_on_signals, os_sentence, setting_sentence
from velikiy.findings import COMMAND
from velikiy.settings import BadSetting, MigrationSettings, load

if TYPE_CHECKING:
    from velikiy.backup.create import Made
    from velikiy.backup.restore import Restored

FAILED, OUTCOME_UNKNOWN = 1, 3
"""Exit codes. Click exits with 2 if an option is wrong."""

SAFETY = "before-restore"
"""The beginning of the name of a backup that a restore makes first."""


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), required=False)
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder for a file with a name of its own, instead of FILE.",
)
@click.option(
    "--keep", type=click.IntRange(min=1), help="With --to: delete all but the newest N backups there.", metavar="N"
)
@click.option(
    "--name",
    "prefix",
    default="velikiy",
    show_default=True,
    help="With --to: beginning of the name. --keep counts and deletes only files with this name.",
)
@click.option(
    "--verify",
    type=click.Choice(["rows", "values"]),
    default="rows",
    show_default=True,
    help="Read the file back, and compare the number of rows with the database, or also each value.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs to stdout.")
def backup(file: str | None, folder: Path | None, keep: int | None, prefix: str, verify: str, as_json: bool) -> None:
    """Write a backup of the database into FILE; - is stdout.

    The service goes on meanwhile. The file is an archive of pg_dump of one snapshot. It is verified before it replaces
    an existing FILE as a whole, and only its owner may read it. A backup on stdout is not verified.

    Exits with 0 if the backup is complete, 1 if not: then an existing FILE is as it was. Exits with 2 if an option is
    wrong, and with 130, 143 or 129 if the command was interrupted.
    """
    from velikiy.backup import create, retention  # with SQLAlchemy, half a second

    if (file is None) == (folder is None):
        raise click.UsageError("give FILE, or a folder with --to")
    if keep and folder is None:
        raise click.UsageError("--keep needs --to")
    if not prefix or "/" in prefix or prefix.startswith("."):
        raise click.UsageError("--name is the beginning of the name of a file: letters, digits and -")
    if file and file.endswith(".gz"):
        raise click.UsageError("a backup is compressed already: give FILE a name that does not end in .gz")
    if as_json and file == "-":
        raise click.UsageError("--json and the backup both write to stdout: give FILE another name")
    with _exit_codes("backup"):
        path = str(retention.new_path(folder, prefix)) if folder else str(file)
        began = time.monotonic()
        made = create.make(_owner(), path, "values" if verify == "values" else "rows")
        deleted = retention.delete_old(folder, prefix, keep) if folder and keep else []
    _print_made(made, deleted, time.monotonic() - began, as_json=as_json)


def _print_made(made: "Made", deleted: list[Path], seconds: float, *, as_json: bool) -> None:
    if as_json:
        members = {**made._asdict(), "deleted": [str(file) for file in deleted], "seconds": round(seconds, 3)}
        click.echo(json.dumps(members))
    for name in made.left_out:
        print_message(f"left out {name}: the role may not read it")
    if made.verified is None:
        print_message(f"wrote {_counted(made.rows)}; not verified, because it is a stream")
        return
    print_message(f"wrote {made.file}: {_counted(made.rows)}, {made.size:,} bytes, verified, {seconds:.1f} s")
    print_message(f"SHA-256 {made.sha256}")
    for file in deleted:
        print_message(f"deleted {file}")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, exists=True, readable=True, allow_dash=True))
@click.option("--yes", is_flag=True, help="Do not wait for an answer. Without a terminal this is required.")
@click.option(
    "--save-to",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder for the backup that is made first. Default: the folder of FILE.",
)
@click.option("--no-save", is_flag=True, help="Make no backup first.")
@click.option("--keep-keys", is_flag=True, help="Leave the API keys as they are.")
@click.option("--dry-run", is_flag=True, help="Read all of FILE and print what it contains. Change nothing.")
@click.option(
    "--scratch",
    metavar="NAME",
    help="Empty database on the same server, for a FILE of an older version. Default: one is created and dropped.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs to stdout.")
def restore(
    file: str,
    yes: bool,
    save_to: Path | None,
    no_save: bool,
    keep_keys: bool,
    dry_run: bool,
    scratch: str | None,
    as_json: bool,
) -> None:
    """Replace all rows by those in FILE, a backup; - is stdin.

    The service goes on meanwhile: reads return the rows before or after the restore, and no cache returns an older row
    afterwards. Writes wait, or are answered 503, while rows are exchanged. Rows that were created after the backup are
    lost. A backup of the present rows is made first.

    \b
    Exit codes:
      0    All rows are those of FILE.
      1    Nothing was changed: FILE or the database cannot be used.
      2    Nothing was changed: an option is wrong.
      3    PostgreSQL was lost, and the outcome is unknown: look, and run the
           same command again.
      130, 143, 129
           Interrupted by Ctrl-C, SIGTERM or the end of the terminal.
    """
    from velikiy.backup import CannotBackUp, CannotRestore, create, retention  # with SQLAlchemy, half a second
    from velikiy.backup import restore as restoring
    from velikiy.backup.archive import Archive

    if no_save and save_to:
        raise click.UsageError("--no-save and --save-to exclude each other")
    began = time.monotonic()
    with _exit_codes("restore"), _seekable(file) as path:
        archive = Archive(path, shown="the backup on stdin" if file == "-" else file)
        if dry_run:
            _print_content(archive, as_json=as_json)
            return
        with open_gate(exit_code=OUTCOME_UNKNOWN) as (_, gate):
            restoring.check(gate, archive)
            if not yes:
                _ask(file, archive)
            if not no_save:
                folder = save_to or (Path() if file == "-" else Path(file).parent)
                try:
                    saved = create.make(_owner(), str(retention.new_path(folder, SAFETY)), "rows")
                except (CannotBackUp, OSError) as error:
                    reason = os_sentence(error) if isinstance(error, OSError) else str(error)
                    raise CannotRestore(
                        f"no backup of the present rows could be made: {reason.rstrip('.')}. Name another folder with"
                        " --save-to, or omit that backup with --no-save"
                    ) from None
                print_message(f"the present rows are in {saved.file}: {_counted(saved.rows)}")
            restored = _restore(archive, gate, keep_keys, scratch)
    _print_restored(restored, time.monotonic() - began, as_json=as_json)


def _restore(archive: Any, gate: Any, keep_keys: bool, scratch: str | None) -> "Restored":
    from velikiy.backup.restore import restore as replace

    with progress_bar("reading", None) as report:
        return replace(
            gate,
            archive,
            _owner(),
            keep_keys=keep_keys,
            scratch_database=scratch,
            report=lambda table, rows: report(rows, rows),
        )


def _owner() -> str:
    """Return the address of the database with the role that owns the tables, or of the apps where it is not known.

    Raises:
        BadSetting
    """
    settings = load(MigrationSettings)
    address = settings.migration_database_url or settings.database_direct_url or settings.database_url
    if address is None:
        raise BadSetting("DATABASE_URL is not set. Set it in the environment, in .env or as a file in /run/secrets.")
    return address


@contextmanager
def _seekable(file: str) -> Iterator[Path]:
    """Yield the path of a file that can be read several times: a stream is copied into a temporary file first."""
    if file != "-" and Path(file).is_file():
        yield Path(file)
        return
    # Only this user may read a temporary file. TMPDIR chooses its folder.
    with tempfile.NamedTemporaryFile(prefix="velikiy-restore-") as copy:
        with sys.stdin.buffer if file == "-" else Path(file).open("rb") as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


def _ask(file: str, archive: Any) -> None:
    """Raises: CannotRestore, KeyboardInterrupt"""
    from velikiy.backup import CannotRestore

    if file == "-" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CannotRestore("this replaces all rows. Add --yes to the command")
    print_message(f"{file} is from {_age(archive.file)}. Rows that were created or changed since will be lost.")
    try:
        accepted = click.confirm("Replace all rows by those of this backup?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None
    if not accepted:
        raise CannotRestore("nothing was changed")


def _age(file: Path) -> str:
    return f"{datetime.fromtimestamp(file.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"


def _print_content(archive: Any, *, as_json: bool) -> None:
    from velikiy.postgres.migrate import VERSION_TABLE

    rows: dict[str, int] = {}
    for section in archive.sections([]):
        rows[section.table] = sum(block.count(b"\n") for block in section.rows)
    if as_json:
        click.echo(json.dumps({"revision": archive.revision, "rows": rows}))
    shown = {name: count for name, count in rows.items() if name != VERSION_TABLE}
    print_message(f"{archive.shown} is complete: revision {archive.revision}, {_counted(shown)}")


def _print_restored(restored: "Restored", seconds: float, *, as_json: bool) -> None:
    if as_json:
        members = {**restored._asdict(), "seconds": round(seconds, 3)}
        members["tables"] = {name: exchanged._asdict() for name, exchanged in restored.tables.items()}
        click.echo(json.dumps(members))
    for name, exchanged in restored.tables.items():
        print_message(f"{name}: {exchanged.rows:,} rows, {exchanged.removed:,} removed, {exchanged.added:,} added")
    for name in restored.kept:
        print_message(f"{name}: not in the backup, left as it is")
    if restored.still_revoked:
        print_message(f"still revoked, though valid at the time of the backup: {', '.join(restored.still_revoked)}")
    if restored.lost_keys:
        print_message(f"API keys that were created after the backup are gone: {', '.join(restored.lost_keys)}")
    print_message(f"restored in {seconds:.1f} s; every cache is emptied")


def _counted(rows: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in rows.items() if count) or "no rows"


@contextmanager
def _exit_codes(command: str) -> Iterator[None]:
    """Turn an error into one line for the operator and an exit code."""
    from velikiy.backup import CannotBackUp, CannotRestore
    from velikiy.backup.archive import BadArchive
    from velikiy.postgres.client_programs import NotInstalled

    name = f"velikiy {command}"
    try:
        with ending_on_signals(name):
            yield
    except BadSetting as error:
        print_message(f"{name}: {setting_sentence(error)}")
    except OSError as error:
        print_message(f"{name}: {os_sentence(error)}")
    except (CannotBackUp, CannotRestore, BadArchive, NotInstalled) as error:
        print_message(f"{name}: {COMMAND.sub(lambda match: command_of_run(match[1]), str(error))}.")
    else:
        return
    sys.exit(FAILED)
