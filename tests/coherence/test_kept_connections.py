"""Connections that are kept between requests: to Redis, to edges, to PostgreSQL. None is used again after a reply was
missed, and none that broke meanwhile costs more than a new one."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

import psycopg
import pytest
import redis.exceptions

from testkit.stack import Stack, wait_until
from testkit.tcp_proxy import CloseConnection, DelayedRequest, ProxiedConnection, TcpProxy, on_first, tcp_proxy
from velikiy.coherence import CachePath, EdgeTier, Entry, Lease, RedisTier
from velikiy.coherence.membership import Cache, Caches
from velikiy.coherence.redis_connections import DROP, FILL, READ, Connections
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.timing import DROP_TIMEOUT_S, now
from velikiy.postgres import Connection, Database, DatabaseUnavailable

PATH = CachePath("/kept/1", "kept:1")
OTHER = CachePath("/kept/2", "kept:2")


class Always:
    """Redis is never fenced."""

    def trusted_until(self) -> float:
        return now() + 9


@pytest.fixture
def way(stack: Stack) -> Iterator[TcpProxy]:
    """To Redis."""
    with tcp_proxy(("127.0.0.1", urlsplit(stack.redis_url).port or 6379)) as way:
        yield way
    stack.redis().delete(PATH.key, OTHER.key, "kept:text", "kept:list", "kept:unheard")


def is_kept(stack: Stack, said: bytes) -> bool:
    return bool(stack.redis().get("kept:unheard") == said)


def url(stack: Stack, way: TcpProxy) -> str:
    return stack.redis_url.replace(f":{urlsplit(stack.redis_url).port}", f":{way.port}")


class TestToRedis:
    @pytest.fixture
    def connections(self, stack: Stack, way: TcpProxy) -> Connections:
        return Connections(url(stack, way), 0.3)

    @pytest.fixture
    def tier(self, stack: Stack, way: TcpProxy) -> RedisTier:
        return RedisTier(url(stack, way), Always(), ttl=60, timeout=0.3)  # type: ignore[arg-type]

    def test_one_is_enough_for_questions_that_follow_each_other(self, connections: Connections, way: TcpProxy) -> None:
        for number in range(5):
            assert connections.exchange(("SET", "kept:text", number), ("GET", "kept:text")) == [b"OK", b"%d" % number]
        assert len(way.connections) == 1

    def test_a_reply_that_comes_too_late_is_nobodys(self, connections: Connections, way: TcpProxy) -> None:
        go_on = threading.Event()

        def hold(link: ProxiedConnection, said: bytes) -> bytes:
            go_on.wait(9)
            return said

        connections.exchange(("SET", "kept:text", "mine"))
        way.on_reply = hold
        with pytest.raises(redis.exceptions.TimeoutError):
            connections.exchange(("GET", "kept:text"))
        way.reset_hooks()
        go_on.set()
        for number in range(3):
            assert connections.exchange(("ECHO", f"{number}")) == [b"%d" % number]

    def test_of_several_commands_one_may_fail_and_the_others_are_heard(
        self, connections: Connections, way: TcpProxy
    ) -> None:
        with pytest.raises(redis.exceptions.ResponseError):
            connections.exchange(("SET", "kept:text", "1"), ("LPUSH", "kept:text", "x"), ("SET", "kept:text", "2"))
        assert connections.exchange(("GET", "kept:text")) == [b"2"]
        assert len(way.connections) == 1

    def test_those_that_broke_are_replaced_at_once(self, connections: Connections, way: TcpProxy) -> None:
        for number in range(3):
            assert connections.exchange(("ECHO", f"{number}")) == [b"%d" % number]
            way.close_connections()

    def test_however_many_broke_there_is_one_more(self, connections: Connections, way: TcpProxy) -> None:
        """redis-py's pool counts those that it made, and stops at a hundred."""
        way.refuse()
        for _ in range(120):
            with pytest.raises(redis.exceptions.ConnectionError):
                connections.exchange(("PING",))
        way.listen()
        assert connections.exchange(("PING",)) == [b"PONG"]

    def test_threads_share_them_and_each_gets_its_own_answers(self, connections: Connections, way: TcpProxy) -> None:
        wrong: list[object] = []

        def ask(who: int) -> None:
            for number in range(200):
                mine = b"%d %d" % (who, number)
                try:
                    answer = connections.exchange(("ECHO", mine))
                except redis.exceptions.ConnectionError:
                    continue  # cut once more while it was asked again
                if answer != [mine]:
                    wrong.append((mine, answer))

        threads = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            way.close_connections()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(connections._idle) <= len(threads)

    def test_who_does_not_listen_leaves_the_answer_to_whoever_comes_next(
        self, connections: Connections, way: TcpProxy
    ) -> None:
        for number in range(3):
            assert connections.exchange(("ECHO", f"unheard {number}"), ("ECHO", "and more"), await_reply=False) == []
        assert connections.exchange(("ECHO", "heard")) == [b"heard"]
        assert connections.exchange(("LPUSH",), await_reply=False) == []  # an error too is nobody's
        assert connections.exchange(("ECHO", "heard again"), ("ECHO", "both")) == [b"heard again", b"both"]
        assert len(way.connections) == 1

    def test_nor_does_an_answer_that_never_came_become_anothers(self, connections: Connections, way: TcpProxy) -> None:
        go_on = threading.Event()
        connections.exchange(("PING",))  # there is a connection that is kept
        way.on_reply = on_first(lambda: go_on.wait(9))
        connections.exchange(("ECHO", "held back"), await_reply=False)
        with pytest.raises(redis.exceptions.TimeoutError):
            connections.exchange(("ECHO", "too early"))
        go_on.set()
        assert connections.exchange(("ECHO", "heard")) == [b"heard"]

    def test_a_broken_one_is_replaced_for_who_does_not_listen_as_well(
        self, stack: Stack, connections: Connections, way: TcpProxy
    ) -> None:
        for number in range(3):
            connections.exchange(("SET", "kept:unheard", f"{number}"), await_reply=False)
            wait_until(partial(is_kept, stack, b"%d" % number))
            way.close_connections()
            assert connections.exchange(("ECHO", "heard")) == [b"heard"]

    def test_a_script_that_redis_has_forgotten_is_said_again_after_what_came_before_it(
        self, stack: Stack, connections: Connections
    ) -> None:
        stack.redis().script_flush()
        stack.redis().set(OTHER.key, "something")
        [dropped] = connections.run(DROP, (PATH.key, "token", 3000), after=[("UNLINK", OTHER.key)])
        assert (dropped, stack.redis().exists(OTHER.key)) == (0, 0)
        assert connections.run(FILL, (PATH.key, "", "token", b"200\t\t\t\n{}", 60_000)) == [1]
        assert connections.run(READ, (PATH.key, "", "another", 3000))[0][:2] == [1, b"200\t\t\t\n{}"]

    def test_a_read_that_was_lost_and_comes_late_gives_no_lease_again(
        self, stack: Stack, tier: RedisTier, way: TcpProxy
    ) -> None:
        lease = self.repeated(stack, way, lambda: tier.read(PATH, ""), tier)
        assert isinstance(lease, Lease)
        tier.fill(PATH, "", lease, Entry(200, b"{}"))
        assert tier.read(PATH, "", patience=0) is None  # the late question has the lease

    def test_nor_does_a_drop(self, stack: Stack, tier: RedisTier, way: TcpProxy) -> None:
        lease = self.repeated(stack, way, lambda: tier.drop([PATH], [PATH])[PATH], tier)
        assert isinstance(lease, Lease)
        assert lease not in str(stack.redis().hgetall(PATH.key))

    def repeated(self, stack: Stack, way: TcpProxy, ask: Callable[[], object], tier: RedisTier) -> object:
        """What came of it over a second connection; meanwhile somebody else drops, and the first question arrives."""
        assert tier.answers()
        tier.read(OTHER, "")
        tier.drop([OTHER], [OTHER])  # there are connections that are kept
        way.on_request = lost = DelayedRequest()
        got = ask()
        assert lost.received
        stack.redis().delete(PATH.key)
        lost.release.set()
        wait_until(lambda: stack.redis().hexists(PATH.key, "lease:"))
        return got

    def test_a_drop_of_which_nothing_is_heard_is_none(self, tier: RedisTier, way: TcpProxy) -> None:
        def end(link: ProxiedConnection, said: bytes) -> bytes:
            raise CloseConnection

        way.on_reply = end
        with pytest.raises(DoesNotAnswer):
            tier.drop([PATH], [PATH])
        way.reset_hooks()
        assert tier.drop([PATH], [PATH])


