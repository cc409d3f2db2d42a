"""A row of an edge that may hold a lease is fenced instead of deleted, and the table of caches cannot be truncated."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0011_live_edges"
down_revision = "0010_lock_numbers"
usable_from = "0010_lock_numbers"


def upgrade() -> None:
    op.execute(statements("live_edges"))
