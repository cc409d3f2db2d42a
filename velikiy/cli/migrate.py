"""`velikiy migrate`: the tables of the database."""

import sys

import click

from velikiy.settings import BadSetting, MigrationSettings, load


@click.command()
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for PostgreSQL.")
@click.option(
    "--app-role", metavar="NAME", help="Role of the apps, which gets its rights; by default the role of DATABASE_URL."
)
@click.option(
    "--await", "only_awaits", is_flag=True, help="Change nothing: wait until another process has migrated the database."
)
def migrate(wait: float, app_role: str | None, only_awaits: bool) -> None:
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
        applied = migration.upgrade(owner, wait=wait, app_role=app_role or migration.role_of(settings.database_url))
    except migration.CannotMigrate as error:
        sys.exit(f"velikiy migrate: {error}")
    click.echo(f"applied: {', '.join(applied)}" if applied else "the tables are up to date")
