"""Contending writers (velikiy/coherence/group_commit.py): which writers share a round, and what a failed round means."""

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

Round = tuple[Drop, ...]


class RoundFailed(Exception):
    pass


class Writers:
    """Writers of one group. The result of a writer is the round that included its drop.

    The first round is held up until `release_first`, so that other writers queue meanwhile.
    """

    def __init__(self, database: Database, threads: ThreadPoolExecutor) -> None:
        self.database, self.threads = database, threads
        self.group = GroupCommit[Round]()
        self.rounds: list[Round] = []
        self.release_first = threading.Event()
        self.fail_shared_rounds = False
        self.extensions: dict[str, float] = {}
        """The seconds by which the deadline of each writer was extended."""

    def drop_all(self, drops: Sequence[Drop]) -> Round:
        self.rounds.append(tuple(drops))
        if len(self.rounds) == 1:
            assert self.release_first.wait(10)
        elif self.fail_shared_rounds and len(drops) > 1:
            raise RoundFailed
        return tuple(drops)

    def submit(self, drop: Drop, name: str = "") -> Round:
        with self.database.autocommit() as connection:
            before = connection.deadline
            try:
                return self.group.submit(connection, drop, self.drop_all)
            finally:
                assert before is not None
                assert connection.deadline is not None
                self.extensions[name] = connection.deadline - before

    def has_queued(self, count: int) -> bool:
        return len(self.group._waiting) == count

    def submit_during_first_round(self, *drops: Drop) -> list[Future[Round]]:
        """Return the results of these drops, which queue in this order while the first round is under way."""
        first = self.threads.submit(self.submit, drop_of("first"), "first")
        wait_until(lambda: self.rounds)
        results = []
        for number, drop in enumerate(drops, start=1):
            results.append(self.threads.submit(self.submit, drop, f"{number}"))
            wait_until(partial(self.has_queued, number))
        self.release_first.set()
        assert first.result(10) == self.rounds[0] == (drop_of("first"),)
        return results


def drop_of(name: str) -> Drop:
    return Drop([CachePath(f"/{name}", name)])


def drop_of_many(name: str, count: int) -> Drop:
    return Drop([CachePath(f"/{name}/{number}", f"{name}:{number}") for number in range(count)])


@contextmanager
def writers_with_timeout(stack: Stack, seconds: float, kind: type[Writers] = Writers) -> Iterator[Writers]:
    """Yield writers that each have so many seconds for PostgreSQL."""
    database = Database(stack.postgres, size=8, timeout=seconds)
    database.open()
    with ThreadPoolExecutor() as threads:
        writers = kind(database, threads)
        try:
            yield writers
        finally:
            writers.release_first.set()
    database.close()


@pytest.fixture
def writers(stack: Stack) -> Iterator[Writers]:
    with writers_with_timeout(stack, 20) as writers:
        yield writers


def test_writer_without_contention_drops_alone_and_at_once(writers: Writers) -> None:
    writers.release_first.set()
    results = [writers.submit(drop_of(name)) for name in "abc"]
    assert results == writers.rounds == [(drop_of("a"),), (drop_of("b"),), (drop_of("c"),)]


def test_writers_that_arrive_during_a_round_share_the_next_round(writers: Writers) -> None:
    drops = [drop_of("a"), drop_of("b"), Drop(None)]
    results = writers.submit_during_first_round(*drops)
    assert [result.result(10) for result in results] == [tuple(drops)] * 3
    assert len(writers.rounds) == 2


def test_failed_round_fails_only_its_leader_and_the_other_writers_drop_by_themselves(writers: Writers) -> None:
    writers.fail_shared_rounds = True
    leader, *others = writers.submit_during_first_round(drop_of("a"), drop_of("b"), drop_of("c"))
    assert isinstance(leader.exception(10), RoundFailed)
    assert [other.result(10) for other in others] == [(drop_of("b"),), (drop_of("c"),)]
    assert writers.submit(drop_of("d")) == (drop_of("d"),)  # the group still works


