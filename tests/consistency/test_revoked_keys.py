"""A key that is revoked while clients read with it is never accepted once `revoke` has returned.

A read is judged by when it started, as a stale read is: a read that started after `revoke` had returned must be
refused, at any edge and at any app, whatever happens to an edge meanwhile.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import requests

from testkit.stack import EDGE_SECRET, Stack, children_of, running, wait_until
from tests.consistency.mutants import KEY_BUGS, Mutant, checkout, started
from velikiy import coherence
from velikiy.coherence import Gate
from velikiy.keys import store
from velikiy.postgres import Database
from velikiy.settings import Settings

ROUNDS = int(os.environ.get("REVOCATIONS", "50"))
"""1,000 take some minutes: REVOCATIONS=1000 ./run test tests/consistency/test_revoked_keys.py"""


@pytest.fixture(scope="module")
def keyed_stack() -> Iterator[Stack]:
    # Long, so that no entry ends by itself before it is judged.
    with running("--edges", "2", "--apps", "2", AUTH="all", EDGE_TTL="600") as stack:
        yield stack


@pytest.fixture
def gate(keyed_stack: Stack) -> Iterator[Gate]:
    with gate_of(keyed_stack) as gate:
        yield gate


@contextmanager
def gate_of(stack: Stack) -> Iterator[Gate]:
    """Yield the gate of the command `velikiy keys`, which runs in a process of its own."""
    database = Database(stack.postgres, size=4, timeout=5)
    settings = Settings(
        _env_file=None,
        database_url=stack.postgres,
        redis_url=stack.redis_url,
        edge_secret=EDGE_SECRET,
        redis_direct=True,
    )
    gate = coherence.connect(database, settings)
    database.open()
    yield gate
    database.close()


class Reader(threading.Thread):
    """Reads with a key as fast as it can, and notes when each accepted read started."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.headers = {"Authorization": f"Bearer {token}"}
        self.accepted = 0
        self.hits = 0
        self.last_accepted_start = 0.0
        self.refused = 0
        self.others: list[int] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        with requests.Session() as session:
            while not self.stopping.is_set():
                started = time.monotonic()
                try:
                    response = session.get(self.url, headers=self.headers, timeout=10)
                except requests.RequestException:
                    continue  # a stopped edge
                if response.status_code == 200:
                    self.accepted += 1
                    self.hits += response.headers.get("X-Cache-Status", "HIT") == "HIT"  # an app has no such header
                    self.last_accepted_start = max(self.last_accepted_start, started)
                elif response.status_code == 401:
                    self.refused += 1
                else:
                    self.others.append(response.status_code)


@contextmanager
def reading(urls: list[str], token: str) -> Iterator[list[Reader]]:
    readers = [Reader(url, token) for url in urls]
    for reader in readers:
        reader.start()
    try:
        yield readers
    finally:
        for reader in readers:
            reader.stopping.set()
        for reader in readers:
            reader.join()


def check_revocations(stack: Stack, gate: Gate, rounds: int) -> None:
    """Revoke keys while clients read with them through both edges and at an app.

    Raises:
        AssertionError: A read that started after its key was revoked was accepted.
    """
    urls = [f"{base}/users/{n}" for base in (*stack.edges, stack.app) for n in (1, 2)]
    for number in range(rounds):
        created = store.create(gate, f"round-{number}", "read", None)
        with reading(urls, created.token) as readers:
            wait_until(lambda: all(reader.hits for reader in readers), every=0.002, what="hits")
            if number % 2:
                store.revoke(gate, created.name)
            else:
                store.rotate(gate, created.name, overlap=store.NO_OVERLAP, expires_at=None)
            revoked_at = time.monotonic()
            wait_until(partial(are_judged, readers, revoked_at), every=0.002, what="refusals")
        for reader in readers:
            assert reader.last_accepted_start < revoked_at, f"accepted after revoke, in round {number}"
            assert not reader.others


def are_judged(readers: list[Reader], revoked_at: float) -> bool:
    """Return whether each reader was refused repeatedly, or any was accepted wrongly."""
    return any(reader.last_accepted_start > revoked_at for reader in readers) or all(
        reader.refused >= 5 for reader in readers
    )


@pytest.mark.timeout(1800)
def test_revoked_key_is_never_accepted_after_revoke_has_returned(keyed_stack: Stack, gate: Gate) -> None:
    check_revocations(keyed_stack, gate, ROUNDS)


@pytest.mark.long
@pytest.mark.parametrize("mutant", KEY_BUGS, ids=lambda mutant: mutant.name)
def test_check_finds_the_planted_bug(mutant: Mutant) -> None:
    with (
        checkout(mutant) as root,
        started(root, edge_ttl=600, AUTH="all") as stack,
        gate_of(stack) as gate,
        pytest.raises(AssertionError, match="accepted after revoke"),
    ):
        check_revocations(stack, gate, rounds=20)


def test_revoked_key_is_refused_by_an_edge_that_was_cut_off(keyed_stack: Stack, gate: Gate) -> None:
    created = store.create(gate, "cut-off", "read", None)
    url = f"{keyed_stack.edges[1]}/users/1"
    with reading([url], created.token) as [reader]:
        wait_until(lambda: reader.hits)
        workers = children_of(keyed_stack.pids()["edge2"])
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            store.revoke(gate, created.name)  # waits until the edge is excluded
            revoked_at = time.monotonic()
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: reader.refused >= 5)
    assert reader.last_accepted_start < revoked_at


def test_checker_finds_a_revocation_that_does_not_invalidate(keyed_stack: Stack, gate: Gate) -> None:
    created = store.create(gate, "planted", "read", None)
    with reading([f"{keyed_stack.edge}/users/1"], created.token) as [reader]:
        wait_until(lambda: reader.hits)
        as_the_app = "SET velikiy.passes_gate = on; UPDATE api_keys SET revoked_at = now() WHERE name = 'planted'"
        keyed_stack.sql(as_the_app)
        revoked_at = time.monotonic()
        wait_until(lambda: reader.last_accepted_start > revoked_at, what="the bug shows")


def test_key_that_sql_from_outside_revokes_is_refused_soon(keyed_stack: Stack, gate: Gate) -> None:
    created = store.create(gate, "by-sql", "read", None)
    with reading([f"{edge}/users/1" for edge in keyed_stack.edges], created.token) as readers:
        wait_until(lambda: all(reader.hits for reader in readers))
        keyed_stack.sql("UPDATE api_keys SET revoked_at = now() WHERE name = 'by-sql'")
        wait_until(lambda: all(reader.refused for reader in readers), within=5)
