"""Writers who meet (velikiy/coherence/group_commit.py): who goes for whom, and what becomes of those whose leader fails."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from testkit.stack import Stack, wait_until
from velikiy.coherence import CachePath
from velikiy.coherence.group_commit import MAX_GROUP_PATHS, Drop, GroupCommit
from velikiy.postgres import Database

Told = tuple[Drop, ...]


class Lost(Exception):
    pass


class Meeting:
    """Each who joins is told what was dropped with its own. The first is held up, and the others come meanwhile."""

    def __init__(self, database: Database, threads: ThreadPoolExecutor) -> None:
        self.database, self.threads = database, threads
        self.group = GroupCommit[Told]()
        self.went: list[Told] = []
        self.released = threading.Event()
        self.failing = False
        self.deadlines: dict[str, float] = {}
        """By how many seconds each one's has moved."""

    def go(self, drops: Sequence[Drop]) -> Told:
        self.went.append(tuple(drops))
        if len(self.went) == 1:
            assert self.released.wait(10)
        elif self.failing and len(drops) > 1:
            raise Lost
        return tuple(drops)

    def join(self, drop: Drop, name: str = "") -> Told:
        with self.database.autocommit() as connection:
            before = connection.deadline
            try:
                return self.group.submit(connection, drop, self.go)
            finally:
                assert before is not None
                assert connection.deadline is not None
                self.deadlines[name] = connection.deadline - before

    def waiting(self, count: int) -> bool:
        return len(self.group._waiting) == count

    def after_the_first(self, *drops: Drop) -> list[Future[Told]]:
        """What comes of these, who come while the first is under way, in this order."""
        first = self.threads.submit(self.join, one("first"), "first")
        wait_until(lambda: self.went)
        others = []
        for number, drop in enumerate(drops, start=1):
            others.append(self.threads.submit(self.join, drop, f"{number}"))
            wait_until(partial(self.waiting, number))
        self.released.set()
        assert first.result(10) == self.went[0] == (one("first"),)
        return others


def one(name: str) -> Drop:
    return Drop([CachePath(f"/{name}", name)])


def many(name: str, count: int) -> Drop:
    return Drop([CachePath(f"/{name}/{number}", f"{name}:{number}") for number in range(count)])


@contextmanager
def meeting_of(stack: Stack, timeout: float, kind: type[Meeting] = Meeting) -> Iterator[Meeting]:
    """`timeout`: the seconds that each has for PostgreSQL."""
    database = Database(stack.postgres, size=8, timeout=timeout)
    database.open()
    with ThreadPoolExecutor() as threads:
        meeting = kind(database, threads)
        try:
            yield meeting
        finally:
            meeting.released.set()
    database.close()


@pytest.fixture
def meeting(stack: Stack) -> Iterator[Meeting]:
    with meeting_of(stack, 20) as meeting:
        yield meeting


def test_who_is_alone_goes_at_once_and_for_itself(meeting: Meeting) -> None:
    meeting.released.set()
    assert [meeting.join(one(name)) for name in "abc"] == meeting.went == [(one("a"),), (one("b"),), (one("c"),)]


def test_who_comes_while_one_is_under_way_is_not_told_of_that_but_of_the_next(meeting: Meeting) -> None:
    come = [one("a"), one("b"), Drop(None)]
    told = meeting.after_the_first(*come)
    assert [one.result(10) for one in told] == [tuple(come)] * 3
    assert len(meeting.went) == 2


def test_where_one_fails_it_alone_is_told_and_the_others_go_each_for_itself(meeting: Meeting) -> None:
    meeting.failing = True
    leader, *others = meeting.after_the_first(one("a"), one("b"), one("c"))
    assert isinstance(leader.exception(10), Lost)
    assert [other.result(10) for other in others] == [(one("b"),), (one("c"),)]
    assert meeting.join(one("d")) == (one("d"),)  # and the group goes on


def test_one_takes_no_more_along_than_an_edge_can_hear(meeting: Meeting) -> None:
    come = [many("a", MAX_GROUP_PATHS - 1), one("b"), many("c", MAX_GROUP_PATHS + 1), one("d")]
    told = [one.result(10) for one in meeting.after_the_first(*come)]
    assert [len(drops) for drops in told] == [2, 2, 1, 1]


def test_who_is_told_gets_back_the_time_that_it_has_waited_and_who_goes_itself_does_not(meeting: Meeting) -> None:
    came = time.monotonic()
    leader, told = meeting.after_the_first(one("a"), one("b"))
    assert leader.result(10) == told.result(10)
    assert 0 < meeting.deadlines["2"] <= time.monotonic() - came
    assert meeting.deadlines["first"] == meeting.deadlines["1"] == 0


def test_nobody_waits_longer_for_another_than_half_of_its_own_time(stack: Stack) -> None:
    with meeting_of(stack, 1) as meeting:
        first = meeting.threads.submit(meeting.join, one("first"), "first")
        wait_until(lambda: meeting.went)
        others = [meeting.threads.submit(meeting.join, one(name), name) for name in "ab"]
        told = [other.result(10) for other in others]
        assert all(one(name) in drops for name, drops in zip("ab", told, strict=True))
        assert 0 in meeting.deadlines.values()  # of the one that went; the other one may have been taken along
        came = time.monotonic()
        assert meeting.join(one("c"), "c") == (one("c"),)
        assert time.monotonic() - came < 0.25  # nobody waits for the same one again
        assert not first.done()
        meeting.released.set()
        assert first.result(10) == (one("first"),)
        assert meeting.join(one("d"), "d") == (one("d"),)


def test_who_comes_after_a_round_with_company_lets_others_come_and_who_comes_after_a_lonely_one_does_not(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in meeting.after_the_first(one("a"), one("b")):
        assert other.result(10) == (one("a"), one("b"))
    ready = [one("late")]
    came: list[Future[Told]] = []
    yields = []

    def others_run() -> None:
        yields.append(len(meeting.went))
        if ready:
            came.append(meeting.threads.submit(meeting.join, ready.pop()))
            wait_until(partial(meeting.waiting, 1))

    monkeypatch.setattr("velikiy.coherence.group_commit.os.sched_yield", others_run)
    told = [meeting.join(one(name)) for name in "cdef"]
    assert told == [(one("c"), one("late")), (one("d"),), (one("e"),), (one("f"),)]
    assert came[0].result(10) == told[0]
    assert yields == [2, 2, 3]  # twice for c, since somebody came; once for d; e and f come after lonely ones


@pytest.mark.parametrize(("at_most", "turns"), [(0.002, 100), (1.0, 10)], ids=["in time", "too late for some"])
def test_many_who_come_at_any_time_are_each_told_of_their_own(stack: Stack, at_most: float, turns: int) -> None:
    """`at_most`: seconds that one is under way; the others have half a second for it."""

    class Busy(Meeting):
        def go(self, drops: Sequence[Drop]) -> Told:
            time.sleep(at_most * random.random())
            return tuple(drops)

    with meeting_of(stack, 1, Busy) as busy:

        def come(name: str) -> float:
            longest = 0.0
            for mine in (one(f"{name}{turn}") for turn in range(turns)):
                came = time.monotonic()
                assert mine in busy.join(mine)
                longest = max(longest, time.monotonic() - came)
            return longest

        longest = max(busy.threads.map(come, "abcdef"))
        assert longest < (0.45 if at_most < 0.1 else 2.5)  # in time: nobody was forgotten, and had to help itself
        assert not busy.group._waiting
        assert not busy.group._under_way
