"""`velikiy cache`: show the entries of a path in each tier, and purge them."""

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
    completed = run("velikiy", "cache", *arguments, DATA=str(stack.data))
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def tiers(stack: Stack, address: str) -> dict[str, dict[str, Any]]:
    return {tier["tier"].split()[0]: tier for tier in json.loads(cache(stack, "show", "--json", address))}


@pytest.fixture(autouse=True)
def _only_edges_of_this_stack(stack: Stack) -> None:
    """Wait until the edges of other tests are removed from the list, which takes some seconds."""
    wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(len(stack.edges),)])


def warm(stack: Stack, path: str) -> None:
    for edge in stack.edges:
        wait_until(lambda edge=edge: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]


def test_show_reports_the_entry_of_each_tier(stack: Stack, new_user: User) -> None:
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


def test_show_distinguishes_pages_by_their_parameters(stack: Stack) -> None:
    warm(stack, "/users?limit=2")
    shown = tiers(stack, "/users?limit=2")
    assert "limit=2" in shown["redis"]["entries"]
    assert shown["edge"]["bytes"]
    assert tiers(stack, "/users?limit=77")["edge"]["bytes"] is None


def test_show_reports_a_writer_in_flight(stack: Stack) -> None:
    from velikiy.coherence.locks import lock
    from velikiy.postgres import Connection
    from velikiy.resources.base import registry

    with Connection.connect(stack.postgres, autocommit=True) as writer, writer.transaction():
        lock(writer, [registry()["users"].row_path(2)])
        assert "a writer is in flight" in cache(stack, "show", "/users/2")


def test_purge_drops_one_path_or_every_path_in_both_tiers(stack: Stack) -> None:
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


def test_show_reports_a_hanging_redis_as_fenced(own_stack: Stack) -> None:
    with hanging(own_stack, "redis"):
        assert "does not answer" in cache(own_stack, "show", "/users/1")
        requests.put(f"{own_stack.edge}/users/1", json={"name": "Alice"}, timeout=10)
        assert "fenced," in cache(own_stack, "show", "/users/1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "/health"), "'/health' is not cached"),
        (("show", "/users/007"), "'/users/007' is not cached"),
        (("purge",), "give either a PATH or --all"),
        (("purge", "/users", "--all"), "give either a PATH or --all"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_message(stack: Stack, arguments: tuple[str, ...], message: str) -> None:
    completed = run("velikiy", "cache", *arguments, DATA=str(stack.data))
    assert completed.returncode == 2
    assert message in completed.stderr


def test_purge_reports_a_statement_that_postgresql_cancelled(own_stack: Stack) -> None:
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(own_stack.postgres) as outside, ThreadPoolExecutor(1) as pool:
        outside.execute("LOCK TABLE caches IN ACCESS EXCLUSIVE MODE")
        completed = pool.submit(run, "velikiy", "cache", "purge", "--all", DATA=str(own_stack.data))
        # This cancels statements of the apps and of the relay, too, which wait for the same lock.
        wait_until(lambda: own_stack.sql(cancel) is not None and completed.done())
    assert completed.result().returncode == 1
    assert "PostgreSQL cancelled the statement (QueryCanceled 57014)" in completed.result().stderr


def test_show_without_postgresql_fails_with_one_line(own_stack: Stack) -> None:
    own_stack.supervisor.rpc.stopProcess("postgres")
    completed = run("velikiy", "cache", "show", "/users/1", DATA=str(own_stack.data))
    assert completed.returncode == 1
    assert completed.stderr.startswith("velikiy cache show: PostgreSQL does not answer")
    assert completed.stderr.count("\n") == 1
