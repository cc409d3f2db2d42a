"""The table of caches: cache leases and fences between parties that are late, down, or at another address."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import psycopg
import pytest
import requests

from testkit.api import User, is_hit
from testkit.databases import redis_at_a_socket
from testkit.inside import signed_post
from testkit.outages import refusing
from testkit.stack import EDGE_SECRET, Stack, folder, free_ports, run, wait_until
from velikiy.coherence import CachePath, Caches, EdgeTier, RedisTier
from velikiy.coherence import redis_lease as redis_lease_module
from velikiy.coherence.host import HOST
from velikiy.coherence.membership import Cache, Renewals
from velikiy.coherence.redis_connections import Connections
from velikiy.coherence.redis_lease import RedisLease
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.shards import Server, ShardMap
from velikiy.coherence.timing import DROP_TIMEOUT_S, EXCLUSION_S, LEASE_S, now
from velikiy.postgres import Database, DatabaseUnavailable


@pytest.fixture
def caches(stack: Stack, database: Database) -> Iterator[Caches]:
    yield Caches(database, threads=8)
    stack.forget_edges("address LIKE '192.0.2.%%'")  # addresses for documentation (RFC 5737)


def cache_row(stack: Stack, name: str) -> tuple[str, bool, bool] | None:
    """Return the epoch of a cache, whether it is fenced, and whether it is excluded."""
    rows = stack.sql("SELECT epoch, fenced_at IS NOT NULL, excluded FROM caches WHERE name = %s", name)
    return (str(rows[0][0]), bool(rows[0][1]), bool(rows[0][2])) if rows else None


def edge_cache(instance_id: str, address: str, epoch: str = "1") -> Cache:
    return Cache(f"{instance_id}@{address}", address, epoch, fenced=False, excluded=False)


class TestFences:
    def test_fenced_edge_gets_no_lease_and_is_excluded_after_the_wait(self, stack: Stack, caches: Caches) -> None:
        with refusing(stack, "relay"):  # the relay would forget the edge as soon as it is excluded
            cache = edge_cache("a/b", "192.0.2.1:1")
            caches.register("a/b", cache.address, "1")
            assert caches.renew("a/b", "1") is not None
            began = time.monotonic()
            caches.fence([cache])
            assert caches.renew("a/b", "1") is None
            caches.await_exclusion([cache])
            assert EXCLUSION_S <= time.monotonic() - began < EXCLUSION_S + 1
            assert cache_row(stack, cache.name) == ("1", True, True)
            began = time.monotonic()
            caches.await_exclusion([cache])
            assert time.monotonic() - began < 0.5  # the cache is excluded already
            caches.register("a/b", cache.address, "2")
            assert cache_row(stack, cache.name) == ("2", False, False)
            assert caches.renew("a/b", "2") is not None

    def test_late_registration_of_an_old_epoch_replaces_no_later_one_of_the_same_run(
        self, stack: Stack, caches: Caches
    ) -> None:
        cache = edge_cache("a/b", "192.0.2.9:1")
        assert caches.register("a/b", cache.address, "run.10") is not None
        assert caches.register("a/b", cache.address, "run.9") is None
        assert cache_row(stack, cache.name) == ("run.10", False, False)
        assert caches.register("a/b", cache.address, "run.11") is not None
        assert caches.register("a/b", cache.address, "another.1") is not None

    def test_late_registration_of_an_old_epoch_does_not_shorten_the_wait_for_exclusion(
        self, stack: Stack, caches: Caches
    ) -> None:
        """The edge still uses the cache lease of its newer epoch."""
        cache = edge_cache("a/b", "192.0.2.2:1", "2")
        caches.register("a/b", cache.address, "2")
        caches.fence([cache])
        late_registration = threading.Timer(0.3, caches.register, ("a/b", cache.address, "1"))
        late_registration.start()
        began = time.monotonic()
        caches.await_exclusion([cache])
        assert time.monotonic() - began >= EXCLUSION_S
        late_registration.join()
        assert cache_row(stack, cache.name) == ("1", False, False)
        assert caches.renew("a/b", "2") is None

    def test_edge_with_two_addresses_keeps_its_lease(self, stack: Stack, caches: Caches) -> None:
        caches.register("a/b", "192.0.2.3:1", "1")
        assert caches.renew("a/b", "1") is not None
        assert caches.renew("a", "1") is None
        # The edge was fenced, and another app, which sees it at another address, registered it again.
        caches.register("a/b", "192.0.2.4:1", "2")
        assert caches.renew("a/b", "2") is not None
        # Writers invalidate at both addresses until the relay forgets the first.
        assert cache_row(stack, "a/b@192.0.2.3:1") == ("1", False, False)

    def test_registration_at_an_address_fences_the_edge_that_was_registered_there(
        self, stack: Stack, caches: Caches
    ) -> None:
        predecessor = edge_cache("old/b", "192.0.2.5:1")
        caches.register("old/b", predecessor.address, "1")
        caches.register("new/b", predecessor.address, "2")
        assert cache_row(stack, predecessor.name) == ("1", True, False)
        wait_until(lambda: cache_row(stack, predecessor.name) is None)  # the relay removes the row

    def test_three_quarters_of_the_threads_of_a_process_wait_for_an_exclusion_at_most(
        self, stack: Stack, database: Database
    ) -> None:
        caches = Caches(database, threads=4)
        cache = edge_cache("a/b", "192.0.2.6:1")
        caches.register("a/b", cache.address, "1")
        caches.fence([cache])
        refused: list[Exception] = []

        def await_exclusion() -> None:
            try:
                caches.await_exclusion([cache])
            except DatabaseUnavailable as error:
                refused.append(error)

        threads = [threading.Thread(target=await_exclusion) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 2

    def test_redis_is_readmitted_only_when_excluded_and_only_by_its_current_epoch(
        self, stack: Stack, database: Database, caches: Caches
    ) -> None:
        with database.autocommit() as connection:
            redis = caches.redis(connection)
            server = ShardMap.parse(redis.address)
            caches.readmit_redis(redis, server)
            assert caches.redis(connection) == redis  # Redis was not excluded
            caches.fence([redis])
            caches.readmit_redis(redis._replace(epoch="an earlier one"), server)
            assert caches.redis(connection).fenced
        wait_until(lambda: caches.in_use() is not None)  # the relay empties Redis and readmits it


class TestClocks:
    def test_edges_stay_registered_when_the_clock_of_postgresql_is_set(self, stack: Stack, caches: Caches) -> None:
        """The trigger dates each renewal as if the clock had been set by an hour since. The relay of the stack looks too."""
        edges = "SELECT name, epoch FROM caches WHERE kind = 'edge' AND fenced_at IS NULL ORDER BY 1"
        before, renewals = stack.sql(edges), Renewals(2.5)
        stack.sql(
            "CREATE FUNCTION dated() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN NEW.renewed_at := NEW.renewed_at - interval '1 h'; RETURN NEW; END$$"
        )
        stack.sql("CREATE TRIGGER dated BEFORE UPDATE ON caches FOR EACH ROW EXECUTE FUNCTION dated()")
        try:
            until = time.monotonic() + 3.5
            while time.monotonic() < until:
                assert caches.expired_edges(renewals) == []
                time.sleep(0.3)
            assert stack.sql(edges) == before
        finally:
            stack.sql("DROP FUNCTION dated CASCADE")

    def test_row_that_is_not_renewed_lapses_by_the_clock_of_the_relay(self) -> None:
        renewals = Renewals(0.2)
        assert renewals.lapsed([("a", "1", "x"), ("b", "1", "x")]) == set()
        time.sleep(0.3)
        assert renewals.lapsed([("a", "1", "x"), ("b", "1", "y")]) == {"a"}
        renewals.forget()
        assert renewals.lapsed([("a", "1", "x")]) == set()


class TestDeletedRows:
    """Rows of the table `caches` are deleted by hand, or the table is emptied."""

    def test_redis_without_a_row_counts_as_fenced_and_requests_succeed(
        self, stack: Stack, caches: Caches, database: Database, new_user: User
    ) -> None:
        path = f"/users/{new_user['id']}"
        with refusing(stack, "relay"):  # the relay would insert the row
            stack.sql("DELETE FROM caches WHERE name = 'redis'")
            assert caches.in_use() is None
            with database.autocommit() as connection:
                assert not caches.redis(connection).excluded  # a writer waits for the exclusion
            wait_until(lambda: [app for app in stack.apps if is_redis_hit(app + path)] == [])
            for number, app in enumerate(stack.apps):
                write_and_read_everywhere(stack, app + path, f"Without {number}")
            shown, purged = (
                run("velikiy", "cache", *command, DATA=str(stack.data)) for command in (("show", path), ("purge", path))
            )
            assert "fenced," in shown.stdout, shown.stderr
            assert purged.stdout == f"dropped {path} in Redis and at 2 edges\n", purged.stderr
        wait_until(lambda: all(is_redis_hit(app + path) for app in stack.apps))
        write_and_read_everywhere(stack, stack.app + path, "With")

    def test_deleted_row_of_redis_comes_back_without_a_stale_read_or_a_failed_request(
        self, stack: Stack, new_user: User
    ) -> None:
        before = cache_row(stack, "redis")
        stack.sql("DELETE FROM caches WHERE name = 'redis'")
        path = f"/users/{new_user['id']}"
        numbers = count()

        def is_back() -> bool:
            write_and_read_everywhere(stack, f"{stack.edge}{path}", f"Number {next(numbers)}")
            row = cache_row(stack, "redis")
            return row is not None and row != before and not row[1]

        wait_until(is_back)
        wait_until(lambda: all(is_redis_hit(app + path) for app in stack.apps))

    def test_table_cannot_be_truncated_while_edges_may_hold_leases(self, stack: Stack) -> None:
        with pytest.raises(psycopg.errors.RaiseException, match="edges may hold leases"):
            stack.sql("TRUNCATE caches")

    def test_all_caches_register_again_after_all_rows_are_deleted_and_no_read_is_stale(
        self, stack: Stack, new_user: User
    ) -> None:
        path = f"/users/{new_user['id']}"
        names = stack.sql("SELECT name FROM caches WHERE fenced_at IS NULL AND NOT excluded ORDER BY name")
        for edge in stack.edges:
            wait_until(lambda edge=edge: is_hit(edge + path))  # type: ignore[misc]
        stack.sql("DELETE FROM caches")
        # At once: the edges still have their leases.
        write_and_read_everywhere(stack, stack.app + path, "Meanwhile")
        wait_until(
            lambda: stack.sql("SELECT name FROM caches WHERE fenced_at IS NULL AND NOT excluded ORDER BY name") == names
        )
        write_and_read_everywhere(stack, stack.edge + path, "After")
        wait_until(lambda: all(is_redis_hit(app + path) for app in stack.apps))
        for edge in stack.edges:
            wait_until(lambda edge=edge: is_hit(edge + path))  # type: ignore[misc]


def is_redis_hit(url: str) -> bool:
    response = requests.get(url, timeout=5)
    assert response.status_code == 200, response.text
    return "redis; hit" in response.headers["Cache-Status"]


def write_and_read_everywhere(stack: Stack, url: str, name: str) -> None:
    """Write the name, and read it through every edge and every app."""
    response = requests.put(url, json={"name": name}, timeout=10)
    assert response.status_code == 200, response.text
    path = "/" + url.split("/", 3)[3]
    responses = [requests.get(base + path, timeout=5) for base in (*stack.edges, *stack.apps)]
    assert [(response.status_code, response.json().get("name")) for response in responses] == (
        [(200, name)] * len(responses)
    )


SERVER = ShardMap.plain(Server("1/0", "localhost:1"))


class TestRedisLease:
    def test_lease_of_redis_is_counted_from_before_the_question_and_is_kept(self) -> None:
        asked_at: list[float] = []

        def in_use() -> ShardMap:
            asked_at.append(now())
            time.sleep(0.2)
            return SERVER

        redis_lease = RedisLease(in_use)
        trust = redis_lease.trust()
        assert trust.until <= asked_at[0] + LEASE_S
        assert trust.holder == SERVER
        assert redis_lease.trust() == trust
        assert len(asked_at) == 1  # the second call did not ask PostgreSQL

    def test_fenced_redis_grants_no_lease(self) -> None:
        assert RedisLease(lambda: None).trust().holder is None

    def test_lease_of_redis_expires_while_postgresql_is_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: list[ShardMap | None] = [SERVER]

        def in_use() -> ShardMap | None:
            if not answers:
                raise DatabaseUnavailable
            return answers.pop()

        redis_lease = RedisLease(in_use)
        trust = redis_lease.trust()
        monkeypatch.setattr(redis_lease_module, "RENEWAL_S", 0)
        assert redis_lease.trust() == trust
        redis_lease._trust = trust._replace(until=now())
        with pytest.raises(DatabaseUnavailable):
            redis_lease.trust()


class TestDrops:
    def test_refused_connection_proves_only_an_edge_on_our_own_loopback_down(self) -> None:
        """Elsewhere the address may belong to another machine by now, while the edge still runs."""
        address = f"127.0.0.1:{free_ports(1)}"
        local, remote = edge_cache(f"{HOST}/x", address), edge_cache("another/x", address)
        assert EdgeTier(EDGE_SECRET).drop([local, remote], None) == [remote]

    def test_refused_connection_proves_redis_down_only_at_its_own_socket(self) -> None:
        url = f"redis://127.0.0.1:{free_ports(1)}/0"
        direct = RedisTier(url, lambda: None, ttl=60, timeout=1, direct=True)
        here = Server("1/0", Connections(url, 1, direct=True).place)
        direct.drop([CachePath("/x", "x")], shards=ShardMap.plain(here))
        for tier, server in (
            (RedisTier(url, lambda: None, ttl=60, timeout=1), here),
            (direct, here._replace(place=here.address)),  # the same address on another machine
        ):
            with pytest.raises(DoesNotAnswer):
                tier.drop([CachePath("/x", "x")], shards=ShardMap.plain(server))

    def test_end_of_its_process_proves_redis_down_at_a_unix_socket(self) -> None:
        """The path proves nothing: another Redis may take it over, or a person may remove it, while Redis serves."""
        with folder() as home, ExitStack() as servers:
            path = home / "redis.sock"
            tier = RedisTier(f"unix://{path}", lambda: None, ttl=60, timeout=1, direct=True)
            first, second = (servers.enter_context(ExitStack()) for _ in range(2))
            first.enter_context(redis_at_a_socket(path))
            server = tier.identify()
            tier._drop_servers._named[0].close_idle()
            path.unlink()
            with pytest.raises(DoesNotAnswer):
                tier.drop([CachePath("/x", "x")], shards=server)
            second.enter_context(redis_at_a_socket(path))
            other = tier.identify()
            assert other.address == f"{path}/0"
            assert not tier.is_surely_gone(server, other)
            second.close()
            with pytest.raises(DoesNotAnswer):
                tier.drop([CachePath("/x", "x")], shards=server)
            assert tier.drop([CachePath("/x", "x")], shards=other) == {}
            first.close()
            assert tier.is_surely_gone(server, other)
            assert tier.drop([CachePath("/x", "x")], shards=server) == {}
            [listener] = server.servers
            elsewhere = listener._replace(place=f"{HOST} {path} {listener.place.rpartition(' ')[2]}")
            for unknown in (listener._replace(place=str(path)), elsewhere):
                assert not tier.is_surely_gone(ShardMap.plain(unknown), other)

    def test_drop_waits_for_several_silent_edges_no_longer_than_for_one(self) -> None:
        with ExitStack() as context:
            silent = [context.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
            edges = [
                edge_cache(f"{HOST}/x{number}", f"127.0.0.1:{server.getsockname()[1]}")
                for number, server in enumerate(silent)
            ]
            began = time.monotonic()
            assert EdgeTier(EDGE_SECRET).drop(edges, None) == edges
            assert time.monotonic() - began < 3 * DROP_TIMEOUT_S

    def test_edge_whose_control_listener_no_app_reaches_is_not_registered(self, stack: Stack) -> None:
        form = {"instance_id": f"{HOST}/unreachable", "epoch": "1", "port": str(free_ports(1))}
        # On our own loopback, too, a refusal proves nothing before the edge has responded there once.
        assert signed_post(stack.app, "/.lease/register", form).status_code == 424
        with socket.create_server(("127.0.0.1", 0)) as silent:
            form["port"] = str(silent.getsockname()[1])
            assert signed_post(stack.app, "/.lease/register", form).status_code == 424
        assert stack.sql("SELECT name FROM caches WHERE name LIKE %s", f"{HOST}/unreachable@%") == []

    def test_edge_passes_no_lease_request_of_a_client_to_an_app(self, stack: Stack) -> None:
        form = {"instance_id": "x", "epoch": "1", "port": "1"}
        for spelling in ("/.lease/register", "/%2elease/register", "/x/../.lease/register", "//.lease/register"):
            request = requests.Request("POST", stack.edge, data=form).prepare()
            request.url = stack.edge + spelling
            with requests.Session() as session:
                assert session.send(request, timeout=5).status_code == 404
