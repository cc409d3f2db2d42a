"""Tier 2, seen through an app: the form of its entries, their TTL, and what a write invalidates."""

import pytest
import requests

from testkit.api import User
from testkit.stack import Stack


def test_first_read_fills_redis_and_second_read_is_a_redis_hit(stack: Stack, new_user: User) -> None:
    key = f"user:{new_user['id']}"
    stack.redis().delete(key)
    first, second = (requests.get(new_user["url"], timeout=5) for _ in range(2))
    assert first.headers["Cache-Status"] == "redis; fwd=uri-miss; stored"
    assert second.headers["Cache-Status"].startswith("redis; hit; ttl=")
    assert first.content == second.content
    assert 0 < stack.redis().ttl(key) <= 60


def test_entry_in_redis_contains_the_bytes_of_the_response(stack: Stack, new_user: User) -> None:
    response = requests.get(new_user["url"], timeout=5)
    stored = stack.redis().hgetall(f"user:{new_user['id']}")
    head = f"200\t{response.headers['ETag']}\t{response.headers['Last-Modified']}\t\n"
    assert stored[b"body:"] == head.encode() + response.content


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_write_of_a_row_invalidates_the_list_and_prefills_the_row(stack: Stack, new_user: User, method: str) -> None:
    requests.get(new_user["url"], timeout=5)
    requests.get(f"{stack.app}/users", timeout=5)
    requests.get(f"{stack.app}/users?limit=1", timeout=5)
    key = f"user:{new_user['id']}"
    assert stack.redis().exists(key, "all_users") == 2
    before = stack.redis().hget(key, "body:")
    requests.request(method, new_user["url"], json={"name": "Dropped"}, timeout=5)
    assert not stack.redis().exists("all_users")
    # The writer prefills its row. It cannot prefill the list: it does not know the rows that others are about to commit.
    after = stack.redis().hget(key, "body:")
    assert isinstance(after, bytes)
    assert after.startswith(b'404\t\t\t\n{"type"') if method == "DELETE" else b'"name":"Dropped"' in after
    assert after != before


def test_missing_row_is_cached_as_404_until_it_is_created(stack: Stack) -> None:
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


def test_refused_write_leaves_the_redis_entry(stack: Stack, new_user: User) -> None:
    requests.get(new_user["url"], timeout=5)
    requests.put(new_user["url"], json={"email": "alice@example.com"}, timeout=5)
    assert requests.get(new_user["url"], timeout=5).headers["Cache-Status"].startswith("redis; hit; ttl=")


def test_invalid_value_in_redis_counts_as_a_miss(stack: Stack, new_user: User) -> None:
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
