"""Findings about the processes that supervisor starts."""

import time
from typing import NamedTuple

from velikiy.findings import Finding

DATA_SERVERS = {"postgres": "PostgreSQL", "redis": "Redis"}


class Process(NamedTuple):
    name: str
    pid: int
    """0 if it does not run."""

    state: str
    """supervisor's name of the state, such as RUNNING."""

    started_at: float
    stopped_at: float
    restarts: int
    """Since the stack was started."""

    recent_restarts: list[float]
    """The moments of the restarts that are so near that the program ends again and again, or none."""

    worker_ends: list[float]
    """The moments at which workers ended, if they end again and again while their master goes on."""

    @property
    def runs(self) -> bool:
        return bool(self.pid)


def process(it: Process) -> list[Finding]:
    """Return whether this process does not run, or ends again and again."""
    if it.recent_restarts:
        seconds = max(1, round(time.time() - it.recent_restarts[0]))
        return [
            Finding(
                "process.crash_loop",
                f"{it.name} ends again and again: it was started again {len(it.recent_restarts)} times in {seconds} s,"
                f" and {it.restarts} times since the start of the stack.",
                f"Run ./run logs {it.name} -n 200: the lines before each start say why.",
                since=it.recent_restarts[0],
            )
        ]
    if not it.runs:
        stopped = it.state == "STOPPED"
        return [
            Finding(
                "process.down",
                f"{it.name} does not run: {'it was stopped' if stopped else 'it has ended and was not started again'}.",
                f"Run ./run up --detach, which starts it. ./run logs {it.name} shows its last lines.",
                since=it.stopped_at or None,
            )
        ]
    if it.worker_ends:
        return [
            Finding(
                "process.workers_end",
                f"Workers of {it.name} end again and again: {len(it.worker_ends)} within"
                f" {max(1, round(time.time() - it.worker_ends[0]))} s, each with its requests in progress.",
                f"Run ./run logs {it.name} -n 200: the line before each start names the signal. dmesg | grep -i kill"
                " says whether the kernel has ended it for lack of memory.",
                since=it.worker_ends[0],
            )
        ]
    return []


def hangs(name: str, timeout_s: float, pid: int) -> Finding:
    return Finding(
        "process.silent",
        f"{name} does not answer within {timeout_s:g} s: it starts, hangs, or is overloaded.",
        f"Run ./run logs {name}. If it hangs, end it: kill -9 {pid or 'PID'} - supervisor starts it again.",
        where=name,
    )


def silent_supervisor(timeout_s: float) -> Finding:
    return Finding(
        "supervisor.silent",
        f"supervisord does not answer within {timeout_s:g} s, so the state of the processes is not known.",
        "If it hangs, run ./run down, then ./run up --detach.",
    )


def stopped_supervisor() -> Finding:
    return Finding(
        "supervisor.away",
        "supervisord does not run, but processes of the stack do: those that end are not started again.",
        "Run ./run down, then ./run up --detach.",
    )


def stranger(name: str, url: str) -> Finding:
    return Finding(
        "edge.stranger",
        f"Another program, or an edge of another stack, answers at {url} instead of {name}.",
        f"Find it with: ss -ltnp | grep :{url.rpartition(':')[2]} - stop it, and run ./run up --detach.",
        where=name,
    )
