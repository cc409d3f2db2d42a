"""`velikiy`: the project's own commands. `./run velikiy ...` runs them in its environment."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from velikiy import coherence, logs, secret_files
from velikiy.bulk.commands import commands
from velikiy.postgres import Database, DatabaseUnavailable
from velikiy.resources.base import path_of, registry
from velikiy.settings import BadSetting, Settings, load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def velikiy() -> None:
    """Operate a Velikiy Flask installation."""


@velikiy.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
def migrate(wait: float) -> None:
    """Bring the database tables up to date."""
    from velikiy.postgres import migrate as migration  # SQLAlchemy takes half a second to import

    try:
        applied = migration.upgrade(load(Settings).database_url, wait=wait)
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")


@velikiy.command()
@click.option("--heartbeat", type=click.Path(path_type=Path), help="File to touch while PostgreSQL answers.")
def relay(heartbeat: Path | None) -> None:
    """Invalidate the caches after SQL writes that bypass the app. Runs until it is stopped."""
    from velikiy.relay.listener import connect

    settings = load(Settings)
    logs.configure(settings.log_level)
    connect(settings).run(heartbeat)


@velikiy.group()
def cache() -> None:
    """Inspect or purge the caches."""


@cache.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def show(path: str, as_json: bool) -> None:
    """Show the entries for PATH in each cache tier: /users, /users?limit=5, /users/7."""
    from velikiy.coherence import inspect

    with _gate() as (settings, gate):
        tiers = inspect.look(gate, _path(path), path, settings)
    click.echo(json.dumps(tiers, indent=2) if as_json else inspect.text(path, tiers))


@cache.command()
@click.argument("path", required=False)
@click.option("--all", "everything", is_flag=True, help="Remove every entry, in Redis and at every edge.")
def purge(path: str | None, everything: bool) -> None:
    """Remove PATH from both cache tiers. Reads are correct without a purge."""
    if (path is None) != everything:
        raise click.UsageError("give either a PATH or --all")
    with _gate() as (_, gate), gate.database.autocommit() as connection:
        gate.drop(connection, [_path(path)] if path else None)
        redis, *edges = gate.caches.all(connection)
    click.echo(f"dropped {path or 'everything'} in Redis and at {len(edges)} edge{'' if len(edges) == 1 else 's'}")
    for cache in (redis, *edges):
        if cache.fenced:
            name = f"edge {cache.address}" if cache.address else "Redis"
            click.echo(f"{name} does not answer: it is fenced and will be emptied before it is used again", err=True)


def _path(address: str) -> coherence.CachePath:
    path = path_of(address)
    if path is None:
        raise click.BadParameter(
            f"'{address}' is not cached. Give /users, one of its pages, /users/count or /users/<id>"
        )
    return path


@contextmanager
def _gate() -> Iterator[tuple[Settings, coherence.Gate]]:
    settings = load(Settings)
    logs.configure("error")  # what is said below is for a person
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    database = Database(settings.database_url, size=2, timeout=5)
    gate = coherence.connect(database, settings)
    database.open()
    try:
        yield settings, gate
    except DatabaseUnavailable as error:
        failure = "cancelled the statement" if getattr(error.__cause__, "sqlstate", None) else "does not answer"
        sys.exit(f"velikiy: PostgreSQL {failure} ({error}). Check with ./run status that the stack runs")
    finally:
        database.close()


@velikiy.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--postgres", required=True, metavar="HOST:PORT", help="Address of PostgreSQL.")
@click.option("--redis", required=True, metavar="HOST:PORT", help="Address of Redis.")
@click.option(
    "--edge",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the only secret that edges may read: the address of Redis.",
)
def secrets(folder: Path, postgres: str, redis: str, edge: Path | None) -> None:
    """Create the passwords that FOLDER lacks, and the addresses of PostgreSQL and Redis that contain them."""
    secret_files.write(folder, postgres=postgres, redis=redis, edge=edge)


for resource in registry().values():
    if resource.name in velikiy.commands:
        raise ValueError(f"{resource.name}: this name is taken by a command of velikiy")
    velikiy.add_command(commands(resource, _gate))


def main() -> None:
    try:
        velikiy(prog_name="velikiy")
    except BadSetting as bad:
        sys.exit(f"velikiy: {bad}\nStart a stack with ./run up, or select its folder with ./run velikiy --data DIR.")
