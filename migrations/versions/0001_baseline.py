"""The baseline: the table users, new with three rows or adopted with its own; the triggers of every resource; the
tables of the caches, of idempotency keys and of imports."""

from alembic import op
from sqlalchemy import text

from velikiy.postgres.migrate import CannotMigrate, statements

revision = "0001_baseline"
down_revision = None


def upgrade() -> None:
    refuse_without_trigrams()
    run("words")
    run("resources")
    run("add_triggers")
    if op.get_bind().execute(text("SELECT to_regclass('users') IS NOT NULL")).scalar():
        refuse_unfit_table()
        refuse_unfit_rows()
        run("users_adopt")
    else:
        run("users_create")
    run("users_complete")
    run("caches")
    run("idempotency_keys")
    run("imports")


def run(name: str) -> None:
    op.execute(statements(name))


def refuse_without_trigrams() -> None:
    query = "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'"
    if not op.get_bind().execute(text(query)).scalar():
        raise CannotMigrate(
            "PostgreSQL lacks the extension pg_trgm, which the search of users needs. Install its contrib modules "
            "(Debian: package postgresql-contrib) and start again; nothing was changed."
        )


def refuse_unfit_table() -> None:
    reasons = op.get_bind().execute(text(statements("users_unfit_table"))).scalars().all()
    if reasons:
        raise CannotMigrate(
            f"the existing table users cannot be adopted: {'; '.join(reasons)}. Rename the table or use another "
            "database; nothing was changed."
        )


def refuse_unfit_rows() -> None:
    """Name the ids of the rows, and not their personal data."""
    ids = op.get_bind().execute(text(statements("users_unfit_rows"))).scalars().all()
    if ids:
        raise CannotMigrate(
            f"the existing table users has rows that cannot be adopted, ids {', '.join(map(str, ids))}. Each row needs "
            "a unique id of at least 1, a name of 1 to 100 characters, an e-mail of 1 to 254 characters that is unique "
            "(ignoring case), and a finite created_at. Correct these rows and start again; nothing was changed."
        )
