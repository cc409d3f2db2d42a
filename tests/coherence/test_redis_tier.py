"""Tier 2: what is kept, for how long, and what is dropped by a write."""

import pytest
import requests

from testkit.api import User
from testkit.stack import Stack


def test_the_first_read_fills_and_the_second_is_answered_from_redis(stack: Stack, new_user: User) -> None:
    key = f"user:{new_user['id']}"
    stack.redis().delete(key)
    first, second = (requests.get(new_user["url"], timeout=5) for _ in range(2))
    assert first.headers["Cache-Status"] == "redis; fwd=uri-miss; stored"
    assert second.headers["Cache-Status"].startswith("redis; hit; ttl=")
    assert first.content == second.content
    assert 0 < stack.redis().ttl(key) <= 60


def test_redis_keeps_the_very_bytes_that_clients_get(stack: Stack, new_user: User) -> None:
    response = requests.get(new_user["url"], timeout=5)
    stored = stack.redis().hgetall(f"user:{new_user['id']}")
    head = f"200\t{response.headers['ETag']}\t{response.headers['Last-Modified']}\t\n"
    assert stored[b"body:"] == head.encode() + response.content


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_write_drops_the_list_and_replaces_the_user(stack: Stack, new_user: User, method: str) -> None:
    requests.get(new_user["url"], timeout=5)
    requests.get(f"{stack.app}/users", timeout=5)
    requests.get(f"{stack.app}/users?limit=1", timeout=5)
    key = f"user:{new_user['id']}"
    assert stack.redis().exists(key, "all_users") == 2
    before = stack.redis().hget(key, "body:")
    requests.request(method, new_user["url"], json={"name": "Dropped"}, timeout=5)
    assert not stack.redis().exists("all_users")
    # The writer knows the new body and puts it there; of the list it does not know what others are about to commit.
    after = stack.redis().hget(key, "body:")
    assert isinstance(after, bytes)
    assert after.startswith(b'404\t\t\t\n{"type"') if method == "DELETE" else b'"name":"Dropped"' in after
    assert after != before


def test_who_is_not_there_is_remembered_until_created(stack: Stack) -> None:
    (next_id,) = stack.sql("SELECT last_value + 1 FROM users_id_seq")[0]
    url = f"{stack.app}/users/{next_id}"
    assert [requests.get(url, timeout=5).status_code for _ in range(2)] == [404, 404]
    assert requests.get(url, timeout=5).headers["Cache-Status"].startswith("redis; hit; ttl=")
    created = requests.post(f"{stack.app}/users", json={"name": "N", "email": "next@example.com"}, timeout=5)
    try:
        assert created.json()["id"] == next_id
        assert requests.get(url, timeout=5).status_code == 200
    finally:
        requests.delete(url, timeout=5)


def test_a_failed_write_drops_nothing(stack: Stack, new_user: User) -> None:
    requests.get(new_user["url"], timeout=5)
    requests.put(new_user["url"], json={"email": "alice@example.com"}, timeout=5)
    assert requests.get(new_user["url"], timeout=5).headers["Cache-Status"].startswith("redis; hit; ttl=")


def test_what_is_no_entry_is_read_anew(stack: Stack, new_user: User) -> None:
    redis = stack.redis()
    key = f"user:{new_user['id']}"
    for spoil in (
        lambda: redis.set(key, "a string"),
        lambda: redis.hset(key, "body:", b"\xff\x00 garbage"),
        lambda: redis.hset(key, "body:", b""),
        lambda: redis.hset(key, "body:", b"99999\t\t\t\nx"),
        lambda: redis.hset(key, "body:", b"200\t\t\ta\rb\nx"),
    ):
        redis.delete(key)
        spoil()
        assert requests.get(new_user["url"], timeout=5).json()["name"] == new_user["name"]
