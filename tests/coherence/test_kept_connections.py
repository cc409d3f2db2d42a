"""Connections that are kept between requests: to Redis, to edges and to PostgreSQL. A connection is never used again
after a reply has missed its deadline, and a connection that broke in between costs no more than a new one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import redis.exceptions

from testkit.stack import EDGE_SECRET, Stack, wait_until
from testkit.tcp_proxy import CloseConnection, DelayedRequest, ProxiedConnection, TcpProxy, on_first, tcp_proxy
from velikiy import names
from velikiy.coherence import CachePath, EdgeTier, Entry, FillLease, RedisTier
from velikiy.coherence.membership import Cache, Caches
from velikiy.coherence.redis_connections import DROP, FILL, READ, Connections
from velikiy.coherence.redis_servers import RedisServers
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.timing import DROP_TIMEOUT_S
from velikiy.postgres import Connection, Database, DatabaseUnavailable

PATH = CachePath("/kept/1", "kept:1")
OTHER_PATH = CachePath("/kept/2", "kept:2")


def drop(tier: RedisTier, path: CachePath) -> dict[CachePath, FillLease]:
    """Drop a path that the writer wants to prefill."""
    shards = tier.registered() or tier.identify()
    return tier.drop([path], [path], shards=shards)


@pytest.fixture
def redis_proxy(stack: Stack) -> Iterator[TcpProxy]:
    with tcp_proxy(stack.redis_socket) as proxy:
        yield proxy
    stack.redis().delete(PATH.key, OTHER_PATH.key, "kept:text", "kept:list", "kept:number")


def is_stored(stack: Stack, value: bytes) -> bool:
    return bool(stack.redis().get("kept:number") == value)


def url_through(stack: Stack, proxy: TcpProxy) -> str:
    return stack.redis_through(proxy.port)


def close_connection(connection: ProxiedConnection, data: bytes) -> bytes:
    """A hook that closes the connection instead of passing the bytes on."""
    raise CloseConnection


def hold_until(event: threading.Event) -> Callable[[ProxiedConnection, bytes], bytes]:
    """Return a hook that passes nothing on until the event is set."""

    def hold(connection: ProxiedConnection, data: bytes) -> bytes:
        event.wait(9)
        return data

    return hold


class TestToRedis:
    @pytest.fixture
    def connections(self, stack: Stack, redis_proxy: TcpProxy) -> Connections:
        return Connections(url_through(stack, redis_proxy), 0.3)

    @pytest.fixture
    def tier(self, stack: Stack, redis_proxy: TcpProxy) -> RedisTier:
        shards = RedisServers(stack.redis_url, 1).discover()
        return RedisTier(url_through(stack, redis_proxy), lambda: shards, ttl=60, timeout=0.3)

    def test_successive_exchanges_share_one_redis_connection(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        for number in range(5):
            assert connections.exchange(("SET", "kept:text", number), ("GET", "kept:text")) == [b"OK", b"%d" % number]
        assert redis_proxy.accepted == 1

    def test_late_reply_of_redis_is_not_taken_for_the_reply_to_a_later_command(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        release = threading.Event()
        connections.exchange(("SET", "kept:text", "mine"))
        redis_proxy.on_reply = hold_until(release)
        with pytest.raises(redis.exceptions.TimeoutError):
            connections.exchange(("GET", "kept:text"))
        redis_proxy.reset_hooks()
        release.set()
        for number in range(3):
            assert connections.exchange(("ECHO", f"{number}")) == [b"%d" % number]

    def test_error_of_one_redis_command_leaves_the_others_and_the_connection_intact(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        with pytest.raises(redis.exceptions.ResponseError):
            connections.exchange(("SET", "kept:text", "1"), ("LPUSH", "kept:text", "x"), ("SET", "kept:text", "2"))
        assert connections.exchange(("GET", "kept:text")) == [b"2"]
        assert redis_proxy.accepted == 1

    def test_broken_redis_connection_is_replaced_without_an_error(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        for number in range(3):
            assert connections.exchange(("ECHO", f"{number}")) == [b"%d" % number]
            redis_proxy.close_connections()

    def test_redis_connections_do_not_run_out_after_many_failures(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        """The pool of redis-py counts the connections that it has made, and stops at a hundred."""
        redis_proxy.refuse()
        for _ in range(120):
            with pytest.raises(redis.exceptions.ConnectionError):
                connections.exchange(("PING",))
        redis_proxy.listen()
        assert connections.exchange(("PING",)) == [b"PONG"]

    def test_threads_that_share_redis_connections_each_get_their_own_replies(
        self, connections: Connections, redis_proxy: TcpProxy
    ) -> None:
        wrong: list[object] = []

        def exchange_many(thread_number: int) -> None:
            for number in range(200):
                sent = b"%d %d" % (thread_number, number)
                try:
                    reply = connections.exchange(("ECHO", sent))
                except redis.exceptions.ConnectionError:
                    continue  # the connection of the second attempt was closed as well
                if reply != [sent]:
                    wrong.append((sent, reply))

        threads = [threading.Thread(target=exchange_many, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            redis_proxy.close_connections()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(connections._idle) <= len(threads)

    def test_error_reply_is_raised_after_all_replies_were_read(self, connections: Connections) -> None:
        with pytest.raises(redis.exceptions.ResponseError):
            connections.exchange(("LPUSH",), ("ECHO", "behind the error"))
        assert connections.exchange(("ECHO", "next")) == [b"next"]

    def test_script_that_redis_does_not_know_is_sent_after_the_commands_that_preceded_it(
        self, stack: Stack, connections: Connections
    ) -> None:
        stack.redis().script_flush()
        stack.redis().set(OTHER_PATH.key, "something")
        [dropped] = connections.run(DROP, (PATH.key, "token", 3000), before=[("UNLINK", OTHER_PATH.key)])
        assert (dropped, stack.redis().exists(OTHER_PATH.key)) == (0, 0)
        assert connections.run(FILL, (PATH.key, "", "token", b"200\t\t\t\n{}", 60_000)) == [1]
        assert connections.run(READ, (PATH.key, "", "another", 3000, connections.identify().data_set))[0][:2] == [
            1,
            b"200\t\t\t\n{}",
        ]

    def test_delayed_redis_read_does_not_grant_the_fill_lease_of_its_repetition(
        self, stack: Stack, tier: RedisTier, redis_proxy: TcpProxy
    ) -> None:
        lease = self.repeat_delayed(stack, redis_proxy, lambda: tier.read(PATH, ""), tier)
        assert isinstance(lease, FillLease)
        tier.fill(PATH, "", lease, Entry(200, b"{}"))
        assert tier.read(PATH, "", patience=0) is None  # the delayed request holds the fill lease

    def test_delayed_redis_drop_does_not_grant_the_fill_lease_of_its_repetition(
        self, stack: Stack, tier: RedisTier, redis_proxy: TcpProxy
    ) -> None:
        lease = self.repeat_delayed(stack, redis_proxy, lambda: drop(tier, PATH)[PATH], tier)
        assert isinstance(lease, FillLease)
        assert lease not in str(stack.redis().hgetall(PATH.key))

    def repeat_delayed(
        self, stack: Stack, redis_proxy: TcpProxy, operation: Callable[[], object], tier: RedisTier
    ) -> object:
        """Return the result of an operation whose first request is delayed and then repeated over a second connection.

        After the repetition another writer drops the path, and then the first request arrives.
        """
        tier.identify()
        tier.read(OTHER_PATH, "")
        drop(tier, OTHER_PATH)  # opens the connections that are kept
        redis_proxy.on_request = delayed = DelayedRequest()
        result = operation()
        assert delayed.received
        stack.redis().delete(PATH.key)
        delayed.release.set()
        wait_until(lambda: stack.redis().hexists(PATH.key, "lease:"))
        return result

    def test_lost_drop_reply_grants_no_fill_lease(self, tier: RedisTier, redis_proxy: TcpProxy) -> None:
        redis_proxy.on_reply = close_connection
        with pytest.raises(DoesNotAnswer):
            drop(tier, PATH)
        redis_proxy.reset_hooks()
        assert drop(tier, PATH)


class TestToEdges:
    @pytest.fixture
    def edge(self, stack: Stack) -> Cache:
        """A running edge, as PostgreSQL lists it."""
        [row] = stack.sql(
            "SELECT name, address, epoch, false, false FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1"
        )
        return Cache(*row)

    @pytest.fixture
    def edge_proxy(self, edge: Cache) -> Iterator[TcpProxy]:
        host, _, port = edge.address.rpartition(":")
        with tcp_proxy((host, int(port))) as proxy:
            yield proxy

    @pytest.fixture
    def proxied_edge(self, edge: Cache, edge_proxy: TcpProxy) -> Cache:
        return edge._replace(address=f"127.0.0.1:{edge_proxy.port}")

    def test_successive_drops_share_one_edge_connection(self, proxied_edge: Cache, edge_proxy: TcpProxy) -> None:
        tier = EdgeTier(EDGE_SECRET)
        for _ in range(5):
            assert tier.drop([proxied_edge], [PATH]) == []
        assert edge_proxy.accepted == 1

    def test_edge_connection_that_broke_between_drops_is_replaced(
        self, proxied_edge: Cache, edge_proxy: TcpProxy
    ) -> None:
        tier = EdgeTier(EDGE_SECRET)
        for _ in range(3):
            assert tier.drop([proxied_edge], [PATH]) == []
            edge_proxy.close_connections()

    def test_drop_is_repeated_when_its_edge_connection_breaks(self, proxied_edge: Cache, edge_proxy: TcpProxy) -> None:
        tier = EdgeTier(EDGE_SECRET)
        tier.drop([proxied_edge], [PATH])
        edge_proxy.requests.clear()

        def close() -> None:
            raise CloseConnection

        edge_proxy.on_reply = on_first(close)
        assert tier.drop([proxied_edge], [PATH]) == []
        assert edge_proxy.requests[0] == edge_proxy.requests[1]  # a path may be dropped twice

    @pytest.mark.parametrize(
        "response",
        [
            b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 20",
            b"HTTP/1.1 204 No Content\r\n",
            b"what?",
        ],
    )
    def test_edge_response_other_than_204_acknowledges_no_drop_and_closes_the_connection(
        self, proxied_edge: Cache, edge_proxy: TcpProxy, response: bytes
    ) -> None:
        tier = EdgeTier(EDGE_SECRET)
        edge_proxy.on_reply = lambda connection, data: response
        began = time.monotonic()
        assert tier.drop([proxied_edge], [PATH]) == [proxied_edge]
        assert time.monotonic() - began < DROP_TIMEOUT_S + 0.5
        edge_proxy.reset_hooks()
        assert tier.drop([proxied_edge], [PATH]) == []
        assert edge_proxy.accepted == 2

    def test_late_acknowledgement_of_an_edge_is_not_taken_for_that_of_the_next_drop(
        self, proxied_edge: Cache, edge_proxy: TcpProxy
    ) -> None:
        tier = EdgeTier(EDGE_SECRET)
        tier.drop([proxied_edge], [PATH])
        release = threading.Event()
        edge_proxy.on_reply = on_first(lambda: release.wait(9))
        assert tier.drop([proxied_edge], [PATH]) == [proxied_edge]
        release.set()
        edge_proxy.on_reply = lambda connection, data: data.replace(b"204", b"500")
        assert tier.drop([proxied_edge], [PATH]) == [proxied_edge]

    def test_missing_acknowledgement_closes_all_kept_connections_to_the_edge(
        self, proxied_edge: Cache, edge_proxy: TcpProxy
    ) -> None:
        """The kept connections may lead to one worker, which is stopped while the edge's other workers respond."""
        tier = EdgeTier(EDGE_SECRET)
        barrier = threading.Barrier(3)

        def reply_together(connection: ProxiedConnection, data: bytes) -> bytes:
            barrier.wait(5)
            return data

        edge_proxy.on_reply = reply_together
        threads = [threading.Thread(target=tier.drop, args=([proxied_edge], [PATH])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(edge_proxy.connections) == 3
        held = list(edge_proxy.connections)
        release = threading.Event()

        def hold_old_connections(connection: ProxiedConnection, data: bytes) -> bytes:
            if connection in held:
                release.wait(9)
            return data

        edge_proxy.on_reply = hold_old_connections
        assert tier.drop([proxied_edge], [PATH]) == [proxied_edge]
        assert tier.drop([proxied_edge], [PATH]) == []
        release.set()

    def test_edge_with_an_invalid_host_name_counts_as_unreachable(self, edge: Cache) -> None:
        unreachable = edge._replace(address="a..b:1")
        assert EdgeTier(EDGE_SECRET).drop([unreachable], [PATH]) == [unreachable]
        assert not EdgeTier(EDGE_SECRET).reaches(unreachable)


class TestToPostgreSQL:
    @pytest.fixture
    def database(self, stack: Stack) -> Iterator[Database]:
        database = Database(stack.postgres, size=1, timeout=1)
        database.open()
        stack.sql("CREATE TABLE kept (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        yield database
        database.close()
        stack.sql("DROP TABLE kept")

    def stored_numbers(self, stack: Stack) -> list[int]:
        return [n for (n,) in stack.sql("SELECT n FROM kept ORDER BY n")]

    def test_idle_postgresql_connection_that_broke_fails_no_request(self, stack: Stack, database: Database) -> None:
        for _ in range(3):
            terminate(stack, transact(database, insert, lambda connection: connection.execute("DELETE FROM kept")))

    def test_connection_that_breaks_in_a_transaction_leaves_no_change_and_is_replaced(
        self, stack: Stack, database: Database
    ) -> None:
        with pytest.raises(DatabaseUnavailable):
            transact(database, insert, lambda connection: terminate(stack, connection), insert)
        assert self.stored_numbers(stack) == []
        transact(database, insert)
        assert self.stored_numbers(stack) == [1]

    def test_connection_that_breaks_before_commit_reports_no_success(self, stack: Stack, database: Database) -> None:
        with pytest.raises(DatabaseUnavailable):
            transact(database, insert, lambda connection: terminate(stack, connection))
        assert self.stored_numbers(stack) == []

    def test_connection_that_breaks_before_rollback_does_not_hide_the_error(
        self, stack: Stack, database: Database
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            transact(database, insert, lambda connection: terminate(stack, connection), lambda _: 1 // 0)
        transact(database, insert)
        assert self.stored_numbers(stack) == [1]

    def test_connection_returns_to_its_pool_outside_of_a_transaction(self, stack: Stack, database: Database) -> None:
        def interrupt(connection: Connection) -> None:
            raise KeyboardInterrupt

        for work, error in (
            (divide_by_zero, psycopg.errors.DivisionByZero),
            (interrupt, KeyboardInterrupt),
            (insert, psycopg.errors.UniqueViolation),  # the deferred constraint is checked by COMMIT
        ):
            with pytest.raises(error):
                transact(database, insert, work)
            connection = transact(database)
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert self.stored_numbers(stack) == []

    def test_transaction_with_a_suppressed_error_is_not_reported_as_committed(
        self, stack: Stack, database: Database
    ) -> None:
        """PostgreSQL answers ROLLBACK, which is no error, to COMMIT after an error that the caller suppressed."""

        def suppress_error(connection: Connection) -> None:
            with suppress(psycopg.errors.DivisionByZero):
                divide_by_zero(connection)

        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            transact(database, insert, suppress_error)
        assert self.stored_numbers(stack) == []

    def test_connection_that_missed_its_deadline_is_not_used_again(self, database: Database) -> None:
        used: list[Connection] = []
        with pytest.raises(DatabaseUnavailable):
            transact(
                database,
                used.append,
                lambda connection: connection.execute("SET LOCAL statement_timeout = 0"),
                lambda connection: connection.execute("SELECT pg_sleep(3)"),
            )
        assert used[0].closed
        assert transact(database) is not used[0]

    def test_pending_notification_on_a_kept_connection_does_no_harm(self, stack: Stack, database: Database) -> None:
        with database.autocommit() as connection:
            connection.execute("LISTEN kept")
        stack.sql("NOTIFY kept")
        with database.autocommit() as reused:
            assert reused.execute("SELECT 1").fetchone() == (1,)
        assert reused is connection


def test_fence_of_redis_can_be_read_after_postgresql_closed_every_connection(stack: Stack) -> None:
    database = Database(stack.postgres, size=2, timeout=2)
    database.open()
    caches = Caches(database, threads=2)
    assert caches.in_use()
    stack.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'velikiy reads'")
    assert caches.in_use()
    database.close()


def transact(database: Database, *work: Callable[[Connection], object]) -> Connection:
    with database.transaction() as connection:
        for step in work:
            step(connection)
    return connection


def insert(connection: Connection) -> None:
    connection.execute("INSERT INTO kept VALUES (1)")


def divide_by_zero(connection: Connection) -> None:
    connection.execute("SELECT 1/0")


def terminate(stack: Stack, connection: Connection) -> None:
    """End the session of this connection, as a restart of PostgreSQL does."""
    stack.sql("SELECT pg_terminate_backend(%s, 5000)", connection.info.backend_pid)


@pytest.fixture
def silent_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No name server answers. Yield the names that are looked up."""
    asked: list[str] = []
    over = threading.Event()
    real = socket.getaddrinfo

    def wait(host: Any, *arguments: Any, **options: Any) -> Any:
        if not str(host).endswith(".example"):
            return real(host, *arguments, **options)
        asked.append(host)
        over.wait(10)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    yield asked
    over.set()


def test_name_server_that_does_not_answer_keeps_no_request_waiting_for_redis(silent_names: list[str]) -> None:
    tier = RedisTier("redis://redis.example:6379", lambda: None, ttl=60, timeout=0.2)

    def identify(_: int) -> float:
        began = time.monotonic()
        with pytest.raises(DoesNotAnswer):
            tier.identify()
        return time.monotonic() - began

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(identify, range(8))) < DROP_TIMEOUT_S + 1
    assert silent_names == ["redis.example"], "all requests share one look-up"


def test_name_server_that_does_not_answer_makes_an_edge_silent_in_time(silent_names: list[str]) -> None:
    edge = Cache("instance@edge.example:8081", "edge.example:8081", "1", fenced=False, excluded=False)
    began = time.monotonic()
    assert EdgeTier(EDGE_SECRET).drop([edge], [PATH]) == [edge]
    assert time.monotonic() - began < DROP_TIMEOUT_S + 1


def test_last_address_of_a_name_counts_while_no_name_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    answers.set()
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "known.example" and not answers.wait(10):
            raise socket.gaierror("no answer")
        return real("127.0.0.1" if host == "known.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(names, "FRESH_S", 0.0)
    assert names.addresses("known.example", 5) == ("127.0.0.1",)
    answers.clear()
    try:
        began = time.monotonic()
        assert names.addresses("known.example", 0.4) == ("127.0.0.1",)
        assert time.monotonic() - began < 1
    finally:
        answers.set()


def test_new_connection_follows_a_changed_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["127.0.0.1"]
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        return real(found[0] if host == "moves.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(names, "FRESH_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.2", 0)) as other:
        names.connect("moves.example", server.getsockname()[1], 5).close()
        found[0] = "127.0.0.2"
        names.connect("moves.example", other.getsockname()[1], 5).close()
