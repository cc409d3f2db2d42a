"""The database names the oldest code that works with its tables, so that older code can go on."""

from alembic import op

from velikiy.postgres.migrate import VERSION_TABLE

revision = "0008_oldest_code"
down_revision = "0007_idempotency_owner"
usable_from = "0007_idempotency_owner"


def upgrade() -> None:
    op.execute(f"ALTER TABLE {VERSION_TABLE} ADD COLUMN oldest_code text")
