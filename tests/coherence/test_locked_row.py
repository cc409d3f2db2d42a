"""A row that another session has locked delays its writers, and no other request."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
import requests

from testkit.api import is_hit
from testkit.failpoints import lease_ms
from testkit.stack import Stack, running, wait_until

CLIENTS = 100
LOCKED_S = 6
"""Longer than two cache leases: an edge that cannot renew has lost its lease by then."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack whose entries outlive the test, so a read that is no hit shows that the edge has lost its cache."""
    with running("--edges", "2", EDGE_TTL="600") as stack:
        yield stack


@contextmanager
def row_locked(stack: Stack, user: int) -> Iterator[None]:
    """Hold a row lock, as a session that was left open does."""
    with psycopg.connect(stack.postgres) as connection:
        connection.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user,))
        yield


@contextmanager
def clients_writing(stack: Stack, user: int) -> Iterator[list[int]]:
    """Run clients that write this row again and again; yield the growing list of their status codes."""
    statuses: list[int] = []
    finished = threading.Event()

    def write(number: int) -> None:
        edge = stack.edges[number % len(stack.edges)]
        while not finished.is_set():
            response = requests.put(f"{edge}/users/{user}", json={"name": f"Client {number}"}, timeout=30)
            statuses.append(response.status_code)

    clients = [threading.Thread(target=write, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        finished.set()
        for client in clients:
            client.join()


def test_writers_of_a_locked_row_cost_no_edge_its_cache_lease_and_no_other_row_its_hits(stack: Stack) -> None:
    other_rows = [f"{edge}/users/{user}" for edge in stack.edges for user in (2, 3)]
    for url in other_rows:
        wait_until(lambda url=url: is_hit(url))  # type: ignore[misc]
    results: list[str] = []
    with ExitStack() as lock:
        lock.enter_context(row_locked(stack, 1))
        with clients_writing(stack, 1) as statuses:
            until = time.monotonic() + LOCKED_S
            while time.monotonic() < until:
                for url in other_rows:
                    results.append(requests.get(url, timeout=1).headers["X-Cache-Status"])
                assert all(lease_ms(edge) > 0 for edge in stack.edges)
                for edge in stack.edges:
                    assert requests.get(f"{edge}/livez", timeout=1).status_code == 200
                    assert requests.get(f"{edge}/readyz", timeout=1).json()["checks"]["edge"] == "ok"
            assert set(statuses) == {503}  # PostgreSQL carried out none of these writes
            lock.close()
            wait_until(lambda: 200 in statuses, what="the row can be written again")
    assert set(results) == {"HIT"}


def test_misses_are_served_while_writers_wait_for_a_locked_row(stack: Stack) -> None:
    with row_locked(stack, 1), clients_writing(stack, 1):
        for number in range(30):
            stack.redis().flushdb()
            assert requests.get(f"{stack.edges[number % 2]}/users?limit={number + 1}", timeout=3).status_code == 200
