"""Every change of a row leaves an entry in its history."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0009_row_history"
down_revision = "0008_oldest_code"
usable_from = "0008_oldest_code"


def upgrade() -> None:
    op.execute(statements("row_history"))
