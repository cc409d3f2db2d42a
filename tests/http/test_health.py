"""When PostgreSQL or Redis is away: what is answered, how soon, and that everything comes back by itself."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest
import requests
from flask import Flask
from psycopg.conninfo import make_conninfo

from testkit.api import check_problem
from testkit.databases import create_database, drop_database, execute
from testkit.outages import hanging, readiness, refusing
from testkit.stack import Stack, free_ports, running, status_of, wait_until
from velikiy.coherence import RedisTier
from velikiy.coherence.redis_lease import RedisLease
from velikiy.http import health
from velikiy.postgres import Database


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """One whose servers are taken away; each test brings them back."""
    with running() as stack:
        yield stack


Away = Callable[[Stack, str], "object"]


@pytest.mark.parametrize("away", [refusing, hanging])
def test_without_postgresql_it_says_so_soon(fragile: Stack, away: Away) -> None:
    with away(fragile, "postgres"):  # type: ignore[attr-defined]
        fragile.redis().flushdb()
        for method, path, body in (
            ("GET", "/users/1", None),
            ("GET", "/users", None),
            ("POST", "/users", {"name": "A", "email": "away@example.com"}),
            ("PUT", "/users/1", {"name": "Alice"}),
            ("DELETE", "/users/424242", None),
        ):
            began = time.monotonic()
            response = requests.request(method, fragile.app + path, json=body, timeout=10)
            took = time.monotonic() - began
            check_problem(response, 503)
            assert response.headers["Retry-After"] == "1"
            assert took < 2.5, f"{method} {path} took {took:.1f} s"
        response = requests.get(f"{fragile.app}/health", timeout=5)
        assert (response.status_code, response.json()) == (503, {"status": "unhealthy"})
        assert readiness(fragile)[0] == 503
        assert status_of(f"{fragile.app}/livez") == 200
    # Started is not ready: until then it goes on saying so.
    wait_until(lambda: status_of(f"{fragile.app}/users/1") == 200)


@pytest.mark.parametrize("away", [refusing, hanging])
def test_without_postgresql_an_edge_answers_what_it_has_and_marks_it(fragile: Stack, away: Away) -> None:
    url = f"{fragile.edge}/users/2"
    wait_until(lambda: requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT")

    def marked() -> bool:
        response = requests.get(url, timeout=10)
        assert (response.status_code, response.json()["id"]) == (200, 2)
        assert response.headers["X-Cache-Status"] in ("HIT", "STALE")
        return response.headers["X-Cache-Status"] == "STALE"

    with away(fragile, "postgres"):  # type: ignore[attr-defined]
        wait_until(marked)
        response = requests.get(url, timeout=10)
        assert response.headers["Cache-Status"] == "nginx; hit; detail=stale"
        assert 0 <= int(response.headers["Age"]) < 60
        nothing = requests.get(f"{fragile.edge}/users?limit=7", timeout=10)
        check_problem(nothing, 503)
        assert nothing.headers["Retry-After"] == "1"
    wait_until(lambda: requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT")


@pytest.mark.parametrize("away", [refusing, hanging])
def test_without_redis_it_goes_on_with_a_warning(fragile: Stack, away: Away) -> None:
    with away(fragile, "redis"):  # type: ignore[attr-defined]
        for _ in range(10):
            began = time.monotonic()
            response = requests.get(f"{fragile.app}/users/1", timeout=5)
            assert response.status_code == 200
            assert "stored" not in response.headers["Cache-Status"]
            assert time.monotonic() - began < 1
        created = requests.post(f"{fragile.app}/users", json={"name": "R", "email": "r@example.com"}, timeout=5)
        assert created.status_code == 201
        assert requests.delete(fragile.app + created.headers["Location"], timeout=5).status_code == 200
        assert requests.get(f"{fragile.app}/health", timeout=5).json() == {"status": "healthy"}
        status, body = readiness(fragile)
        assert status == 200
        assert body["warnings"]


def test_an_app_that_starts_before_its_servers_waits_for_them(fragile: Stack) -> None:
    rpc = fragile.supervisor.rpc
    with refusing(fragile, "postgres", "redis"):
        rpc.stopProcess("app1")
        rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)
        assert status_of(f"{fragile.app}/readyz") == 503
    wait_until(lambda: status_of(f"{fragile.app}/health") == 200, within=5)


def test_the_edge_serves_what_it_has_when_no_app_answers_and_marks_it(fragile: Stack) -> None:
    url = f"{fragile.edge}/users/3"
    wait_until(lambda: requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT")
    for app in ("app1", "app2"):
        fragile.supervisor.rpc.stopProcess(app)
    try:
        stale = wait_until(
            lambda: (a := requests.get(url, timeout=5)).headers["X-Cache-Status"] == "STALE" and a, within=10
        )
        assert isinstance(stale, requests.Response)
        assert stale.json()["name"] == "Charlie"
        check_problem(requests.get(f"{fragile.edge}/users/2?x=1", timeout=5), 502)
        check_problem(requests.put(url, json={"name": "Lost"}, timeout=5), 502)
    finally:
        for app in ("app1", "app2"):
            fragile.supervisor.rpc.startProcess(app)
        wait_until(fragile.healthy)


def test_writes_soon_avoid_an_app_that_is_gone(fragile: Stack) -> None:
    fragile.supervisor.rpc.stopProcess("app1")
    try:

        def all_pass() -> bool:
            responses = [requests.put(f"{fragile.edge}/users/1", json={"name": "Alice"}, timeout=5) for _ in range(20)]
            return {response.status_code for response in responses} == {200}

        wait_until(all_pass, within=5, every=0)
    finally:
        fragile.supervisor.rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)


def test_a_lock_that_somebody_holds_leaves_nothing_behind(fragile: Stack) -> None:
    with psycopg.connect(fragile.postgres) as connection:
        connection.execute("SELECT FROM users WHERE id = 2 FOR UPDATE")
        with ThreadPoolExecutor(16) as pool:
            responses = list(
                pool.map(lambda _: requests.put(f"{fragile.app}/users/2", json={"name": "Bob"}, timeout=20), range(32))
            )
        assert {response.status_code for response in responses} == {503}
        wait_until(
            lambda: fragile.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == [(0,)]
        )
        # Others are not affected, and neither is this one as soon as the lock is gone.
        assert requests.put(f"{fragile.app}/users/1", json={"name": "Alice"}, timeout=5).status_code == 200
    assert requests.put(f"{fragile.app}/users/2", json={"name": "Bob"}, timeout=5).status_code == 200


def test_health_waits_for_no_lock(fragile: Stack) -> None:
    with psycopg.connect(fragile.postgres) as connection:
        connection.execute("LOCK TABLE users")
        for path in ("/health", "/readyz"):
            began = time.monotonic()
            assert status_of(fragile.app + path) == 200
            assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("DROP TABLE users", "the tables are missing or may not be read"),
        ("REVOKE ALL ON users FROM velikiy", "the tables are missing or may not be read"),
        ("", "does not answer"),
    ],
)
def test_readiness_says_what_is_wrong_with_postgresql(fragile: Stack, wrong: str, said: str) -> None:
    name, address = create_database(fragile)
    try:
        execute(address, f"CREATE TABLE users (id int); {wrong}")
        address = address if wrong else make_conninfo(address, port=free_ports(1))
        with closing(Database(address, size=1, timeout=1)) as database:
            database.open()
            app = Flask("in this process")
            health.install(app, database, RedisTier(fragile.redis_url, RedisLease(lambda: False), ttl=60, timeout=1))
            response = app.test_client().get("/readyz")
            checks = {"postgres": said, "redis": "ok"}
            assert (response.status_code, response.json) == (503, {"status": "not ready", "checks": checks})
            assert app.test_client().get("/health").status_code == 503
    finally:
        drop_database(fragile, name)


def test_after_a_restart_of_postgresql_no_connection_of_old_costs_a_failure(fragile: Stack) -> None:
    url = f"{fragile.app}/users?limit=1"

    def read(_: int) -> int:
        fragile.redis().delete("all_users")
        return requests.get(url, timeout=5).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(read, range(100))) == {200}  # the pools have grown
        with refusing(fragile, "postgres"):
            pass
        assert set(pool.map(read, range(100))) == {200}


def test_without_postgresql_many_who_ask_are_told_soon_and_nobody_else_waits(fragile: Stack) -> None:
    with refusing(fragile, "postgres"), ThreadPoolExecutor(64) as pool:
        fragile.redis().flushdb()

        def read(_: int) -> float:
            began = time.monotonic()
            check_problem(requests.get(f"{fragile.edge}/users?limit=333", timeout=10), 503)
            return time.monotonic() - began

        asked = pool.map(read, range(64))
        assert status_of(f"{fragile.app}/livez") == 200
        assert max(asked) < 5


def test_a_read_is_tried_on_another_app_when_one_is_gone(fragile: Stack) -> None:
    fragile.supervisor.rpc.stopProcess("app1")
    try:
        responses = [requests.get(f"{fragile.edge}/livez", timeout=5).status_code for _ in range(20)]
        assert set(responses) == {200}
    finally:
        fragile.supervisor.rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)
