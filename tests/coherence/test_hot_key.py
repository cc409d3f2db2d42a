"""A key that many read and somebody writes: PostgreSQL is spared, and nobody waits long."""

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
def crowd(edge: str) -> Iterator[list[socket.socket]]:
    """So many connections to it."""
    address = urlsplit(edge)
    with ExitStack() as context:
        yield [
            context.enter_context(socket.create_connection((str(address.hostname), address.port or 80), timeout=10))
            for _ in range(READERS)
        ]


def ask_all(connections: list[socket.socket], path: str) -> list[tuple[float, bytes]]:
    """All at the same moment; seconds and answer of each."""
    began: dict[socket.socket, float] = {}
    parts: dict[socket.socket, bytes] = dict.fromkeys(connections, b"")
    took: list[tuple[float, bytes]] = []
    with selectors.DefaultSelector() as ready:
        for connection in connections:
            ready.register(connection, selectors.EVENT_READ)
            began[connection] = time.monotonic()
            connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        while len(took) < len(connections):
            for key, _ in ready.select(10):
                connection = cast(socket.socket, key.fileobj)
                parts[connection] += connection.recv(65536)
                if parts[connection].endswith(b"}"):
                    took.append((time.monotonic() - began[connection], parts[connection]))
                    ready.unregister(connection)
    return took


@pytest.mark.exclusive
def test_after_a_write_256_readers_ask_postgresql_a_handful_of_times_and_none_waits_long(
    stack: Stack, new_user: User
) -> None:
    path = f"/users/{new_user['id']}"
    asked, slowest = [], []
    with crowd(stack.edge) as connections:
        ask_all(connections, path)
        for number in range(10):
            writer = threading.Thread(
                target=requests.put, args=(stack.edges[1] + path,), kwargs={"json": {"name": f"N{number}"}}
            )
            writer.start()  # the readers come before, while and after it drops and commits
            answers = [answer for _ in range(3) for answer in ask_all(connections, path)]
            writer.join()
            assert all(answer.startswith(b"HTTP/1.1 200") for _, answer in answers)
            asked.append(sum(b"redis; fwd=" in answer for _, answer in answers))
            slowest.append(max(seconds for seconds, _ in answers))
            last = ask_all(connections, path)
            assert all(b'"name":"N%d"' % number in answer for _, answer in last)
    print(f"asked PostgreSQL {asked} times, slowest answers {[round(1000 * s) for s in slowest]} ms")
    assert sorted(asked)[5] <= 10  # of 768 reads, while a writer was on its way
    assert max(slowest) < 0.5