def test_round_includes_no_more_paths_than_an_edge_accepts(writers: Writers) -> None:
    drops = [
        drop_of_many("a", MAX_GROUP_PATHS - 1),
        drop_of("b"),
        drop_of_many("c", MAX_GROUP_PATHS + 1),
        drop_of("d"),
    ]
    rounds = [result.result(10) for result in writers.submit_during_first_round(*drops)]
    assert [len(drops) for drops in rounds] == [2, 2, 1, 1]


def test_wait_for_a_leader_extends_the_deadline_of_the_included_writer_only(writers: Writers) -> None:
    began = time.monotonic()
    leader, included = writers.submit_during_first_round(drop_of("a"), drop_of("b"))
    assert leader.result(10) == included.result(10)
    assert 0 < writers.extensions["2"] <= time.monotonic() - began
    assert writers.extensions["first"] == writers.extensions["1"] == 0


def test_writer_waits_for_a_leader_for_half_of_its_own_time_at_most(stack: Stack) -> None:
    with writers_with_timeout(stack, 1) as writers:
        first = writers.threads.submit(writers.submit, drop_of("first"), "first")
        wait_until(lambda: writers.rounds)
        others = [writers.threads.submit(writers.submit, drop_of(name), name) for name in "ab"]
        rounds = [other.result(10) for other in others]
        assert all(drop_of(name) in drops for name, drops in zip("ab", rounds, strict=True))
        assert 0 in writers.extensions.values()  # a leader; the other writer may have been included in its round
        began = time.monotonic()
        assert writers.submit(drop_of("c"), "c") == (drop_of("c"),)
        assert time.monotonic() - began < 0.25  # no writer waits for the same leader again
        assert not first.done()
        writers.release_first.set()
        assert first.result(10) == (drop_of("first"),)
        assert writers.submit(drop_of("d"), "d") == (drop_of("d"),)


def test_leader_yields_to_arriving_writers_after_a_shared_round_and_not_after_a_round_of_one_writer(
    writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for result in writers.submit_during_first_round(drop_of("a"), drop_of("b")):
        assert result.result(10) == (drop_of("a"), drop_of("b"))
    ready = [drop_of("late")]
    late_results: list[Future[Round]] = []
    yields = []

    def run_other_threads() -> None:
        yields.append(len(writers.rounds))
        if ready:
            late_results.append(writers.threads.submit(writers.submit, ready.pop()))
            wait_until(partial(writers.has_queued, 1))

    monkeypatch.setattr("velikiy.coherence.group_commit.os.sched_yield", run_other_threads)
    rounds = [writers.submit(drop_of(name)) for name in "cdef"]
    assert rounds == [(drop_of("c"), drop_of("late")), (drop_of("d"),), (drop_of("e"),), (drop_of("f"),)]
    assert late_results[0].result(10) == rounds[0]
    assert yields == [2, 2, 3]  # c yields twice, since a writer arrived; d yields once; e and f follow rounds of one


@pytest.mark.parametrize(
    ("max_round_s", "drops_per_writer"), [(0.002, 100), (1.0, 10)], ids=["in time", "too late for some"]
)
def test_concurrent_writers_each_get_a_round_that_includes_their_own_drop(
    stack: Stack, max_round_s: float, drops_per_writer: int
) -> None:
    """A round takes up to `max_round_s`. A writer waits for the round of another writer for half a second."""

    class SlowWriters(Writers):
        def drop_all(self, drops: Sequence[Drop]) -> Round:
            time.sleep(max_round_s * random.random())
            return tuple(drops)

    with writers_with_timeout(stack, 1, SlowWriters) as writers:

        def submit_all(name: str) -> float:
            longest = 0.0
            for own in (drop_of(f"{name}{number}") for number in range(drops_per_writer)):
                began = time.monotonic()
                assert own in writers.submit(own)
                longest = max(longest, time.monotonic() - began)
            return longest

        longest = max(writers.threads.map(submit_all, "abcdef"))
        # In time: no writer was left in the queue until its wait ended.
        assert longest < (0.45 if max_round_s < 0.1 else 2.5)
        assert not writers.group._waiting
        assert not writers.group._under_way
