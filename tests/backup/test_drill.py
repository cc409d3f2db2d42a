"""A restore drill: rows are lost and come back while clients read and write, and every read is judged."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import requests

from testkit.databases import superuser_dsn
from testkit.stack import Stack, wait_until
from tests.backup.commands import back_up, restore, velikiy
from tests.consistency.checker import Checker
from tests.consistency.history import Kind, Operation, Row
from velikiy.backup import restore as restoring

STATES = 5
USERS = (1, 2, 3)


def name_of(state: int, user: int) -> str:
    return f"state {state} of {user}"


class Readers:
    """Clients that read users and lists through every edge and app, and record what they see.

    A restore counts as a write of every user, and the state that it brings back as the next version.
    """

    def __init__(self, stack: Stack) -> None:
        self._servers = [*stack.edges, *stack.apps]
        self._done = threading.Event()
        self.operations: list[Operation] = []
        self.failures: list[int] = []
        self._threads = [threading.Thread(target=self._read, args=(seed,)) for seed in range(4)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join()

    def _read(self, seed: int) -> None:
        chance = random.Random(seed)
        with requests.Session() as session:
            while not self._done.is_set():
                user = chance.choice([None, *USERS])
                path = "/users" if user is None else f"/users/{user}"
                invoke = time.monotonic_ns()
                response = session.get(chance.choice(self._servers) + path, timeout=5)
                returned = time.monotonic_ns()
                if response.status_code != 200:
                    self.failures.append(response.status_code)
                    continue
                shown = response.json() if user is None else [response.json()]
                rows = tuple(Row(it["id"], int(it["name"].split()[1]), it["name"]) for it in shown)
                tier = response.headers.get("X-Cache-Status", "")
                kind: Kind = "list" if user is None else "read"
                self.operations.append(
                    Operation(invoke, returned, kind, path, "ok", 200, tier=tier, user=user, rows=rows)
                )


def writes(state: int, invoke: int, returned: int) -> list[Operation]:
    """Return a restore as writes of a history."""
    return [
        Operation(invoke, returned, "update", f"/users/{user}", "ok", 200, user=user, name=name_of(state, user))
        for user in USERS
    ]


def test_no_read_is_stale_or_mixed_while_backups_are_restored(stack: Stack, tmp_path: Path) -> None:
    for state in range(STATES):
        stack.sql("UPDATE users SET name = format('state %%s of %%s', %s::int, id)", state)
        back_up(stack, tmp_path / f"{state}.dump")
    restore(stack, tmp_path / "1.dump")
    now = time.monotonic_ns()
    first = tuple(Row(user, 1, name_of(1, user)) for user in USERS)
    history = [Operation(now, now, "initial", "/users", "ok", rows=first)]
    readers = Readers(stack)
    with readers.running():
        for state in range(2, STATES):
            seen = len(readers.operations) + 100
            wait_until(lambda seen=seen: len(readers.operations) > seen)  # type: ignore[misc]
            invoke = time.monotonic_ns()
            restore(stack, tmp_path / f"{state}.dump")
            history += writes(state, invoke, time.monotonic_ns())
    checker = Checker()
    for operation in sorted([*history, *readers.operations], key=lambda it: it.invoke):
        checker.add(operation)
    checker.advance(time.monotonic_ns())
    assert checker.verdict.wrong == 0, checker.verdict
    assert checker.verdict.lists > 50
    assert checker.verdict.tiers["HIT"] > 50
    mixed = [it for it in readers.operations if len({row.version for row in it.rows}) > 1]
    assert not mixed, mixed
    assert not readers.failures  # reads go on while rows are exchanged


@contextmanager
def paused_before_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Stop a restore when writers are kept out. Yield the event that it has got there, and the event that it waits for."""
    there, go_on = threading.Event(), threading.Event()
    exchange: Callable[..., object] = restoring._exchange

    def wait(*arguments: object) -> object:
        there.set()
        assert go_on.wait(20)
        return exchange(*arguments)

    monkeypatch.setattr(restoring, "_exchange", wait)
    yield there, go_on


def test_writers_wait_or_are_refused_while_rows_are_exchanged_and_readers_go_on(
    stack: Stack, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restore runs in this thread, because only the main thread receives signals."""
    answers: dict[str, requests.Response] = {}
    before = requests.get(f"{stack.app}/users/2", timeout=5).json()["name"]

    def clients() -> None:
        assert there.wait(20)
        try:
            answers["read"] = requests.get(f"{stack.app}/users/2", timeout=5)
            answers["search"] = requests.get(f"{stack.edge}/users?q=nothing-has-this", timeout=5)
            answers["write"] = requests.post(
                f"{stack.edge}/users", json={"name": "Waits", "email": "waits@example.com"}, timeout=10
            )
        finally:
            go_on.set()

    with paused_before_commit(monkeypatch) as (there, go_on):
        running = threading.Thread(target=clients)
        running.start()
        restore(stack, original)
        running.join()
    assert answers["read"].json()["name"] == before
    assert answers["search"].json() == []
    assert answers["write"].status_code == 503
    assert int(answers["write"].headers["Retry-After"]) > 0
    again = requests.post(f"{stack.edge}/users", json={"name": "Waits", "email": "waits@example.com"}, timeout=10)
    assert again.status_code == 201


def test_restore_gives_up_and_changes_nothing_if_a_transaction_does_not_end(
    stack: Stack, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "LOCK_WAIT_S", 0.5)
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")
    with psycopg.connect(stack.postgres) as writing:
        writing.execute("UPDATE users SET name = 'Not committed' WHERE id = 3")
        refused = velikiy(stack, "restore", original, "--yes", "--no-save", code=1)
        assert "a transaction that writes does not end" in refused.stderr
        # Between two attempts other writers go on.
        assert requests.patch(f"{stack.edge}/users/1", json={"name": "Goes on"}, timeout=5).status_code == 200
    assert stack.sql("SELECT name FROM users WHERE id = 2") == [("Present",)]


def test_interrupted_restore_changes_nothing(stack: Stack, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")

    def interrupt() -> None:
        assert there.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)
        go_on.set()

    with paused_before_commit(monkeypatch) as (there, go_on):
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        velikiy(stack, "restore", original, "--yes", "--no-save", code=128 + signal.SIGTERM)
        interrupting.join()
    assert [requests.get(f"{edge}/users/2", timeout=5).json()["name"] for edge in stack.edges] == ["Present"] * 2
    # No lock is left.
    assert requests.patch(f"{stack.edge}/users/1", json={"name": "Goes on"}, timeout=5).status_code == 200


def test_restore_that_loses_postgresql_half_way_changes_nothing(
    stack: Stack, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")

    def lose() -> None:
        assert there.wait(20)
        with psycopg.connect(superuser_dsn(stack), autocommit=True) as superuser:
            superuser.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE mode = 'ExclusiveLock' AND relation IS NOT NULL"
            )
        go_on.set()

    with paused_before_commit(monkeypatch) as (there, go_on):
        losing = threading.Thread(target=lose)
        losing.start()
        lost = velikiy(stack, "restore", original, "--yes", "--no-save", code=3)
        losing.join()
    assert "PostgreSQL" in lost.stderr
    assert [requests.get(f"{edge}/users/2", timeout=5).json()["name"] for edge in stack.edges] == ["Present"] * 2
