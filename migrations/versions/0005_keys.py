"""API keys."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0005_keys"
down_revision = "0004_import_counts"
usable_from = "0004_import_counts"


def upgrade() -> None:
    op.execute(statements("api_keys"))
