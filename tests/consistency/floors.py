"""What is known of a user at one moment of a replay: which versions there can be, and from which one on they count."""

from bisect import bisect_right
from collections import deque
from typing import NamedTuple

from tests.consistency.history import FOREVER, Operation

ABSENT = 0
GONE = 1 << 62
"""Deletion is the last state: ids are never given twice."""

KEPT_WRITES = 1000
"""Of one user, at least. A read of an older one is below the floor by its number alone, so that its name is of no
interest."""


class Shown(NamedTuple):
    """A floor's height at one moment, and the operation that raised it to there."""

    version: int
    because: Operation | None


class Floor:
    """The lowest version that may still be current, as far as one kind of evidence says.

    Of an acknowledged write only this much is known, as long as nobody has read it: it took some number, above what
    had been reached when it was invoked, and none that is known to be another's. So the floor goes up by one free
    number for each write that lies as a whole in a stretch of time, counted from the floor at the stretch's begin.
    Which stretch counts most changes with every return; only those that end at the invocation of a write still under
    way can matter, so `_under_way` is all that has to be remembered.
    """

    __slots__ = ("_under_way", "at", "now")

    def __init__(self) -> None:
        self.now = Shown(ABSENT, None)
        self.at = 0
        """When it was raised last."""
        self._under_way: list[tuple[str, int]] = []

    def rise(self, version: int, because: Operation, at: int) -> bool:
        if version <= self.now.version:
            return False
        self.now, self.at = Shown(version, because), at
        return True

    def invoked(self, name: str) -> None:
        self._under_way.append((name, self.now.version))

    def returned(self, name: str, taken: set[int], known: bool) -> int:
        """How high the writes that have returned by now reach."""
        place = next(n for n, (other, _) in enumerate(self._under_way) if other == name)
        reached = ABSENT
        for n in range(place + 1):
            other, height = self._under_way[n]
            if not known:
                height = _next_free(height, taken)
                self._under_way[n] = (other, height)
            reached = max(reached, height)
        if place + 1 < len(self._under_way):
            other, height = self._under_way[place + 1]
            self._under_way[place + 1] = (other, max(height, self._under_way[place][1]))
        del self._under_way[place]
        return reached


def _next_free(version: int, taken: set[int]) -> int:
    version += 1
    while version in taken:
        version += 1
    return version


class User:
    def __init__(self, number: int, *, across: bool) -> None:
        self.number = number
        self.writes: dict[str, Operation] = {}
        self.over: deque[Operation] = deque()
        """Updates that have returned, in that order."""
        self.version_of: dict[str, int] = {}
        self.name_of: dict[int, str] = {}
        self.taken: set[int] = set()
        """Numbers that no write can have taken whose own is not known: all in `name_of`, but for those of writes that
        had been counted before somebody read them. They would count twice."""
        self.counted: set[str] = set()
        """Writes that returned before anybody had read them, or at least told us."""
        self.before: dict[str, int] = {}
        """For each write: the version that had been reached when it was invoked. Its own is higher."""
        self.possible = 1
        """The highest version that there can be: one for the creation, and one for each update invoked."""
        self.deletion: int | None = None
        """When one was first invoked that may have happened."""
        self.deletions: list[Operation] = []
        self.unsettled_until = 0
        self.acknowledged = Floor()
        self.read = Floor()
        self.listed = self.read if across else Floor()
        self.floors = (self.acknowledged, self.read) if across else (self.acknowledged, self.read, self.listed)
        self.rise_times: list[int] = []
        self.rise_versions: list[int] = []
        """Of `listed`: until when a version may have been current."""
        self.forgot = False

    def may_be_gone(self, at: int) -> bool:
        return self.deletion is not None and self.deletion <= at

    def ended(self, version: int) -> int:
        """The last moment at which it may have been current."""
        place = bisect_right(self.rise_versions, version)
        return self.rise_times[place] if place < len(self.rise_times) else FOREVER

    def forget(self, before: int) -> None:
        """What returned before then; but the last writes, and unknown ones that may still come, are kept."""
        while len(self.over) > KEPT_WRITES and self.over[0].returned < before:
            name = self.over.popleft().name
            self.forgot = True
            self.writes.pop(name, None)
            self.before.pop(name, None)
            self.counted.discard(name)
            version = self.version_of.pop(name, None)
            if version is not None and self.name_of.get(version) == name:
                del self.name_of[version]
                self.taken.discard(version)
        if len(self.rise_times) > 2 * KEPT_WRITES and self.rise_times[KEPT_WRITES] < before:
            del self.rise_times[:KEPT_WRITES], self.rise_versions[:KEPT_WRITES]

    def bury(self) -> None:
        """Nothing but that it is gone: whatever is read of it is below the floor."""
        self.forgot = True
        for names in (self.writes, self.over, self.version_of, self.name_of, self.before, self.taken, self.counted):
            names.clear()
        self.rise_times, self.rise_versions, self.deletions = [self.acknowledged.at], [GONE], []