class TestToEdges:
    @pytest.fixture
    def edge(self, stack: Stack) -> Cache:
        """One that lives, as PostgreSQL knows it."""
        [row] = stack.sql(
            "SELECT name, address, epoch, false, false FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1"
        )
        return Cache(*row)

    @pytest.fixture
    def way(self, edge: Cache) -> Iterator[TcpProxy]:
        host, _, port = edge.address.rpartition(":")
        with tcp_proxy((host, int(port))) as way:
            yield way

    @pytest.fixture
    def behind(self, edge: Cache, way: TcpProxy) -> Cache:
        return edge._replace(address=f"127.0.0.1:{way.port}")

    def test_one_connection_takes_drop_after_drop(self, behind: Cache, way: TcpProxy) -> None:
        tier = EdgeTier()
        for _ in range(5):
            assert tier.drop([behind], [PATH]) == []
        assert len(way.connections) == 1

    def test_one_that_broke_meanwhile_is_replaced(self, behind: Cache, way: TcpProxy) -> None:
        tier = EdgeTier()
        for _ in range(3):
            assert tier.drop([behind], [PATH]) == []
            way.close_connections()

    def test_one_that_breaks_under_the_drop_too(self, behind: Cache, way: TcpProxy) -> None:
        tier = EdgeTier()
        tier.drop([behind], [PATH])
        way.requests.clear()

        def end() -> None:
            raise CloseConnection

        way.on_reply = on_first(end)
        assert tier.drop([behind], [PATH]) == []
        assert way.requests[0] == way.requests[1]  # a path may be dropped twice

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 20",
            b"HTTP/1.1 204 No Content\r\n",
            b"what?",
        ],
    )
    def test_any_other_answer_than_the_one_is_none_and_its_connection_ends(
        self, behind: Cache, way: TcpProxy, answer: bytes
    ) -> None:
        tier = EdgeTier()
        way.on_reply = lambda link, said: answer
        began = time.monotonic()
        assert tier.drop([behind], [PATH]) == [behind]
        assert time.monotonic() - began < DROP_TIMEOUT_S + 0.5
        way.reset_hooks()
        assert tier.drop([behind], [PATH]) == []
        assert len(way.connections) == 2

    def test_an_answer_that_comes_late_is_not_taken_for_the_next_ones(self, behind: Cache, way: TcpProxy) -> None:
        tier = EdgeTier()
        tier.drop([behind], [PATH])
        go_on = threading.Event()
        way.on_reply = on_first(lambda: go_on.wait(9))
        assert tier.drop([behind], [PATH]) == [behind]
        go_on.set()
        way.on_reply = lambda link, said: said.replace(b"204", b"500")
        assert tier.drop([behind], [PATH]) == [behind]

    def test_of_a_silent_edge_no_other_connection_is_kept(self, behind: Cache, way: TcpProxy) -> None:
        """They may lead to one worker, which is stopped while those beside it answer."""
        tier = EdgeTier()
        slow = threading.Barrier(3)

        def together(link: ProxiedConnection, said: bytes) -> bytes:
            slow.wait(5)
            return said

        way.on_reply = together
        threads = [threading.Thread(target=tier.drop, args=([behind], [PATH])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(way.connections) == 3
        stopped = list(way.connections)
        go_on = threading.Event()

        def hold(link: ProxiedConnection, said: bytes) -> bytes:
            if link in stopped:
                go_on.wait(9)
            return said

        way.on_reply = hold
        assert tier.drop([behind], [PATH]) == [behind]
        assert tier.drop([behind], [PATH]) == []
        go_on.set()

    def test_a_host_that_is_none_is_an_edge_that_does_not_answer(self, edge: Cache) -> None:
        nobody = edge._replace(address="a..b:1")
        assert EdgeTier().drop([nobody], [PATH]) == [nobody]
        assert not EdgeTier().reaches(nobody)


class TestToPostgreSQL:
    @pytest.fixture
    def database(self, stack: Stack) -> Iterator[Database]:
        database = Database(stack.postgres, size=1, timeout=1)
        database.open()
        stack.sql("CREATE TABLE kept (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        yield database
        database.close()
        stack.sql("DROP TABLE kept")

    def kept(self, stack: Stack) -> list[int]:
        return [n for (n,) in stack.sql("SELECT n FROM kept ORDER BY n")]

    def test_one_that_broke_while_nobody_used_it_costs_no_request(self, stack: Stack, database: Database) -> None:
        for _ in range(3):
            end(stack, transact(database, insert, lambda connection: connection.execute("DELETE FROM kept")))

    def test_one_that_ends_in_a_transaction_leaves_nothing_and_the_next_request_gets_another(
        self, stack: Stack, database: Database
    ) -> None:
        with pytest.raises(DatabaseUnavailable):
            transact(database, insert, lambda connection: end(stack, connection), insert)
        assert self.kept(stack) == []
        transact(database, insert)
        assert self.kept(stack) == [1]

    def test_one_that_ends_before_the_commit_is_no_success(self, stack: Stack, database: Database) -> None:
        with pytest.raises(DatabaseUnavailable):
            transact(database, insert, lambda connection: end(stack, connection))
        assert self.kept(stack) == []

    def test_one_that_ends_before_the_rollback_shows_what_had_failed(self, stack: Stack, database: Database) -> None:
        with pytest.raises(ZeroDivisionError):
            transact(database, insert, lambda connection: end(stack, connection), lambda _: 1 // 0)
        transact(database, insert)
        assert self.kept(stack) == [1]

    def test_none_is_given_back_inside_a_transaction(self, stack: Stack, database: Database) -> None:
        def interrupt(connection: Connection) -> None:
            raise KeyboardInterrupt

        for work, error in (
            (divide, psycopg.errors.DivisionByZero),
            (interrupt, KeyboardInterrupt),
            (insert, psycopg.errors.UniqueViolation),  # found out by COMMIT
        ):
            with pytest.raises(error):
                transact(database, insert, work)
            again = transact(database)
            assert again.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert self.kept(stack) == []

    def test_what_has_failed_inside_is_not_said_to_be_committed(self, stack: Stack, database: Database) -> None:
        """To COMMIT after an error that somebody passed over PostgreSQL answers ROLLBACK, which is no error."""

        def pass_over(connection: Connection) -> None:
            with suppress(psycopg.errors.DivisionByZero):
                divide(connection)

        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            transact(database, insert, pass_over)
        assert self.kept(stack) == []

    def test_one_that_did_not_answer_in_time_is_not_used_again(self, database: Database) -> None:
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

    def test_notices_that_wait_on_it_do_no_harm(self, stack: Stack, database: Database) -> None:
        with database.autocommit() as connection:
            connection.execute("LISTEN kept")
        stack.sql("NOTIFY kept")
        with database.autocommit() as again:
            assert again.execute("SELECT 1").fetchone() == (1,)
        assert again is connection


def test_caches_are_asked_over_them(stack: Stack) -> None:
    """After PostgreSQL has ended every connection, the next question is answered."""
    database = Database(stack.postgres, size=2, timeout=2)
    database.open()
    caches = Caches(database, threads=2)
    assert not caches.redis_is_fenced()
    stack.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'velikiy reads'")
    assert not caches.redis_is_fenced()
    database.close()


def transact(database: Database, *work: Callable[[Connection], object]) -> Connection:
    with database.transaction() as connection:
        for step in work:
            step(connection)
    return connection


def insert(connection: Connection) -> None:
    connection.execute("INSERT INTO kept VALUES (1)")


def divide(connection: Connection) -> None:
    connection.execute("SELECT 1/0")


def end(stack: Stack, connection: Connection) -> None:
    """As a restart of PostgreSQL would."""
    stack.sql("SELECT pg_terminate_backend(%s, 5000)", connection.info.backend_pid)
