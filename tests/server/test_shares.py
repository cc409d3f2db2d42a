"""The share of the threads for writes (velikiy/server/shares.py:WriteShare): what a locked row takes of it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from velikiy.server.shares import Admission, WriteShare

ROW, OTHER, NEW = b"PUT /users/1 HTTP/1.1", b"DELETE /users/2 HTTP/1.1", b"POST /users HTTP/1.1"


class Threads:
    """Threads of a worker, each of which serves one write at a time."""

    def __init__(self, size: int) -> None:
        self.long: set[int] = set()
        """The threads whose statement takes long."""
        self.share = WriteShare(size, self.long.__contains__, lambda: threading.get_ident() in self.long)
        self._threads = [ThreadPoolExecutor(1) for _ in range(size)]

    def run(self, number: int, call: Callable[..., Any], *arguments: object) -> Any:
        return self._threads[number].submit(call, *arguments).result(5)

    def enter(self, number: int, connection: str, beginning: bytes) -> Admission:
        admission: Admission = self.run(number, self.share.enter, connection, beginning)
        return admission

    def leave(self, number: int) -> str | None:
        connection: str | None = self.run(number, self.share.leave)[0]
        return connection

    def take_long(self, *numbers: int) -> None:
        self.long.update(self.run(number, threading.get_ident) for number in numbers)


def test_two_writes_of_one_row_are_admitted_and_writes_of_other_rows_go_on() -> None:
    threads = Threads(5)
    assert [threads.enter(n, f"row {n}", ROW) for n in range(3)] == [*[Admission.ADMITTED] * 2, Admission.QUEUED]
    assert threads.enter(2, "other", OTHER) is Admission.ADMITTED
    assert threads.leave(2) is None  # the row has its share already
    assert threads.leave(0) == "row 2"


def test_one_row_leaves_one_of_two_threads_to_other_rows() -> None:
    threads = Threads(2)
    assert [threads.enter(n, f"row {n}", ROW) for n in range(2)] == [Admission.ADMITTED, Admission.QUEUED]
    assert threads.enter(1, "other", OTHER) is Admission.ADMITTED


def test_new_rows_take_all_but_one_of_the_threads() -> None:
    threads = Threads(4)
    assert [threads.enter(n, f"new {n}", NEW) for n in range(4)] == [*[Admission.ADMITTED] * 3, Admission.QUEUED]


def test_queued_writes_of_a_row_that_waits_are_refused_and_those_of_other_rows_are_not() -> None:
    threads = Threads(2)
    assert threads.enter(0, "first", ROW) is Admission.ADMITTED
    assert threads.enter(1, "other", OTHER) is Admission.ADMITTED
    for connection, beginning in (("second", ROW), ("third", b"PATCH /users/1 HTTP/1.1"), ("new", NEW)):
        assert threads.enter(1, connection, beginning) is Admission.QUEUED
    assert threads.share.refused() == []
    threads.take_long(0)
    assert threads.share.refused() == ["second", "third"]
    assert threads.leave(1) == "new"


def test_every_queued_write_is_refused_while_all_threads_wait() -> None:
    threads = Threads(2)
    threads.enter(0, "first", ROW)
    threads.enter(1, "second", OTHER)
    threads.enter(1, "third", NEW)
    threads.take_long(0, 1)
    assert threads.share.refused() == ["third"]


def test_one_write_at_a_time_tries_a_row_that_was_locked_until_one_gets_through() -> None:
    threads = Threads(3)
    threads.enter(0, "first", ROW)
    threads.take_long(0)
    assert threads.leave(0) is None
    threads.long.clear()
    assert threads.enter(0, "second", ROW) is Admission.ADMITTED
    assert threads.enter(1, "third", ROW) is Admission.QUEUED
    assert threads.share.refused() == ["third"]
    assert threads.leave(0) is None  # soon, so the row is free
    assert [threads.enter(n, "later", ROW) for n in range(2)] == [Admission.ADMITTED] * 2
