"""PostgreSQL, the source of truth: pools with deadlines, statements that travel together, and migrations."""

from velikiy.postgres.database import (
    CONNECT_OPTIONS,
    MIGRATION_LOCK,
    Database,
    DatabaseUnavailable,
    Deadlock,
    TooLate,
    forgets,
    lacking_settings,
    patient,
)
from velikiy.postgres.leader import CONFIRM, CONFIRMED, Leader
from velikiy.postgres.pipeline import MARK, Connection, Row, Statement

__all__ = [
    "CONFIRM",
    "CONFIRMED",
    "CONNECT_OPTIONS",
    "MARK",
    "MIGRATION_LOCK",
    "Connection",
    "Database",
    "DatabaseUnavailable",
    "Deadlock",
    "Leader",
    "Row",
    "Statement",
    "TooLate",
    "forgets",
    "lacking_settings",
    "patient",
]
