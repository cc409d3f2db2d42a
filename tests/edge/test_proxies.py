"""A proxy in front of the edge: its headers count if it is trusted, and stored responses do not depend on them."""

import json
import subprocess
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from werkzeug import Request, Response

from testkit.fake_app import FakeApp, fake_app, plain, storable
from testkit.raw_http import RawResponse, parse_response, send_bytes
from testkit.stack import EDGE_SECRET, ROOT, folder, wait_until

_numbers = count(1)

PROXIES = "127.0.0.0/8, 10.1.0.0/16,2001:db8::/32"

LINK = '</rows?cursor=a&limit=2>; rel="next", </rows?limit=2>; rel="first"'

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def trusting() -> Iterator[FakeApp]:
    """An edge that trusts the proxies on this machine."""
    with fake_app(TRUSTED_PROXIES=PROXIES, EDGE_TTL="60") as app:
        yield app


@pytest.fixture(scope="module")
def fixed() -> Iterator[FakeApp]:
    """An edge whose setting names the path prefix."""
    with fake_app(PATH_PREFIX="/v1/users-api/") as app:
        yield app


@pytest.fixture(scope="module")
def by_default() -> Iterator[FakeApp]:
    with fake_app() as app:
        yield app


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    for name in {"trusting", "fixed", "by_default"} & set(request.fixturenames):
        app = request.getfixturevalue(name)
        app.received.clear()
        app.respond = storable


@pytest.fixture
def path() -> str:
    """The path of a list that no test has read yet."""
    return f"/r{next(_numbers)}"


