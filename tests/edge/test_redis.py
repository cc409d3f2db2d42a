"""The edge reads Redis itself: what it makes of its replies, early, late, wrong or none."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from urllib.parse import quote, urlsplit

import pytest
import requests
from flask import Flask
from redis import Redis

from testkit.failpoints import FailpointApp, failpoint_app, has_cache_lease, running_edge
from testkit.fake_app import cacheable, fake_app
from testkit.outages import refusing
from testkit.stack import Stack, wait_until
from testkit.tcp_proxy import CloseConnection, DelayedRequest, ProxiedConnection, TcpProxy, on_first, tcp_proxy
from tests.edge.reads import edges, get, listed, name, put
from velikiy.coherence import Caches
from velikiy.http import edge_leases
from velikiy.postgres import Database
from velikiy.resources.base import registry
from velikiy.resources.repository import NotFound

_numbers = count(1)

FILLED = "redis; fwd=uri-miss; stored, nginx; fwd=uri-miss; stored"


@pytest.fixture(scope="module")
def redis(stack: Stack) -> Iterator[TcpProxy]:
    """What stands between Redis and the edge; nobody else's questions go through it."""
    with tcp_proxy(("127.0.0.1", urlsplit(stack.redis_url).port or 6379)) as redis:
        yield redis


def url(stack: Stack, redis: TcpProxy, password: str | None = None) -> str:
    given = urlsplit(stack.redis_url)
    user, known = given.username or "", given.password or ""
    return f"redis://{user}:{known if password is None else password}@127.0.0.1:{redis.port}{given.path}"


@pytest.fixture(scope="module")
def module_app(stack: Stack, redis: TcpProxy) -> Iterator[FailpointApp]:
    """Patient: replies are held for longer than an edge would wait."""
    with failpoint_app(stack, REDIS_URL=url(stack, redis), REDIS_TIMEOUT="9") as app:
        wait_until(lambda: has_cache_lease(app.edge))
        yield app


@pytest.fixture
def app(module_app: FailpointApp, redis: TcpProxy) -> Iterator[FailpointApp]:
    redis.reset_hooks()
    module_app.failpoints.reached.clear()
    yield module_app
    redis.reset_hooks()
    assert not module_app.failpoints.actions, "no reader or writer reached this failpoint"


@pytest.fixture
def user(app: FailpointApp) -> Iterator[int]:
    """Whom Redis has as "old", and no edge; the edge that will ask for it has a connection."""
    user = app.users.create(name="old", email=f"edge-redis{next(_numbers)}@example.com")
    wait_until(lambda: reads_redis(app, user))  # after a test that fenced it, the edge has yet to renew its lease
    app.users.update(user, "old")
    app.failpoints.reached.clear()
    yield user
    with suppress(NotFound):
        app.users.delete(user)


def asked_by_readers(app: FailpointApp) -> int:
    return app.failpoints.reached.count("between fill and response")


@contextmanager
def hasty(app: FailpointApp, redis_url: str) -> Iterator[FailpointApp]:
    """Another edge before the same app, as patient as edges are."""
    with running_edge(urlsplit(app.url).netloc, REDIS_URL=redis_url) as (edge, data):
        wait_until(lambda: has_cache_lease(edge))
        yield replace(app, edge=edge, data=data)


