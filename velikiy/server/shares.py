"""Shares of the threads of a process: no class of requests, and no locked row, can take all of them, nor all
connections to PostgreSQL."""

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

COSTLY = re.compile(
    rb"(GET|HEAD) [^ ?]*\?[^ ]*(q|%71)=|POST /[^ /?]*/batch[ ?]|POST /console/import[/ ?]|GET /console/tiers[ ?]"
)
"""The beginnings of searches, counts with a search, batches, pieces of an import, and looks at every tier."""


def costly_threads(threads: int) -> int:
    """Return the share of the costly requests."""
    return max(1, threads // 4)


class Admission(Enum):
    """The way of a connection whose request belongs to a share."""

    ADMITTED = auto()
    QUEUED = auto()
    REFUSED = auto()


class Share:
    """Admits a limited number of connections. The others queue without a thread, in the order in which they came."""

    def __init__(self, size: int, max_queued: float = math.inf, max_wait_s: float = math.inf) -> None:
        """
        Args:
            size: Connections that are admitted at the same time.
            max_queued: Connections that may queue. Further connections are refused.
            max_wait_s: A connection that has queued for longer is refused when its turn comes.
        """
        self._free = size
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._queued: deque[tuple[Any, float]] = deque()
        self._lock = threading.Lock()

    @property
    def queued(self) -> int:
        return len(self._queued)

    def enter(self, connection: Any, beginning: bytes = b"") -> Admission:
        """Admit the connection, queue it until `leave` returns it, or refuse it. The requests of this share are alike,
        however they begin."""
        with self._lock:
            if self._free:
                self._free -= 1
                return Admission.ADMITTED
            if len(self._queued) >= self._max_queued:
                return Admission.REFUSED
            self._queued.append((connection, time.monotonic()))
            return Admission.QUEUED

    def leave(self) -> tuple[Any | None, Admission]:
        """Return the next connection, and whether it is admitted instead or refused. Return no connection if none
        queues."""
        with self._lock:
            if not self._queued:
                self._free += 1
                return None, Admission.ADMITTED
            connection, since = self._queued.popleft()
            is_late = time.monotonic() - since > self._max_wait_s
            return connection, Admission.REFUSED if is_late else Admission.ADMITTED


LINE = re.compile(rb"(\S+) (\S+) ")


class WriteShare:
    """Admits a limited number of writes, and fewer of one path. The others queue without a thread, in the order in
    which they came.

    A write may wait for a row that another session has locked. While one does, further writes of that row are refused,
    and if all that are admitted wait, every write is: else all threads, and the queue, would wait for that session.
    Afterwards one write at a time tries the row, until one gets through.
    """

    def __init__(self, size: int, is_long: Callable[[int], bool], was_long: Callable[[], bool]) -> None:
        """
        Args:
            size: Writes that are admitted at the same time.
            is_long: Returns whether a thread has waited for a statement for long (velikiy/statement_waits.py).
            was_long: Returns whether this thread has.
        """
        self._size = size
        self._size_of_path = max(1, size - 1)
        self._is_long, self._was_long = is_long, was_long
        self._admitted: dict[int, bytes] = {}
        """The path of each write that is admitted, by the number of its thread."""
        self._queued: deque[tuple[Any, bytes]] = deque()
        self._locked: set[bytes] = set()
        """The paths whose last write has waited for long."""
        self._lock = threading.Lock()

    @property
    def queued(self) -> int:
        return len(self._queued)

    def enter(self, connection: Any, beginning: bytes) -> Admission:
        """Admit the connection to this thread, or queue it until `leave` or `refused` returns it."""
        path = _path_of(beginning)
        with self._lock:
            if len(self._admitted) < self._size and self._has_room(path):
                self._was_long()  # forget the waits of earlier requests
                self._admitted[threading.get_ident()] = path
                return Admission.ADMITTED
            self._queued.append((connection, path))
            return Admission.QUEUED

    def leave(self) -> tuple[Any | None, Admission]:
        """Note that the write of this thread has ended. Return the next connection, which is admitted to this thread,
        and None if none may be."""
        waited = self._was_long()
        with self._lock:
            path = self._admitted.pop(threading.get_ident())
            if not waited:
                self._locked.discard(path)
            elif not path.startswith(b"POST "):
                if len(self._locked) >= MAX_LOCKED_PATHS:
                    self._locked.clear()
                self._locked.add(path)
            for number, (connection, queued_path) in enumerate(self._queued):
                if self._has_room(queued_path):
                    del self._queued[number]
                    self._admitted[threading.get_ident()] = queued_path
                    return connection, Admission.ADMITTED
        return None, Admission.ADMITTED

    def refused(self) -> list[Any]:
        """Remove the connections that would wait for a locked row from the queue, and return them. Not in `enter`:
        clients that try again at once would be refused some thousand times each second, and take the CPU from other
        requests."""
        with self._lock:
            refusals = {path: self._must_refuse(path) for path in {path for _, path in self._queued}}
            refused = [connection for connection, path in self._queued if refusals[path]]
            if refused:
                self._queued = deque(it for it in self._queued if not refusals[it[1]])
        return refused

    def _has_room(self, path: bytes) -> bool:
        return self._count(path) < (1 if path in self._locked else self._size_of_path)

    def _count(self, path: bytes) -> int:
        return sum(it == path for it in self._admitted.values())

    def _must_refuse(self, path: bytes) -> bool:
        waiting = [it for thread, it in self._admitted.items() if self._is_long(thread)]
        if len(waiting) == self._size:
            return True
        if path.startswith(b"POST "):  # new rows, which wait for each other only if they have a unique value in common
            return waiting.count(path) >= self._size_of_path
        return path in waiting or (path in self._locked and self._count(path) > 0)


MAX_LOCKED_PATHS = 1000
"""Paths that a process remembers."""


def _path_of(beginning: bytes) -> bytes:
    """Return the path that a request writes. All new rows of a resource have one path."""
    line = LINE.match(beginning)
    if not line:
        return b""
    method, path = line.groups()
    return b"POST " + path if method == b"POST" else bytes(path)
