"""Shares of the threads of a process: no class of requests can take all of them, nor all connections to PostgreSQL."""

import math
import re
import threading
import time
from collections import deque
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

    def enter(self, connection: Any) -> Admission:
        """Admit the connection, queue it until `leave` returns it, or refuse it."""
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