class TestWhatRedisHas:
    def test_is_answered_without_an_app_and_kept(self, app: FailpointApp, user: int) -> None:
        first, second = get(app.edge, user), get(app.edge, user)
        assert first.headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert first.headers["Cache-Status"].endswith(", nginx; fwd=uri-miss; stored")
        assert second.headers["Cache-Status"] == "nginx; hit"
        assert asked_by_readers(app) == 0
        through_the_app = get(app.stack.app, user)
        assert first.content == second.content == through_the_app.content
        for header in ("ETag", "Last-Modified", "Content-Type", "Cache-Control", "Content-Length"):
            assert first.headers[header] == through_the_app.headers[header]

    def test_a_404_too_and_each_names_its_own_request(self, app: FailpointApp, user: int) -> None:
        app.users.delete(user)
        answers = [get(app.edge, user) for _ in range(2)]
        assert answers[0].headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert asked_by_readers(app) == 0
        for answer in answers:
            assert answer.status_code == 404
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
        assert answers[0].json()["request_id"] != answers[1].json()["request_id"]

    def test_a_head_and_a_condition_are_answered_out_of_it(self, app: FailpointApp, user: int) -> None:
        etag = get(app.stack.app, user).headers["ETag"]
        known = requests.get(f"{app.edge}/users/{user}", headers={"If-None-Match": etag}, timeout=5)
        assert (known.status_code, known.content) == (304, b"")
        app.users.update(user, "old")
        head = requests.head(f"{app.edge}/users/{user}", timeout=5)
        assert head.headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert head.headers["Content-Length"] == str(len(get(app.edge, user).content))
        assert asked_by_readers(app) == 0

    def test_what_it_has_not_is_filled_by_an_app_under_the_lease_that_the_edge_got(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        app.stack.redis().flushdb()
        redis.requests.clear()
        before = scripts(app.stack)
        assert get(app.edge, user).headers["Cache-Status"] == FILLED
        assert len(redis.requests) == 1
        assert scripts(app.stack) - before == 2  # the edge's read and the app's fill
        assert app.stack.redis().hget(f"user:{user}", "body:")

    def test_while_another_one_fills_an_app_reads_and_leaves_redis_alone(self, app: FailpointApp, user: int) -> None:
        app.stack.redis().delete(f"user:{user}")
        till = f"somebody {int(time.time() * 1000) + 3000}"
        app.stack.redis().hset(f"user:{user}", "lease:", till)
        assert get(app.edge, user).headers["Cache-Status"] == "redis; fwd=bypass, nginx; fwd=uri-miss; stored"
        assert app.stack.redis().hgetall(f"user:{user}") == {b"lease:": till.encode()}

    def test_lists_and_counts_as_well_and_what_has_a_query_through_an_app(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        for address, keys in (("/users", "all_users"), ("/users/count", "count_users")):
            app.users.update(user, "old")
            app.stack.redis().delete(keys)
            requests.get(app.stack.app + address, timeout=5)
            redis.requests.clear()
            answer = requests.get(app.edge + address, timeout=5)
            assert answer.headers["Cache-Status"].startswith("redis; hit"), address
            assert keys.encode() in redis.requests[0]
        redis.requests.clear()
        assert requests.get(f"{app.edge}/users?limit=1", timeout=5).status_code == 200
        assert not redis.requests


class TestWhereItIs:
    """As REDIS_URL says it, and under which keys."""

    @pytest.fixture
    def client(self, stack: Stack) -> Iterator[Redis]:
        client = Redis.from_url(url_of(stack, "", 3))
        yield client
        client.flushdb()
        client.acl_deluser("edge@one")

    @pytest.mark.parametrize("login", ["", "edge%40one:p%40ss%2Fw%3Ard%25@"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_by_its_name_its_database_and_a_login_with_any_characters(
        self, stack: Stack, client: Redis, login: str, host: str
    ) -> None:
        client.acl_setuser("edge@one", enabled=True, passwords=["+p@ss/w:rd%"], keys=["*"], commands=["+@all"])
        client.hset("thing:7", "body:", b'200\t"tag"\t\t\n{"id":7}')
        address = url_of(stack, login, 3).replace("127.0.0.1", host)
        with fake_app("2400 1 things:thing", REDIS_URL=address) as app:
            answer = requests.get(f"{app.edge}/things/7", timeout=5)
            assert (answer.content, answer.headers["ETag"]) == (b'{"id":7}', '"tag"')
            assert answer.headers["Cache-Status"] == "redis; hit; ttl=0, nginx; fwd=uri-miss; stored"
            assert app.received == []

    def test_of_each_resource_under_its_own_keys_whatever_its_rows_are_called(
        self, stack: Stack, client: Redis
    ) -> None:
        rows = {"orders": "order", "order_lines": "order line", "dates": "user's date: день"}
        for one in rows.values():
            client.hset(f"{one}:7", "body:", f"200\t\t\t\n{one}")
        names = " ".join(f"{many}:{quote(one, safe='')}" for many, one in rows.items())
        with fake_app(f"2400 1 {names}", REDIS_URL=url_of(stack, "", 3)) as app:
            for many, one in rows.items():
                assert requests.get(f"{app.edge}/{many}/7", timeout=5).content.decode() == one
            assert app.received == []
            app.respond = lambda request: cacheable(request, 200, b"the app's")
            assert requests.get(f"{app.edge}/others/7", timeout=5).content == b"the app's"
            assert [line for line, _, _ in app.received] == ["GET /others/7"]

    def test_apps_say_of_them_what_is_one_word(self, stack: Stack) -> None:
        """To an edge that renews its lease: one of the stack's."""
        app, database = Flask("in this process"), Database(stack.postgres, size=1, timeout=2)
        lines = replace(registry()["users"], name="order_lines", singular="order line")
        edge_leases.install(app, {"order_lines": lines}, Caches(database, threads=1))
        database.open()
        [(name, epoch)] = stack.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1")
        asked = {"instance_id": name.partition("@")[0], "epoch": epoch, "port": "1"}
        answer = app.test_client().post("/.lease/renew", data=asked)
        assert answer.text == "2400 1 order_lines:order%20line"
        database.close()


class TestReplies:
    def test_one_that_a_write_overtakes_is_found_by_nobody(self, app: FailpointApp, user: int, redis: TcpProxy) -> None:
        redis.on_reply = on_first(lambda: put(app, user, "new"))
        assert name(app.edge, user) == "old"  # it began before the write
        for edge in edges(app):
            assert [name(edge, user) for _ in range(2)] == ["new", "new"]

    def test_nor_is_what_is_filled_under_a_lease_that_a_write_overtakes(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        app.stack.redis().flushdb()
        redis.on_reply = on_first(lambda: put(app, user, "new"))
        listed(app.edge, user)
        for edge in edges(app):
            assert [listed(edge, user) for _ in range(2)] == ["new", "new"]

    def test_a_lease_from_a_redis_that_writers_pass_by_is_not_used(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        """The edge is stopped before it asks; it is answered when Redis is out of use, and emptied already."""
        caches = app.users.gate.caches

        def fence() -> None:
            with caches.database.autocommit() as connection:
                cache = caches.redis(connection)
            caches.fence([cache])
            caches.await_exclusion([cache])
            app.stack.redis().flushdb()

        def pass_by() -> None:
            app.users.update(user, "new")
            with caches.database.autocommit() as connection:
                caches.readmit_redis(caches.redis(connection))

        with refusing(app.stack, "relay"):
            redis.on_request = on_first(fence)
            app.failpoints.actions["between snapshot and fill"] = pass_by
            assert listed(app.edge, user) == "old"
            assert not app.stack.redis().hexists("all_users", "body:")
        for edge in edges(app):
            assert [listed(edge, user) for _ in range(2)] == ["new", "new"]

    def test_a_question_that_was_repeated_and_comes_late_gives_no_lease_again(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        name(app.edge, user)  # there is a connection that is kept
        app.stack.redis().flushdb()
        lost = DelayedRequest()

        def overtake() -> None:
            put(app, user, "new")
            lost.release.set()
            wait_until(lambda: app.stack.redis().hexists("all_users", "lease:"))

        redis.on_request = lost
        app.failpoints.actions["between snapshot and fill"] = overtake
        assert listed(app.edge, user) == "old"
        assert lost.received
        assert not app.stack.redis().hexists("all_users", "body:")
        for edge in edges(app):
            assert [listed(edge, user) for _ in range(2)] == ["new", "new"]

    @pytest.mark.parametrize(
        "reply",
        [
            b"$-1\r\n",
            b"*-1\r\n",
            b":1\r\n",
            b"+OK\r\n",
            b"*0\r\n",
            b"*1\r\n:1\r\n",
            b"*1\r\n+1\r\n",
            b"*3\r\n:1\r\n$-1\r\n:1\r\n",
            b"*3\r\n:1\r\n$5\r\nab\r\n\r\n:1\r\n",
            b'*3\r\n:1\r\n$12\r\n204\t\t\t\n{"a"}\r\n:1\r\n',
            b"*3\r\n:1\r\n$8\r\n404\t\t\t\n\r\n:1\r\n",
            b"*2\r\n:1\r\n-ERR in the middle\r\n",
            b"$99999999999\r\nabc\r\n",
            b"$x\r\n",
            b"*1e3\r\n",
            b"\r\n",
            b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            b"-LOADING Redis is loading the dataset in memory\r\n",
            b"-NOAUTH Authentication required.\r\n",
            b"-MOVED 866 127.0.0.1:1\r\n",
            b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
            b"-NOSCRIPT No matching script.\r\n",
        ],
    )
    def test_one_that_is_none_costs_a_question_to_an_app_and_nothing_else(
        self, app: FailpointApp, redis: TcpProxy, user: int, reply: bytes
    ) -> None:
        redis.on_reply = lambda link, said: reply if not said.startswith(b"+") else said
        assert name(app.edge, user) == "old"
        assert name(app.edge, 10**9 + user) is None
        redis.reset_hooks()
        put(app, user, "new")
        for edge in edges(app):
            assert [name(edge, user) for _ in range(2)] == ["new", "new"]
        wait_until(lambda: reads_redis(app, user))

    def test_bytes_that_follow_one_are_nobodys_answer(self, app: FailpointApp, redis: TcpProxy, user: int) -> None:
        other = app.users.create(name="other", email=f"edge-redis{next(_numbers)}@example.com")
        redis.on_reply = lambda link, said: said + b"*3\r\n:1\r\n$9\r\n200\t\t\t\n{}\r\n:1\r\n"
        assert name(app.edge, user) == "old"
        redis.reset_hooks()
        assert name(app.edge, other) == "other"
        app.users.delete(other)

    def test_a_script_that_redis_has_forgotten_is_said_again(self, app: FailpointApp, user: int) -> None:
        app.stack.redis().script_flush()
        assert get(app.edge, user).headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert asked_by_readers(app) == 0

    def test_what_is_no_entry_is_read_anew_and_cleared_away(self, app: FailpointApp, user: int) -> None:
        key, client = f"user:{user}", app.stack.redis()
        for spoil in (
            lambda: client.set(key, "a string"),
            lambda: client.hset(key, "body:", b"\xff\x00 garbage"),
            lambda: client.hset(key, "body:", b""),
            lambda: client.hset(key, "body:", b"99999\t\t\t\nx"),
            lambda: client.hset(key, "body:", b"404\t\t\ta\rb\nx}"),
            lambda: client.hset(key, "body:", b"200\tno quotes\t\t\nx"),
        ):
            app.users.update(user, "old")
            client.delete(key)
            spoil()
            assert name(app.edge, user) == "old"
            put(app, user, "new")
            assert reads_redis(app, user)
            assert name(app.edge, user) == "new"


class TestARedisThatIsAway:
    def test_one_that_hangs_is_waited_for_once_and_then_left_alone(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        go_on = threading.Event()

        def hang(link: ProxiedConnection, said: bytes) -> bytes:
            go_on.wait(20)
            return said

        with hasty(app, url(app.stack, redis)) as other:
            assert name(other.edge, user) == "old"
            app.users.update(user, "newer")
            redis.on_reply = hang
            redis.requests.clear()
            began = time.monotonic()
            assert name(other.edge, user) == "newer"
            assert time.monotonic() - began < 0.6
            for _ in range(3):
                app.users.update(user, "newest")
                assert name(other.edge, user) == "newest"
            assert len(redis.requests) == 1 or time.monotonic() - began > 1
            redis.reset_hooks()
            go_on.set()
            wait_until(lambda: reads_redis(other, user))
            assert name(other.edge, user) == "newest"

    def test_one_that_answers_others_meanwhile_is_asked_on(self, app: FailpointApp, user: int, redis: TcpProxy) -> None:
        another = app.users.create(name="another", email="another@edge-redis.example")
        go_on = threading.Event()

        def hang(link: ProxiedConnection, said: bytes) -> bytes:
            if f"user:{user}\r".encode() in said:
                go_on.wait(20)
            return said

        with hasty(app, url(app.stack, redis)) as other:
            wait_until(lambda: reads_redis(other, another))
            app.failpoints.reached.clear()
            redis.on_request = hang
            answers: list[str | None] = []
            late = threading.Thread(target=lambda: answers.append(name(other.edge, user)))
            late.start()
            reads = 0
            while late.is_alive() or reads < 20:
                drop(app, another)
                assert name(other.edge, another) == "another"
                reads += 1
            assert answers == ["old"]
            assert asked_by_readers(app) == 1  # for this one; all others the edge has read itself
            go_on.set()
        app.users.delete(another)

    def test_a_reply_that_comes_after_its_time_is_not_taken_for_anothers(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        others = [app.users.create(name=f"other {n}", email=f"other{n}@edge-redis.example") for n in range(3)]
        go_on = threading.Event()

        def hold(link: ProxiedConnection, said: bytes) -> bytes:
            go_on.wait(20)
            return said

        with hasty(app, url(app.stack, redis)) as other:
            for one in others:
                name(other.edge, one)
                app.users.update(one, "known")
            redis.on_reply = hold
            assert name(other.edge, user) == "old"  # through an app, when Redis had its time
            redis.on_reply = on_first(go_on.set)
            go_on.set()
            for one in others:
                assert name(other.edge, one) == "known"
            wait_until(lambda: reads_redis(other, user))
            for one in [*others, *others]:
                assert name(other.edge, one) == "known"
        for one in others:
            app.users.delete(one)

    def test_one_that_was_restarted_is_asked_over_new_connections(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        assert name(app.edge, user) == "old"
        for _ in range(3):
            app.users.update(user, "newer")
            redis.close_connections()
            assert get(app.edge, user).headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert asked_by_readers(app) == 0

    def test_one_that_ends_each_connection_with_a_question_unanswered(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        def end(link: ProxiedConnection, said: bytes) -> bytes:
            raise CloseConnection

        assert name(app.edge, user) == "old"
        app.users.update(user, "newer")
        redis.on_request = end
        assert name(app.edge, user) == "newer"
        redis.reset_hooks()
        wait_until(lambda: reads_redis(app, user))

    def test_one_that_refuses(self, app: FailpointApp, user: int, redis: TcpProxy) -> None:
        redis.refuse()
        try:
            for number in range(3):
                app.users.update(user, f"number {number}")
                assert name(app.edge, user) == f"number {number}"
        finally:
            redis.listen()
        wait_until(lambda: reads_redis(app, user))

    def test_one_that_does_not_let_us_in(self, app: FailpointApp, user: int, redis: TcpProxy) -> None:
        with hasty(app, url(app.stack, redis, "wrong")) as other:
            for number in range(3):
                put(app, user, f"number {number}")
                assert [name(other.edge, user) for _ in range(2)] == [f"number {number}"] * 2
            redis.requests.clear()
            put(app, user, "last")
            assert name(other.edge, user) == "last"
            assert len(redis.requests) <= 1  # not for each read anew

    @pytest.mark.parametrize("address", ["", "unix:///nowhere", "rediss://127.0.0.1:1", "redis://[::1]:1/0", "what?"])
    def test_where_no_address_is_known_that_it_can_read_apps_ask_for_it(
        self, app: FailpointApp, user: int, address: str
    ) -> None:
        with hasty(app, address) as other:
            put(app, user, "new")
            answer = get(other.edge, user)
            assert answer.headers["Cache-Status"].startswith("redis; hit; ttl=")  # the app's
            app.stack.redis().delete(f"user:{user}")
            put(app, user, "newer")
            assert [name(other.edge, user) for _ in range(2)] == ["newer"] * 2


def url_of(stack: Stack, login: str, database: int) -> str:
    """Redis itself; as who we are where no login is given."""
    given = urlsplit(stack.redis_url)
    login = login or given.netloc.rpartition("@")[0] + "@"
    return f"redis://{login}127.0.0.1:{given.port}/{database}"


def scripts(stack: Stack) -> int:
    """That Redis has run."""
    return int(
        sum(stack.redis().info("commandstats").get(f"cmdstat_{one}", {}).get("calls", 0) for one in ("eval", "evalsha"))
    )


def drop(app: FailpointApp, user: int) -> bool:
    """At its edge alone: what it has it has to ask for again."""
    gate = app.users.gate
    with gate.database.autocommit() as connection:
        gate.edge_tier.drop(gate.caches.edges(connection), [app.users.rows.resource.row_path(user)])
    return False


def reads_redis(app: FailpointApp, user: int) -> bool:
    """The edge itself, again."""
    app.failpoints.reached.clear()
    drop(app, user)
    return "redis; hit" in get(app.edge, user).headers["Cache-Status"] and asked_by_readers(app) == 0
