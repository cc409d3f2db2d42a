"""Races between readers and writers through edges: one stops at a failpoint while the other runs through."""

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from testkit.edge_copy import copy_edge
from testkit.failpoints import FailpointApp, failpoint_app, has_cache_lease, running_edge, writer_process
from testkit.stack import Stack, children_of, folder, wait_until
from testkit.tcp_proxy import tcp_proxy
from tests.edge.reads import edges, get, listed, name, put
from velikiy.coherence import CachePath, Entry
from velikiy.coherence.redis_tier import FillLease

_numbers = count(1)

READER_FAILPOINTS = ("between probe and snapshot", "between snapshot and fill", "between fill and response")
WRITER_FAILPOINTS = ("before the lock", "before the drops", "between the drops", "before the commit")


@pytest.fixture(scope="module", params=["redis-itself", "redis-through-the-app"])
def app(request: pytest.FixtureRequest, stack: Stack) -> Iterator[FailpointApp]:
    """An app whose edge reads Redis itself, and an app whose edge does not."""
    with tcp_proxy(stack.redis_socket) as redis, ExitStack() as context:  # an edge under test may not use the socket
        address = stack.redis_through(redis.port) if request.param == "redis-itself" else ""
        app = context.enter_context(failpoint_app(stack, REDIS_URL=address))
        wait_until(lambda: has_cache_lease(app.edge))
        yield app
        assert not app.failpoints.actions, "a failpoint that was not reached"


@pytest.fixture
def user(app: FailpointApp) -> Iterator[int]:
    number = next(_numbers)
    user_id = app.users.create(name="old", email=f"race{number}@example.com")
    yield user_id
    app.users.delete(user_id)


def cold(app: FailpointApp, user: int) -> None:
    """Remove the user from every tier."""
    put(app, user, "old")
    app.stack.redis().flushdb()


def remove(app: FailpointApp, user: int) -> None:
    assert requests.delete(f"{app.stack.edge}/users/{user}", timeout=10).status_code == 200


@pytest.mark.parametrize("failpoint", READER_FAILPOINTS)
@pytest.mark.parametrize("look", [name, listed])
def test_read_that_a_write_overtakes_stores_nothing_that_is_found_later(
    app: FailpointApp, user: int, failpoint: str, look: Callable[[str, int], str | None]
) -> None:
    cold(app, user)
    app.failpoints.actions[failpoint] = lambda: put(app, user, "new")
    assert look(app.edge, user) in ("old", "new")  # it began before the write
    for edge in edges(app):
        assert [look(edge, user) for _ in range(2)] == ["new", "new"]


@pytest.mark.parametrize("failpoint", READER_FAILPOINTS)
def test_read_of_a_missing_row_that_a_create_overtakes_leaves_no_404(app: FailpointApp, failpoint: str) -> None:
    app.stack.redis().flushdb()
    (user,) = app.stack.sql("SELECT last_value + 1 FROM users_id_seq")[0]
    made: list[int] = []

    def create() -> None:
        new = {"name": "new", "email": f"created{next(_numbers)}@example.com"}
        made.append(requests.post(f"{app.stack.edge}/users", json=new, timeout=10).json()["id"])

    app.failpoints.actions[failpoint] = create
    name(app.edge, user)
    assert made == [user]
    for edge in edges(app):
        assert [name(edge, user) for _ in range(2)] == ["new", "new"]
    app.failpoints.actions[failpoint] = lambda: remove(app, user)
    app.stack.redis().flushdb()
    name(app.edge, 10**9 + user)  # any read that reaches the failpoint: the delete runs there
    for edge in edges(app):
        assert [name(edge, user) for _ in range(2)] == [None, None]


