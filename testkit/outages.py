"""Take servers of a stack away for a while."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import requests

from testkit.stack import EDGE_SECRET, Stack, children_of, wait_until
from velikiy.stack import local_http


def readiness(stack: Stack) -> tuple[int, dict[str, object]]:
    response = requests.get(f"{stack.app}/readyz", timeout=5)
    return response.status_code, response.json()


def is_recovered(stack: Stack, since: float) -> bool:
    """Return whether all servers respond and the relay has probed PostgreSQL after `since`.

    The relay invalidates what it may have missed during the outage. A test that went on earlier would not expect that.
    """
    with suppress(requests.RequestException, FileNotFoundError):
        return (
            readiness(stack)[1]["checks"] == {"postgres": "ok", "redis": "ok"}
            and all(map(is_up, stack.edges))
            and ("relay" not in stack.pids() or stack.supervisor.plan.heartbeat.stat().st_mtime > since)
        )
    return False


def is_up(edge: str) -> bool:
    return local_http.answers(f"{edge}/.edge", EDGE_SECRET)


def pids_of(stack: Stack, name: str) -> list[int]:
    """Return the process ids of the server's master and its children."""
    master = stack.pids()[name]
    return [master, *children_of(master)]


@contextmanager
def refusing(stack: Stack, *names: str) -> Iterator[None]:
    """Stop these servers: connections to them are refused."""
    for name in names:
        stack.supervisor.rpc.stopProcess(name)
    try:
        yield
    finally:
        for name in names:
            stack.supervisor.rpc.startProcess(name)
        since = time.time()
        wait_until(lambda: is_recovered(stack, since), what="all servers respond again")


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop these processes, and let them go on at the end. A process may end meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def hanging(stack: Stack, name: str) -> Iterator[None]:
    """Freeze a server: its connections stay open and packets are acknowledged, but no request gets a response."""
    try:
        with stopped(pids_of(stack, name)):
            yield
    finally:
        since = time.time()
        wait_until(lambda: is_recovered(stack, since), what="all servers respond again")
