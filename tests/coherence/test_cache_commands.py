"""`velikiy cache`: what each tier holds of an address, and dropping it."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import requests

from testkit.api import User
from testkit.outages import hanging
from testkit.stack import Stack, run, wait_until


def cache(stack: Stack, *arguments: str) -> str:
    done = run("velikiy", "cache", *arguments, DATA=str(stack.data))
    assert done.returncode == 0, done.stderr
    return done.stdout


def tiers(stack: Stack, address: str) -> dict[str, dict[str, Any]]:
    return {tier["tier"].split()[0]: tier for tier in json.loads(cache(stack, "show", "--json", address))}


@pytest.fixture(autouse=True)
def _its_own_edges_alone(stack: Stack) -> None:
    """Those of other tests are on the list for some seconds after their end."""
    wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(len(stack.edges),)])


def warm(stack: Stack, path: str) -> None:
    for edge in stack.edges:
        wait_until(lambda edge=edge: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]


def test_show_tells_what_each_tier_holds(stack: Stack, new_user: User) -> None:
    path = f"/users/{new_user['id']}"
    warm(stack, path)
    body = requests.get(stack.edge + path, timeout=5).content
    shown = tiers(stack, path)
    assert shown["postgres"] == {"tier": "postgres", "writer_in_flight": False}
    assert list(shown["redis"]["entries"]) == [""]
    assert shown["redis"]["entries"][""] > len(body)
    assert 0 <= shown["redis"]["age"] <= 60
    assert shown["edge"]["bytes"] > len(body)
    assert 0 <= shown["edge"]["age"] <= 10
    assert 0 < shown["edge"]["lease"] <= 2.4
    assert shown["edge"]["generation"]
    text = cache(stack, "show", path)
    assert text.startswith(path)
    assert shown["edge"]["generation"].split(".")[0] in text


def test_pages_are_shown_by_their_parameters(stack: Stack) -> None:
    warm(stack, "/users?limit=2")
    shown = tiers(stack, "/users?limit=2")
    assert "limit=2" in shown["redis"]["entries"]
    assert shown["edge"]["bytes"]
    assert tiers(stack, "/users?limit=77")["edge"]["bytes"] is None


def test_a_writer_in_flight_is_shown(stack: Stack) -> None:
    from velikiy.coherence.locks import lock
    from velikiy.postgres import Connection
    from velikiy.resources.base import registry

    with Connection.connect(stack.postgres, autocommit=True) as writer, writer.transaction():
        lock(writer, [registry()["users"].row_path(2)])
        assert "a writer is in flight" in cache(stack, "show", "/users/2")


def test_purge_drops_one_address_or_everything_everywhere(stack: Stack) -> None:
    for path in ("/users/1", "/users/2"):
        warm(stack, path)
    assert cache(stack, "purge", "/users/1") == "dropped /users/1 in Redis and at 2 edges\n"
    assert tiers(stack, "/users/1")["edge"]["generation"] is None
    assert tiers(stack, "/users/1")["redis"]["entries"] == {}
    assert tiers(stack, "/users/2")["edge"]["generation"]
    assert cache(stack, "purge", "--all") == "dropped everything in Redis and at 2 edges\n"
    assert tiers(stack, "/users/2")["edge"]["generation"] is None
    for edge in stack.edges:
        assert requests.get(f"{edge}/users/2", timeout=5).headers["X-Cache-Status"] == "MISS"


def test_a_cache_that_hangs_is_shown_as_such(own_stack: Stack) -> None:
    with hanging(own_stack, "redis"):
        assert "does not answer" in cache(own_stack, "show", "/users/1")
        requests.put(f"{own_stack.edge}/users/1", json={"name": "Alice"}, timeout=10)
        assert "fenced: not in use" in cache(own_stack, "show", "/users/1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "/health"), "'/health' is not cached"),
        (("show", "/users/007"), "'/users/007' is not cached"),
        (("purge",), "give either a PATH or --all"),
        (("purge", "/users", "--all"), "give either a PATH or --all"),
    ],
)
def test_what_cannot_be_done_is_said(stack: Stack, arguments: tuple[str, ...], said: str) -> None:
    done = run("velikiy", "cache", *arguments, DATA=str(stack.data))
    assert done.returncode == 2
    assert said in done.stderr


def test_a_command_that_postgresql_cancels_says_so(own_stack: Stack) -> None:
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(own_stack.postgres) as outside, ThreadPoolExecutor(1) as pool:
        outside.execute("LOCK TABLE caches IN ACCESS EXCLUSIVE MODE")
        done = pool.submit(run, "velikiy", "cache", "purge", "--all", DATA=str(own_stack.data))
        wait_until(lambda: own_stack.sql(cancel) is not None and done.done())  # apps and the relay wait for it too
    assert done.result().returncode == 1
    assert "PostgreSQL cancelled the statement (QueryCanceled 57014)" in done.result().stderr


def test_without_a_database_it_says_so(own_stack: Stack) -> None:
    own_stack.supervisor.rpc.stopProcess("postgres")
    done = run("velikiy", "cache", "show", "/users/1", DATA=str(own_stack.data))
    assert done.returncode == 1
    assert "PostgreSQL does not answer" in done.stderr
