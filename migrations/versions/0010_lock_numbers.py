"""The locks of paths, imports and idempotency keys have numbers of the service's own. Older code takes other locks, so
a reader of this version would not see its writers: it must not run beside this version."""

revision = "0010_lock_numbers"
down_revision = "0009_row_history"


def upgrade() -> None:
    """Change nothing: the revision alone keeps older code away (velikiy/postgres/migrate.py:Code.can_use)."""
