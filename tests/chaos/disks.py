"""Faults of the disk: full, stalled, slow, failing, not writable.

The data folder of this kind of service is a small disk of its own: a file with a file system, which only root may
mount. strace delays the system calls of one server, or lets them fail.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from testkit.stack import folder, running
from tests.chaos.fault import MISSES_FAIL, POSTGRES_CRASHES, Fault, Inject, Limits
from tests.chaos.postgres import administrator
from tests.chaos.service import Kind, Missing, Service, need_programs
from velikiy.findings.machine import LOW_BYTES

DISK_BYTES = 2 * LOW_BYTES
"""Enough that no finding warns of a disk that is nearly full. The file is sparse."""


@contextmanager
def small_disk() -> Iterator[Service]:
    if os.geteuid() != 0:
        raise Missing("only root may mount a disk and delay system calls")
    need_programs("strace", "mkfs.ext4", "mount", "umount", "fsfreeze")
    with folder() as home:
        image, disk = home / "image", home / "disk"
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        try:
            _run("mount", "-o", "loop,noatime", str(image), str(disk))
        except subprocess.CalledProcessError:
            raise Missing("this machine has no loop devices") from None
        try:
            with running("--edges", "2", "--apps", "2", data=disk / "data") as stack:
                yield Service(stack, stack.edges, more={"disk": disk})
        finally:
            _run("umount", str(disk))


SMALL_DISK = Kind("small disk", small_disk)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def full(service: Service, random: random.Random) -> Iterator[None]:
    """Leave no room on the disk of all servers."""
    filler = service.more["disk"] / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filler.parent).free - 2**20)
            file.seek(0, os.SEEK_END)
            while True:
                file.write(bytes(4096))
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextmanager
def full_at_a_new_segment(service: Service, random: random.Random) -> Iterator[None]:
    """On a full disk, PostgreSQL needs a further file for its log: it crashes, and cannot start again."""
    with full(service, random):
        _switch_segments(service)
        yield


@contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    mode = folder.stat().st_mode
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(mode)


@contextmanager
def log_not_writable(service: Service, random: random.Random) -> Iterator[None]:
    with not_writable(service.plan.cluster / "pg_wal"):
        _switch_segments(service)
        yield


def _switch_segments(service: Service) -> None:
    """Begin another file of the log, more often than PostgreSQL has such files in reserve."""
    with suppress(psycopg.Error), administrator(service) as connection:
        for _ in range(20):
            connection.execute("SELECT pg_switch_wal(), pg_logical_emit_message(true, 'chaos', '')")


@contextmanager
def frozen(service: Service, random: random.Random) -> Iterator[None]:
    """Let every write to the disk wait."""
    disk: Path = service.more["disk"]
    _run("fsfreeze", "--freeze", str(disk))
    try:
        yield
    finally:
        _run("fsfreeze", "--unfreeze", str(disk))


def system_calls(names: str, effect: str) -> Inject:
    """Return a fault in which these system calls of PostgreSQL have this effect."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        pids = service.pids("postgres")
        tracees = [argument for pid in pids for argument in ("-p", str(pid))]
        tracer = subprocess.Popen(
            [
                "strace",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                f"trace={names}",
                "-e",
                f"inject={names}:{effect}",
                *tracees,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            service.until(lambda: _is_traced(pids[0]), within=5, what="strace has attached")
            yield
        finally:
            tracer.terminate()
            tracer.wait(20)

    return inject


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()


FAULTS = [
    Fault(
        "disk-full",
        "The disk of all servers is full.",
        full,
        named=("disk.full",),
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-full-at-a-new-segment",
        "The disk is full when PostgreSQL needs a further file for its log.",
        full_at_a_new_segment,
        named=("disk.full",),
        limits=MISSES_FAIL,
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-log-not-writable",
        "The folder of PostgreSQL's log can no longer be written.",
        log_not_writable,
        named=("postgres.refuses", "postgres.silent"),
        limits=MISSES_FAIL,
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-stalled",
        "Every write to the disk of all servers waits.",
        frozen,
        named=("postgres.commits_wait",),
        limits=MISSES_FAIL,
        pairs=False,  # the run itself would wait if another fault wrote to the disk
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-flush-stalled",
        "The flush of PostgreSQL's log (fdatasync) hangs.",
        system_calls("fdatasync", "delay_enter=60s"),
        named=("postgres.commits_wait",),
        limits=MISSES_FAIL,
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-flush-slow",
        "Each flush of PostgreSQL's log (fdatasync) takes 0.1 s longer.",
        system_calls("fdatasync", "delay_enter=100ms"),
        unnamed="each write takes a little longer, and is answered",
        limits=Limits(writes=0.9),
        kind=SMALL_DISK,
    ),
    Fault(
        "disk-flush-fails",
        "Each flush of PostgreSQL's log (fdatasync) fails with EIO, so PostgreSQL crashes.",
        system_calls("fdatasync", "error=EIO"),
        named=("postgres.sessions_end", "postgres.silent", "postgres.refuses"),
        limits=POSTGRES_CRASHES,
        kind=SMALL_DISK,
    ),
]
