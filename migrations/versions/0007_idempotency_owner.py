"""Idempotency keys have an owner."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0007_idempotency_owner"
down_revision = "0006_statistics"
usable_from = "0006_statistics"


def upgrade() -> None:
    op.execute(statements("idempotency_owner"))
