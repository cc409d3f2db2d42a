"""Processes that share a database and reach different servers as Redis."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import requests
from redis import Redis

from testkit.databases import answers, redis_server
from testkit.stack import Stack, folder, run, running, wait_until
from testkit.tcp_proxy import TcpProxy, tcp_proxy

_numbers = count(1)


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def first() -> Iterator[Stack]:
    with running() as stack:
        yield stack


def stop(client: Redis) -> None:
    client.shutdown()
    wait_until(lambda: not answers(client))


def new_user(stack: Stack) -> int:
    body = {"name": "old", "email": f"shared{next(_numbers)}@example.com"}
    created = requests.post(f"{stack.edge}/users", json=body, timeout=10)
    assert created.status_code == 201, created.text
    return int(created.json()["id"])


def rename(base: str, user: int, name: str) -> None:
    assert requests.put(f"{base}/users/{user}", json={"name": name}, timeout=10).status_code == 200


def read(base: str, user: int) -> str:
    response = requests.get(f"{base}/users/{user}", timeout=10)
    assert response.status_code == 200, response.text
    return str(response.json()["name"])


def is_redis_hit(base: str, user: int) -> bool:
    return "redis; hit" in requests.get(f"{base}/users/{user}", timeout=10).headers["Cache-Status"]


def readiness(stack: Stack) -> Any:
    return requests.get(f"{stack.app}/readyz", timeout=10).json()


def redis_check(stack: Stack) -> str:
    return str(readiness(stack)["checks"]["redis"])


def write_here_and_read_there(user: int, *bases: str) -> None:
    """Write through each address, and read each write through every address twice: the second read may be a hit."""
    for base in bases:
        name = f"name {next(_numbers)}"
        rename(base, user, name)
        assert {read(other, user) for other in bases for _ in range(2)} == {name}, base


def test_two_stacks_with_a_redis_each_read_every_write_and_say_why_they_use_neither(first: Stack) -> None:
    user = new_user(first)
    wait_until(lambda: is_redis_hit(first.app, user))
    with running(DATABASE_URL=first.postgres) as second:
        for base in (first.app, first.edge, second.app, second.edge):
            read(base, user)
        write_here_and_read_there(user, first.edge, second.edge, first.app, second.app)
        for stack in (first, second):
            wait_until(lambda stack=stack: redis_check(stack) == "not used")  # type: ignore[misc]
            wait_until(lambda stack=stack: "different servers" in str(readiness(stack).get("warnings")))  # type: ignore[misc]
            status = run("status", "--data", str(stack.data)).stdout
            assert status.startswith("something is wrong, and requests are answered\n"), status
            assert f"{first.redis_socket}/0" in status
            assert f"{second.redis_socket}/0" in status
            assert "Give all the same REDIS_URL." in status
            wait_until(lambda stack=stack: '"redis.contested"' in stack.log("relay"))  # type: ignore[misc]
        write_here_and_read_there(user, first.edge, second.edge, first.app, second.app)
    wait_until(lambda: is_redis_hit(first.app, user), within=40)
    assert readiness(first)["checks"]["redis"] == "ok"
    assert first.sql("SELECT name FROM caches WHERE kind = 'redis'") == [("redis",)]


def test_stack_with_another_database_number_of_the_same_redis_reads_every_write(first: Stack) -> None:
    user = new_user(first)
    wait_until(lambda: is_redis_hit(first.app, user), within=40)
    with running(DATABASE_URL=first.postgres, REDIS_URL=first.redis_database(1)) as second:
        write_here_and_read_there(user, first.edge, second.edge, first.app, second.app)
        wait_until(lambda: redis_check(second) == "not used")
        write_here_and_read_there(user, first.edge, second.edge, first.app, second.app)
    wait_until(lambda: is_redis_hit(first.app, user), within=40)


def test_stacks_with_the_same_redis_share_it(first: Stack) -> None:
    user = new_user(first)
    wait_until(lambda: is_redis_hit(first.app, user), within=40)
    with running(DATABASE_URL=first.postgres, REDIS_URL=first.redis_url) as second:
        wait_until(lambda: is_redis_hit(second.app, user))
        write_here_and_read_there(user, first.edge, second.edge, first.app, second.app)
        assert [redis_check(stack) for stack in (first, second)] == ["ok", "ok"]


class TestExchangedRedis:
    """The address of Redis leads to another server from one moment to the next."""

    @pytest.fixture
    def proxy(self) -> Iterator[TcpProxy]:
        with redis_server() as port, tcp_proxy(("127.0.0.1", port)) as proxy:
            yield proxy

    def test_exchanged_redis_is_used_only_after_it_was_emptied(self, proxy: TcpProxy) -> None:
        with running(REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0") as stack, redis_server() as other:
            user = new_user(stack)
            wait_until(lambda: is_redis_hit(stack.app, user))
            before, proxy.server = proxy.server, ("127.0.0.1", other)
            proxy.close_connections()
            rename(stack.app, user, "written to the other server")
            assert read(stack.app, user) == "written to the other server"
            wait_until(lambda: is_redis_hit(stack.app, user))

            proxy.server = before  # where an entry of the old name is left
            proxy.close_connections()
            assert {read(base, user) for base in (stack.app, stack.edge) for _ in range(3)} == {
                "written to the other server"
            }
            write_here_and_read_there(user, stack.app, stack.edge)
            wait_until(lambda: is_redis_hit(stack.app, user))
            assert read(stack.app, user) == read(stack.edge, user)

    def test_redis_that_restarts_with_its_old_entries_is_emptied_before_it_is_used(self) -> None:
        with folder() as data, redis_server(data) as port, running(REDIS_URL=f"redis://127.0.0.1:{port}/0") as stack:
            user = new_user(stack)
            wait_until(lambda: is_redis_hit(stack.app, user))
            key = f"user:{user}"
            with Redis(port=port) as client:
                assert client.exists(key)
                stop(client)
                rename(stack.app, user, "written while Redis was down")
                with redis_server(data, port), Redis(port=port) as restarted:
                    assert b"old" in restarted.hget(key, "body:"), "Redis has not kept its entries"
                    assert {read(base, user) for base in (stack.app, stack.edge) for _ in range(3)} == {
                        "written while Redis was down"
                    }
                    wait_until(lambda: is_redis_hit(stack.app, user))
                    write_here_and_read_there(user, stack.app, stack.edge)


def test_databases_of_one_redis_at_its_own_address_live_together() -> None:
    """Finding another database there does not mean that the registered one has ended."""
    with redis_server() as port:
        address = f"redis://127.0.0.1:{port}"
        with running(REDIS_URL=f"{address}/0", REDIS_DIRECT="true") as first:
            user = new_user(first)
            wait_until(lambda: is_redis_hit(first.app, user))
            with running(DATABASE_URL=first.postgres, REDIS_URL=f"{address}/1", REDIS_DIRECT="true") as second:
                write_here_and_read_there(user, second.edge, first.edge, second.app, first.app)
                wait_until(lambda: "different servers" in str(readiness(first).get("warnings")))
                write_here_and_read_there(user, second.edge, first.edge, second.app, first.app)


def test_master_that_became_a_replica_serves_no_entry_of_its_new_master() -> None:
    """Its connections stay open, and its data is replaced."""
    with redis_server() as port, redis_server() as other, running(REDIS_URL=f"redis://127.0.0.1:{port}/0") as stack:
        user = new_user(stack)
        wait_until(lambda: is_redis_hit(stack.app, user))
        with Redis(port=port) as master, Redis(port=other) as replica:
            replica.replicaof("127.0.0.1", str(port))
            wait_until(lambda: replica.exists(f"user:{user}"))
            replica.replicaof("NO", "ONE")
            rename(stack.app, user, "written to the master alone")
            master.replicaof("127.0.0.1", str(other))
            wait_until(lambda: b"old" in (master.hget(f"user:{user}", "body:") or b""))
            for _ in range(3):
                assert {read(base, user) for base in (stack.app, stack.edge)} == {"written to the master alone"}
            wait_until(lambda: "replica" in str(readiness(stack).get("warnings")))
            write_here_and_read_there(user, stack.app, stack.edge)
            master.replicaof("NO", "ONE")
            wait_until(lambda: is_redis_hit(stack.app, user), within=40)
            assert read(stack.app, user) == read(stack.edge, user)
