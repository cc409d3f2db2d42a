"""Taking a stack's servers away for a while."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import requests

from testkit.stack import Stack, children_of, status_of, wait_until


def readiness(stack: Stack) -> tuple[int, dict[str, object]]:
    answer = requests.get(f"{stack.app}/readyz", timeout=5)
    return answer.status_code, answer.json()


def all_back(stack: Stack, since: float) -> bool:
    """All answer, and the relay has looked at PostgreSQL since then: what it heard nothing of meanwhile it drops, which
    would come as a surprise to a test that has gone on."""
    with suppress(requests.RequestException, FileNotFoundError):
        return (
            readiness(stack)[1]["checks"] == {"postgres": "ok", "redis": "ok"}
            and all(map(answers, stack.edges))
            and ("relay" not in stack.pids() or stack.supervisor.plan.heartbeat.stat().st_mtime > since)
        )
    return False


def answers(edge: str) -> bool:
    return status_of(f"{edge}/.edge") == 200


def servers_of(stack: Stack, name: str) -> list[int]:
    """The server's process and its children."""
    master = stack.pids()[name]
    return [master, *children_of(master)]


@contextmanager
def refusing(stack: Stack, *names: str) -> Iterator[None]:
    """Stopped: connections to it are refused."""
    for name in names:
        stack.supervisor.rpc.stopProcess(name)
    try:
        yield
    finally:
        for name in names:
            stack.supervisor.rpc.startProcess(name)
        since = time.time()
        wait_until(lambda: all_back(stack, since), what="all back")


@contextmanager
def hanging(stack: Stack, name: str) -> Iterator[None]:
    """Stopped in its tracks: connections stay, packets are acknowledged, nothing is answered."""
    pids = servers_of(stack, name)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        since = time.time()
        wait_until(lambda: all_back(stack, since), what="all back")
