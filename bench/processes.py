"""Measure CPU time and memory of running processes, by their role."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

MEGABYTE = 1_000_000

SUPERVISOR = "supervisor"
"""The group that consists of its root alone: the supervisor has started all other servers, which have groups of their
own."""


class Processes:
    """Groups of processes. A group is named by its roots: the processes that started the others."""

    def __init__(self, roots: Mapping[str, list[int]]) -> None:
        self.roots = roots

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds that each group has used so far, processes that have ended included."""
        return {
            group: sum(_own_cpu(root) if group == SUPERVISOR else _family_cpu(root) for root in roots)
            for group, roots in self.roots.items()
        }

    def workers(self, group: str) -> dict[int, float]:
        """Return the CPU seconds of each worker of a group, by process id."""
        families = [family(root) for root in self.roots.get(group, [])]
        # A root without children does the work itself.
        return {process.pid: _own_cpu(process.pid) for members in families for process in members[1:] or members}

    def memory(self, *kinds: str) -> dict[str, float]:
        """Return the megabytes of each group.

        Shared memory counts once (PSS); otherwise PostgreSQL's buffers would count for each backend.

        Args:
            kinds: Count only these fields of smaps_rollup (proc_pid_smaps(5)).
        """
        return {
            group: sum(pss_bytes(process, *kinds) for process in self._of(group, roots)) / MEGABYTE
            for group, roots in self.roots.items()
        }

    def pin(self, cores: list[int]) -> dict[psutil.Process, list[int]]:
        """Keep all processes on these cores. Return the cores that each process could use before."""
        before = {}
        for group, roots in self.roots.items():
            for process in self._of(group, roots):
                with contextlib.suppress(psutil.Error):
                    before[process] = process.cpu_affinity()
                    set_cores(process, cores)
        return before

    def _of(self, group: str, roots: list[int]) -> list[psutil.Process]:
        families = [family(root) for root in roots]
        return [process for members in families for process in (members[:1] if group == SUPERVISOR else members)]


def set_cores(process: psutil.Process, cores: list[int]) -> None:
    """Keep all threads of a process on these cores. `cpu_affinity` of psutil moves the first thread only."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def family(root: int) -> list[psutil.Process]:
    """Return the process and all its descendants; nothing if it has ended."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _family_cpu(root: int) -> float:
    seconds = 0.0
    for process in family(root):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            # Includes children that have ended: each connection to PostgreSQL is a process, and cache-aside opens a
            # connection for each request.
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _own_cpu(pid: int) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def pss_bytes(process: psutil.Process, *kinds: str) -> int:
    """Return the proportional set size; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]  # the first has no name
    except (OSError, ProcessLookupError):
        return 0
    sizes = {name: int(size) for name, size, _ in map(str.split, lines)}
    return sum(sizes[f"{kind}:"] for kind in kinds or ("Pss",)) * 1024
