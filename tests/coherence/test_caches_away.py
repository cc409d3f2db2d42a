"""Caches that fail: a cache that hangs is fenced, a cache that is down costs no wait, and both return empty."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import redis
import requests

from testkit.outages import hanging, is_up, refusing
from testkit.stack import Stack, running, wait_until
from velikiy.stack.reaper import leftovers

MAX_FENCING_WRITE_S = 3.3
"""The longest write that fences a cache (3 s), and a margin for a busy machine."""


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """A stack whose servers the tests take away. Each test brings them back."""
    with running("--edges", "2") as stack:
        yield stack


def put(edge: str, user: int, name: str) -> float:
    """Rename the user; return the seconds that the write took."""
    began = time.monotonic()
    response = requests.put(f"{edge}/users/{user}", json={"name": name}, timeout=10)
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def read(edge: str, user: int) -> tuple[str, str]:
    """Return the user's name and the value of X-Cache-Status."""
    response = requests.get(f"{edge}/users/{user}", timeout=10)
    assert response.status_code == 200
    return response.json()["name"], response.headers["X-Cache-Status"]


def fenced_kinds(stack: Stack) -> list[str]:
    return [name for (name,) in stack.sql("SELECT kind FROM caches WHERE fenced_at IS NOT NULL")]


def warm(stack: Stack, user: int) -> str:
    """Give the user a new name, have both edges and Redis cache it, and return the name."""
    name = f"warm {time.monotonic_ns()}"
    wait_until(lambda: not fenced_kinds(stack))
    put(stack.edge, user, name)
    for edge in stack.edges:
        wait_until(lambda edge=edge: read(edge, user) == (name, "HIT"))  # type: ignore[misc]
    return name


def test_hanging_edge_is_fenced_and_is_readmitted_empty(fragile: Stack) -> None:
    warm(fragile, 1)
    with hanging(fragile, "edge2"):
        assert put(fragile.edge, 1, "Fenced") < MAX_FENCING_WRITE_S
        # Only the other edge is left in use. The relay may have deleted the fenced row already.
        assert len(fragile.sql("SELECT name FROM caches WHERE kind = 'edge' AND fenced_at IS NULL")) == 1
        for number in range(5):
            assert put(fragile.edge, 1, f"Later {number}") < 1
        assert read(fragile.edge, 1)[0] == "Later 4"
    # The clients of the edge get correct responses at once.
    assert read(fragile.edges[1], 1)[0] == "Later 4"
    wait_until(lambda: not fenced_kinds(fragile))
    assert read(fragile.edges[1], 1)[0] == "Later 4"
    wait_until(lambda: read(fragile.edges[1], 1) == ("Later 4", "HIT"))
    assert put(fragile.edge, 1, "Alice") < 1
    assert read(fragile.edges[1], 1)[0] == "Alice"


def test_hanging_redis_is_fenced_and_is_readmitted_empty(fragile: Stack) -> None:
    warm(fragile, 2)
    with hanging(fragile, "redis"):
        assert put(fragile.edge, 2, "Fenced") < MAX_FENCING_WRITE_S
        assert fenced_kinds(fragile) == ["redis"]
        for number in range(5):
            assert put(fragile.edges[1], 2, f"Later {number}") < 1
        for edge in fragile.edges:
            assert read(edge, 2)[0] == "Later 4"
            began = time.monotonic()
            requests.get(f"{edge}/users/3", timeout=5)
            assert time.monotonic() - began < 1
    for edge in fragile.edges:
        assert read(edge, 2)[0] == "Later 4"
    wait_until(lambda: not fenced_kinds(fragile))
    for edge in fragile.edges:
        assert read(edge, 2)[0] == "Later 4"
    put(fragile.edge, 2, "Bob")
    wait_until(lambda: fragile.redis().exists("user:2"))  # Redis is in use again


