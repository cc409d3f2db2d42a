"""The edge reads Redis itself. Replies may be early, late, malformed or missing."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from urllib.parse import quote, urlencode, urlsplit

import pytest
import requests
from flask import Flask
from redis import Redis

from testkit.databases import redis_at_a_socket, redis_server
from testkit.failpoints import FailpointApp, failpoint_app, has_cache_lease, running_edge
from testkit.fake_app import fake_app, storable
from testkit.outages import refusing
from testkit.stack import EDGE_SECRET, Stack, folder, wait_until
from testkit.tcp_proxy import CloseConnection, DelayedRequest, ProxiedConnection, TcpProxy, on_first, tcp_proxy
from tests.edge.reads import edges, get, listed, name, put
from velikiy.coherence import Caches, EdgeTier
from velikiy.coherence.redis_connections import Connections
from velikiy.coherence.shards import ShardMap
from velikiy.http import edge_leases
from velikiy.postgres import Database
from velikiy.resources.base import registry
from velikiy.resources.repository import NotFound
from velikiy.signatures import HEADER, Signer

_numbers = count(1)

FILLED = "redis; fwd=uri-miss; stored, nginx; fwd=uri-miss; stored"


@pytest.fixture(scope="module")
def redis(stack: Stack) -> Iterator[TcpProxy]:
    """A proxy in front of Redis that only the edge under test uses."""
    with tcp_proxy(stack.redis_socket) as redis:
        yield redis


@pytest.fixture(scope="module")
def module_app(stack: Stack, redis: TcpProxy) -> Iterator[FailpointApp]:
    """An app whose edge waits 9 s for Redis, because tests delay replies for longer than an edge usually waits."""
    with failpoint_app(stack, REDIS_URL=stack.redis_through(redis.port), REDIS_TIMEOUT="9") as app:
        wait_until(lambda: has_cache_lease(app.edge))
        yield app


@pytest.fixture
def app(module_app: FailpointApp, redis: TcpProxy) -> Iterator[FailpointApp]:
    redis.reset_hooks()
    module_app.failpoints.reached.clear()
    yield module_app
    redis.reset_hooks()
    assert not module_app.failpoints.actions, "a failpoint that was not reached"


@pytest.fixture
def user(app: FailpointApp) -> Iterator[int]:
    """A user whose name is "old". Redis has its entry, and no edge has; the edge has a kept connection to Redis."""
    user = app.users.create(name="old", email=f"edge-redis{next(_numbers)}@example.com")
    wait_until(
        lambda: reads_redis(app, user)
    )  # a test before may have fenced Redis, and the edge has yet to renew its lease
    app.users.update(user, "old")
    app.failpoints.reached.clear()
    yield user
    with suppress(NotFound):
        app.users.delete(user)


def reads_by_the_app(app: FailpointApp) -> int:
    return app.failpoints.reached.count("between fill and response")


@contextmanager
def impatient_edge(app: FailpointApp, redis_url: str) -> Iterator[FailpointApp]:
    """Run another edge in front of the same app, with the usual timeout for Redis."""
    with running_edge(urlsplit(app.url).netloc, REDIS_URL=redis_url) as (edge, data):
        wait_until(lambda: has_cache_lease(edge))
        yield replace(app, edge=edge, data=data)


class TestEntriesInRedis:
    def test_entry_in_redis_is_served_without_an_app_and_stored_at_the_edge(self, app: FailpointApp, user: int) -> None:
        first, second = get(app.edge, user), get(app.edge, user)
        assert first.headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert first.headers["Cache-Status"].endswith(", nginx; fwd=uri-miss; stored")
        assert second.headers["Cache-Status"] == "nginx; hit"
        assert reads_by_the_app(app) == 0
        through_the_app = get(app.stack.app, user)
        assert first.content == second.content == through_the_app.content
        for header in ("ETag", "Last-Modified", "Content-Type", "Cache-Control", "Content-Length"):
            assert first.headers[header] == through_the_app.headers[header]

    def test_404_in_redis_is_served_with_the_id_of_each_request(self, app: FailpointApp, user: int) -> None:
        app.users.delete(user)
        responses = [get(app.edge, user) for _ in range(2)]
        assert responses[0].headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert reads_by_the_app(app) == 0
        for response in responses:
            assert response.status_code == 404
            assert response.headers["Content-Type"] == "application/problem+json"
            assert response.json()["request_id"] == response.headers["X-Request-Id"]
        assert responses[0].json()["request_id"] != responses[1].json()["request_id"]

    def test_head_and_if_none_match_are_answered_from_redis(self, app: FailpointApp, user: int) -> None:
        etag = get(app.stack.app, user).headers["ETag"]
        known = requests.get(f"{app.edge}/users/{user}", headers={"If-None-Match": etag}, timeout=5)
        assert (known.status_code, known.content) == (304, b"")
        app.users.update(user, "old")
        head = requests.head(f"{app.edge}/users/{user}", timeout=5)
        assert head.headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert head.headers["Content-Length"] == str(len(get(app.edge, user).content))
        assert reads_by_the_app(app) == 0

    def test_missing_entry_is_filled_by_an_app_under_the_fill_lease_of_the_edge(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        app.stack.redis().flushdb()
        redis.requests.clear()
        before = scripts_run(app.stack)
        assert get(app.edge, user).headers["Cache-Status"] == FILLED
        assert len(redis.requests) == 1
        assert scripts_run(app.stack) - before == 2  # the edge's read and the app's fill
        assert app.stack.redis().hget(f"user:{user}", "body:")

    def test_app_does_not_access_redis_while_another_reader_fills(self, app: FailpointApp, user: int) -> None:
        app.stack.redis().delete(f"user:{user}")
        valid_until = f"other {int(time.time() * 1000) + 3000}"
        app.stack.redis().hset(f"user:{user}", "lease:", valid_until)
        assert get(app.edge, user).headers["Cache-Status"] == "redis; fwd=bypass, nginx; fwd=uri-miss; stored"
        assert app.stack.redis().hgetall(f"user:{user}") == {b"lease:": valid_until.encode()}

    def test_edge_reads_lists_and_counts_from_redis_and_queries_through_an_app(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        for address, keys in (("/users", "all_users"), ("/users/count", "count_users")):
            app.users.update(user, "old")
            app.stack.redis().delete(keys)
            requests.get(app.stack.app + address, timeout=5)
            redis.requests.clear()
            response = requests.get(app.edge + address, timeout=5)
            assert response.headers["Cache-Status"].startswith("redis; hit"), address
            assert keys.encode() in redis.requests[0]
        redis.requests.clear()
        assert requests.get(f"{app.edge}/users?limit=1", timeout=5).status_code == 200
        assert not redis.requests


class TestAddressesAndKeys:
    """The forms of REDIS_URL, and the keys of resources."""

    @pytest.fixture
    def client(self, stack: Stack) -> Iterator[Redis]:
        client = Redis.from_url(stack.redis_database(3))
        yield client
        client.flushdb()

    @pytest.mark.parametrize("login", ["", "edge%40one:p%40ss%2Fw%3Ard%25@"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_edge_reads_redis_by_host_name_database_and_encoded_login(self, login: str, host: str) -> None:
        with redis_server() as port, Redis(port=port, db=3) as client, ExitStack() as context:
            client.acl_setuser("edge@one", enabled=True, passwords=["+p@ss/w:rd%"], keys=["*"], commands=["+@all"])
            client.hset("thing:7", "body:", b'200\t"tag"\t\t\n{"id":7}')
            address = f"redis://{login}{host}:{port}/3"
            fake = context.enter_context(
                fake_app(f"2400 {Connections(address, 1).identify().id} things:thing", REDIS_URL=address)
            )
            response = requests.get(f"{fake.edge}/things/7", timeout=5)
            assert (response.content, response.headers["ETag"]) == (b'{"id":7}', '"tag"')
            assert response.headers["Cache-Status"] == "redis; hit; ttl=0, nginx; fwd=uri-miss; stored"
            assert fake.received == []

    @pytest.mark.parametrize("database", [0, 3])
    def test_edge_reads_redis_at_a_unix_socket(self, database: int) -> None:
        with folder() as home, redis_at_a_socket(home / "redis @1.sock"), ExitStack() as context:
            address = f"unix://{quote(str(home))}/redis%20%401.sock" + (f"?db={database}" if database else "")
            client = context.enter_context(Redis.from_url(address))
            client.hset("thing:7", "body:", b"200\t\t\t\nfrom Redis")
            lease = f"2400 {Connections(address, 1).identify().id} things:thing"
            fake = context.enter_context(fake_app(lease, REDIS_URL=address))
            assert requests.get(f"{fake.edge}/things/7", timeout=5).text == "from Redis"
            assert fake.received == []

    def test_each_resource_has_its_own_keys_whatever_its_singular(
        self, stack: Stack, client: Redis, redis: TcpProxy
    ) -> None:
        rows = {"orders": "order", "order_lines": "order line", "dates": "user's date: день"}
        for singular in rows.values():
            client.hset(f"{singular}:7", "body:", f"200\t\t\t\n{singular}")
        names = " ".join(f"{resource}:{quote(singular, safe='')}" for resource, singular in rows.items())
        server = Connections(stack.redis_database(3), 1).identify()
        with fake_app(f"2400 {server.id} {names}", REDIS_URL=stack.redis_through(redis.port, database=3)) as fake:
            for resource, singular in rows.items():
                assert requests.get(f"{fake.edge}/{resource}/7", timeout=5).content.decode() == singular
            assert fake.received == []
            fake.respond = lambda request: storable(request, 200, b"the app's")
            assert requests.get(f"{fake.edge}/others/7", timeout=5).content == b"the app's"
            assert [line for line, _, _ in fake.received] == ["GET /others/7"]

    def test_app_percent_encodes_a_singular_with_a_space_in_a_cache_lease(self, stack: Stack) -> None:
        """The lease is that of an edge of the stack."""
        app, database = Flask("in this process"), Database(stack.postgres, size=1, timeout=2)
        lines = replace(registry()["users"], name="order_lines", singular="order line")
        edge_leases.install(app, {"order_lines": lines}, Caches(database, threads=1), EdgeTier(EDGE_SECRET))
        database.open()
        [(name, epoch)] = stack.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name LIMIT 1")
        form = {"instance_id": name.partition("@")[0], "epoch": epoch, "port": "1"}
        body = urlencode(form)
        signed, _ = Signer(EDGE_SECRET).sign_request("POST", "/.lease/renew", body=body)
        response = app.test_client().post(
            "/.lease/renew",
            data=body,
            content_type="application/x-www-form-urlencoded",
            headers={HEADER: signed},
        )
        server = Connections(stack.redis_url, 1).identify()
        assert response.text == f"2400 {server.id} order_lines:order%20line"
        database.close()


class TestReplies:
    def test_entry_from_redis_that_a_write_overtakes_is_not_found_later(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        redis.on_reply = on_first(lambda: put(app, user, "new"))
        assert name(app.edge, user) == "old"  # the read began before the write
        for edge in edges(app):
            assert [name(edge, user) for _ in range(2)] == ["new", "new"]

    def test_fill_under_a_lease_that_a_write_overtakes_is_not_found_later(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        app.stack.redis().flushdb()
        redis.on_reply = on_first(lambda: put(app, user, "new"))
        listed(app.edge, user)
        for edge in edges(app):
            assert [listed(edge, user) for _ in range(2)] == ["new", "new"]

    def test_fill_lease_from_an_excluded_redis_is_not_used(self, app: FailpointApp, user: int, redis: TcpProxy) -> None:
        """The question of the edge is delayed until Redis is excluded and empty."""
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
                redis = caches.redis(connection)
            caches.readmit_redis(redis, ShardMap.parse(redis.address))

        with refusing(app.stack, "relay"):
            redis.on_request = on_first(fence)
            app.failpoints.actions["between snapshot and fill"] = pass_by
            assert listed(app.edge, user) == "old"
            assert not app.stack.redis().hexists("all_users", "body:")
        for edge in edges(app):
            assert [listed(edge, user) for _ in range(2)] == ["new", "new"]

    def test_late_copy_of_a_repeated_question_grants_no_fill_lease(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        name(app.edge, user)  # leaves a kept connection
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
    def test_malformed_reply_of_redis_costs_one_request_to_an_app_only(
        self, app: FailpointApp, redis: TcpProxy, user: int, reply: bytes
    ) -> None:
        redis.on_reply = lambda link, data: reply if not data.startswith(b"+") else data
        assert name(app.edge, user) == "old"
        assert name(app.edge, 10**9 + user) is None
        redis.reset_hooks()
        put(app, user, "new")
        for edge in edges(app):
            assert [name(edge, user) for _ in range(2)] == ["new", "new"]
        wait_until(lambda: reads_redis(app, user))

    def test_surplus_bytes_after_a_reply_are_not_taken_for_a_reply(
        self, app: FailpointApp, redis: TcpProxy, user: int
    ) -> None:
        other = app.users.create(name="other", email=f"edge-redis{next(_numbers)}@example.com")
        redis.on_reply = lambda link, data: data + b"*3\r\n:1\r\n$9\r\n200\t\t\t\n{}\r\n:1\r\n"
        assert name(app.edge, user) == "old"
        redis.reset_hooks()
        assert name(app.edge, other) == "other"
        app.users.delete(other)

    def test_edge_sends_the_script_again_after_redis_has_forgotten_it(self, app: FailpointApp, user: int) -> None:
        app.stack.redis().script_flush()
        assert get(app.edge, user).headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert reads_by_the_app(app) == 0

    def test_foreign_value_under_a_key_is_replaced_by_the_row(self, app: FailpointApp, user: int) -> None:
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


class TestOutages:
    def test_hanging_redis_delays_one_read_and_opens_the_breaker(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        go_on = threading.Event()

        def hang(link: ProxiedConnection, data: bytes) -> bytes:
            go_on.wait(20)
            return data

        with impatient_edge(app, app.stack.redis_through(redis.port)) as other:
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

    def test_redis_that_answers_other_questions_keeps_the_breaker_closed(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        another = app.users.create(name="another", email="another@edge-redis.example")
        go_on = threading.Event()

        def hang(link: ProxiedConnection, data: bytes) -> bytes:
            if f"user:{user}\r".encode() in data:
                go_on.wait(20)
            return data

        with impatient_edge(app, app.stack.redis_through(redis.port)) as other:
            wait_until(lambda: reads_redis(other, another))
            app.failpoints.reached.clear()
            redis.on_request = hang
            responses: list[str | None] = []
            late = threading.Thread(target=lambda: responses.append(name(other.edge, user)))
            late.start()
            reads = 0
            while late.is_alive() or reads < 20:
                drop_at_edge(app, another)
                assert name(other.edge, another) == "another"
                reads += 1
            assert responses == ["old"]
            assert reads_by_the_app(app) == 1  # for the delayed user; the edge has read all others itself
            go_on.set()
        app.users.delete(another)

    def test_late_reply_is_not_taken_for_the_reply_to_another_question(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        others = [app.users.create(name=f"other {n}", email=f"other{n}@edge-redis.example") for n in range(3)]
        go_on = threading.Event()

        def hold(link: ProxiedConnection, data: bytes) -> bytes:
            go_on.wait(20)
            return data

        with impatient_edge(app, app.stack.redis_through(redis.port)) as other:
            for user_id in others:
                name(other.edge, user_id)
                app.users.update(user_id, "known")
            redis.on_reply = hold
            assert name(other.edge, user) == "old"  # through an app, after the timeout of Redis
            redis.on_reply = on_first(go_on.set)
            go_on.set()
            for user_id in others:
                assert name(other.edge, user_id) == "known"
            wait_until(lambda: reads_redis(other, user))
            for user_id in [*others, *others]:
                assert name(other.edge, user_id) == "known"
        for user_id in others:
            app.users.delete(user_id)

    def test_edge_connects_again_to_a_restarted_redis_within_the_same_read(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        assert name(app.edge, user) == "old"
        for _ in range(3):
            app.users.update(user, "newer")
            redis.close_connections()
            assert get(app.edge, user).headers["Cache-Status"].startswith("redis; hit; ttl=")
        assert reads_by_the_app(app) == 0

    def test_redis_that_closes_every_connection_costs_no_wrong_read(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        def end(link: ProxiedConnection, data: bytes) -> bytes:
            raise CloseConnection

        assert name(app.edge, user) == "old"
        app.users.update(user, "newer")
        redis.on_request = end
        assert name(app.edge, user) == "newer"
        redis.reset_hooks()
        wait_until(lambda: reads_redis(app, user))

    def test_redis_that_refuses_connections_costs_no_wrong_read(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        redis.refuse()
        try:
            for number in range(3):
                app.users.update(user, f"number {number}")
                assert name(app.edge, user) == f"number {number}"
        finally:
            redis.listen()
        wait_until(lambda: reads_redis(app, user))

    def test_wrong_password_opens_the_breaker_and_costs_no_wrong_read(
        self, app: FailpointApp, user: int, redis: TcpProxy
    ) -> None:
        with impatient_edge(app, app.stack.redis_through(redis.port, "wrong")) as other:
            for number in range(3):
                put(app, user, f"number {number}")
                assert [name(other.edge, user) for _ in range(2)] == [f"number {number}"] * 2
            redis.requests.clear()
            put(app, user, "last")
            assert name(other.edge, user) == "last"
            assert len(redis.requests) <= 1  # the breaker is open, so not every read connects

    @pytest.mark.parametrize(
        "address",
        ["", "unix:///nowhere", "unix:///nowhere?a=1", "rediss://127.0.0.1:1", "redis://127.0.0.1:1?db=0", "what?"],
    )
    def test_app_reads_redis_if_the_edge_does_not_support_its_address(
        self, app: FailpointApp, user: int, address: str
    ) -> None:
        with impatient_edge(app, address) as other:
            put(app, user, "new")
            response = get(other.edge, user)
            assert response.headers["Cache-Status"].startswith("redis; hit; ttl=")  # from the app
            app.stack.redis().delete(f"user:{user}")
            put(app, user, "newer")
            assert [name(other.edge, user) for _ in range(2)] == ["newer"] * 2


def scripts_run(stack: Stack) -> int:
    """Count the scripts that Redis has run."""
    return int(
        sum(
            stack.redis().info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)
            for command in ("eval", "evalsha")
        )
    )


def drop_at_edge(app: FailpointApp, user: int) -> bool:
    """Invalidate the user at its edge alone, so that the edge has to read it again."""
    gate = app.users.gate
    with gate.database.autocommit() as connection:
        gate.edge_tier.drop(gate.caches.edges(connection), [app.users.rows.resource.row_path(user)])
    return False


def reads_redis(app: FailpointApp, user: int) -> bool:
    """Return whether the edge reads this user from Redis itself."""
    app.failpoints.reached.clear()
    drop_at_edge(app, user)
    return "redis; hit" in get(app.edge, user).headers["Cache-Status"] and reads_by_the_app(app) == 0
