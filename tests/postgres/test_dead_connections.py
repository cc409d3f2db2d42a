"""Connections that lead to nowhere: a host that lost its power, or a firewall that forgot them, sends no end of them."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from psycopg.conninfo import make_conninfo

from testkit.stack import Stack
from testkit.tcp_proxy import TcpProxy, tcp_proxy
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
