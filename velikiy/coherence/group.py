"""Group commit, for drops: of the writers of a process who meet one goes to the caches for all.

A drop waits for Redis, for the list of edges and for the edges, and to wait costs the same for the paths of many as for
those of one. So one writer goes at a time, and takes along who waits; who comes too late for that goes with the next.
Who is alone goes at once. To each it is as if all had gone for themselves, step by step at the same moment: each has
its locks before it comes here, and commits after it was told.

DeWitt et al., Implementation Techniques for Main Memory Database Systems, 1984; PostgreSQL does it with its log.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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
        self.left_alone = False
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
        Its errors are for who called it alone: those whom it took along go each for itself, since the one may have run
        out of the time that the others still have."""
        me: _Writer[Told] = _Writer(drop)
        with self._lock:
            first, self._under_way = not self._under_way, True
            if not first:
                self._waiting.append(me)
        if not first:
            began = time.monotonic()
            me.turn.acquire()
            if me.left_alone:  # and the deadline stays, or a PostgreSQL that hangs would be waited for twice
                return go([drop])
            connection.wait_longer(time.monotonic() - began)
            if me.told is not None:
                return me.told
        return self._go(me, go)

    def _go(self, me: _Writer[Told], go: Callable[[Sequence[Drop]], Told]) -> Told:
        taken: list[_Writer[Told]] = []
        try:
            self._let_others_come()
            taken += self._take(MOST - me.drop.size)
            me.told = go([me.drop, *(writer.drop for writer in taken)])
            return me.told
        finally:
            with self._lock:
                following = self._waiting.popleft() if self._waiting else None
                self._under_way = following is not None
            if following:
                following.turn.release()
            for writer in taken:
                writer.told, writer.left_alone = me.told, me.told is None
                writer.turn.release()

    def _let_others_come(self) -> None:
        """Those who are ready to, and wait for nothing but this interpreter and this CPU. Where nobody is it costs one
        system call; under load twice as many go together."""
        seen = -1
        while len(self._waiting) > seen:
            seen = len(self._waiting)
            os.sched_yield()

    def _take(self, most: int) -> list[_Writer[Told]]:
        taken = []
        with self._lock:
            while self._waiting and self._waiting[0].drop.size <= most:
                taken.append(self._waiting.popleft())
                most -= taken[-1].drop.size
        return taken
