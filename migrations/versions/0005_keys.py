"""API keys."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0005_keys"
down_revision = "0003_replicated"


def upgrade() -> None:
    op.execute(statements("api_keys"))
