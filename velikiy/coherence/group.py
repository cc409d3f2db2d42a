"""Group commit, for drops: of the writers of a process who meet one goes to the caches for all.

A drop waits for Redis, for the list of edges and for the edges, and to wait costs the same for the paths of many as for
those of one. So one writer goes at a time, and takes along who waits; who comes too late for that goes with the next.
Who meets nobody goes at once. Each has its locks before it comes here, and commits after it was told: as if all had
gone themselves, step by step at the same moments.

DeWitt et al., Implementation Techniques for Main Memory Database Systems, 1984; PostgreSQL does it with its log.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from velikiy.coherence.entry import Path
from velikiy.postgres import Connection

Told = TypeVar("Told")

MOST = 1000
"""Paths that one goes with, where they are not all its own: of too many an edge drops everything (edge_tier.MANY)."""


class Drop(NamedTuple):
    paths: Sequence[Path] | None
    """None is everything."""

    own: Path | None = None
    """The one of these paths that the writer wants the lease for."""

    @property
    def size(self) -> int:
        return len(self.paths or ())


class _Writer(Generic[Told]):
    def __init__(self, drop: Drop) -> None:
        self.drop = drop
        self.told: Told | None = None
        self.turn = threading.Lock()
        """Held until it is told, or has to go itself. The cheapest that one thread can wait for another with."""
        self.turn.acquire()


class Group(Generic[Told]):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = False
        self._waiting: deque[_Writer[Told]] = deque()

    def join(self, connection: Connection, drop: Drop, go: Callable[[Sequence[Drop]], Told]) -> Told:
        """What `go` says of these drops: called by us for all who wait, or by somebody else who has taken ours along.
        Its errors are for who called it alone; those whom it took along go again, each for itself."""
        me: _Writer[Told] = _Writer(drop)
        with self._lock:
            meets, self._under_way = self._under_way, True
            if meets:
                self._waiting.append(me)
        if meets:
            self._wait(me, connection)
        return me.told if me.told is not None else self._go(me, go, meets)

    def _wait(self, me: _Writer[Told], connection: Connection) -> None:
        """Until it is told, or has to go itself: as the next, as one whose leader failed, or since it takes too long.

        That is half of the time that it has for PostgreSQL: a leader whose own connection hangs may take all of its
        time, and the other half is for going. Who is told gets that time back: Redis and edges have theirs.
        """
        assert connection.deadline is not None  # a request has it
        began = time.monotonic()
        if not me.turn.acquire(timeout=max(0.0, connection.deadline - began) / 2):
            with self._lock, suppress(ValueError):  # somebody has taken it along, and tells it in vain
                self._waiting.remove(me)
        if me.told is not None:
            connection.wait_longer(time.monotonic() - began)

    def _let_others_come(self) -> None:
        """Those who are ready to, and wait for nothing but this interpreter and this CPU: under load twice as many go
        together. Not for who meets nobody: a CPU that others want as well comes back after milliseconds."""
        seen = -1
        while len(self._waiting) > seen:
            seen = len(self._waiting)
            os.sched_yield()

    def _go(self, me: _Writer[Told], go: Callable[[Sequence[Drop]], Told], meets: bool) -> Told:
        taken: list[_Writer[Told]] = []
        try:
            if meets:
                self._let_others_come()
            taken += self._take(MOST - me.drop.size)
            me.told = go([me.drop, *(writer.drop for writer in taken)])
            return me.told
        finally:
            for writer in taken:
                writer.told = me.told
                writer.turn.release()
            with self._lock:
                self._under_way = bool(self._waiting)
                if self._waiting:
                    self._waiting.popleft().turn.release()

    def _take(self, most: int) -> list[_Writer[Told]]:
        taken = []
        with self._lock:
            while self._waiting and self._waiting[0].drop.size <= most:
                taken.append(self._waiting.popleft())
                most -= taken[-1].drop.size
        return taken
