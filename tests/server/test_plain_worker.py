"""The stack with gunicorn's own worker (APP_WORKER_CLASS=gthread): the promise holds, with less speed."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import requests

from testkit.stack import Stack, children_of, running, wait_until

pytestmark = pytest.mark.plain_worker

LONG_TTL_S = 600
"""Longer than a test, so that no entry expires by itself."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running("--edges", "2", APP_WORKER_CLASS="gthread", EDGE_TTL=str(LONG_TTL_S)) as stack:
        yield stack


def user_at(stack: Stack, user: int) -> list[str]:
    return [f"{edge}/users/{user}" for edge in stack.edges]


def read(url: str) -> tuple[str, str]:
    """Return the name of the user, and which tier answered."""
    response = requests.get(url, timeout=5)
    return response.json()["name"], response.headers["X-Cache-Status"]


def test_apps_run_with_the_worker_of_gunicorn(stack: Stack) -> None:
    assert "Using worker: velikiy.server.plain_worker.Worker" in stack.log("app1")


def test_write_through_an_app_with_the_plain_worker_is_seen_by_the_next_read_of_each_edge(stack: Stack) -> None:
    urls = user_at(stack, 1)
    for number in range(10):
        for url in urls:
            wait_until(lambda url=url: read(url)[1] == "HIT")  # type: ignore[misc]
        written = requests.put(urls[number % 2], json={"name": f"Name {number}"}, timeout=5)
        assert written.status_code == 200
        assert [read(url)[0] for url in urls] == [f"Name {number}"] * 2


def test_read_after_a_write_fills_the_edge_again_with_the_plain_worker(stack: Stack) -> None:
    url = user_at(stack, 2)[0]
    wait_until(lambda: read(url)[1] == "HIT")
    assert requests.put(url, json={"name": "Filled"}, timeout=5).status_code == 200
    assert read(url) == ("Filled", "MISS")
    assert read(url) == ("Filled", "HIT")


def test_locked_row_refuses_its_writes_and_recovers_with_the_plain_worker(stack: Stack) -> None:
    urls = user_at(stack, 3)
    assert requests.put(urls[0], json={"name": "Before"}, timeout=5).status_code == 200

    def write(number: int) -> int:
        return requests.put(urls[number % 2], json={"name": f"Late {number}"}, timeout=30).status_code

    with ThreadPoolExecutor(40) as pool:
        with psycopg.connect(stack.postgres) as connection:
            connection.execute("SELECT FROM users WHERE id = 3 FOR UPDATE")
            statuses = list(pool.map(write, range(80)))  # more writes than threads
            assert set(statuses) == {503}
        wait_until(lambda: write(0) == 200)
        assert requests.put(urls[1], json={"name": "After"}, timeout=5).status_code == 200
    assert [read(url)[0] for url in urls] == ["After"] * 2
    wait_until(lambda: read(urls[0])[1] == "HIT", what="the edge uses its cache again")


def test_restarted_plain_worker_loses_no_request(stack: Stack) -> None:
    master = stack.pids()["app1"]
    before = set(children_of(master))
    urls = user_at(stack, 1)
    with ThreadPoolExecutor(4) as pool:
        # Each request has a query of its own, so no cache answers it.
        pages = [f"{stack.edges[n % 2]}/users?limit={n + 1}" for n in range(100)]
        responses = [pool.submit(requests.get, page, timeout=10) for page in pages[:50]]
        os.kill(master, signal.SIGHUP)
        responses += [pool.submit(requests.get, page, timeout=10) for page in pages[50:]]
        assert {response.result().status_code for response in responses} == {200}
    wait_until(lambda: not before & set(children_of(master)), what="all workers are new")
    assert requests.put(urls[0], json={"name": "Restarted"}, timeout=5).status_code == 200
    assert [read(url)[0] for url in urls] == ["Restarted"] * 2
