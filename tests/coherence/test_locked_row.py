"""A row that another session has locked delays its writers, and no other request."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
import requests

from testkit.api import is_hit
from testkit.failpoints import lease_ms
from testkit.stack import ROOT, Stack, running, wait_until

CLIENTS = 100
OTHER_WORKER = [pytest.mark.plain_worker, pytest.mark.long]

LOCKED_S = 6
"""Longer than two cache leases: an edge that cannot renew has lost its lease by then."""


@pytest.fixture(scope="module", params=["epoll", pytest.param("gthread", marks=OTHER_WORKER)])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A stack whose entries outlive the test, so a read that is no hit shows that the edge has lost its cache."""
    with running("--edges", "2", EDGE_TTL="600", APP_WORKER_CLASS=request.param) as stack:
        yield stack


@contextmanager
def row_locked(stack: Stack, user: int) -> Iterator[None]:
    """Hold a row lock, as a session that was left open does."""
    with psycopg.connect(stack.postgres) as connection:
        connection.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user,))
        yield


@contextmanager
def clients_writing(stack: Stack, user: int, count: int = CLIENTS, pause: float = 0) -> Iterator[list[int]]:
    """Run clients that write this row again and again; yield the growing list of their status codes."""
    statuses: list[int] = []
    finished = threading.Event()

    def write(number: int) -> None:
        edge = stack.edges[number % len(stack.edges)]
        while not finished.is_set():
            response = requests.put(f"{edge}/users/{user}", json={"name": f"Client {number}"}, timeout=30)
            statuses.append(response.status_code)
            time.sleep(pause)

    clients = [threading.Thread(target=write, args=(number,)) for number in range(count)]
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


def hits_of_other_rows(stack: Stack, seconds: float) -> list[float]:
    """Return the sorted times of hits of another row, one after the other."""
    url, took = f"{stack.edge}/users/2", []
    with requests.Session() as session:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            assert session.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"
            took.append(time.monotonic() - began)
    return sorted(took)


@pytest.mark.long
@pytest.mark.exclusive
def test_hits_of_other_rows_take_at_most_twice_as_long_beside_a_hundred_writers_of_a_locked_row(stack: Stack) -> None:
    wait_until(lambda: is_hit(f"{stack.edge}/users/2"))
    hits_of_other_rows(stack, 1)
    calm = hits_of_other_rows(stack, 5)
    command = [sys.executable, "-m", "tests.chaos.crowd", "writing", str(CLIENTS), "1", "Client ", *stack.edges]
    with row_locked(stack, 1):
        clients = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hits_of_other_rows(stack, 2)  # until the clients have started
        beside = hits_of_other_rows(stack, 5)
        outcomes = json.loads(clients.communicate(timeout=60)[0])
    assert outcomes["503"] > CLIENTS
    for share in (0.5, 0.9):
        assert beside[int(share * len(beside))] < 2 * calm[int(share * len(calm))]


def test_writers_beyond_a_few_are_refused_at_once_and_writes_of_other_rows_succeed(stack: Stack) -> None:
    with row_locked(stack, 1), clients_writing(stack, 1, pause=0.2) as statuses:
        time.sleep(2)  # the first writers have waited for as long as they may
        waiting = "wait_event_type = 'Lock' AND application_name = 'velikiy writes'"
        before = len(statuses)
        for number in range(10):
            began = time.monotonic()
            response = requests.put(f"{stack.edges[number % 2]}/users/2", json={"name": f"Other {number}"}, timeout=5)
            assert (response.status_code, time.monotonic() - began < 2) == (200, True)
            [(count,)] = stack.sql(f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}")
            assert count <= len(stack.apps) * 2  # one for each process
        assert len(statuses) - before > 20
        refused = requests.put(f"{stack.edge}/users/1", json={"name": "Refused"}, timeout=5)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "locked" in refused.json()["detail"]
        assert "not carried out" in refused.json()["detail"]


