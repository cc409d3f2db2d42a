"""Replace a worker that is stopped (SIGSTOP). It keeps its connections, and an edge waits for it: a read until its try
times out, and a write, which is sent once, until the edge gives up. When it is killed, the edge notices at once.

Relies on: gunicorn's master looks after its workers whenever one of them stops, since the kernel then sends SIGCHLD,
and calls `murder_workers` and `wait_for_signals` by their names.
Remove when: gunicorn's master replaces workers that are stopped. edge/lua/workers.lua does the same for an edge.
"""

import os
import signal
import time
from contextlib import suppress
from typing import Any

STOPPED_S = 0.5
"""Seconds for which a worker may be stopped: a snapshot of a debugger takes less."""

LOOK_S = 0.1
"""Seconds between two looks while a worker is stopped."""


def install(server: Any) -> None:
    """Look after stopped workers: gunicorn's hook `on_starting`."""
    stopped_since: dict[int, float] = {}
    looked_at = time.monotonic()
    murder_workers, wait_for_signals = server.murder_workers, server.wait_for_signals

    def look() -> None:
        nonlocal looked_at
        before, looked_at = looked_at, time.monotonic()
        murder_workers()
        stopped = {pid for pid in list(server.WORKERS) if _is_stopped(pid)}
        if looked_at - before > 2 * STOPPED_S:
            stopped_since.clear()  # the master was idle, or stopped itself, and the whole app with it
        for pid in stopped_since.keys() - stopped:
            del stopped_since[pid]
        for pid in stopped:
            if looked_at - stopped_since.setdefault(pid, looked_at) >= STOPPED_S:
                server.log.error("A stopped worker is killed, and another one takes its place (pid %s)", pid)
                server.kill_worker(pid, signal.SIGKILL)

    def wait(timeout: float = 1.0) -> Any:
        return wait_for_signals(timeout=LOOK_S if stopped_since else timeout)

    server.murder_workers, server.wait_for_signals = look, wait


def _is_stopped(pid: int) -> bool:
    with suppress(ChildProcessError):  # it has ended meanwhile
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False
