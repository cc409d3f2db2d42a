"""Each kind of response has the headers that security scanners such as ZAP look for, and tells nothing about the server."""

import re

import pytest

from testkit.raw_http import RawResponse, send_bytes, send_request
from testkit.raw_http import parse_response as parse
from testkit.stack import Stack

RESPONSES = [
    *[
        ("GET", path)
        for path in ("/users/1", "/users", "/users/count", "/users/0", "/users?limit=0", "/nothing", "/.edge")
    ],
    *[
        ("GET", path)
        for path in (
            *("/docs", "/docs/", "/openapi.json", "/problems/not-found", "/health", "/readyz", "/livez"),
            *("/favicon.ico", "/robots.txt"),
        )
    ],
    *[("POST", "/users"), ("PUT", "/users/0"), ("DELETE", "/users/0"), ("PATCH", "/users/1"), ("OPTIONS", "/users")],
    *[("TRACE", "/users"), ("HEAD", "/users/1"), ("GET", "/users/1?q=" + "a" * 5000), ("POST", "/users/batch")],
]


@pytest.fixture(params=RESPONSES, ids=lambda it: f"{it[0]} {it[1][:20]}")
def response(request: pytest.FixtureRequest, stack: Stack) -> RawResponse:
    method, path = request.param
    return send_request(stack.edge, method, path)


def test_no_browser_guesses_another_type(response: RawResponse) -> None:
    assert response.status == 204 or response.headers["x-content-type-options"] == "nosniff", response
    assert response.body == b"" or response.headers["content-type"], response


def test_no_version_and_no_technology_is_named(response: RawResponse) -> None:
    assert response.headers["server"] == "nginx"
    assert not {"x-powered-by", "x-aspnet-version", "via", "x-runtime", "x-debug"} & set(response.headers)
    assert not re.search(rb"Traceback|gunicorn|werkzeug|psycopg|nginx/|/velikiy/", response.body)


def test_no_cookie_is_set_and_no_page_of_another_origin_may_read(response: RawResponse) -> None:
    assert "set-cookie" not in response.headers
    assert "access-control-allow-origin" not in response.headers


def test_no_shared_cache_may_store_it(response: RawResponse) -> None:
    control = response.headers.get("cache-control", "")
    is_asset = response.headers.get("content-type", "").startswith(("text/html", "application/json")) is False
    assert is_asset or "private" in control or "no-store" in control or "no-cache" in control, response.headers


def test_html_has_a_policy_that_forbids_frames(response: RawResponse) -> None:
    if response.headers.get("content-type", "").startswith("text/html") and response.status == 200:
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "unsafe-eval" not in response.headers["content-security-policy"]
        assert "charset=utf-8" in response.headers["content-type"]


@pytest.mark.parametrize(
    "frame", [b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
def test_malformed_request_gets_a_problem_with_the_same_headers(stack: Stack, frame: bytes) -> None:
    response = parse(send_bytes(stack.edge, frame, half_close=True))
    assert response.status in (400, 404, 505)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