@pytest.mark.parametrize("failpoint", WRITER_FAILPOINTS)
@pytest.mark.parametrize("warm", [True, False])
def test_reads_return_the_old_row_until_the_commit_and_the_new_row_after_it(
    app: FailpointApp, user: int, failpoint: str, warm: bool
) -> None:
    cold(app, user)
    if warm:
        for edge in edges(app):
            assert (name(edge, user), listed(edge, user)) == ("old", "old")
    seen: list[str | None] = []

    def look() -> None:
        for _ in range(2):
            seen.extend(look(edge, user) for edge in edges(app) for look in (name, listed))

    app.failpoints.actions[failpoint] = look
    app.users.update(user, "new")
    assert seen == ["old"] * 12  # not committed yet
    for edge in edges(app):
        assert (name(edge, user), listed(edge, user)) == ("new", "new")


@pytest.mark.parametrize("failpoint", WRITER_FAILPOINTS)
def test_if_none_match_with_the_old_etag_is_304_until_the_commit_only(
    app: FailpointApp, user: int, failpoint: str
) -> None:
    cold(app, user)
    has = {"If-None-Match": get(app.edge, user).headers["ETag"]}

    def unchanged() -> list[bool]:
        responses = [requests.get(f"{edge}/users/{user}", headers=has, timeout=10) for edge in edges(app) * 2]
        return [response.status_code == 304 or response.json()["name"] == "old" for response in responses]

    seen: list[bool] = []
    app.failpoints.actions[failpoint] = lambda: seen.extend(unchanged())
    app.users.update(user, "new")
    assert seen == [True] * 6
    assert unchanged() == [False] * 6


def test_read_between_invalidation_and_commit_is_stored_nowhere(app: FailpointApp, user: int) -> None:
    cold(app, user)
    seen: list[str] = []
    app.failpoints.actions["before the commit"] = lambda: seen.extend(
        get(edge, user).headers["Cache-Status"] for edge in edges(app) for _ in range(2)
    )
    app.users.update(user, "new")
    assert set(seen) == {"redis; fwd=uri-miss; detail=write-in-flight, nginx; fwd=uri-miss"}


def test_committed_row_is_read_before_its_writer_is_answered(app: FailpointApp, user: int) -> None:
    cold(app, user)
    seen: list[str | None] = []
    app.failpoints.actions["after the commit"] = lambda: seen.extend(name(edge, user) for edge in edges(app))
    app.users.update(user, "new")
    assert set(seen) == {"new"}


