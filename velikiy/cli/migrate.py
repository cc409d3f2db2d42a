"""`velikiy migrate`: the tables of the database."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from velikiy.settings import BadSetting, MigrationSettings, load

if TYPE_CHECKING:
    from velikiy.postgres.migrate import Migration

SAFE_PENDING, UNSAFE_PENDING = 3, 4
"""Exit codes of `--check`."""


@click.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
@click.option(
    "--app-role", metavar="NAME", help="Role of the apps, which gets its rights; by default the role of DATABASE_URL."
)
@click.option(
    "--await", "only_awaits", is_flag=True, help="Change nothing: wait until another process has migrated the database."
)
@click.option(
    "--check",
    "only_checks",
    is_flag=True,
    help="Change nothing: list the migrations that the database lacks, and whether each is safe while the apps run. "
    "Exits with 0 if nothing is pending, 3 if all are safe, 4 if the apps have to be stopped first, 1 if this code is "
    "too old for the database.",
)
@click.option(
    "--lock-wait",
    default=60.0,
    show_default=True,
    help="Seconds to try again while a transaction of another program keeps a table locked.",
)
def migrate(wait: float, app_role: str | None, only_awaits: bool, only_checks: bool, lock_wait: float) -> None:
    """Bring the database tables up to date, as the role of MIGRATION_DATABASE_URL, else of DATABASE_URL."""
    from velikiy.postgres import migrate as migration  # SQLAlchemy takes half a second to import

    settings = load(MigrationSettings)
    direct = settings.database_direct_url or settings.database_url
    owner = settings.migration_database_url or direct
    if owner is None:
        raise BadSetting("DATABASE_URL is not set. Set it in the environment, in .env or as a file in /run/secrets.")
    try:
        if only_awaits:
            migration.await_migration(direct or owner, wait=wait)
            return
        if only_checks:
            sys.exit(_show(migration.pending(owner, wait=wait)))
        role = app_role or migration.role_of(settings.database_url)
        applied = migration.upgrade(owner, wait=wait, app_role=role, lock_wait=lock_wait)
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")


def _show(pending: list[Migration]) -> int:
    """Print the migrations and return the exit code."""
    for it in pending:
        state = "safe while the apps run" if it.is_safe else f"stop apps that are older than {it.usable_from} first"
        click.echo(f"{it.revision}: {state}. {it.description}")
    if not pending:
        click.echo("the tables are up to date")
        return 0
    return SAFE_PENDING if all(it.is_safe for it in pending) else UNSAFE_PENDING
