"""Caches that do not response are fenced, dead ones cost nothing, and each comes back by itself, emptied."""

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

AT_MOST = 3.3
"""Seconds: what the fence takes, and what a busy machine adds."""


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """One whose servers are taken away; each test brings them back."""
    with running("--edges", "2") as stack:
        yield stack


def put(edge: str, user: int, name: str) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    response = requests.put(f"{edge}/users/{user}", json={"name": name}, timeout=10)
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def read(edge: str, user: int) -> tuple[str, str]:
    response = requests.get(f"{edge}/users/{user}", timeout=10)
    assert response.status_code == 200
    return response.json()["name"], response.headers["X-Cache-Status"]


def fenced(stack: Stack) -> list[str]:
    return [name for (name,) in stack.sql("SELECT kind FROM caches WHERE fenced_at IS NOT NULL")]


def warm(stack: Stack, user: int) -> str:
    """Its name, which both edges and Redis have."""
    name = f"warm {time.monotonic_ns()}"
    wait_until(lambda: not fenced(stack))
    put(stack.edge, user, name)
    for edge in stack.edges:
        wait_until(lambda edge=edge: read(edge, user) == (name, "HIT"))  # type: ignore[misc]
    return name


def test_an_edge_that_hangs_is_fenced_and_comes_back_with_nothing(fragile: Stack) -> None:
    warm(fragile, 1)
    with hanging(fragile, "edge2"):
        assert put(fragile.edge, 1, "Fenced") < AT_MOST
        assert fenced(fragile) == ["edge"]
        for number in range(5):
            assert put(fragile.edge, 1, f"Later {number}") < 1
        assert read(fragile.edge, 1)[0] == "Later 4"
    # Its clients are answered at once, and with what is true.
    assert read(fragile.edges[1], 1)[0] == "Later 4"
    wait_until(lambda: not fenced(fragile))
    assert read(fragile.edges[1], 1)[0] == "Later 4"
    wait_until(lambda: read(fragile.edges[1], 1) == ("Later 4", "HIT"))
    assert put(fragile.edge, 1, "Alice") < 1
    assert read(fragile.edges[1], 1)[0] == "Alice"


def test_a_redis_that_hangs_is_fenced_and_comes_back_with_nothing(fragile: Stack) -> None:
    warm(fragile, 2)
    with hanging(fragile, "redis"):
        assert put(fragile.edge, 2, "Fenced") < AT_MOST
        assert fenced(fragile) == ["redis"]
        for number in range(5):
            assert put(fragile.edges[1], 2, f"Later {number}") < 1
        for edge in fragile.edges:
            assert read(edge, 2)[0] == "Later 4"
            began = time.monotonic()
            requests.get(f"{edge}/users/3", timeout=5)
            assert time.monotonic() - began < 1
    for edge in fragile.edges:
        assert read(edge, 2)[0] == "Later 4"
    wait_until(lambda: not fenced(fragile))
    for edge in fragile.edges:
        assert read(edge, 2)[0] == "Later 4"
    put(fragile.edge, 2, "Bob")
    wait_until(lambda: fragile.redis().exists("user:2"))  # it is used again


