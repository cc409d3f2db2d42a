"""Steps of a migration with `in_transaction = False`: long work that never keeps requests waiting.

Each step can be repeated: a migration that was interrupted begins again.
"""

import time

from alembic import op

from velikiy.postgres.migrate import LOCK_TIMEOUT_MS

PAUSE_S = 0.05
"""Seconds between two batches, in which others write and the relay invalidates."""


def in_batches(statement: str) -> None:
    """Repeat a statement that changes some rows, until no row is left. Each run is a transaction of its own.

    Args:
        statement: SQL that changes at most some thousand rows, and finds only rows that still have to be changed.
    """
    while op.get_bind().exec_driver_sql(statement).rowcount:
        time.sleep(PAUSE_S)


def index(name: str, definition: str) -> None:
    """Build an index while others read and write the table.

    Args:
        name: The name of the index.
        definition: What follows CREATE INDEX ... name, such as "ON users (phone)".
    """
    connection = op.get_bind()
    # PostgreSQL waits for the end of all transactions that are older than the index. No statement waits behind it.
    connection.exec_driver_sql("SET lock_timeout = 0")
    invalid = f"SELECT FROM pg_index WHERE indexrelid = to_regclass('{name}') AND NOT indisvalid"
    if connection.exec_driver_sql(invalid).rowcount:  # an interrupted attempt has left it
        connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {name}")
    connection.exec_driver_sql(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} {definition}")
    connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
