"""Connections that are of no use any more. Some lead to nowhere: a host that lost its power, or a firewall that forgot
them, sends no end of them. On others the bytes make no sense: something between has changed them."""

import gc
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from testkit.stack import Stack, wait_until
from testkit.tcp_proxy import TcpProxy, tcp_proxy
from velikiy.postgres import Connection, Database, DatabaseUnavailable, Statement

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


COPY = [kind + b"\0\0\0\7\0\0\0" for kind in (b"G", b"H", b"W")]
NOISE = [
    *COPY,
    b"E\0\0\0\5\0",
    b"T\x7f\xff\xff\xff",
    b"Z\0\0\0\5I",
    *(random.Random(n).randbytes(40) for n in range(6)),
]
"""Beginnings of replies: of a COPY, of an error without fields, of a long message, of the end of an answer; and at
random."""


def send_noise(proxy: TcpProxy, noise: bytes) -> None:
    """Put this in the place of the beginning of each reply."""
    proxy.on_reply = lambda _, data: noise + data[len(noise) :]


@pytest.mark.parametrize("ask", [read, write, read_with_a_cursor])
def test_noise_instead_of_an_answer_counts_as_no_answer(
    stack: Stack, proxy: TcpProxy, ask: Callable[[Database], None]
) -> None:
    dsn = make_conninfo(stack.postgres, host="127.0.0.1", port=proxy.port)
    database = Database(dsn, size=CONNECTIONS, timeout=0.3)
    database.open()
    try:
        for noise in NOISE:
            proxy.reset_hooks()
            wait_until(lambda: succeeds(ask, database))
            send_noise(proxy, noise)
            with pytest.raises(DatabaseUnavailable):
                ask(database)
    finally:
        database.close()


def test_no_connection_is_missing_after_noise(stack: Stack, proxy: TcpProxy) -> None:
    dsn = make_conninfo(stack.postgres, host="127.0.0.1", port=proxy.port)
    database = Database(dsn, size=CONNECTIONS, timeout=1)
    database.open()
    try:
        for noise in NOISE[-3:]:
            wait_until(lambda: succeeds(borrow_all, database))
            send_noise(proxy, noise)
            for _ in range(CONNECTIONS):
                with suppress(DatabaseUnavailable):
                    read(database)
            proxy.reset_hooks()
            wait_until(lambda: succeeds(read, database), within=5)
    finally:
        database.close()


def borrow_all(database: Database) -> None:
    with ExitStack() as together:
        for _ in range(CONNECTIONS):
            together.enter_context(database.autocommit()).query(Statement("SELECT 1"))


def succeeds(ask: Callable[[Database], None], database: Database) -> bool:
    try:
        ask(database)
    except DatabaseUnavailable:
        return False
    return True


@pytest.fixture
def without_collector() -> Iterator[None]:
    """An idle process may run its garbage collector minutes later."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_connection_that_is_given_up_is_closed_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            Connection.connect(f"host=127.0.0.1 port={port} user=velikiy connect_timeout=1")
        server_side, _ = silent.accept()
        server_side.settimeout(5)
        with server_side:
            while server_side.recv(1024):  # what the client had sent; then its end
                pass


@pytest.mark.usefixtures("without_collector")
def test_session_that_cannot_be_set_up_is_ended(stack: Stack) -> None:
    """This server is no pooler, so its sessions lack the settings that a pooler gives them."""
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%client_min_messages=warning%%'"
        " AND pid <> pg_backend_pid()"
    )
    database = Database(stack.postgres, size=1, timeout=1, pooled=True)
    database.open()
    try:
        with pytest.raises(DatabaseUnavailable):
            read(database)
        wait_until(lambda: stack.sql(sessions) == [(0,)])
    finally:
        database.close()
