"""CPU and memory of what runs, by what it is for."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import psutil

MEGABYTE = 1_000_000


ALONE = "supervisor"
"""It has started all the others, which have groups of their own."""


class Processes:
    """Groups of processes, each by the ones that have started the others."""

    def __init__(self, roots: Mapping[str, list[int]]) -> None:
        self.roots = roots

    def cpu(self) -> dict[str, float]:
        """Seconds that each group has used until now, those of its processes that have ended too."""
        return {
            group: sum(_own_cpu(root) if group == ALONE else _cpu(root) for root in roots)
            for group, roots in self.roots.items()
        }

    def workers(self, group: str) -> dict[int, float]:
        """Seconds of each process of a group that has no children: of those that do the work."""
        families = [family(root) for root in self.roots.get(group, [])]
        # A family is its root and what it has started; without children the root itself does the work.
        return {process.pid: _own_cpu(process.pid) for them in families for process in them[1:] or them}

    def memory(self, *kinds: str) -> dict[str, float]:
        """Megabytes; what processes share counts once (PSS), or PostgreSQL's buffers would count for each backend.
        `kinds`: of these alone (proc_pid_smaps(5))."""
        return {
            group: sum(proportional(process, *kinds) for process in self._of(group, roots)) / MEGABYTE
            for group, roots in self.roots.items()
        }

    def pin(self, cores: list[int]) -> dict[psutil.Process, list[int]]:
        """Where each was allowed to run before."""
        before = {}
        for group, roots in self.roots.items():
            for process in self._of(group, roots):
                with contextlib.suppress(psutil.Error):
                    before[process] = process.cpu_affinity()
                    process.cpu_affinity(cores)
        return before

    def _of(self, group: str, roots: list[int]) -> list[psutil.Process]:
        families = [family(root) for root in roots]
        return [process for family in families for process in (family[:1] if group == ALONE else family)]


def family(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu(root: int) -> float:
    seconds = 0.0
    for process in family(root):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            # Of children that have ended: a connection to PostgreSQL is a process, and the classic makes one each time.
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _own_cpu(pid: int) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def proportional(process: psutil.Process, *kinds: str) -> int:
    """Bytes (PSS); 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]  # the first has no name
    except (OSError, ProcessLookupError):
        return 0
    sizes = {name: int(size) for name, size, _ in map(str.split, lines)}
    return sum(sizes[f"{kind}:"] for kind in kinds or ("Pss",)) * 1024
