"""Searches and batches have a share of an app's threads and connections. Other requests do not wait behind them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest
import requests

from testkit.failpoints import has_cache_lease
from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import Stack, running, wait_until

SEARCHING_CLIENTS = 64

SLOW_WORDS = """
CREATE FUNCTION words(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
    'BEGIN PERFORM pg_sleep(0.2); RETURN fast_words($1); END'
"""
"""Makes each search take at least 0.2 s, in the planner."""


@pytest.fixture(scope="module")
def searched() -> Iterator[Stack]:
    """A stack with one app whose searches are slow."""
    with running("--apps", "1") as stack:
        stack.sql("ALTER FUNCTION words(text) RENAME TO fast_words")
        stack.sql(SLOW_WORDS)
        yield stack


class Searches:
    """Clients that search for another word each time."""

    def __init__(self, stack: Stack) -> None:
        self.statuses: Counter[int] = Counter()
        self._stack = stack
        self._stop = threading.Event()
        self._numbers = count()
        self._threads = [threading.Thread(target=self._search) for _ in range(SEARCHING_CLIENTS)]

    def __enter__(self) -> "Searches":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _search(self) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                response = session.get(f"{self._stack.edge}/users?q=word{next(self._numbers)}", timeout=20)
                self.statuses[response.status_code] += 1
                time.sleep(float(response.headers.get("Retry-After", 0)) / 10)  # impatient


def test_reads_writes_and_leases_do_not_wait_behind_searches(searched: Stack) -> None:
    edge = searched.edge
    created = requests.post(f"{edge}/users", json={"name": "A", "email": "busy@example.com"}, timeout=5).json()["id"]
    with Searches(searched) as searches:
        wait_until(lambda: searches.statuses[503], what="the share is busy")
        slowest = 0.0
        for number in range(1, 41):
            began = time.monotonic()
            read = requests.get(f"{edge}/users?limit={number}", timeout=10)  # a miss each time
            written = requests.patch(f"{edge}/users/{created}", json={"name": f"A{number}"}, timeout=10)
            slowest = max(slowest, time.monotonic() - began)
            assert (read.status_code, written.status_code) == (200, 200)
            assert has_cache_lease(edge)
        assert slowest < 3
        wait_until(lambda: searches.statuses[200] >= SEARCHING_CLIENTS, what="searches are carried out, too")
    assert set(searches.statuses) == {200, 503}
    requests.delete(f"{edge}/users/{created}", timeout=5)


def test_search_beyond_the_share_is_a_problem_that_says_when_to_retry(searched: Stack) -> None:
    numbers = count()
    with Searches(searched):

        def refused() -> bool:
            response = send_request(searched.app, "GET", f"/users?q=other{next(numbers)}")
            if response.status != 503:
                return False
            check_raw_problem(response, 503)
            assert response.headers["retry-after"] == "1"
            assert "Too many searches" in response.json["detail"]
            return True

        wait_until(refused, every=0)


def test_searches_are_carried_out_again_when_the_crowd_has_gone(searched: Stack) -> None:
    with Searches(searched) as searches:
        wait_until(lambda: searches.statuses[503])
    wait_until(lambda: requests.get(f"{searched.edge}/users?q=later", timeout=5).status_code == 200, within=10)
