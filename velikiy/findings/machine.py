"""Findings about this machine: disk, memory, and the limits of a process."""

import os
import resource
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from velikiy.findings import Finding

FULL_BYTES, LOW_BYTES = 100_000_000, 1_000_000_000
"""Free space of the disk with which a stack does not start, and with which a person should look at it."""

ENOUGH_OPEN_FILES = 16384
"""The larger of the limits that an edge (edge/nginx.conf) and an app (velikiy/server/gunicorn.conf.py) set for
themselves."""

LOW_MEMORY_SHARE = 0.05

CLOCK_DIFFERENCE_S = 2.0
"""A request may be on its way for a second or two on a busy machine."""


def free_bytes(folder: Path) -> int:
    """Raises: OSError"""
    existing = next(it for it in (folder, *folder.parents) if it.exists())
    return shutil.disk_usage(existing).free


def disk(folder: Path) -> list[Finding]:
    try:
        free = free_bytes(folder)
    except OSError:
        return []
    if free >= LOW_BYTES:
        return []
    return [
        Finding(
            "disk.full" if free < FULL_BYTES else "disk.low",
            f"The disk of {folder} has {free // 1_000_000} MB left. When it is full, writes are answered 503.",
            f"Free some space: du -xh {folder} | sort -h | tail",
            wrong=free < FULL_BYTES,
        )
    ]


def disks(folders: Iterable[Path]) -> list[Finding]:
    """Look at the disk of each folder that exists, and at each disk once."""
    found: dict[int, list[Finding]] = {}
    for folder in folders:
        with suppress(OSError):
            device = folder.stat().st_dev
            if device not in found:
                found[device] = disk(folder.resolve())
    return [finding for findings in found.values() for finding in findings]


def memory_bytes() -> tuple[int, int]:
    """Return the memory of this machine, and what programs can still have of it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    return values["MemTotal"], values.get("MemAvailable", values["MemFree"])


def memory() -> list[Finding]:
    total, available = memory_bytes()
    if available >= LOW_MEMORY_SHARE * total:
        return []
    return [
        Finding(
            "memory.low",
            f"This machine has {available // 1_000_000} MB of memory left. Without any, the kernel ends processes.",
            "Lower EDGE_MEMORY, APPS or APP_WORKERS, or add memory.",
            wrong=False,
        )
    ]


def clock_differs(whose: str, other: str, seconds: float, *, delay: float = 0.0) -> list[Finding]:
    """Return whether two clocks differ. `delay`: the seconds between the moments at which they were read, at most."""
    if abs(seconds) <= CLOCK_DIFFERENCE_S + delay:
        return []
    direction = "ahead of" if seconds > 0 else "behind"
    return [
        Finding(
            "clock.differs",
            f"The clock of {whose} is {abs(seconds):.0f} s {direction} that of {other}. No read is wrong for it, but"
            " times in logs and rows do not fit each other.",
            "Synchronize both clocks: timedatectl set-ntp true.",
            wrong=False,
        )
    ]


def limits() -> list[Finding]:
    """Return the limits of this account that are too low for a service."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = []
    if files != resource.RLIM_INFINITY and files < ENOUGH_OPEN_FILES:
        found.append(few_open_files(files))
    _, processes = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and processes != resource.RLIM_INFINITY and processes < 1024:
        found.append(
            Finding(
                "limits.processes",
                f"This account may start {processes} processes and threads (ulimit -u).",
                "Raise it: nproc in /etc/security/limits.conf.",
                wrong=False,
            )
        )
    return found


def few_open_files(limit: int) -> Finding:
    return Finding(
        "limits.open_files",
        f"The limit of open files is {limit} (ulimit -n), so the service takes fewer connections.",
        f"Raise it: ulimit -Hn {ENOUGH_OPEN_FILES} as root, or nofile in /etc/security/limits.conf.",
        wrong=False,
    )


def memory_of(pid: int) -> int:
    """Return the memory of a process and its descendants, in bytes. Memory that several share counts in part (PSS)."""
    total = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, StopIteration):  # the process has ended
        return total
    return total + sum(memory_of(int(child)) for child in children)
