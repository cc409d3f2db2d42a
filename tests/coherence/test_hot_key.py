"""A key that many clients read while another writes it: few reads reach PostgreSQL, and no client waits long."""

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast
from urllib.parse import urlsplit

import pytest
import requests

from testkit.api import User
from testkit.stack import Stack

READERS = 256


@contextmanager
def reader_connections(edge: str) -> Iterator[list[socket.socket]]:
    address = urlsplit(edge)
    with ExitStack() as context:
        yield [
            context.enter_context(socket.create_connection((str(address.hostname), address.port or 80), timeout=10))
            for _ in range(READERS)
        ]


def get_all(connections: list[socket.socket], path: str) -> list[tuple[float, bytes]]:
    """Send a GET over every connection at once; return the seconds and the response of each."""
    began: dict[socket.socket, float] = {}
    received: dict[socket.socket, bytes] = dict.fromkeys(connections, b"")
    responses: list[tuple[float, bytes]] = []
    with selectors.DefaultSelector() as ready:
        for connection in connections:
            ready.register(connection, selectors.EVENT_READ)
            began[connection] = time.monotonic()
            connection.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
        while len(responses) < len(connections):
            for key, _ in ready.select(10):
                connection = cast(socket.socket, key.fileobj)
                received[connection] += connection.recv(65536)
                if received[connection].endswith(b"}"):
                    responses.append((time.monotonic() - began[connection], received[connection]))
                    ready.unregister(connection)
    return responses


@pytest.mark.exclusive
def test_256_readers_of_a_row_under_write_cause_few_loads_from_postgresql_and_wait_briefly(
    stack: Stack, new_user: User
) -> None:
    path = f"/users/{new_user['id']}"
    loads, slowest_s = [], []
    with reader_connections(stack.edge) as connections:
        get_all(connections, path)
        for number in range(10):
            writer = threading.Thread(
                target=requests.put, args=(stack.edges[1] + path,), kwargs={"json": {"name": f"N{number}"}}
            )
            writer.start()  # reads arrive before, during and after the invalidation and the commit
            responses = [response for _ in range(3) for response in get_all(connections, path)]
            writer.join()
            assert all(response.startswith(b"HTTP/1.1 200") for _, response in responses)
            loads.append(sum(b"redis; fwd=" in response for _, response in responses))
            slowest_s.append(max(seconds for seconds, _ in responses))
            assert all(b'"name":"N%d"' % number in response for _, response in get_all(connections, path))
    print(f"loads from PostgreSQL {loads}, slowest responses {[round(1000 * s) for s in slowest_s]} ms")
    assert sorted(loads)[5] <= 10  # of 768 reads that arrive while a writer is in flight
    assert max(slowest_s) < 0.5