@pytest.fixture
def slow_commits(app: FailpointApp) -> Iterator[None]:
    """A commit takes 2 s if it writes the name 'slow'."""
    app.stack.sql(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON users DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION slow();
        """
    )
    yield
    app.stack.sql("DROP FUNCTION slow CASCADE")


def test_reads_during_a_slow_commit_return_the_old_row_and_are_stored_nowhere(
    app: FailpointApp, user: int, slow_commits: None
) -> None:
    cold(app, user)
    committing, committed = threading.Event(), threading.Event()
    app.failpoints.actions.update({"before the commit": committing.set, "after the commit": committed.set})
    writer = threading.Thread(target=app.users.update, args=(user, "slow"))
    writer.start()
    assert committing.wait(5)
    seen: set[tuple[str | None, bool]] = set()
    while not committed.is_set():
        response = get(app.stack.edge, user)
        seen.add((response.json()["name"], "stored" in response.headers["Cache-Status"]))
    writer.join()
    assert ("old", False) in seen
    assert ("old", True) not in seen
    for edge in edges(app):
        assert name(edge, user) == "slow"


@pytest.mark.parametrize("failpoint", [*WRITER_FAILPOINTS, "after the commit"])
def test_killed_writer_leaves_no_contradicting_read_and_every_path_cacheable(
    app: FailpointApp, user: int, failpoint: str
) -> None:
    cold(app, user)
    for edge in edges(app):
        wait_until(lambda edge=edge: get(edge, user).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]
    with writer_process(app.stack, user, "new", failpoint) as writer:
        writer.join(30)
        assert writer.exitcode == -signal.SIGKILL
    left = "new" if failpoint == "after the commit" else "old"
    for edge in edges(app):
        assert [(name(edge, user), listed(edge, user)) for _ in range(2)] == [(left, left)] * 2
    for edge in edges(app):
        wait_until(lambda edge=edge: get(edge, user).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]
    put(app, user, "newer")
    for edge in edges(app):
        assert (name(edge, user), listed(edge, user)) == ("newer", "newer")


def test_commit_that_outlives_its_killed_writer_becomes_visible_everywhere_at_once(
    app: FailpointApp, user: int, slow_commits: None
) -> None:
    cold(app, user)
    with writer_process(app.stack, user, "slow") as writer:
        wait_until(lambda: committing(app.stack), every=0.01)
        writer.kill()
        writer.join()
        assert committing(
            app.stack
        )  # PostgreSQL has received everything and notices no closed connection until it is done
        seen: list[tuple[str | None, bool]] = []
        while (last := get(app.edge, user)).json()["name"] == "old":
            seen.append(("old", "stored" in last.headers["Cache-Status"]))
            assert name(app.stack.edge, user) in ("old", "slow")
    assert set(seen) == {("old", False)}
    assert last.json()["name"] == "slow"
    for edge in edges(app):
        assert (name(edge, user), listed(edge, user)) == ("slow", "slow")


def committing(stack: Stack) -> bool:
    return bool(stack.sql("SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'"))


def test_one_writer_of_a_list_may_overtake_another(app: FailpointApp, user: int) -> None:
    other = app.users.create(name="old", email=f"other{next(_numbers)}@example.com")
    seen: list[tuple[str | None, str | None]] = []

    def pass_by() -> None:
        put(app, other, "second")
        seen.extend((listed(edge, user), listed(edge, other)) for edge in edges(app) for _ in range(2))

    for failpoint in WRITER_FAILPOINTS:
        app.users.update(user, "old")
        seen.clear()
        app.failpoints.actions[failpoint] = pass_by
        app.users.update(user, "first")
        assert set(seen) == {("old", "second")}, failpoint
        for edge in edges(app):
            assert (listed(edge, user), listed(edge, other)) == ("first", "second"), failpoint
    app.users.delete(other)


def test_writer_prefills_redis_unless_a_second_writer_has_invalidated_since(app: FailpointApp, user: int) -> None:
    def is_prefilled() -> bool:
        app.users.update(user, "mine")
        return "redis; hit" in get(app.edge, user).headers["Cache-Status"]

    wait_until(is_prefilled)  # at once, unless this process lost its lease for Redis on a busy machine

    # The prefill of the first writer arrives after the second has invalidated and committed, so its lease is gone.
    tier = app.users.gate.redis_tier
    fill = tier.fill

    def late(path: CachePath, variant: str, lease: FillLease, entry: Entry | None) -> None:
        tier.fill = fill  # type: ignore[method-assign]
        put(app, user, "second")
        fill(path, variant, lease, entry)

    tier.fill = late  # type: ignore[method-assign]
    app.users.update(user, "first")
    assert tier.fill == fill
    for edge in edges(app):
        assert name(edge, user) == "second"


class TestEdgeProcesses:
    def test_reload_keeps_entries_and_invalidations(self, app: FailpointApp, user: int) -> None:
        assert name(app.edge, user) == "old"
        pid = int((Path(app.data) / "nginx.pid").read_text())
        before = workers(pid)
        os.kill(pid, signal.SIGHUP)
        put(app, user, "new")
        assert name(app.edge, user) == "new"
        wait_until(lambda: not before & workers(pid))
        wait_until(lambda: has_cache_lease(app.edge))
        assert name(app.edge, user) == "new"
        put(app, user, "newer")
        assert name(app.edge, user) == "newer"

    def test_killed_worker_loses_no_invalidation(self, app: FailpointApp, user: int) -> None:
        pid = int((Path(app.data) / "nginx.pid").read_text())
        for number in range(3):
            before = workers(pid)
            assert name(app.edge, user) is not None
            for worker in before:
                os.kill(worker, signal.SIGKILL)
            put(app, user, f"after {number}")
            wait_until(lambda before=before: workers(pid) - before)  # type: ignore[misc]
            wait_until(lambda number=number: name(app.edge, user) == f"after {number}", within=1)  # type: ignore[misc]

    def test_edge_that_stops_gracefully_serves_no_stale_read_to_its_last_client(
        self, app: FailpointApp, user: int
    ) -> None:
        """The control listener is closed, so writers count the edge as dead, while a client still has a connection."""
        with running_edge(urlsplit(app.stack.app).netloc) as (edge, data), open_connection(edge) as client:
            wait_until(lambda: has_cache_lease(edge))
            put(app, user, "old")
            assert [name(edge, user) for _ in range(2)] == ["old"] * 2
            client.sendall(b"GET /users/%d HTTP/1.1\r\n" % user)  # the rest comes later
            assert (
                name(edge, user) == "old"
            )  # the only worker has received the first line; it would not wait for a silent client
            os.kill(int((Path(data) / "nginx.pid").read_text()), signal.SIGQUIT)
            wait_until(lambda: refuses(edge))
            put(app, user, "new")
            client.sendall(b"Host: localhost\r\n\r\n")
            response = b""
            while not response.endswith(b"}") and (piece := client.recv(65536)):
                response += piece
            assert b'"name":"new"' in response
            assert b"X-Cache-Status: BYPASS" in response

    def test_full_dictionaries_cost_misses_only(self, app: FailpointApp, user: int) -> None:
        with edge_with_little_memory(app.stack.app, "generations", "fills", "small", "large") as edge:
            for number in range(3):
                put(app, user, f"number {number}")
                assert name(edge, user) == f"number {number}"
                results = [get(edge, 10**6 + n).headers["X-Cache-Status"] for n in range(200)]
                assert set(results) <= {"MISS", "HIT", "EXPIRED"}
                assert name(edge, user) == f"number {number}"
            assert get(edge, user).headers["X-Cache-Status"] == "HIT"

    def test_responses_that_writes_overtook_evict_no_entries(self, app: FailpointApp, user: int) -> None:
        with edge_with_little_memory(app.url, "small") as edge:
            assert [get(edge, 1).headers["X-Cache-Status"] for _ in range(2)] == ["MISS", "HIT"]
            for number in range(100):
                app.failpoints.actions["between fill and response"] = partial(put, app, user, f"number {number}")
                get(edge, user)
            assert get(edge, 1).headers["X-Cache-Status"] == "HIT"


@contextmanager
def edge_with_little_memory(apps: str, *dictionaries: str) -> Iterator[str]:
    """Run an edge whose named dictionaries have room for some dozens of entries."""
    with folder() as copy:
        home = copy_edge(copy)
        conf = home / "conf/lua.conf"
        text, replaced = re.subn(
            rf"(lua_shared_dict (?:{'|'.join(dictionaries)})) [^;]+;", r"\1 24k;", conf.read_text()
        )
        assert replaced == len(dictionaries)
        conf.write_text(text)
        with running_edge(urlsplit(apps).netloc, home) as (edge, _):
            wait_until(lambda: has_cache_lease(edge))
            yield edge


@contextmanager
def open_connection(edge: str) -> Iterator[socket.socket]:
    address = urlsplit(edge)
    with socket.create_connection((str(address.hostname), address.port or 80), timeout=10) as client:
        yield client


def refuses(edge: str) -> bool:
    try:
        with open_connection(edge):
            return False
    except ConnectionRefusedError:
        return True


def workers(master: int) -> set[int]:
    return {pid for pid, command in children_of(master).items() if "worker process" in command}
