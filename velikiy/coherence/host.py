"""Which machine is this? Names that are the same for all processes that share its network, its files or its clock."""

import hashlib
import os
import time
from pathlib import Path


def name_in_this_boot(namespace: str) -> str:
    """Name this boot and this process's namespace of that kind (`net`, `time`), as edge/start does."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        inode = str(Path(f"/proc/self/ns/{namespace}").readlink())
    except OSError:  # a kernel without namespaces of this kind
        inode = ""
    return hashlib.sha256(f"{boot} {inode}".encode()).hexdigest()[:16]


HOST = name_in_this_boot("net")

PROCESSES = name_in_this_boot("pid")
"""A process id names the same process for all processes with this name."""


def start_of_process(pid: int) -> str:
    """Return the moment at which the process started, or "" if it has ended or this account may not look."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # a zombie has closed its files


def started_at(pid: int) -> float:
    """Return the moment at which the process started, in seconds of Unix time; 0 if it has ended."""
    ticks = start_of_process(pid)
    if not ticks:
        return 0.0
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return round(time.time() - age, 1)


def process_has_ended(pid: int, start: str) -> bool:
    """Return whether the process with this id that started at that moment has surely ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, or its id is another user's by now
        return False
    return start_of_process(pid) != start
