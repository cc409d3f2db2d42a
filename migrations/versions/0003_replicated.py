"""Rows that a logical replication or a session with session_replication_role = replica writes invalidate the caches."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0003_replicated"
down_revision = "0002_folded"
usable_from = "0002_folded"


def upgrade() -> None:
    op.execute(statements("add_triggers"))
    op.execute(statements("add_triggers_again"))
