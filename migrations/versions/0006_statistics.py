"""An import collects the statistics of its table, though the role of the apps does not own the table."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0006_statistics"
down_revision = "0005_keys"
usable_from = "0005_keys"


def upgrade() -> None:
    op.execute(statements("analyze_rows"))
