"""The table of caches: leases and fences between parties that are late, dead or somewhere else."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import pytest
import requests

from testkit.api import User
from testkit.outages import refusing
from testkit.stack import Stack, free_ports, run, wait_until
from velikiy.coherence import CachePath, Caches, EdgeTier, RedisTier
from velikiy.coherence import redis_lease as redis_lease_module
from velikiy.coherence.membership import HOST, Cache
from velikiy.coherence.redis_lease import RedisLease
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.timing import DROP_TIMEOUT_S, EXCLUSION_S, LEASE_S, now
from velikiy.postgres import Database, DatabaseUnavailable


@pytest.fixture
def caches(stack: Stack, database: Database) -> Iterator[Caches]:
    yield Caches(database, threads=8)
    stack.sql("DELETE FROM caches WHERE address LIKE '192.0.2.%%'")  # a documentation's addresses, nobody's


def row(stack: Stack, name: str) -> tuple[str, bool, bool] | None:
    """Epoch, fenced, left out."""
    rows = stack.sql("SELECT epoch, fenced_at IS NOT NULL, left_out FROM caches WHERE name = %s", name)
    return (str(rows[0][0]), bool(rows[0][1]), bool(rows[0][2])) if rows else None


def edge(place: str, address: str, epoch: str = "1") -> Cache:
    return Cache(f"{place}@{address}", address, epoch, fenced=False, left_out=False)


class TestFences:
    def test_a_fenced_edge_is_refused_and_after_the_wait_left_out(self, stack: Stack, caches: Caches) -> None:
        with refusing(stack, "relay"):  # which forgets an edge as soon as it is left out
            cache = edge("a/b", "192.0.2.1:1")
            caches.register("a/b", cache.address, "1")
            assert caches.renew("a/b", "1") is not None
            began = time.monotonic()
            caches.fence([cache])
            assert caches.renew("a/b", "1") is None
            caches.await_exclusion([cache])
            assert EXCLUSION_S <= time.monotonic() - began < EXCLUSION_S + 1
            assert row(stack, cache.name) == ("1", True, True)
            began = time.monotonic()
            caches.await_exclusion([cache])
            assert time.monotonic() - began < 0.5  # somebody else has waited
            caches.register("a/b", cache.address, "2")
            assert row(stack, cache.name) == ("2", False, False)
            assert caches.renew("a/b", "2") is not None

    def test_a_registration_that_is_carried_out_late_ends_nobodys_wait(self, stack: Stack, caches: Caches) -> None:
        """The edge goes on under the lease of the newer one."""
        cache = edge("a/b", "192.0.2.2:1", "2")
        caches.register("a/b", cache.address, "2")
        caches.fence([cache])
        late = threading.Timer(0.3, caches.register, ("a/b", cache.address, "1"))
        late.start()
        began = time.monotonic()
        caches.await_exclusion([cache])
        assert time.monotonic() - began >= EXCLUSION_S
        late.join()
        assert row(stack, cache.name) == ("1", False, False)
        assert caches.renew("a/b", "2") is None

    def test_an_edge_that_apps_see_at_two_addresses_keeps_its_lease(self, stack: Stack, caches: Caches) -> None:
        caches.register("a/b", "192.0.2.3:1", "1")
        assert caches.renew("a/b", "1") is not None
        assert caches.renew("a", "1") is None
        caches.register("a/b", "192.0.2.4:1", "2")  # it was fenced meanwhile, and another app took it in
        assert caches.renew("a/b", "2") is not None
        assert row(stack, "a/b@192.0.2.3:1") == ("1", False, False)  # writers drop at both, until the relay forgets it

    def test_whoever_was_at_the_address_before_is_fenced(self, stack: Stack, caches: Caches) -> None:
        before = edge("old/b", "192.0.2.5:1")
        caches.register("old/b", before.address, "1")
        caches.register("new/b", before.address, "2")
        assert row(stack, before.name) == ("1", True, False)
        wait_until(lambda: row(stack, before.name) is None)  # the relay sees to that

    def test_not_all_threads_of_a_process_wait(self, stack: Stack, database: Database) -> None:
        caches = Caches(database, threads=4)
        cache = edge("a/b", "192.0.2.6:1")
        caches.register("a/b", cache.address, "1")
        caches.fence([cache])
        refused: list[Exception] = []

        def wait() -> None:
            try:
                caches.await_exclusion([cache])
            except DatabaseUnavailable as error:
                refused.append(error)

        waiting = [threading.Thread(target=wait) for _ in range(5)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        assert len(refused) == 2

    def test_redis_comes_back_by_its_epoch_only(self, stack: Stack, database: Database, caches: Caches) -> None:
        with database.autocommit() as connection:
            redis = caches.redis(connection)
            caches.readmit_redis(redis)
            assert caches.redis(connection) == redis  # it was not left out
            caches.fence([redis])
            caches.readmit_redis(redis._replace(epoch="an earlier one"))
            assert caches.redis(connection).fenced
        wait_until(lambda: not caches.redis_is_fenced())  # the relay empties it and puts it back


class TestRowsThatDisappear:
    """Somebody deletes them, or empties the table."""

    def test_while_redis_has_no_row_it_is_fenced_and_clients_are_answered(
        self, stack: Stack, caches: Caches, database: Database, new_user: User
    ) -> None:
        path = f"/users/{new_user['id']}"
        with refusing(stack, "relay"):  # which would insert it
            stack.sql("DELETE FROM caches WHERE name = 'redis'")
            assert caches.redis_is_fenced()
            with database.autocommit() as connection:
                assert not caches.redis(connection).left_out  # a writer waits until nobody uses it any more
            wait_until(lambda: [app for app in stack.apps if uses_redis(app + path)] == [])
            for number, app in enumerate(stack.apps):
                written_and_read(stack, app + path, f"Without {number}")
            shown, purged = (
                run("velikiy", "cache", *what, DATA=str(stack.data)) for what in (("show", path), ("purge", path))
            )
            assert "fenced: not in use" in shown.stdout, shown.stderr
            assert purged.stdout == f"dropped {path} in Redis and at 2 edges\n", purged.stderr
        wait_until(lambda: all(uses_redis(app + path) for app in stack.apps))
        written_and_read(stack, stack.app + path, "With")

    def test_the_row_of_redis_comes_back_and_no_client_notices(self, stack: Stack, new_user: User) -> None:
        before = row(stack, "redis")
        stack.sql("DELETE FROM caches WHERE name = 'redis'")
        path = f"/users/{new_user['id']}"
        numbers = count()

        def is_back() -> bool:
            written_and_read(stack, f"{stack.edge}{path}", f"Number {next(numbers)}")
            found = row(stack, "redis")
            return found is not None and found != before and not found[1]

        wait_until(is_back)
        wait_until(lambda: all(uses_redis(app + path) for app in stack.apps))

    def test_after_a_truncate_all_caches_come_back(self, stack: Stack, new_user: User) -> None:
        path = f"/users/{new_user['id']}"
        names = stack.sql("SELECT name FROM caches WHERE fenced_at IS NULL ORDER BY name")
        stack.sql("TRUNCATE caches")
        wait_until(lambda: stack.sql("SELECT name FROM caches WHERE fenced_at IS NULL ORDER BY name") == names)
        written_and_read(stack, stack.edge + path, "After")
        wait_until(lambda: all(uses_redis(app + path) for app in stack.apps))
        for edge in stack.edges:
            wait_until(lambda edge=edge: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]


def uses_redis(url: str) -> bool:
    response = requests.get(url, timeout=5)
    assert response.status_code == 200, response.text
    return "redis; hit" in response.headers["Cache-Status"]


def written_and_read(stack: Stack, url: str, name: str) -> None:
    """A write is answered, and seen wherever one asks."""
    response = requests.put(url, json={"name": name}, timeout=10)
    assert response.status_code == 200, response.text
    path = "/" + url.split("/", 3)[3]
    responses = [requests.get(base_url + path, timeout=5) for base_url in (*stack.edges, *stack.apps)]
    assert [(response.status_code, response.json().get("name")) for response in responses] == [(200, name)] * len(
        responses
    )


class TestTrust:
    def test_who_has_asked_may_use_redis_for_the_lease_from_before_the_question(self) -> None:
        asked: list[float] = []

        def fenced() -> bool:
            asked.append(now())
            time.sleep(0.2)
            return False

        redis_lease = RedisLease(fenced)
        until = redis_lease.trusted_until()
        assert until <= asked[0] + LEASE_S
        assert redis_lease.trusted_until() == until
        assert len(asked) == 1  # not each time

    def test_a_fenced_redis_is_not_used(self) -> None:
        assert RedisLease(lambda: True).trusted_until() == 0

    def test_without_an_answer_what_was_promised_runs_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        responses = [False]

        def fenced() -> bool:
            if not responses:
                raise DatabaseUnavailable
            return responses.pop()

        redis_lease = RedisLease(fenced)
        until = redis_lease.trusted_until()
        monkeypatch.setattr(redis_lease_module, "RENEWAL_S", 0)
        assert redis_lease.trusted_until() == until
        redis_lease._until = now()
        with pytest.raises(DatabaseUnavailable):
            redis_lease.trusted_until()


class TestDrops:
    def test_a_refused_connection_shows_a_dead_edge_only_beside_us(self) -> None:
        """Elsewhere the address may be another machine's by now, and the edge that was meant lives on."""
        address = f"127.0.0.1:{free_ports(1)}"
        dead, elsewhere = edge(f"{HOST}/x", address), edge("another/x", address)
        assert EdgeTier().drop([dead, elsewhere], None) == [elsewhere]

    def test_a_redis_that_somebody_else_may_refuse_for_is_not_taken_for_dead(self) -> None:
        url = f"redis://127.0.0.1:{free_ports(1)}/0"
        redis_lease = RedisLease(lambda: False)
        RedisTier(url, redis_lease, ttl=60, timeout=1, direct=True).drop([CachePath("/x", "x")])
        with pytest.raises(DoesNotAnswer):
            RedisTier(url, redis_lease, ttl=60, timeout=1).drop([CachePath("/x", "x")])

    def test_many_that_are_silent_cost_no_more_than_one(self) -> None:
        with ExitStack() as context:
            holes = [context.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
            edges = [edge(f"{HOST}/x{n}", f"127.0.0.1:{hole.getsockname()[1]}") for n, hole in enumerate(holes)]
            began = time.monotonic()
            assert EdgeTier().drop(edges, None) == edges
            assert time.monotonic() - began < 3 * DROP_TIMEOUT_S

    def test_an_edge_that_cannot_be_told_gets_no_lease(self, stack: Stack) -> None:
        asked = {"place": f"{HOST}/nobody", "epoch": "1", "port": str(free_ports(1))}
        # A refusal on our own loopback is no death either, before it has once answered there.
        assert requests.post(f"{stack.app}/.lease/register", data=asked, timeout=5).status_code == 424
        with socket.create_server(("127.0.0.1", 0)) as hole:
            asked["port"] = str(hole.getsockname()[1])
            assert requests.post(f"{stack.app}/.lease/register", data=asked, timeout=5).status_code == 424
        assert stack.sql("SELECT name FROM caches WHERE name LIKE %s", f"{HOST}/nobody@%") == []

    def test_clients_cannot_ask_for_leases(self, stack: Stack) -> None:
        asked = {"place": "x", "epoch": "1", "port": "1"}
        for spelling in ("/.lease/register", "/%2elease/register", "/x/../.lease/register", "//.lease/register"):
            request = requests.Request("POST", stack.edge, data=asked).prepare()
            request.url = stack.edge + spelling
            with requests.Session() as session:
                assert session.send(request, timeout=5).status_code == 404
