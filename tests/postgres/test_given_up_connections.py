"""A server that is silent: connections that are given up are closed, and do not wait for it to go on."""

import gc
import socket
from collections.abc import Iterator

import psycopg
import pytest

from velikiy.postgres import Connection


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
