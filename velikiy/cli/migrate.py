"""`velikiy migrate`: the tables of the database."""

import sys

import click

from velikiy.settings import Settings, load


@click.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
@click.option(
    "--await", "only_awaits", is_flag=True, help="Change nothing: wait until another process has migrated the database."
)
def migrate(wait: float, only_awaits: bool) -> None:
    """Bring the database tables up to date."""
    from velikiy.postgres import migrate as migration  # SQLAlchemy takes half a second to import

    try:
        if only_awaits:
            migration.await_migration(load(Settings).database_url, wait=wait)
            return
        applied = migration.upgrade(load(Settings).database_url, wait=wait)
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")
