"""Tier 1: which responses are cached, how they are marked, and which requests are refused."""

import json
import re

import pytest
import requests

from testkit.api import User, check_problem
from testkit.raw_http import send_bytes
from testkit.stack import Stack, wait_until


def tiers(url: str) -> str:
    return requests.get(url, timeout=5).headers["Cache-Status"]


def result(url: str) -> str:
    return requests.get(url, timeout=5).headers["X-Cache-Status"]


class TestCaching:
    def test_read_is_a_miss_then_a_hit_and_expires(self, stack: Stack, new_user: User) -> None:
        url = f"{stack.edge}/users/{new_user['id']}"
        assert result(url) == "MISS"
        first = requests.get(url, timeout=5)
        assert first.headers["X-Cache-Status"] == "HIT"
        assert first.headers["Cache-Status"] == "nginx; hit"
        assert first.json()["name"] == new_user["name"]
        wait_until(lambda: result(url) == "EXPIRED", within=10)

    def test_each_edge_has_a_cache_of_its_own(self, stack: Stack, new_user: User) -> None:
        for edge in stack.edges:
            assert result(f"{edge}/users/{new_user['id']}") == "MISS"

    def test_cache_status_names_every_tier_that_the_response_passed(self, stack: Stack, new_user: User) -> None:
        stack.redis().delete(f"user:{new_user['id']}")
        url, other = (f"{edge}/users/{new_user['id']}" for edge in stack.edges)
        assert tiers(url) == "redis; fwd=uri-miss; stored, nginx; fwd=uri-miss; stored"
        assert re.fullmatch("redis; hit; ttl=(60|5[0-9]), nginx; fwd=uri-miss; stored", tiers(other))
        # The stored Cache-Status is not repeated: this hit did not reach Redis.
        assert tiers(other) == "nginx; hit"

    def test_first_read_after_a_write_is_a_hit_in_redis(self, stack: Stack, new_user: User) -> None:
        url = f"{stack.edge}/users/{new_user['id']}"
        requests.put(url, json={"name": "Written"}, timeout=5)
        assert re.fullmatch("redis; hit; ttl=(60|5[0-9]), nginx; fwd=uri-miss; stored", tiers(url))

    def test_404_is_cached(self, stack: Stack) -> None:
        url = f"{stack.edge}/users/888888888"
        assert result(url) in ("MISS", "EXPIRED")
        assert result(url) == "HIT"
        response = requests.get(url, timeout=5)
        check_problem(response, 404)
        assert response.json()["request_id"] == response.headers["X-Request-Id"]

    def test_head_and_get_share_an_entry(self, stack: Stack, new_user: User) -> None:
        url = f"{stack.edge}/users/{new_user['id']}"
        assert requests.head(url, timeout=5).headers["X-Cache-Status"] == "MISS"
        response = requests.get(url, timeout=5)
        assert response.headers["X-Cache-Status"] == "HIT"
        assert response.json()["id"] == new_user["id"]

    def test_stored_page_keeps_its_link(self, stack: Stack) -> None:
        url = f"{stack.edge}/users?limit=1"
        links = [requests.get(url, timeout=5).links["next"]["url"] for _ in range(3)]
        assert len(set(links)) == 1

    @pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/users?foo=1", "/users/1?x=1"])
    def test_address_without_a_cacheable_shape_is_never_cached(self, stack: Stack, path: str) -> None:
        assert [result(stack.edge + path) for _ in range(2)] == ["BYPASS", "BYPASS"]

    def test_404_of_an_unknown_resource_is_not_stored(self, stack: Stack) -> None:
        for address in ("/nope", "/nope/7"):
            assert [tiers(stack.edge + address) for _ in range(2)] == ["nginx; fwd=uri-miss"] * 2

    @pytest.mark.parametrize("spelling", ["007", "%37", "%D9%A7", "7/", "./7", "x/../7", "7?"])
    def test_other_spelling_of_a_row_is_404_and_not_cached(self, stack: Stack, spelling: str) -> None:
        request = f"GET /users/{spelling} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        for _ in range(2):
            response = send_bytes(stack.edge, request)
            assert response.startswith(b"HTTP/1.1 404")
            assert b"X-Cache-Status: BYPASS" in response

    def test_writes_bypass_the_cache(self, stack: Stack) -> None:
        created = requests.post(f"{stack.edge}/users", json={"name": "P", "email": "p@example.com"}, timeout=5)
        url = stack.edge + created.headers["Location"]
        changed = requests.put(url, json={"name": "Q"}, timeout=5)
        deleted = requests.delete(url, timeout=5)
        assert [a.status_code for a in (created, changed, deleted)] == [201, 200, 200]
        assert {a.headers["X-Cache-Status"] for a in (created, changed, deleted)} == {"BYPASS"}

    def test_cache_status_of_a_write_names_the_method_as_reason(self, stack: Stack) -> None:
        response = requests.delete(f"{stack.edge}/users/777777777", timeout=5)
        assert response.headers["Cache-Status"] == "nginx; fwd=method"

    def test_client_with_the_current_etag_gets_304_until_the_next_write(self, stack: Stack, new_user: User) -> None:
        url = f"{stack.edge}/users/{new_user['id']}"
        for written in ("first", "second", "third"):
            requests.put(url, json={"name": written}, timeout=5)
            tag = requests.get(url, timeout=5).headers["ETag"]
            for edge in stack.edges:
                for _ in range(2):
                    response = requests.get(f"{edge}/users/{new_user['id']}", headers={"If-None-Match": tag}, timeout=5)
                    assert (response.status_code, response.headers["ETag"]) == (304, tag)
            assert response.headers["X-Cache-Status"] == "HIT"
            requests.put(url, json={"name": f"not {written}"}, timeout=5)
            response = requests.get(url, headers={"If-None-Match": tag}, timeout=5)
            assert (response.status_code, response.json()["name"]) == (200, f"not {written}")

    def test_browsers_must_revalidate_each_time(self, stack: Stack) -> None:
        assert requests.get(f"{stack.edge}/users/1", timeout=5).headers["Cache-Control"] == "private, no-cache"