@pytest.mark.exclusive  # PostgreSQL's timeout comes a tenth of a second before the app's own
def test_each_refusal_of_writers_in_the_queue_of_a_locked_row_names_the_lock(stack: Stack) -> None:
    """A writer in the queue waits for two locks, one after the other."""
    details: list[str] = []

    def write(app: str) -> None:
        response = requests.put(f"{app}/users/1", json={"name": "Waits"}, timeout=5)
        details.append(f"{response.status_code} {response.json()['detail']}")

    with row_locked(stack, 1):
        for _ in range(3):
            writers = [threading.Thread(target=write, args=(app,)) for app in stack.apps]
            for writer in writers:
                writer.start()
                time.sleep(0.3)
            for writer in writers:
                writer.join()
    assert len(details) == 3 * len(stack.apps)
    assert all(detail.startswith("503 ") and "locked" in detail for detail in details), details


@pytest.mark.long
def test_writers_of_many_locked_rows_are_refused_at_once_too(stack: Stack) -> None:
    with psycopg.connect(stack.postgres) as outside:
        outside.execute("SELECT FROM users FOR UPDATE")
        with ExitStack() as clients:
            for user in (1, 2, 3):
                clients.enter_context(clients_writing(stack, user, count=20))
            time.sleep(2)
            took = []
            for number in range(9):
                began = time.monotonic()
                response = requests.put(
                    f"{stack.edges[number % 2]}/users/{number % 3 + 1}", json={"name": "A"}, timeout=5
                )
                assert response.status_code == 503
                took.append(time.monotonic() - began)
                for edge in stack.edges:
                    assert lease_ms(edge) > 0
    assert sorted(took)[5] < 1.5


def test_reads_of_a_locked_table_leave_threads_to_other_requests(stack: Stack) -> None:
    url = f"{stack.edge}/users/2"
    wait_until(lambda: is_hit(url))
    finished = threading.Event()

    def read(number: int) -> None:
        while not finished.is_set():
            edge = stack.edges[number % 2]
            statuses.append(requests.get(f"{edge}/users?limit={number + 1}&sort=-name", timeout=30).status_code)

    statuses: list[int] = []
    readers = [threading.Thread(target=read, args=(number,)) for number in range(64)]
    with psycopg.connect(stack.postgres) as outside:
        stack.redis().flushdb()
        outside.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        for reader in readers:
            reader.start()
        try:
            time.sleep(2)  # the first reads have waited for as long as they may
            for _ in range(10):
                began = time.monotonic()
                assert requests.get(f"{stack.edge}/openapi.json", timeout=5).status_code == 200
                assert time.monotonic() - began < 2
                assert is_hit(url)
                assert all(lease_ms(edge) > 0 for edge in stack.edges)
            outside.rollback()
            wait_until(lambda: statuses[-20:] == [200] * 20, what="reads succeed again")
        finally:
            finished.set()
            for reader in readers:
                reader.join()
    assert set(statuses) <= {200, 503}


def test_list_and_count_are_stored_while_writers_wait_for_a_row(stack: Stack) -> None:
    """The waiting writers hold no lock of a path: they lock the paths after the row."""
    with row_locked(stack, 1), clients_writing(stack, 1, count=2) as statuses:
        wait_until(lambda: statuses)  # a client tries again
        for number in range(50):
            url = f"{stack.edge}/users?limit={number + 1}&sort=name"
            requests.get(url, timeout=5)
            assert is_hit(url)
        wait_until(lambda: is_hit(f"{stack.edge}/users/count"), within=1)
        assert set(statuses) == {503}


def test_misses_are_served_while_writers_wait_for_a_locked_row(stack: Stack) -> None:
    with row_locked(stack, 1), clients_writing(stack, 1):
        for number in range(30):
            stack.redis().flushdb()
            assert requests.get(f"{stack.edges[number % 2]}/users?limit={number + 1}", timeout=3).status_code == 200
