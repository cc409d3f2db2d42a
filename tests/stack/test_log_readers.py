"""Who reads the logs, and where they are written, may stall: requests go on."""

import http.client
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

HITS = 10_000
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


def longest(stack: Stack, path: str) -> float:
    """Return the seconds of the slowest of HITS reads."""
    connection = http.client.HTTPConnection(stack.edge.removeprefix("http://"), timeout=10)
    slowest = 0.0
    for _ in range(HITS):
        began = time.monotonic()
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        slowest = max(slowest, time.monotonic() - began)
    connection.close()
    return slowest


@pytest.mark.exclusive
def test_reads_do_not_wait_for_a_stopped_supervisor_and_the_log_says_that_lines_are_lost(own_stack: Stack) -> None:
    path = create(own_stack)
    supervisor = own_stack.supervisor.pid()
    assert supervisor
    with stopped(supervisor):
        assert longest(own_stack, path) < LONGEST_HIT_S
    wait_until(lambda: "lines of this log are lost" in own_stack.log("edge1"))


@pytest.mark.exclusive
def test_reads_do_not_wait_for_a_disk_that_stalls_and_no_line_is_lost(service_on_a_small_disk: Service) -> None:
    stack = service_on_a_small_disk.stack
    path = create(stack)
    line = f'"path":"{path}","status":200'
    before = stack.log("edge1").count(line)
    with frozen(service_on_a_small_disk, random.Random()):
        assert longest(stack, path) < LONGEST_HIT_S
    wait_until(lambda: stack.log("edge1").count(line) - before >= HITS)
