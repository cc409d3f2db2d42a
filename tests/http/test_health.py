"""Outages of PostgreSQL, of Redis and of an app: the responses, their delay, and the recovery without help."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing

import psycopg
import pytest
import requests
from flask import Flask
from psycopg.conninfo import make_conninfo

from testkit.api import check_problem, is_hit
from testkit.databases import create_database, drop_database, execute
from testkit.outages import hanging, readiness, refusing
from testkit.stack import Stack, free_ports, running, status_of, wait_until
from velikiy.coherence import RedisTier
from velikiy.http import health
from velikiy.postgres import Database
from velikiy.resources.base import registry


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """A stack whose servers the tests take away. Each test brings them back."""
    with running() as stack:
        yield stack


Outage = Callable[[Stack, str], AbstractContextManager[None]]

either_outage = pytest.mark.parametrize("outage", [refusing, hanging])


@either_outage
def test_requests_get_503_within_seconds_while_postgresql_is_away(fragile: Stack, outage: Outage) -> None:
    with outage(fragile, "postgres"):
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
            seconds = time.monotonic() - began
            check_problem(response, 503)
            assert response.headers["Retry-After"] == "1"
            assert seconds < 2.5, f"{method} {path} took {seconds:.1f} s"
        response = requests.get(f"{fragile.app}/health", timeout=5)
        assert (response.status_code, response.json()) == (503, {"status": "unhealthy"})
        assert readiness(fragile)[0] == 503
        assert status_of(f"{fragile.app}/livez") == 200
    # A PostgreSQL that has started is not ready yet; until then the response is 503.
    wait_until(lambda: status_of(f"{fragile.app}/users/1") == 200)


@either_outage
def test_edge_serves_its_entries_as_stale_while_postgresql_is_away(fragile: Stack, outage: Outage) -> None:
    url = f"{fragile.edge}/users/2"
    wait_until(lambda: is_hit(url))

    def is_stale() -> bool:
        response = requests.get(url, timeout=10)
        assert (response.status_code, response.json()["id"]) == (200, 2)
        assert response.headers["X-Cache-Status"] in ("HIT", "STALE")
        return response.headers["X-Cache-Status"] == "STALE"

    with outage(fragile, "postgres"):
        wait_until(is_stale)
        response = requests.get(url, timeout=10)
        assert response.headers["Cache-Status"] == "nginx; hit; detail=stale"
        assert 0 <= int(response.headers["Age"]) < 60
        not_cached = requests.get(f"{fragile.edge}/users?limit=7", timeout=10)
        check_problem(not_cached, 503)
        assert not_cached.headers["Retry-After"] == "1"
    wait_until(lambda: is_hit(url))


@either_outage
def test_app_reads_and_writes_with_a_warning_while_redis_is_away(fragile: Stack, outage: Outage) -> None:
    with outage(fragile, "redis"):
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


def test_app_that_starts_before_postgresql_and_redis_becomes_healthy_once_they_are_up(fragile: Stack) -> None:
    rpc = fragile.supervisor.rpc
    with refusing(fragile, "postgres", "redis"):
        rpc.stopProcess("app1")
        rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)
        assert status_of(f"{fragile.app}/readyz") == 503
    wait_until(lambda: status_of(f"{fragile.app}/health") == 200, within=5)


def test_edge_serves_its_entries_as_stale_while_every_app_is_down(fragile: Stack) -> None:
    url = f"{fragile.edge}/users/3"
    wait_until(lambda: is_hit(url))
    for app in ("app1", "app2"):
        fragile.supervisor.rpc.stopProcess(app)
    try:
        stale = wait_until(
            lambda: (response := requests.get(url, timeout=5)).headers["X-Cache-Status"] == "STALE" and response,
            within=10,
        )
        assert isinstance(stale, requests.Response)
        assert stale.json()["name"] == "Charlie"
        check_problem(requests.get(f"{fragile.edge}/users/2?x=1", timeout=5), 502)
        check_problem(requests.put(url, json={"name": "Lost"}, timeout=5), 502)
    finally:
        for app in ("app1", "app2"):
            fragile.supervisor.rpc.startProcess(app)
        wait_until(fragile.healthy)


def test_writes_avoid_an_app_that_is_down_within_5_s(fragile: Stack) -> None:
    fragile.supervisor.rpc.stopProcess("app1")
    try:

        def all_succeed() -> bool:
            responses = [requests.put(f"{fragile.edge}/users/1", json={"name": "Alice"}, timeout=5) for _ in range(20)]
            return {response.status_code for response in responses} == {200}

        wait_until(all_succeed, within=5, every=0)
    finally:
        fragile.supervisor.rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)


def test_writers_of_a_locked_row_get_503_and_leave_no_waiting_session(fragile: Stack) -> None:
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
        # Other rows can be written during the lock, and this row can be written as soon as the lock is released.
        assert requests.put(f"{fragile.app}/users/1", json={"name": "Alice"}, timeout=5).status_code == 200
    assert requests.put(f"{fragile.app}/users/2", json={"name": "Bob"}, timeout=5).status_code == 200


def test_health_checks_wait_for_no_lock_on_the_table(fragile: Stack) -> None:
    with psycopg.connect(fragile.postgres) as connection:
        connection.execute("LOCK TABLE users")
        for path in ("/health", "/readyz"):
            began = time.monotonic()
            assert status_of(fragile.app + path) == 200
            assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("damage", "check", "finding"),
    [
        ("DROP TABLE users", "the tables are missing or may not be read", "postgres.not_migrated"),
        (
            "REVOKE ALL ON users FROM velikiy_owner",
            "the tables are missing or may not be read",
            "postgres.not_migrated",
        ),
        ("", "does not answer", "postgres.silent"),
    ],
)
def test_readiness_reports_the_reason_why_postgresql_is_not_ready(
    fragile: Stack, damage: str, check: str, finding: str
) -> None:
    name, dsn = create_database(fragile)
    try:
        execute(dsn, f"CREATE TABLE users (id int); {damage}")
        dsn = dsn if damage else make_conninfo(dsn, port=free_ports(1))
        with closing(Database(dsn, size=1, timeout=1)) as database:
            database.open()
            app = Flask("in this process")
            redis_tier = RedisTier(fragile.redis_url, lambda: None, ttl=60, timeout=1)
            health.install(app, registry(), database, redis_tier)
            response = app.test_client().get("/readyz")
            assert response.json is not None
            assert (response.status_code, response.json["status"]) == (503, "not ready")
            assert response.json["checks"] == {"postgres": check, "redis": "ok"}
            assert [it["name"] for it in response.json["findings"]] == [finding]
            assert app.test_client().get("/health").status_code == 503
    finally:
        drop_database(fragile, name)


def test_no_request_fails_on_an_old_connection_after_a_restart_of_postgresql(fragile: Stack) -> None:
    url = f"{fragile.app}/users?limit=1"

    def read(_: int) -> int:
        fragile.redis().delete("all_users")
        return requests.get(url, timeout=5).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(read, range(100))) == {200}  # the pools of connections have grown
        with refusing(fragile, "postgres"):
            pass
        assert set(pool.map(read, range(100))) == {200}


def test_many_requests_get_503_soon_and_delay_no_liveness_check_while_postgresql_is_away(fragile: Stack) -> None:
    with refusing(fragile, "postgres"), ThreadPoolExecutor(64) as pool:
        fragile.redis().flushdb()

        def read(_: int) -> float:
            began = time.monotonic()
            check_problem(requests.get(f"{fragile.edge}/users?limit=333", timeout=10), 503)
            return time.monotonic() - began

        durations = pool.map(read, range(64))
        assert status_of(f"{fragile.app}/livez") == 200
        assert max(durations) < 5


def test_read_is_tried_on_another_app_when_an_app_is_down(fragile: Stack) -> None:
    fragile.supervisor.rpc.stopProcess("app1")
    try:
        responses = [requests.get(f"{fragile.edge}/livez", timeout=5).status_code for _ in range(20)]
        assert set(responses) == {200}
    finally:
        fragile.supervisor.rpc.startProcess("app1")
        wait_until(lambda: status_of(f"{fragile.app}/livez") == 200)
