"""Statements that travel to PostgreSQL together (velikiy/postgres/pipeline.py:Connection)."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from velikiy.postgres import Connection, Database, Statement, pipeline

TAKE_LOCK = Statement("SELECT pg_advisory_xact_lock($1)", (7,))
COUNT_LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7"
COUNT_PREPARED = Statement("SELECT count(*) FROM pg_prepared_statements")


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.autocommit() as connection:
        connection.execute("CREATE TEMPORARY TABLE t (n int UNIQUE, word text)")
        yield connection
        connection.execute("DROP TABLE t")


@contextmanager
def transaction_that_begins_with_a_lock(database: Database) -> Iterator[Connection]:
    with database.transaction() as connection:
        connection.enqueue(Statement("BEGIN"), TAKE_LOCK)
        yield connection


def count(connection: Connection, statement: Statement) -> int:
    [[(number,)]] = connection.query(statement)
    return int(number)


def test_query_returns_the_rows_of_each_statement_as_postgresql_spells_them(connection: Connection) -> None:
    no_rows, rows = connection.query(Statement("SELECT FROM t"), Statement("SELECT $1::int, $2::text, NULL", (1, "ü")))
    assert (no_rows, rows) == ([], [(b"1", "ü".encode(), None)])


def test_failed_statement_undoes_the_statements_sent_with_it_and_the_connection_stays_usable(
    connection: Connection,
) -> None:
    insert = "INSERT INTO t VALUES ($1, $2)"
    with pytest.raises(psycopg.errors.UniqueViolation) as raised:
        connection.query(*(Statement(insert, (number, "a")) for number in (1, 1, 2)))
    assert raised.value.diag.constraint_name == "t_n_key"
    # Statements that are sent together without BEGIN are one transaction.
    assert count(connection, Statement("SELECT count(*) FROM t")) == 0


def test_statement_that_fails_repeatedly_is_prepared_once(connection: Connection) -> None:
    insert = Statement("INSERT INTO t VALUES ($1, $2)", (1, "a"))
    connection.query(insert)
    before = count(connection, COUNT_PREPARED)
    for _ in range(20):
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.query(Statement("SELECT 1 FROM t"), insert)
    assert count(connection, COUNT_PREPARED) == before + 1


def test_connection_keeps_a_limited_number_of_prepared_statements(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_PREPARED", 5)
    for number in range(20):
        assert connection.query(Statement(f"SELECT {number}"), Statement(f"SELECT {number}")) == 2 * [
            [(b"%d" % number,)]
        ]
    assert count(connection, COUNT_PREPARED) == 5


@pytest.mark.parametrize("method", ["query", "execute", "savepoint"])
def test_enqueued_statement_runs_before_the_next_statement_whichever_method_sends_it(
    database: Database, method: str
) -> None:
    with transaction_that_begins_with_a_lock(database) as connection:
        if method == "query":
            assert count(connection, Statement(COUNT_LOCKS)) == 1
        elif method == "execute":
            assert connection.execute(COUNT_LOCKS).fetchone() == (1,)
        else:
            with connection.transaction():
                assert connection.execute(COUNT_LOCKS).fetchone() == (1,)
    with database.autocommit() as connection:
        assert count(connection, Statement(COUNT_LOCKS)) == 0


def test_enqueued_statement_stays_enqueued_when_a_value_cannot_be_encoded(database: Database) -> None:
    with transaction_that_begins_with_a_lock(database) as connection:
        with pytest.raises(psycopg.DataError):
            connection.query(Statement("SELECT $1::text", ("a\0",)))
        assert count(connection, Statement(COUNT_LOCKS)) == 1


def test_transaction_without_a_statement_leaves_no_lock(database: Database) -> None:
    with transaction_that_begins_with_a_lock(database):
        pass
    with pytest.raises(KeyError), transaction_that_begins_with_a_lock(database):
        raise KeyError
    with database.autocommit() as connection:
        assert count(connection, Statement(COUNT_LOCKS)) == 0
