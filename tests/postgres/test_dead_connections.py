"""Connections that are of no use any more. Some lead to nowhere: a host that lost its power, or a firewall that forgot
them, sends no end of them. On others the bytes make no sense: something between has changed them."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from testkit.stack import Stack, wait_until
from testkit.tcp_proxy import ProxiedConnection, TcpProxy, tcp_proxy
from velikiy.postgres import Database, DatabaseUnavailable, Statement

CONNECTIONS = 6


@pytest.fixture
def proxy(stack: Stack) -> Iterator[TcpProxy]:
    with tcp_proxy(f"{stack.data}/run/.s.PGSQL.5432") as proxy:
        yield proxy


def test_one_request_pays_for_all_dead_connections(stack: Stack, proxy: TcpProxy) -> None:
    dsn = make_conninfo(stack.postgres, host="127.0.0.1", port=proxy.port)
    database = Database(dsn, size=CONNECTIONS, timeout=1)
    database.open()

    def ask() -> None:
        with database.autocommit() as connection:
            connection.query(Statement("SELECT 1"))

    try:
        with ExitStack() as together:
            for _ in range(CONNECTIONS):
                together.enter_context(database.autocommit()).query(Statement("SELECT 1"))
        for connection in list(proxy.connections):
            connection.lose_server()
        failed = 0
        for _ in range(2 * CONNECTIONS):
            try:
                ask()
            except DatabaseUnavailable:
                failed += 1
        assert failed <= 2
    finally:
        database.close()


def read(database: Database) -> None:
    with database.autocommit() as connection:
        connection.query(Statement("SELECT 1, 'some text'"), Statement("SELECT 2"))


def write(database: Database) -> None:
    with database.transaction() as connection:
        connection.query(Statement("SELECT 1"))


def read_with_a_cursor(database: Database) -> None:
    with database.autocommit() as connection:
        connection.execute("SELECT 1, 'some text'").fetchall()


def send_noise(proxy: TcpProxy) -> None:
    """Let each reply begin with noise."""
    noise = random.Random(1)

    def garbled(_: ProxiedConnection, data: bytes) -> bytes:
        return noise.randbytes(min(40, len(data))) + data[40:]

    proxy.on_reply = garbled


@pytest.mark.parametrize("ask", [read, write, read_with_a_cursor])
def test_noise_instead_of_an_answer_counts_as_no_answer(
    stack: Stack, proxy: TcpProxy, ask: Callable[[Database], None]
) -> None:
    dsn = make_conninfo(stack.postgres, host="127.0.0.1", port=proxy.port)
    database = Database(dsn, size=CONNECTIONS, timeout=0.3)
    database.open()
    try:
        for _ in range(15):
            proxy.reset_hooks()
            wait_until(lambda: succeeds(ask, database))
            send_noise(proxy)
            with pytest.raises(DatabaseUnavailable):
                ask(database)
    finally:
        database.close()


def test_no_connection_is_missing_after_noise(stack: Stack, proxy: TcpProxy) -> None:
    dsn = make_conninfo(stack.postgres, host="127.0.0.1", port=proxy.port)
    database = Database(dsn, size=CONNECTIONS, timeout=1)
    database.open()
    try:
        for _ in range(3):
            with ExitStack() as together:
                for _ in range(CONNECTIONS):
                    together.enter_context(database.autocommit()).query(Statement("SELECT 1"))
            send_noise(proxy)
            for _ in range(CONNECTIONS):
                with suppress(DatabaseUnavailable, psycopg.Error):
                    read(database)
            proxy.reset_hooks()
            wait_until(lambda: succeeds(read, database), within=5)
    finally:
        database.close()


def succeeds(ask: Callable[[Database], None], database: Database) -> bool:
    try:
        ask(database)
    except DatabaseUnavailable:
        return False
    return True
