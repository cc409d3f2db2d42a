"""PostgreSQL, the source of truth: pools with deadlines, statements that travel together, and migrations."""

from velikiy.postgres.database import (
    CONNECT_OPTIONS,
    MIGRATION_LOCK,
    Database,
    DatabaseUnavailable,
    Deadlock,
    forgets,
    lacking_settings,
)
from velikiy.postgres.leader import CONFIRM, CONFIRMED, Leader
from velikiy.postgres.pipeline import Connection, Row, Statement

__all__ = [
    "CONFIRM",
    "CONFIRMED",
    "CONNECT_OPTIONS",
    "MIGRATION_LOCK",
    "Connection",
    "Database",
    "DatabaseUnavailable",
    "Deadlock",
    "Leader",
    "Row",
    "Statement",
    "forgets",
    "lacking_settings",
]
