"""`velikiy migrate`: the tables of the database."""

import sys

import click

from velikiy.settings import Settings, load


@click.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
def migrate(wait: float) -> None:
    """Bring the database tables up to date."""
    from velikiy.postgres import migrate as migration  # SQLAlchemy takes half a second to import

    try:
        applied = migration.upgrade(load(Settings).direct_url, wait=wait)
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")
