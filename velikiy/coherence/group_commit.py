"""Group commit, for drops: of the writers of a process who meet one goes to the caches for all.

A drop waits for Redis, for the list of edges and for the edges, and to wait costs the same for the paths of many as for
those of one. So one writer goes at a time, and takes along who waits; who comes too late for that goes with the next.
Who meets nobody goes at once. A writer has its locks before it comes here, and commits after it was told: as if all
had gone themselves, step by step at the same moments.

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
"""Paths that one goes with, where they are not all its own: where the list is too long, an edge drops everything
(edge_tier.MANY, in bytes)."""


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
        self._had_company = False
        self._waiting: deque[_Writer[Told]] = deque()

    def join(self, connection: Connection, drop: Drop, go: Callable[[Sequence[Drop]], Told]) -> Told:
        """What `go` says of these drops: called by us for all who wait, or by somebody else who has taken ours along.
        Its errors are raised to the one who called it, and to nobody else: those whom it took along go themselves."""
        assert connection.deadline is not None  # a request has it
        me: _Writer[Told] = _Writer(drop)
        with self._lock:
            meets, self._under_way = self._under_way, True
            if meets:
                self._waiting.append(me)
        if meets:
            began = time.monotonic()
            self._wait(me, max(0.0, connection.deadline - began) / 2)
            if me.told is not None:
                connection.wait_longer(time.monotonic() - began)  # Redis and edges have a time of their own
                return me.told
        return self._go(drop, go, meets)

    def _wait(self, me: _Writer[Told], seconds: float) -> None:
        """Until it is told, or has to go itself: as the next, as one whose leader failed, or since it has waited for so
        long: a leader whose own connection to PostgreSQL hangs takes all of its time, and may have more of it."""
        if not me.turn.acquire(timeout=seconds):
            with self._lock, suppress(ValueError):  # taken along, to be told in vain; or just made the next, as it is
                self._waiting.remove(me)

    def _let_others_come(self) -> None:
        """Those who are ready to, and lack nothing but this interpreter or this CPU: then more go together. Who meets
        nobody, and the one before it neither, does not yield: on a busy CPU its turn may come back milliseconds
        later. Who meets nobody right after a round with company does, at that price: those of that round come back
        together, and would otherwise all wait for it."""
        seen = -1
        while len(self._waiting) > seen:
            seen = len(self._waiting)
            os.sched_yield()

    def _go(self, drop: Drop, go: Callable[[Sequence[Drop]], Told], meets: bool) -> Told:
        taken: list[_Writer[Told]] = []
        # Not in what we have waited with: there whoever has taken us along in vain may still say what he was told, and
        # those whom we take along were not with him.
        told: Told | None = None
        try:
            if meets or self._had_company:
                self._let_others_come()
            taken += self._take(MOST - drop.size)
            told = go([drop, *(writer.drop for writer in taken)])
            return told
        finally:
            for writer in taken:
                writer.told = told
                writer.turn.release()
            with self._lock:
                self._under_way = bool(self._waiting)
                self._had_company = bool(taken)
                if self._waiting:
                    self._waiting.popleft().turn.release()

    def _take(self, most: int) -> list[_Writer[Told]]:
        taken = []
        with self._lock:
            while self._waiting and self._waiting[0].drop.size <= most:
                taken.append(self._waiting.popleft())
                most -= taken[-1].drop.size
        return taken
