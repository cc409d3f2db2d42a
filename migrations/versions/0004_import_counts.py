"""The progress of an import counts rows that were updated, left unchanged and skipped, and identifies its rejects."""

from alembic import op

from velikiy.postgres.migrate import statements

revision = "0004_import_counts"
down_revision = "0003_replicated"
usable_from = "0003_replicated"


def upgrade() -> None:
    op.execute(statements("import_counts"))
