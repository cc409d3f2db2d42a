"""What keeps tests apart that two processes run at the same time."""

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


def loopback_of_our_own() -> None:
    """For this process and those that it starts, where we are root: a network namespace. Ports that are free here stay
    free until we take them, whatever other tests start, stop and kill at the same time."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNET) != 0:
        return
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP_AND_RUNNING))


DOOR, ROOM = Path(__file__), Path(__file__).with_name("stack.py")
"""Any two files will do, and these need not be cleaned up."""


@contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Other processes run tests meanwhile, unless this one is to be `alone`: it waits for theirs to end, and they for
    it. Through a door: with one lock those that share it would follow each other, and never let it in."""
    with DOOR.open() as door, ROOM.open() as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # processes that were forked meanwhile would keep it open
