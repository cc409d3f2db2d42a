"""PostgreSQL, where the truth is: pools with a deadline, statements that travel together, and migrations."""

from velikiy.postgres.database import (
    OURS,
    Connection,
    Database,
    DatabaseUnavailable,
    Deadlock,
    Row,
    Statement,
    forgets,
)

__all__ = ["OURS", "Connection", "Database", "DatabaseUnavailable", "Deadlock", "Row", "Statement", "forgets"]
