"""Web pages of the origins in CORS_ORIGINS may read and write from a browser; pages of other origins may not."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Page

from testkit.browser import open_page
from testkit.fake_app import fake_app, refused_by_edge
from testkit.raw_http import RawResponse, parse_response, send_bytes
from testkit.stack import Stack, free_ports, refused, running, wait_until

ORIGIN = "http://app.example"
SECOND = "https://second.example:8443"
FOREIGN = "http://evil.example"
READABLE = {"ETag", "Link", "Location", "X-Cache-Status", "X-Request-Id", "Retry-After", "Idempotency-Replayed"}


@pytest.fixture(scope="module")
def sharing_stack() -> Iterator[Stack]:
    with running("--apps", "1", CORS_ORIGINS=f"{ORIGIN}, {SECOND}") as stack:
        yield stack


@pytest.fixture(params=["app", "edge"])
def shared(request: pytest.FixtureRequest, sharing_stack: Stack) -> str:
    return sharing_stack.app if request.param == "app" else sharing_stack.edge


def send(base_url: str, method: str, target: str, origin: str | None, *lines: str, body: str = "") -> RawResponse:
    head = [f"{method} {target} HTTP/1.1", f"Host: {urlsplit(base_url).netloc}", "Connection: close"]
    head += [f"Content-Length: {len(body)}", *([f"Origin: {origin}"] if origin else []), *lines, "", body]
    received = send_bytes(base_url, "\r\n".join(head).encode())
    for repeated in (b"\naccess-control-allow-origin:", b"\nvary: origin", b"\nx-request-id:"):
        assert received.lower().count(repeated) <= 1
    return parse_response(received)


def lists(response: RawResponse, name: str) -> set[str]:
    return {member.strip() for member in response.headers.get(name, "").split(",")} - {""}


def is_shared(response: RawResponse, origin: str = ORIGIN) -> bool:
    """Return whether a page of this origin may read the response."""
    assert "access-control-allow-credentials" not in response.headers
    if "access-control-allow-origin" not in response.headers:
        return False
    assert response.headers["access-control-allow-origin"] == origin
    assert lists(response, "access-control-expose-headers") >= READABLE
    return True


REQUESTS: list[tuple[str, str, tuple[str, ...], int]] = [
    ("GET", "/users/1", (), 200),
    ("GET", "/users/1", ("If-None-Match: *",), 304),
    ("HEAD", "/users/1", (), 200),
    ("GET", "/users", (), 200),
    ("GET", "/users?limit=1&sort=id", (), 200),
    ("GET", "/users/999999999", (), 404),
    ("GET", "/users?foo=1", (), 400),
    ("GET", "/users/1", ("Accept: text/plain",), 406),
    ("GET", "/openapi.json", (), 200),
    ("GET", "/readyz", (), 200),
    ("OPTIONS", "/users/1", (), 204),
    ("POST", "/users", ("Content-Type: text/plain",), 400),
    ("PUT", "/users/1", ("Content-Type: application/json", 'If-Match: "x"'), 400),
    ("DELETE", "/users/999999999", (), 404),
    ("PUT", "/users", (), 405),
]


@pytest.mark.parametrize(("method", "target", "lines", "status"), REQUESTS)
def test_each_response_can_be_read_by_a_page_of_an_allowed_origin_only(
    shared: str, method: str, target: str, lines: tuple[str, ...], status: int
) -> None:
    for _ in range(2):  # the second is a hit
        for origin in (ORIGIN, SECOND):
            response = send(shared, method, target, origin, *lines)
            assert response.status == status
            assert is_shared(response, origin)
            assert "Origin" in lists(response, "vary")
        for other in (FOREIGN, "null", "https://app.example", f"{ORIGIN}:8080", f"{ORIGIN}.evil.example", None):
            assert not is_shared(send(shared, method, target, other, *lines))


def test_errors_of_nginx_can_be_read(sharing_stack: Stack) -> None:
    edge = sharing_stack.edge
    for method, target, lines, status in [
        ("FO", "/users", (), 501),
        ("GET", "/.other", (), 404),
        ("POST", "/users", ("Content-Type: application/json", "If-Match: "), 400),
        ("POST", "/users", ("Expect: 100-continue", "A: " + "a" * 20_000), 431),
    ]:
        response = send(edge, method, target, ORIGIN, *lines)
        assert response.status == status
        # Nginx stops to read a header that is too large, and may not have read Origin.
        assert is_shared(response) or status == 431
    large = send(edge, "POST", "/users", ORIGIN, "Content-Type: application/json", body="x" * 70_000)
    assert (large.status, is_shared(large)) == (413, True)


def test_name_that_is_not_the_services_is_refused_in_a_readable_response(shared: str) -> None:
    head = f"GET /users/1 HTTP/1.1\r\nHost: evil.example\r\nOrigin: {ORIGIN}\r\nConnection: close\r\n\r\n"
    response = parse_response(send_bytes(shared, head.encode()))
    assert (response.status, is_shared(response)) == (421, True)


def test_hit_serves_each_origin_its_own_header(sharing_stack: Stack) -> None:
    edge = sharing_stack.edge

    def is_hit() -> bool:
        return send(edge, "GET", "/users/2", None).headers["x-cache-status"] == "HIT"

    for origin in (ORIGIN, SECOND):
        wait_until(is_hit)
        response = send(edge, "GET", "/users/2", origin)
        assert (response.headers["x-cache-status"], is_shared(response, origin)) == ("HIT", True)


PREFLIGHT = ("Access-Control-Request-Method: PATCH", "Access-Control-Request-Headers: content-type,if-match")


@pytest.mark.parametrize("target", ["/users/1", "/users", "/users/batch", "/users?q=a", "/readyz", "/docs", "/nothing"])
def test_preflight_allows_writes_with_preconditions(shared: str, target: str) -> None:
    response = send(shared, "OPTIONS", target, ORIGIN, *PREFLIGHT)
    assert (response.status, response.body) == (204, b"")
    assert is_shared(response)
    assert lists(response, "access-control-allow-methods") >= {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}
    allowed = {name.lower() for name in lists(response, "access-control-allow-headers")}
    assert allowed >= {"content-type", "if-match", "if-none-match", "idempotency-key"}
    assert int(response.headers["access-control-max-age"]) > 0
    assert response.headers["x-request-id"]


def test_preflight_of_another_origin_allows_nothing(shared: str) -> None:
    for origin in (FOREIGN, "null"):
        response = send(shared, "OPTIONS", "/users/1", origin, *PREFLIGHT)
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_preflight_needs_no_app() -> None:
    with fake_app(CORS_ORIGINS=ORIGIN) as app:
        assert send(app.edge, "OPTIONS", "/rows/3", ORIGIN, *PREFLIGHT).status == 204
        assert app.received == []
        send(app.edge, "OPTIONS", "/rows/3", FOREIGN, *PREFLIGHT)
        send(app.edge, "OPTIONS", "/rows/3", ORIGIN)
        assert len(app.received) == 2


def test_write_of_an_allowed_origin_is_carried_out_wherever_its_page_is(shared: str) -> None:
    for lines in ((), ("Sec-Fetch-Site: cross-site",), ("Sec-Fetch-Site: same-site",)):
        response = send(
            shared, "PUT", "/users/3", ORIGIN, *lines, "Content-Type: application/json", body='{"name":"C"}'
        )
        assert (response.status, is_shared(response)) == (200, True)
    for origin in (FOREIGN, "null", None):
        site = "Sec-Fetch-Site: cross-site"
        response = send(shared, "PUT", "/users/3", origin, site, "Content-Type: application/json", body='{"name":"D"}')
        assert response.status == 403


def test_nothing_is_shared_without_the_setting(base_url: str) -> None:
    for method in ("GET", "OPTIONS"):
        response = send(base_url, method, "/users/1", ORIGIN, *PREFLIGHT)
        assert not [name for name in response.headers if name.startswith("access-control-") or name == "vary"]


FETCH = """async ([url, options]) => {
    try {
        const response = await fetch(url, options);
        const names = ["ETag", "Link", "Location", "X-Cache-Status", "X-Request-Id"];
        const headers = Object.fromEntries(names.map(name => [name, response.headers.get(name)]));
        return {status: response.status, headers, text: await response.text()};
    } catch (error) {
        return {status: 0, error: String(error)};
    }
}"""


@pytest.fixture
def open_origin(browser: Callable[..., Browser], other_port: int) -> Callable[[str], Any]:
    """Return a function that opens a page of this origin in a browser."""

    def open_origin(origin: str) -> Any:
        host = urlsplit(origin).netloc
        return open_page(browser(f"--host-resolver-rules=MAP {host}:80 127.0.0.1:{other_port}"), origin)

    return open_origin


def fetch(page: Page, url: str, method: str = "GET", body: str | None = None, **headers: str) -> Any:
    options: dict[str, Any] = {"method": method, "headers": headers}
    return page.evaluate(FETCH, [url, {**options, "body": body} if body else options])


class TestInABrowser:
    def test_page_of_an_allowed_origin_reads_writes_and_retries(
        self, sharing_stack: Stack, shared: str, open_origin: Any
    ) -> None:
        new = '{"name": "Shared", "email": "shared@example.com"}'
        json = {"Content-Type": "application/json"}
        with open_origin(ORIGIN) as page:
            created = fetch(page, f"{shared}/users", "POST", new, **json, **{"Idempotency-Key": f"cors {shared}"[-20:]})
            assert created["status"] == 201
            url = shared + created["headers"]["Location"]
            for _ in range(3):
                read = fetch(page, url)
                assert (read["status"], read["headers"]["ETag"]) == (200, created["headers"]["ETag"])
            assert read["headers"]["X-Request-Id"]
            assert read["headers"]["X-Cache-Status"] == (None if shared == sharing_stack.app else "HIT")
            assert 'rel="next"' in fetch(page, f"{shared}/users?limit=1")["headers"]["Link"]
            changed = fetch(page, url, "PATCH", '{"name": "B"}', **json, **{"If-Match": created["headers"]["ETag"]})
            assert changed["status"] == 200
            lost = fetch(page, url, "PATCH", '{"name": "C"}', **json, **{"If-Match": created["headers"]["ETag"]})
            assert (lost["status"], "precondition-failed" in lost["text"]) == (412, True)
            assert fetch(page, url, "DELETE", traceparent="00-a-b-01")["status"] == 200
            assert fetch(page, url)["status"] == 404

    def test_page_of_another_origin_reads_and_writes_nothing(self, shared: str, open_origin: Any) -> None:
        before = requests.get(f"{shared}/users/2", timeout=5).json()
        with open_origin(FOREIGN) as page:
            assert fetch(page, f"{shared}/users/2")["status"] == 0
            json = {"Content-Type": "application/json"}
            for method in ("PUT", "PATCH", "DELETE"):
                assert fetch(page, f"{shared}/users/2", method, '{"name": "E"}', **json)["status"] == 0
        assert requests.get(f"{shared}/users/2", timeout=5).json() == before

    def test_page_reads_nothing_without_the_setting(self, base_url: str, open_origin: Any) -> None:
        with open_origin(ORIGIN) as page:
            assert fetch(page, f"{base_url}/users/1")["status"] == 0


@pytest.mark.parametrize(
    "value",
    [
        *["*", "null", "app.example", "https://app.example/", "https://app.example/path", "https://*.example"],
        *["https://App.example", "https://app.example:443", "http://app.example:80", "https://app.example:port"],
        *[
            "https://a.example,https://b.example/",
            'https://a.example"',
            "https://user@app.example",
            "https://ä.example",
        ],
    ],
)
def test_value_that_is_no_origin_is_refused_at_the_start_by_the_launcher_and_by_the_edge(value: str) -> None:
    assert f"CORS_ORIGINS={value!r} is not allowed" in refused("up", "--port", str(free_ports(1)), CORS_ORIGINS=value)
    assert "CORS_ORIGINS=" in refused_by_edge(CORS_ORIGINS=value)
