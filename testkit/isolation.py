"""Isolate tests that two processes run at the same time."""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP_AND_RUNNING = 0x41


def enter_network_namespace() -> None:
    """Move this process and its children into a network namespace with a loopback of its own, if root runs it.

    A port that is free there stays free until this process takes it, whatever servers other tests start, stop and kill
    at the same time.
    """
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNET) != 0:
        return
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP_AND_RUNNING))


ENTRANCE_LOCK, RUN_LOCK = Path(__file__), Path(__file__).with_name("stack.py")
"""Two files to lock. Any two files will do, and these need no cleanup."""


@contextmanager
def slot_for_test(*, exclusive: bool) -> Iterator[None]:
    """Wait until this process may run a test.

    Tests of several processes run at the same time, but an exclusive test runs when no other test does. Each process
    waits for RUN_LOCK while it holds ENTRANCE_LOCK: with RUN_LOCK only, processes that share it could follow each other
    for ever and never let the exclusive test in.
    """
    with ENTRANCE_LOCK.open() as entrance, RUN_LOCK.open() as slot:
        fcntl.flock(entrance, fcntl.LOCK_EX)
        fcntl.flock(slot, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        fcntl.flock(entrance, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(slot, fcntl.LOCK_UN)  # a process that was forked meanwhile would keep the lock
