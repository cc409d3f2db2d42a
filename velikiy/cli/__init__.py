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
    """Commands for a Velikiy Flask installation."""


@velikiy.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
def migrate(wait: float) -> None:
    """Bring the database's tables up to date; does nothing where they are."""
    from velikiy.postgres import migrate as migration  # SQLAlchemy takes half a second to import

    try:
        applied = migration.upgrade(load(Settings).database_url, wait=wait)
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")


@velikiy.command()
@click.option("--heartbeat", type=click.Path(path_type=Path), help="A file to touch while PostgreSQL answers.")
def relay(heartbeat: Path | None) -> None:
    """Hear of SQL that is written past the app, and drop it in the caches. Runs until it is stopped."""
    from velikiy.relay.listener import connect

    settings = load(Settings)
    logs.configure(settings.log_level)
    connect(settings).run(heartbeat)


@velikiy.group()
def cache() -> None:
    """What the caches hold."""


@cache.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(path: str, as_json: bool) -> None:
    """What each tier holds of PATH: /users, /users?limit=5, /users/7."""
    from velikiy.coherence import inspect

    with _fence() as (settings, fence):
        tiers = inspect.look(fence, _path(path), path, settings)
    click.echo(json.dumps(tiers, indent=2) if as_json else inspect.text(path, tiers))


@cache.command()
@click.argument("path", required=False)
@click.option("--all", "everything", is_flag=True, help="Everything, in Redis and at every edge.")
def purge(path: str | None, everything: bool) -> None:
    """Drop PATH in both tiers. No read is wrong without it: it is for your peace of mind."""
    if (path is None) != everything:
        raise click.UsageError("give a PATH or --all")
    with _fence() as (_, fence), fence.database.autocommit() as connection:
        fence.drop(connection, [_path(path)] if path else None)
        redis, *edges = fence.caches.all(connection)
    click.echo(f"dropped {path or 'everything'} in Redis and at {len(edges)} edge{'' if len(edges) == 1 else 's'}")
    for cache in (redis, *edges):
        if cache.fenced:
            name = f"edge {cache.address}" if cache.address else "Redis"
            click.echo(f"{name} does not answer: it is fenced, and emptied before it is used again", err=True)


def _path(address: str) -> coherence.Path:
    path = path_of(address)
    if path is None:
        raise click.BadParameter(f"'{address}' is not cached; /users, its pages, /users/count and /users/<id> are")
    return path


@contextmanager
def _fence() -> Iterator[tuple[Settings, coherence.Fence]]:
    settings = load(Settings)
    logs.configure("error")  # what is said below is for a person
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    database = Database(settings.database_url, size=2, timeout=5)
    fence = coherence.connect(database, settings)
    database.open()
    try:
        yield settings, fence
    except DatabaseUnavailable as error:
        said = "has broken it off" if getattr(error.__cause__, "sqlstate", None) else "does not answer"
        sys.exit(f"velikiy: PostgreSQL {said} ({error}). Is the stack up? ./run status tells")
    finally:
        database.close()


@velikiy.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--postgres", required=True, metavar="HOST:PORT", help="Where PostgreSQL listens.")
@click.option("--redis", required=True, metavar="HOST:PORT", help="Where Redis listens.")
@click.option(
    "--edge",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for what edges may know: Redis' address alone.",
)
def secrets(folder: Path, postgres: str, redis: str, edge: Path | None) -> None:
    """Write random passwords into FOLDER where there are none yet, and the two addresses that hold them."""
    secret_files.write(folder, postgres=postgres, redis=redis, edge=edge)


for resource in registry().values():
    if resource.name in velikiy.commands:
        raise ValueError(f"{resource.name}: velikiy has a command of this name")
    velikiy.add_command(commands(resource, _fence))


def main() -> None:
    try:
        velikiy(prog_name="velikiy")
    except BadSetting as bad:
        sys.exit(f"velikiy: {bad}\nIs there a stack? ./run up starts one; ./run velikiy --data DIR names its folder.")
