"""The knowledge about a user at one moment of a replay: the possible versions, and the lowest that may be current."""

from bisect import bisect_right
from collections import deque
from typing import NamedTuple

from tests.consistency.history import FOREVER, Operation

ABSENT = 0
GONE = 1 << 62
"""Deletion is the last state: no id is assigned twice."""

KEPT_WRITES = 1000
"""The least number of writes that are kept for one user. A read of an older write is below the floor by its number alone,
so its name does not matter."""


class Shown(NamedTuple):
    """The height of a floor at one moment, and the operation that raised the floor to it."""

    version: int
    because: Operation | None


class Floor:
    """The lowest version that may still be current, according to one kind of evidence.

    As long as no read has shown an acknowledged write, its version is known only within limits: it is above the version
    that had been reached when the write was invoked, and it differs from every version that is known to belong to
    another write. So the floor rises by one free version for each write that lies completely within a span of time,
    counted from the floor at the beginning of the span. The span that counts most changes with every return. Only spans
    that end at the invocation of a write still under way can matter, so the floor stores `_under_way` and nothing else.
    """

    __slots__ = ("_under_way", "at", "now")

    def __init__(self) -> None:
        self.now = Shown(ABSENT, None)
        self.at = 0
        """The time of the last rise."""
        self._under_way: list[tuple[str, int]] = []

    def rise(self, version: int, because: Operation, at: int) -> bool:
        if version <= self.now.version:
            return False
        self.now, self.at = Shown(version, because), at
        return True

    def invoked(self, name: str) -> None:
        self._under_way.append((name, self.now.version))

    def returned(self, name: str, taken: set[int], known: bool) -> int:
        """Return the version that the writes which have returned by now must have reached."""
        index = next(n for n, (other, _) in enumerate(self._under_way) if other == name)
        reached = ABSENT
        for n in range(index + 1):
            other, height = self._under_way[n]
            if not known:
                height = _next_free(height, taken)
                self._under_way[n] = (other, height)
            reached = max(reached, height)
        if index + 1 < len(self._under_way):
            other, height = self._under_way[index + 1]
            self._under_way[index + 1] = (other, max(height, self._under_way[index][1]))
        del self._under_way[index]
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
        """Updates that have returned, in the order of their returns."""
        self.version_of: dict[str, int] = {}
        self.name_of: dict[int, str] = {}
        self.taken: set[int] = set()
        """Versions that are unavailable to writes with an unknown version: all in `name_of`, except those of writes that
        had been counted before a read showed them. These would count twice."""
        self.counted: set[str] = set()
        """Writes that returned before a read of them was reported."""
        self.before: dict[str, int] = {}
        """For each write, the version that had been reached when it was invoked. Its own version is higher."""
        self.possible = 1
        """The highest possible version: one for the creation, and one for each update that was invoked."""
        self.deletion: int | None = None
        """The time at which the first deletion that may have happened was invoked."""
        self.deletions: list[Operation] = []
        self.unsettled_until = 0
        self.acknowledged = Floor()
        self.read = Floor()
        self.listed = self.read if across else Floor()
        self.floors = (self.acknowledged, self.read) if across else (self.acknowledged, self.read, self.listed)
        self.rise_times: list[int] = []
        self.rise_versions: list[int] = []
        """The rises of `listed`: each ends the time in which lower versions may have been current."""
        self.forgot = False

    def may_be_gone(self, at: int) -> bool:
        return self.deletion is not None and self.deletion <= at

    def ended(self, version: int) -> int:
        """Return the last moment at which the version may have been current."""
        index = bisect_right(self.rise_versions, version)
        return self.rise_times[index] if index < len(self.rise_times) else FOREVER

    def forget(self, before: int) -> None:
        """Forget writes that returned before this time, except the last ones, and unknown ones that may still happen."""
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
        """Forget everything except the deletion: whatever a later read shows is below the floor."""
        self.forgot = True
        for names in (self.writes, self.over, self.version_of, self.name_of, self.before, self.taken, self.counted):
            names.clear()
        self.rise_times, self.rise_versions, self.deletions = [self.acknowledged.at], [GONE], []
