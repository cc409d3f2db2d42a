"""Hits go on while the reader of the logs, or their disk, stalls."""

import http.client
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from testkit.api import is_hit
from testkit.stack import Stack, wait_until
from tests.chaos.disks import frozen, small_disk
from tests.chaos.service import Missing, Service

READS = 10_000
"""Their lines, about 3 MB, fill every pipe and buffer on the way to the disk."""

LONGEST_HIT_S = 1.0


@pytest.fixture
def service_on_a_small_disk() -> Iterator[Service]:
    try:
        with small_disk() as service:
            yield service
    except Missing as reason:
        pytest.skip(str(reason))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def create(stack: Stack) -> str:
    """Create a user whose row the edge has stored. Return its path."""
    created = requests.post(f"{stack.edge}/users", json={"name": "Ann", "email": "ann@example.com"}, timeout=5)
    path = f"/users/{created.json()['id']}"
    wait_until(lambda: is_hit(stack.edge + path))
    return path


def read(stack: Stack, path: str) -> tuple[list[float], str]:
    """Read the path READS times on one connection. Return the seconds of each hit, and the beginning that the ids of
    these requests have in common."""
    connection = http.client.HTTPConnection(stack.edge.removeprefix("http://"), timeout=10)
    hits = []
    for _ in range(READS):
        began = time.monotonic()
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        if response.headers["X-Cache-Status"] == "HIT":
            hits.append(time.monotonic() - began)
    connection.close()
    return hits, response.headers["X-Request-Id"].rpartition("-")[0] + "-"


@pytest.mark.exclusive
def test_hits_do_not_wait_for_a_stopped_supervisor_and_the_log_reports_lost_lines(own_stack: Stack) -> None:
    path = create(own_stack)
    supervisor = own_stack.supervisor.pid()
    assert supervisor
    with stopped(supervisor):
        hits, _ = read(own_stack, path)
    assert len(hits) > READS / 2
    assert max(hits) < LONGEST_HIT_S

    def messages() -> list[str]:
        return [json.loads(line).get("message", "") for line in own_stack.log("edge1").splitlines()]

    wait_until(lambda: any("lines of this log are lost" in message for message in messages()))


@pytest.mark.exclusive
def test_hits_do_not_wait_for_a_disk_that_stalls_and_no_line_is_lost(service_on_a_small_disk: Service) -> None:
    stack = service_on_a_small_disk.stack
    path = create(stack)
    # PostgreSQL is on that disk as well, so after 2 s no edge has a cache lease, and the apps answer.
    with frozen(service_on_a_small_disk, random.Random()):
        hits, request_id = read(stack, path)
    assert len(hits) > 1000
    assert max(hits) < LONGEST_HIT_S
    wait_until(lambda: stack.log("edge1").count(f'"request_id":"{request_id}') == READS)