@pytest.mark.exclusive
def test_writes_during_a_fence_wait_no_longer_than_the_write_that_fences(fragile: Stack) -> None:
    warm(fragile, 1)
    durations: list[float] = []
    with hanging(fragile, "edge2"):
        writers = [
            threading.Thread(target=lambda user=u: durations.append(put(fragile.edge, user, "X"))) for u in (1, 2, 3)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert max(durations) < MAX_FENCING_WRITE_S
    wait_until(lambda: not fenced_kinds(fragile))


@pytest.mark.parametrize("name", ["edge2", "redis"])
def test_cache_that_is_down_is_not_fenced_and_delays_no_write(fragile: Stack, name: str) -> None:
    warm(fragile, 3)
    with refusing(fragile, name):
        for number in range(5):
            assert put(fragile.edge, 3, f"Name {number}") < 0.5
            assert read(fragile.edge, 3)[0] == f"Name {number}"
        assert fenced_kinds(fragile) == []
    for edge in fragile.edges:
        assert read(edge, 3)[0] == "Name 4"


def test_killed_edge_restarts_without_its_old_entries(fragile: Stack) -> None:
    name = warm(fragile, 1)
    for pid in leftovers(fragile.data / "edge2"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_up(fragile.edges[1]))
    assert read(fragile.edges[1], 1) in ((name, "MISS"), (name, "BYPASS"))
    wait_until(lambda: read(fragile.edges[1], 1) == (name, "HIT"))


def test_redis_refuses_save_and_its_dump_file_is_deleted_at_start(fragile: Stack) -> None:
    warm(fragile, 1)
    with pytest.raises(redis.ResponseError):
        fragile.redis().save()
    dump = fragile.data / "redis" / "dump.rdb"
    with refusing(fragile, "redis"):
        dump.write_bytes(b"REDIS0010")
    assert not dump.exists()
    assert fragile.redis().dbsize() == 0 or put(fragile.edge, 1, "Alice") < 1


def test_edge_that_invalidations_do_not_reach_is_fenced_and_begins_a_new_epoch(fragile: Stack) -> None:
    """The address for invalidations leads nowhere, while renewals of the cache lease still reach the app."""
    warm(fragile, 1)
    with socket.socket() as silent:  # accepts connections and never replies
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        [(name, epoch)] = fragile.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1")
        fragile.sql("UPDATE caches SET address = %s WHERE name = %s", address, name)
        assert put(fragile.edge, 1, "Unreached") < MAX_FENCING_WRITE_S
        for edge in fragile.edges:
            assert read(edge, 1)[0] == "Unreached"
        wait_until(lambda: fragile.sql("SELECT epoch FROM caches WHERE name = %s", name) != [(epoch,)])
    assert fragile.sql("SELECT address FROM caches WHERE name = %s", name) != [(address,)]
    assert put(fragile.edge, 1, "Alice") < 1
    for edge in fragile.edges:
        assert read(edge, 1)[0] == "Alice"


def test_edge_whose_address_leads_to_another_edge_is_fenced(fragile: Stack) -> None:
    warm(fragile, 1)
    (moved, epoch), (other, _) = fragile.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name")
    fragile.sql(
        "UPDATE caches SET address = (SELECT address FROM caches WHERE name = %s) WHERE name = %s", other, moved
    )
    assert put(fragile.edge, 1, "Elsewhere") < MAX_FENCING_WRITE_S
    for edge in fragile.edges:
        assert read(edge, 1)[0] == "Elsewhere"
    wait_until(lambda: fragile.sql("SELECT epoch FROM caches WHERE name = %s", moved) != [(epoch,)])
    assert put(fragile.edge, 1, "Alice") < 1


def test_edge_without_any_app_serves_stale_responses_after_its_lease_but_no_invalidated_entry(fragile: Stack) -> None:
    name = warm(fragile, 1)
    with refusing(fragile, "app1", "app2"):
        wait_until(lambda: read(fragile.edge, 1) == (name, "STALE"), within=6)
        response = requests.get(f"{fragile.edge}/users/1", timeout=5)
        assert response.headers["Cache-Status"] == "nginx; hit; detail=stale"
        assert int(response.headers["Age"]) >= 0
        assert requests.get(f"{fragile.edge}/users?limit=9", timeout=5).status_code == 502
        # The relay still reaches the edges, and an entry that it has invalidated is not served, not even as STALE.
        fragile.sql("UPDATE users SET name = 'Unseen' WHERE id = 1")
        wait_until(lambda: requests.get(f"{fragile.edge}/users/1", timeout=5).status_code == 502)
    wait_until(lambda: read(fragile.edge, 1)[0] == "Unseen")
    put(fragile.edge, 1, "Alice")


def test_relay_forgets_an_edge_that_stays_down(fragile: Stack) -> None:
    with refusing(fragile, "edge2"):
        wait_until(lambda: fragile.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(1,)], within=40)
        assert put(fragile.edge, 1, "Alice") < 1
    wait_until(lambda: fragile.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(2,)])
