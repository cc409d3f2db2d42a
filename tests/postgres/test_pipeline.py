"""Statements that go to PostgreSQL together (velikiy/postgres/database.py:Connection.ask)."""

from collections.abc import Iterator

import psycopg
import pytest

from velikiy.postgres import Connection, Database, Statement, pipeline

LOCK = Statement("SELECT pg_advisory_xact_lock($1)", (7,))
HELD = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7"
KEPT = Statement("SELECT count(*) FROM pg_prepared_statements")


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.autocommit() as connection:
        connection.execute("CREATE TEMPORARY TABLE t (n int UNIQUE, word text)")
        yield connection
        connection.execute("DROP TABLE t")


def count(connection: Connection, statement: Statement) -> int:
    [[(number,)]] = connection.query(statement)
    return int(number)


def test_each_has_its_rows_as_postgresql_spells_them(connection: Connection) -> None:
    none, some = connection.query(Statement("SELECT FROM t"), Statement("SELECT $1::int, $2::text, NULL", (1, "ü")))
    assert (none, some) == ([], [(b"1", "ü".encode(), None)])


def test_after_one_that_fails_none_is_carried_out_and_the_connection_goes_on(connection: Connection) -> None:
    insert = "INSERT INTO t VALUES ($1, $2)"
    with pytest.raises(psycopg.errors.UniqueViolation) as refused:
        connection.query(*(Statement(insert, (number, "a")) for number in (1, 1, 2)))
    assert refused.value.diag.constraint_name == "t_n_key"
    assert count(connection, Statement("SELECT count(*) FROM t")) == 0  # without BEGIN they are one transaction


def test_what_fails_again_and_again_is_parsed_once(connection: Connection) -> None:
    insert = Statement("INSERT INTO t VALUES ($1, $2)", (1, "a"))
    connection.query(insert)
    before = count(connection, KEPT)
    for _ in range(20):
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.query(Statement("SELECT 1 FROM t"), insert)
    assert count(connection, KEPT) == before + 1


def test_a_connection_keeps_no_more_than_some(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_PREPARED", 5)
    for number in range(20):
        assert connection.query(Statement(f"SELECT {number}"), Statement(f"SELECT {number}")) == 2 * [
            [(b"%d" % number,)]
        ]
    assert count(connection, KEPT) == 5


@pytest.mark.parametrize("way", ["ask", "execute", "savepoint"])
def test_what_is_ahead_is_done_before_whatever_comes_first(database: Database, way: str) -> None:
    with database.transaction(1, LOCK) as connection:
        if way == "ask":
            assert count(connection, Statement(HELD)) == 1
        elif way == "execute":
            assert connection.execute(HELD).fetchone() == (1,)
        else:
            with connection.transaction():
                assert connection.execute(HELD).fetchone() == (1,)
    with database.autocommit() as connection:
        assert count(connection, Statement(HELD)) == 0


def test_a_value_that_cannot_be_sent_leaves_what_is_ahead_to_the_next(database: Database) -> None:
    with database.transaction(1, LOCK) as connection:
        with pytest.raises(psycopg.DataError):
            connection.query(Statement("SELECT $1::text", ("a\0",)))
        assert count(connection, Statement(HELD)) == 1


def test_a_transaction_that_asks_for_nothing_leaves_nothing(database: Database) -> None:
    with database.transaction(1, LOCK):
        pass
    with pytest.raises(KeyError), database.transaction(1, LOCK):
        raise KeyError
    with database.autocommit() as connection:
        assert count(connection, Statement(HELD)) == 0