def get(app: FakeApp, address: str, *lines: str, method: str = "GET") -> RawResponse:
    head = "\r\n".join((f"{method} {address} HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""))
    return parse_response(send_bytes(app.edge, head.encode("latin-1")))


def prefixed(prefix: str) -> str:
    return f"X-Forwarded-Prefix: {prefix}"


def paged(_: Request) -> Response:
    return storable(_, ETag='"1"', Link=LINK)


def large_page(_: Request) -> Response:
    return storable(_, body=b'["%b"]' % (b"x" * 4000), ETag='"1"', Link=LINK)


def missing(request: Request) -> Response:
    return storable(request, 404, problem(request, 404))


def invalid(request: Request) -> Response:
    return plain(request, 400, problem(request, 400))


def problem(request: Request, status: int) -> bytes:
    return b'{"type":"/problems/some","status":%d,"request_id":"%b"}' % (
        status,
        request.headers["X-Request-Id"].encode(),
    )


class TestPrefix:
    @pytest.mark.parametrize("respond", [paged, large_page])
    def test_stored_links_begin_with_the_prefix_of_each_request(
        self, trusting: FakeApp, path: str, respond: Any
    ) -> None:
        trusting.respond = respond
        expected = ["/a", "/b/c", "", "/b/c", "/a"]
        for n, prefix in enumerate(expected):
            response = get(trusting, path, *([prefixed(prefix)] if prefix else []))
            assert response.headers["x-cache-status"] == ("HIT" if n else "MISS")
            assert response.headers["link"] == LINK.replace("</", f"<{prefix}/")
            assert response.headers["content-length"] == str(len(response.body))
        assert len(trusting.received) == 1
        assert "path-prefix" not in trusting.received[0].headers

    def test_stored_404_begins_its_type_with_the_prefix_of_each_request(self, trusting: FakeApp, path: str) -> None:
        trusting.respond = missing
        for n, prefix in enumerate(["/a", "", "/b/c", "/a"]):
            response = get(trusting, f"{path}/7", *([prefixed(prefix)] if prefix else []))
            assert (response.status, response.headers["x-cache-status"]) == (404, "HIT" if n else "MISS")
            assert response.json["type"] == f"{prefix}/problems/some"
            assert response.json["request_id"] == response.headers["x-request-id"]
            assert response.headers["content-length"] == str(len(response.body))

    def test_response_that_is_not_stored_has_the_prefix_too(self, trusting: FakeApp, path: str) -> None:
        trusting.respond = lambda request: plain(request, Link=LINK)
        assert get(trusting, path, prefixed("/a")).headers["link"].startswith("</a/rows")
        trusting.respond = invalid
        response = get(trusting, path, prefixed("/a"))
        assert response.json["type"] == "/a/problems/some"
        assert response.headers["content-length"] == str(len(response.body))

    @pytest.mark.parametrize("line", ["GET /openapi.json", "PUT /rows/7", "POST /rows/batch", "GET /readyz"])
    def test_app_receives_the_prefix_of_a_request_whose_response_is_not_stored(
        self, trusting: FakeApp, line: str
    ) -> None:
        method, address = line.split()
        get(trusting, address, prefixed("/a/b"), method=method)
        assert trusting.received[0].headers["path-prefix"] == "/a/b"

    @pytest.mark.parametrize("line", ["TRACE /r", "FO /r", "GET /.x", "GET /" + "r" * 5000, "GET /r\xff"])
    def test_problem_of_the_edge_has_the_prefix(self, trusting: FakeApp, line: str) -> None:
        method, address = line.split()
        response = get(trusting, address, prefixed("/api"), method=method)
        assert response.json["type"].startswith("/api/problems/")

    @pytest.mark.parametrize(
        "value",
        [
            *[
                "",
                "api",
                "//evil.example",
                "/api//x",
                "/api/../x",
                "/.",
                "https://evil.example/",
                "/a b",
                '/a"b',
                "/a<b",
            ],
            *["/a, /b", "/%61", "/a?b", "/a#b", "/\xe4", "/" + "a" * 65, "/a" * 11, "/a\\b", "/a;b"],
        ],
    )
    def test_malformed_prefix_counts_as_none(self, trusting: FakeApp, path: str, value: str) -> None:
        trusting.respond = paged
        assert get(trusting, path, prefixed(value)).headers["link"] == LINK
        assert get(trusting, "/openapi.json", prefixed(value)).status == 200
        assert "path-prefix" not in trusting.received[-1].headers

    @pytest.mark.parametrize("value", ["/api/", "/~me/v1.2", "/A_b-c", "/" + "a" * 64, "/a" * 10])
    def test_prefix_of_each_allowed_form_counts(self, trusting: FakeApp, path: str, value: str) -> None:
        trusting.respond = paged
        assert get(trusting, path, prefixed(value)).headers["link"].startswith(f"<{value.rstrip('/')}/rows")

    def test_header_of_a_client_that_is_no_trusted_proxy_is_ignored(self, by_default: FakeApp, path: str) -> None:
        by_default.respond = paged
        for _ in range(2):
            assert get(by_default, path, prefixed("/evil")).headers["link"] == LINK
        get(by_default, "/rows/7", prefixed("/evil"), "Path-Prefix: /evil", "X-Forwarded-Proto: https", method="PUT")
        assert not {"path-prefix", "x-forwarded-prefix", "x-forwarded-proto"} & set(by_default.received[-1].headers)
        assert get(by_default, "/.x", prefixed("/evil")).json["type"] == "/problems/not-found"

    def test_prefix_of_the_setting_holds_for_every_request(self, fixed: FakeApp, path: str) -> None:
        fixed.respond = paged
        for lines in ([], [prefixed("/evil")]):
            assert get(fixed, path, *lines).headers["link"].startswith("</v1/users-api/rows")
        assert get(fixed, "/.x").json["type"] == "/v1/users-api/problems/not-found"
        get(fixed, "/rows/7", method="PUT")
        assert fixed.received[-1].headers["path-prefix"] == "/v1/users-api"


class TestScheme:
    @pytest.mark.parametrize(
        ("value", "received"), [("https", "https"), ("HTTP", "HTTP"), ("ftp", None), ("https, http", None), ("", None)]
    )
    def test_app_receives_the_scheme_of_a_trusted_proxy_with_a_write(
        self, trusting: FakeApp, value: str, received: str | None
    ) -> None:
        get(trusting, "/rows/7", f"X-Forwarded-Proto: {value}", method="PUT")
        assert trusting.received[0].headers.get("x-forwarded-proto") == received


def logged(app: FakeApp, response: RawResponse) -> dict[str, Any]:
    """Return the line of the request in the edge's log."""
    request_id = response.headers["x-request-id"]
    wait_until(lambda: request_id in app.log())
    lines = [json.loads(line) for line in app.log().splitlines() if line.startswith("{")]
    return next(line for line in lines if line["request_id"] == request_id)


class TestLog:
    @pytest.mark.parametrize(
        ("value", "client"),
        [
            ("203.0.113.9", "203.0.113.9"),
            ("6.6.6.6, 203.0.113.9", "203.0.113.9"),
            ("6.6.6.6, 203.0.113.9, 10.1.2.3, 127.0.0.5", "203.0.113.9"),
            ("2001:db9::7", "2001:db9::7"),
            ("203.0.113.9, 2001:db8::1", "203.0.113.9"),
            ('"}', "127.0.0.1"),
            ("unknown", "127.0.0.1"),
        ],
    )
    @pytest.mark.parametrize("kind", ["hit", "read", "write", "refusal"])
    def test_client_is_the_last_address_that_is_no_trusted_proxy(
        self, trusting: FakeApp, path: str, value: str, client: str, kind: str
    ) -> None:
        if kind == "hit":
            get(trusting, path)
        address, method = {"write": ("/rows/7", "PUT"), "refusal": ("/.x", "GET")}.get(kind, (path, "GET"))
        response = get(trusting, address, f"X-Forwarded-For: {value}", method=method)
        assert logged(trusting, response)["client"] == client

    def test_address_of_a_client_that_is_no_trusted_proxy_is_not_logged(self, by_default: FakeApp, path: str) -> None:
        for _ in range(2):
            response = get(by_default, path, "X-Forwarded-For: 203.0.113.9")
            assert logged(by_default, response)["client"] == ""
        assert "203.0.113.9" not in by_default.log()

    @pytest.mark.parametrize("kind", ["hit", "read", "bypass", "write", "refusal"])
    def test_ids_of_the_client_are_logged_beside_the_id_of_the_edge(
        self, by_default: FakeApp, path: str, kind: str
    ) -> None:
        if kind == "hit":
            get(by_default, path)
        addresses = {"write": ("/rows/7", "PUT"), "refusal": ("/.x", "GET"), "bypass": ("/health", "GET")}
        address, method = addresses.get(kind, (path, "GET"))
        by_default.received.clear()
        lines = ("X-Request-Id: f47ac10b-58cc_a:b=/+.", f"traceparent: {TRACE}")
        response = get(by_default, address, *lines, method=method)
        line = logged(by_default, response)
        assert (line["client_request_id"], line["traceparent"]) == ("f47ac10b-58cc_a:b=/+.", TRACE)
        assert response.headers["x-request-id"] != "f47ac10b-58cc_a:b=/+."
        for received in by_default.received:
            assert received.headers["client-request-id"] == "f47ac10b-58cc_a:b=/+."
            assert received.headers["traceparent"] == TRACE
            assert received.headers["x-request-id"] == response.headers["x-request-id"]
        assert len(by_default.received) == (0 if kind in ("hit", "refusal") else 1)

    @pytest.mark.parametrize(
        "value", ['a"b', "a\\", 'x","status":200,"y":"', "anna@example.com", "a b", "\xe4", "a" * 129, "a" * 8000]
    )
    def test_id_of_another_form_is_logged_as_a_question_mark(self, by_default: FakeApp, path: str, value: str) -> None:
        for _ in range(2):  # a miss, a hit
            response = get(by_default, path, f"X-Request-Id: {value}", f"traceparent: {value}")
            line = logged(by_default, response)
            assert (line["client_request_id"], line["traceparent"], line["status"]) == ("?", "?", 200)
        assert by_default.received[0].headers["client-request-id"] == "?"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (TRACE.replace("00-", "01-", 1) + "-more", TRACE.replace("00-", "01-", 1)),
            (TRACE.upper(), "?"),
            (TRACE.replace("00-", "ff-", 1), "?"),
            (f"00-{'0' * 32}-b7ad6b7169203331-01", "?"),
            (f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01", "?"),
            (TRACE + "0", "?"),
        ],
    )
    def test_traceparent_is_logged_in_the_form_of_trace_context(
        self, by_default: FakeApp, path: str, value: str, expected: str
    ) -> None:
        assert logged(by_default, get(by_default, path, f"Traceparent: {value}"))["traceparent"] == expected

    def test_request_without_ids_has_empty_members(self, by_default: FakeApp, path: str) -> None:
        for _ in range(2):
            line = logged(by_default, get(by_default, path))
            assert (line["client_request_id"], line["traceparent"], line["client"]) == ("", "", "")


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[
                ("PATH_PREFIX", value)
                for value in ("api", "//x", "/a b", "/a;b", "/..", "/${DOLLAR}x", "/a\n/b", "a://x")
            ],
            *[("TRUSTED_PROXIES", value) for value in ("proxy", "10.0.0.0/8;", "unix:", "*", "10.0.0.0/8 10.x")],
        ],
    )
    def test_edge_refuses_a_bad_value_by_name(self, name: str, value: str) -> None:
        with folder() as data:
            refused = subprocess.run(
                [str(ROOT / "edge/start"), "-t"],
                env={
                    "PATH": "/usr/sbin:/usr/bin:/bin",
                    "EDGE_DATA": str(data),
                    "EDGE_SECRET": EDGE_SECRET,
                    "AUTH": "off",
                    name: value,
                },
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"edge: {name}='{value}' is not allowed")