def test_while_one_write_waits_for_a_fence_others_wait_no_longer(fragile: Stack) -> None:
    warm(fragile, 1)
    took: list[float] = []
    with hanging(fragile, "edge2"):
        writers = [threading.Thread(target=lambda user=u: took.append(put(fragile.edge, user, "X"))) for u in (1, 2, 3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert max(took) < AT_MOST
    wait_until(lambda: not fenced(fragile))


@pytest.mark.parametrize("name", ["edge2", "redis"])
def test_a_dead_cache_costs_a_write_nothing(fragile: Stack, name: str) -> None:
    warm(fragile, 3)
    with refusing(fragile, name):
        for number in range(5):
            assert put(fragile.edge, 3, f"Name {number}") < 0.5
            assert read(fragile.edge, 3)[0] == f"Name {number}"
        assert fenced(fragile) == []
    for edge in fragile.edges:
        assert read(edge, 3)[0] == "Name 4"


def test_an_edge_that_was_killed_finds_nothing_in_its_old_files(fragile: Stack) -> None:
    name = warm(fragile, 1)
    for pid in leftovers(fragile.data / "edge2"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_up(fragile.edges[1]))
    value, result = read(fragile.edges[1], 1)
    assert (value, result) in ((name, "MISS"), (name, "BYPASS"))
    wait_until(lambda: read(fragile.edges[1], 1) == (name, "HIT"))


def test_a_redis_is_not_saved_by_hand_and_does_not_come_back_with_a_file(fragile: Stack) -> None:
    warm(fragile, 1)
    with pytest.raises(redis.ResponseError):
        fragile.redis().save()
    file = fragile.data / "redis" / "dump.rdb"
    with refusing(fragile, "redis"):
        file.write_bytes(b"REDIS0010")
    assert not file.exists()
    assert fragile.redis().dbsize() == 0 or put(fragile.edge, 1, "Alice") < 1


def test_an_edge_that_writers_cannot_reach_loses_its_lease_and_starts_anew(fragile: Stack) -> None:
    """Cut off from the app on the way that drops take, and not on the one that asks for the lease."""
    warm(fragile, 1)
    with socket.socket() as hole:  # takes connections and never says a word
        hole.bind(("127.0.0.1", 0))
        hole.listen(100)
        address = f"127.0.0.1:{hole.getsockname()[1]}"
        [(name, before)] = fragile.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1")
        fragile.sql("UPDATE caches SET address = %s WHERE name = %s", address, name)
        assert put(fragile.edge, 1, "Unheard") < AT_MOST
        for edge in fragile.edges:
            assert read(edge, 1)[0] == "Unheard"
        wait_until(lambda: fragile.sql("SELECT epoch FROM caches WHERE name = %s", name) != [(before,)])
    assert fragile.sql("SELECT address FROM caches WHERE name = %s", name) != [(address,)]
    assert put(fragile.edge, 1, "Alice") < 1
    for edge in fragile.edges:
        assert read(edge, 1)[0] == "Alice"


def test_at_an_address_where_another_edge_is_the_one_that_was_meant_is_fenced(fragile: Stack) -> None:
    warm(fragile, 1)
    (one, before), (other, _) = fragile.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name")
    fragile.sql("UPDATE caches SET address = (SELECT address FROM caches WHERE name = %s) WHERE name = %s", other, one)
    assert put(fragile.edge, 1, "Elsewhere") < AT_MOST
    for edge in fragile.edges:
        assert read(edge, 1)[0] == "Elsewhere"
    wait_until(lambda: fragile.sql("SELECT epoch FROM caches WHERE name = %s", one) != [(before,)])
    assert put(fragile.edge, 1, "Alice") < 1


def test_edges_that_are_cut_off_from_all_apps_answer_marked_once_their_lease_is_over(fragile: Stack) -> None:
    name = warm(fragile, 1)
    with refusing(fragile, "app1", "app2"):
        wait_until(lambda: read(fragile.edge, 1) == (name, "STALE"), within=6)
        response = requests.get(f"{fragile.edge}/users/1", timeout=5)
        assert response.headers["Cache-Status"] == "nginx; hit; detail=stale"
        assert int(response.headers["Age"]) >= 0
        assert requests.get(f"{fragile.edge}/users?limit=9", timeout=5).status_code == 502
        # What is known to be outdated is not shown, marked or not: the relay still reaches them.
        fragile.sql("UPDATE users SET name = 'Unseen' WHERE id = 1")
        wait_until(lambda: requests.get(f"{fragile.edge}/users/1", timeout=5).status_code == 502)
    wait_until(lambda: read(fragile.edge, 1)[0] == "Unseen")
    put(fragile.edge, 1, "Alice")


def test_an_edge_that_is_gone_for_long_is_forgotten(fragile: Stack) -> None:
    with refusing(fragile, "edge2"):
        wait_until(lambda: fragile.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(1,)], within=40)
        assert put(fragile.edge, 1, "Alice") < 1
    wait_until(lambda: fragile.sql("SELECT count(*) FROM caches WHERE kind = 'edge'") == [(2,)])
