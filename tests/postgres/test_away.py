"""PostgreSQL is away for long: what an edge has is answered with the mark STALE, and everything else fails soon.

No part of the service counts longer than this outage lasts: a cache lease (2.4 s), an entry (EDGE_TTL), a pool that gives
up connecting (1 s), an edge whose first tries are long after a 503 (5 s), an edge that has not renewed (10 s). The pools
close connections that were idle for ten minutes, of which an outage leaves none.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress

import psycopg
import pytest
import requests

from testkit.api import is_hit, timed
from testkit.outages import pids_of, stopped
from testkit.stack import Stack, running, wait_until

pytestmark = [pytest.mark.long, pytest.mark.exclusive]

AWAY_S = 40
WARM = range(1, 4)

LONGEST_READ_S = 1.0
LONGEST_WRITE_S = 1.0
FIRST_WRITE_S = 2.0
ON_A_BUSY_MACHINE_S = 0.5


@pytest.fixture(scope="module", params=["epoll", pytest.param("gthread", marks=pytest.mark.plain_worker)])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running("--edges", "2", "--apps", "2", EDGE_TTL="1", APP_WORKER_CLASS=request.param) as stack:
        yield stack


def put(stack: Stack, number: int) -> tuple[float, requests.Response]:
    url = f"{stack.edges[number % 2]}/users/{WARM[0]}"
    return timed(lambda: requests.put(url, json={"name": f"Name {number}"}, timeout=20))


def is_gone(stack: Stack) -> bool:
    return put(stack, 0)[1].status_code == 503


def silent(stack: Stack) -> AbstractContextManager[None]:
    """Stop every process of PostgreSQL: its connections stay open and answer nothing."""
    return stopped(pids_of(stack, "postgres"))


@contextmanager
def ended(stack: Stack) -> Iterator[None]:
    stack.supervisor.rpc.stopProcess("postgres")
    try:
        yield
    finally:
        stack.supervisor.rpc.startProcess("postgres")


def answers(stack: Stack) -> bool:
    with suppress(psycopg.OperationalError):
        return bool(stack.sql("SELECT 1"))
    return False


@pytest.mark.parametrize("away", [ended, silent])
def test_warm_reads_are_stale_and_all_else_fails_within_a_second_until_postgresql_is_back(
    stack: Stack, away: Callable[[Stack], AbstractContextManager[None]]
) -> None:
    urls = [f"{edge}/users/{user}" for edge in stack.edges for user in WARM[1:]]
    for url in urls:
        wait_until(lambda url=url: is_hit(url))  # type: ignore[misc]
    slow: list[tuple[str, float]] = []
    with away(stack), ThreadPoolExecutor(16) as pool:
        wait_until(lambda: is_gone(stack))
        time.sleep(3)  # the leases end
        stack.redis().flushdb()
        until, number = time.monotonic() + AWAY_S, 0
        while time.monotonic() < until:
            number += 1
            cold = [
                f"{stack.edges[n % 2]}/users?limit={n % 100 + 1}&sort=name" for n in range(number * 4, number * 4 + 4)
            ]
            warm = pool.map(lambda url: timed(lambda: requests.get(url, timeout=20)), urls)
            missing = pool.map(lambda url: timed(lambda: requests.get(url, timeout=20)), cold)
            written = pool.map(lambda n: put(stack, n), range(4))
            for kind, limit, status, responses in (
                ("warm", LONGEST_READ_S, 200, warm),
                ("cold", LONGEST_READ_S, 503, missing),
                ("write", LONGEST_WRITE_S, 503, written),
            ):
                for seconds, response in responses:
                    assert response.status_code == status, (kind, response.text)
                    assert kind != "warm" or response.headers["X-Cache-Status"] == "STALE"
                    if seconds > limit + ON_A_BUSY_MACHINE_S:
                        slow.append((kind, seconds))
            time.sleep(0.5)
    wait_until(lambda: answers(stack))
    returned = time.monotonic()
    wait_until(lambda: put(stack, 0)[1].status_code == 200)
    assert time.monotonic() - returned < FIRST_WRITE_S + ON_A_BUSY_MACHINE_S
    assert not slow