class TestHostileRequests:
    def test_no_header_of_a_client_changes_the_stored_response(self, stack: Stack, new_user: User) -> None:
        url = f"{stack.edge}/users/{new_user['id']}"
        hostile = {
            "Cookie": "a=b",
            "X-HTTP-Method-Override": "DELETE",
            "X-Original-URL": "/nope",
            "X-Forwarded-Host": "evil.example",
            "X-Accel-Expires": "0",
            "Range": "bytes=0-1",
            "Accept-Encoding": "gzip",
            "Cache-Control": "no-store",
            "If-None-Match": "*",
        }
        poisoned = requests.get(url, headers=hostile, timeout=5)
        clean = requests.get(url, timeout=5)
        assert clean.headers["X-Cache-Status"] == "HIT"
        assert clean.status_code == 200
        assert clean.json()["id"] == new_user["id"]
        assert poisoned.status_code in (200, 206, 304)

    def test_edge_replaces_the_request_id_of_a_client(self, stack: Stack) -> None:
        response = requests.get(f"{stack.edge}/livez", headers={"X-Request-Id": "mine"}, timeout=5)
        assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", response.headers["X-Request-Id"])

    @pytest.mark.parametrize(
        ("request_bytes", "status"),
        [
            (b"FO /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 501),
            (b"A /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 501),
            (b"TRACE /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
            (b"GET /users/" + b"7" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 414),
            (b"GET /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nA: " + b"a" * 20000 + b"\r\n\r\n", 431),
            (b"POST /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999\r\n\r\n", 413),
            (b"GET /users HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            (
                b"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
            ),
            (b"nonsense\r\n\r\n", 400),
        ],
    )
    def test_errors_of_nginx_are_problems(self, stack: Stack, request_bytes: bytes, status: int) -> None:
        head, _, body = send_bytes(stack.edge, request_bytes).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status), head
        assert b"Content-Type: application/problem+json" in head
        assert b"X-Cache-Status: BYPASS" in head
        problem_body = json.loads(body)
        assert problem_body["status"] == status
        assert problem_body["title"] and problem_body["detail"]
