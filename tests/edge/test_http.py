"""The edge's own HTTP: which responses it stores, conditions, Accept, forwarded headers, its own problems, its log."""

import json
import re
import socket
from collections.abc import Iterator
from itertools import count
from typing import ClassVar
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from werkzeug import Request, Response

from testkit.api import check_problem
from testkit.failpoints import has_cache_lease, running_edge
from testkit.fake_app import FakeApp, fake_app, plain, storable
from testkit.raw_http import check_raw_problem, send_bytes, send_request
from testkit.stack import wait_until

_numbers = count(1)

TAG = '"abc"'
CHANGED = "Mon, 01 Jan 2024 00:00:00 GMT"
LATER = "Tue, 02 Jan 2024 00:00:00 GMT"


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    with fake_app(ALLOWED_HOSTS="*") as app:
        yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    """An app that has received nothing yet. It answers every request with a response that may be stored."""
    module_app.received.clear()
    module_app.respond = tagged
    return module_app


@pytest.fixture(scope="module")
def deserted() -> Iterator[str]:
    """An edge whose app is gone."""
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with running_edge(f"127.0.0.1:{taken.getsockname()[1]}") as (edge, _):
            yield edge


@pytest.fixture
def name() -> str:
    """The name of a resource that no test has read yet."""
    return f"r{next(_numbers)}"


def tagged(request: Request) -> Response:
    return storable(request, ETag=TAG, Last_Modified=CHANGED)


def get(app: FakeApp, address: str, **headers: str) -> requests.Response:
    named = {header.replace("_", "-"): value for header, value in headers.items()}
    return requests.get(app.edge + address, headers=named, timeout=10)


def send_raw(app: FakeApp, line: str, *headers: str, body: bytes = b"") -> requests.Response:
    """Send exactly these headers, which may be repeated or malformed."""
    lines = [
        line + " HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
        "",
        "",
    ]
    head, _, received_bytes = send_bytes(app.edge, "\r\n".join(lines).encode("latin-1") + body).partition(b"\r\n\r\n")
    response = requests.Response()
    first, *rest = head.decode().split("\r\n")
    response.status_code = int(first.split()[1])
    response.headers.update(dict(header.split(": ", 1) for header in rest))
    response._content = received_bytes
    return response


def results(app: FakeApp, address: str, **headers: str) -> list[str]:
    """Return the X-Cache-Status of two reads. The address is sent unchanged; a library would normalize it."""
    lines = [f"{header.replace('_', '-')}: {value}" for header, value in headers.items()]
    return [send_raw(app, f"GET {address}", *lines).headers["X-Cache-Status"] for _ in range(2)]


class TestStoredResponses:
    @pytest.mark.parametrize(
        "rest",
        [
            "",
            "/7",
            "/9223372036854775807",
            "/count",
            "/count?q=ann",
            "?limit=5",
            "?q=%D0%90%D0%BD%D0%BD%D0%B0+O'Hara&sort=-created_at",
            "?sort=name",
            "?cursor=" + "a-_9" * 300 + "&limit=1000&q=a%40b.c&sort=name",
            "?cursor=" + "a-_9" * 300 + "&email=a@b.c&limit=1000&q=" + "%F0%9D%92%B3" * 100 + "&sort=name",
            "?sort=name&q=a&limit=50000&cursor=a",
        ],
    )
    def test_edge_stores_responses_of_every_address_with_a_cacheable_shape(
        self, app: FakeApp, name: str, rest: str
    ) -> None:
        assert results(app, f"/{name}{rest}") == ["MISS", "HIT"]
        assert len(app.received) == 1

    @pytest.mark.parametrize("path", ["", "/count"])
    @pytest.mark.parametrize(
        ("query", "others"),
        [
            ("limit=1&sort=name", ["sort=name&limit=1", "limit=%31&sort=name", "sort=%6e%61me&limit=1"]),
            ("q=a%20b", ["q=a+b", "q=%61%20b", "q=%61+%62"]),
            ("q=%2B%26%3D%25", ["q=%2b%26%3d%25", "q=%2B%26=%25"]),
            ("q=%C3%A9~._-", ["q=%c3%a9%7E%2E%5F%2d", "q=%C3%a9~._-"]),
            ("email=a%40b.c", ["email=a@b.c", "email=%61%40%62%2ec"]),
            ("q=%3Fa%3D1%2C%22%27%28%29%2A%21", ["q=?a=1,\"'()*!"]),
            (
                "cursor=a-_9&limit=2&q=a&sort=-id",
                ["sort=-id&q=a&limit=2&cursor=a-_9", "q=a&cursor=a-_9&sort=%2Did&limit=2"],
            ),
        ],
    )
    def test_every_spelling_of_a_query_is_a_hit_after_one_of_them(
        self, app: FakeApp, name: str, path: str, query: str, others: list[str]
    ) -> None:
        for n, first in enumerate([query, *others]):
            list_path = f"/{name}_{n}{path}"
            assert results(app, f"{list_path}?{first}") == ["MISS", "HIT"]
            for other in (query, *others):
                assert results(app, f"{list_path}?{other}") == ["HIT", "HIT"]
        assert [line for line, _, _ in app.received][-1] == f"GET {list_path}?{others[-1]}"

    @pytest.mark.parametrize(
        ("query", "other"),
        [
            ("q=a%20b", "q=a%2Bb"),
            ("q=a%26limit%3D1", "q=a&limit=1"),
            ("q=%2541", "q=A"),
            ("q=a", "q=A"),
            ("q=a%20b", "q=b%20a"),
            ("q=%C3%A9", "q=e%CC%81"),
            ("limit=1", "limit=01"),
            ("limit=1", ""),
            ("q=1", "limit=1"),
        ],
    )
    def test_queries_with_different_values_have_entries_of_their_own(
        self, app: FakeApp, name: str, query: str, other: str
    ) -> None:
        app.respond = lambda request: storable(request, body=request.query_string)
        for each in (query, other, query, other):
            assert send_raw(app, f"GET /{name}?{each}".rstrip("?")).content == each.encode()

    @pytest.mark.parametrize(
        "rest",
        [
            "?",
            "?limit=5&",
            "?&limit=5",
            "?limit=5&limit=5",
            "?sort=name&limit=5&sort=name",
            "?q=a&q=%61",
            "?q=",
            "?q=%",
            "?q=a%2",
            "?q=a%zz&limit=5",
            "?q=a#b",
            "?limit=5&limit",
            "?li%6Dit=5",
            "?foo=1",
            "?foo=1&limit=5",
            "?Sort=name",
            "?sort=name&x",
            "/7?limit=5",
            "/007",
            "/%37",
            "/7/",
            "/7/count",
            "/count/",
            "/counts",
            "/batch",
            "s" * 50,
            "/",
            "/.",
        ],
    )
    def test_other_spelling_of_a_cacheable_address_bypasses_the_cache(self, app: FakeApp, name: str, rest: str) -> None:
        assert results(app, f"/{name}{rest}") == ["BYPASS", "BYPASS"]
        assert [line for line, _, _ in app.received] == [f"GET /{name}{rest}"] * 2

    @pytest.mark.parametrize(
        "address", ["/health", "/livez", "/readyz", "/docs", "/docs/7", "/problems", "/problems/7", "/openapi.json"]
    )
    def test_addresses_of_the_service_itself_bypass_the_cache(self, app: FakeApp, address: str) -> None:
        assert results(app, address) == ["BYPASS", "BYPASS"]

    @pytest.mark.parametrize("address", ["/healthy", "/docs_7", "/problems_2/7"])
    def test_resource_whose_name_begins_like_a_reserved_name_is_cached(self, app: FakeApp, address: str) -> None:
        assert results(app, address) == ["MISS", "HIT"]

    @pytest.mark.parametrize("status", [200, 404])
    def test_response_without_cache_status_is_not_stored(self, app: FakeApp, name: str, status: int) -> None:
        app.respond = lambda request: plain(request, status)
        for _ in range(2):
            response = get(app, f"/{name}")
            assert response.status_code == status
            assert response.headers["Cache-Status"] == "nginx; fwd=uri-miss"

    def test_response_that_was_read_beside_a_writer_is_not_stored(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: storable(request, X_Accel_Expires="0")
        assert results(app, f"/{name}") == ["MISS", "MISS"]

    @pytest.mark.parametrize("address", ["/health", "/docs", "/r?foo=1"])
    def test_error_response_that_bypasses_the_cache_is_forwarded_unchanged(self, app: FakeApp, address: str) -> None:
        app.respond = lambda request: plain(request, 503, b'{"status": "unhealthy"}')
        response = get(app, address)
        assert (response.status_code, response.json()) == (503, {"status": "unhealthy"})


class TestConditions:
    @pytest.mark.parametrize("condition", [TAG, f'"other", {TAG}', f"W/{TAG}", "*"])
    def test_edge_answers_a_matching_if_none_match_with_304_from_its_store(
        self, app: FakeApp, name: str, condition: str
    ) -> None:
        get(app, f"/{name}")
        for method in ("GET", "HEAD"):
            response = requests.request(method, f"{app.edge}/{name}", headers={"If-None-Match": condition}, timeout=5)
            assert (response.status_code, response.content) == (304, b"")
            assert response.headers["X-Cache-Status"] == "HIT"
            assert response.headers["Cache-Status"] == "nginx; hit"
            assert response.headers["ETag"] == TAG
            assert response.headers["Cache-Control"] == "private, no-cache"
        assert len(app.received) == 1

    def test_304_to_the_first_reader_stores_the_whole_response_for_the_next(self, app: FakeApp, name: str) -> None:
        first = get(app, f"/{name}", If_None_Match=TAG)
        assert (first.status_code, first.headers["X-Cache-Status"]) == (304, "MISS")
        second = get(app, f"/{name}")
        assert (second.status_code, second.headers["X-Cache-Status"], second.content) == (200, "HIT", b'{"id":7}')
        assert "if-none-match" not in app.received[0][1]

    @pytest.mark.parametrize("condition", ['"other"', "abc", '"ab'])
    def test_if_none_match_with_another_etag_gets_the_whole_response(
        self, app: FakeApp, name: str, condition: str
    ) -> None:
        get(app, f"/{name}")
        assert get(app, f"/{name}", If_None_Match=condition).status_code == 200

    @pytest.mark.parametrize("date", [CHANGED, LATER])
    def test_conditions_with_dates_never_lead_to_304(self, app: FakeApp, name: str, date: str) -> None:
        """Dates count whole seconds, and two writes may share a second."""
        for _ in range(2):
            assert get(app, f"/{name}", If_Modified_Since=date).status_code == 200
            assert get(app, f"/{name}", If_Modified_Since=date, If_None_Match='"other"').status_code == 200
            assert get(app, f"/{name}", If_Modified_Since=date, If_None_Match=TAG).status_code == 304
            assert get(app, f"/{name}", If_Unmodified_Since=CHANGED).status_code == 200
            assert get(app, f"/{name}", If_Range=date, Range="bytes=0-1").status_code == 200

    @pytest.mark.parametrize("condition", ['"other"', TAG, "*", ""])
    def test_preconditions_on_a_cached_read_are_ignored_and_kill_no_worker(
        self, app: FakeApp, name: str, condition: str
    ) -> None:
        pid = int((app.data / "nginx.pid").read_text())
        workers = {it.pid for it in psutil.Process(pid).children()}
        for _ in range(2):  # a miss, a hit
            assert get(app, f"/{name}", If_Match=condition).status_code == 200
            assert get(app, f"/{name}", If_Unmodified_Since=condition).status_code == 200
        assert {it.pid for it in psutil.Process(pid).children()} == workers

    def test_app_evaluates_if_none_match_of_a_read_that_bypasses_the_cache(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: plain(request, 304)
        response = get(app, f"/{name}?foo=1", If_None_Match=TAG, If_Modified_Since=CHANGED, If_Match=TAG)
        assert response.status_code == 304
        (_, received, _), *more = app.received
        assert not more
        assert received["if-none-match"] == TAG
        assert not {"if-modified-since", "if-match"} & set(received)

    def test_edge_without_a_lease_evaluates_if_none_match_and_forwards_accept(self, app: FakeApp, name: str) -> None:
        get(app, f"/{name}")
        app.grants_leases = False
        try:
            wait_until(lambda: not has_cache_lease(app.edge))
            app.received.clear()
            response = get(app, f"/{name}", If_None_Match=TAG, If_Modified_Since=CHANGED)
            assert (response.status_code, response.headers["X-Cache-Status"]) == (304, "BYPASS")
            assert get(app, f"/{name}", If_Modified_Since=CHANGED, Accept="text/html").status_code == 200
            assert app.received[1][1]["accept"] == "text/html"
        finally:
            app.grants_leases = True
            wait_until(lambda: has_cache_lease(app.edge))


class TestAccept:
    @pytest.mark.parametrize(
        "accept",
        [
            "*/*",
            "application/json",
            "application/*;q=0.1",
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;version=2",
            "application/problem+json",
            "*/*; q=.2",
            "application/json;q=0.9, */*;q=0.1",
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",
            "application/json, text/plain, */*",
            "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
            "text/html ,\t*/*\t;q=0.001",
            "APPLICATION/JSON;CHARSET=UTF-8",
            "application/json ; charset=utf-8; q=0.8",
            "application/json, text/javascript, */*; q=0.01",
            "application/json, application/*+json",
            "application/json,application/problem+json",
            ", application/json,",
            "*",
        ],
    )
    def test_accept_that_plainly_includes_json_is_answered_from_the_cache(
        self, app: FakeApp, name: str, accept: str
    ) -> None:
        assert results(app, f"/{name}", Accept=accept) == ["MISS", "HIT"]
        assert "accept" not in app.received[0][1]

    @pytest.mark.parametrize(
        "accept",
        [
            "text/html",
            "application/jsonp",
            "application/json;q=0",
            "application/json; q=0.000, */*",
            "*/*;Q=0",
            "text/html;q=.0, */*",
            "*/*; a=1 ; q = 00.;b",
            'application/json;profile="a, b"',
            'text/html;a="\\", */*;a="',
            "text/html;application/json",
            "text/html, application/xml",
            "nonsense",
        ],
    )
    def test_app_judges_every_accept_that_does_not_plainly_include_json(
        self, app: FakeApp, name: str, accept: str
    ) -> None:
        get(app, f"/{name}")
        app.respond = lambda request: plain(request, 406)
        response = get(app, f"/{name}", Accept=accept)
        assert (response.status_code, response.headers["X-Cache-Status"]) == (406, "BYPASS")
        assert app.received[-1][1]["accept"] == accept
        assert get(app, f"/{name}").status_code == 200

    @pytest.mark.parametrize("line", ["GET /{name}", "PUT /{name}/7", "POST /{name}/batch", "OPTIONS /{name}"])
    def test_several_accept_headers_are_forwarded_as_one_list(self, app: FakeApp, name: str, line: str) -> None:
        lines = ["Accept: text/html", "accept: text/plain;q=0.5", *[f"X-{n}: 1" for n in range(150)]]
        send_raw(app, line.format(name=name), *lines, "Accept: application/json;q=.1")
        assert app.received[0][1]["accept"] == "text/html, text/plain;q=0.5, application/json;q=.1"

    @pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
    def test_first_accept_header_that_includes_json_is_enough_for_the_cache(
        self, app: FakeApp, name: str, accept: str
    ) -> None:
        for result in ("MISS", "HIT"):
            response = send_raw(app, f"GET /{name}", f"Accept: {accept}", "Accept: text/html")
            assert response.headers["X-Cache-Status"] == result

    def test_unreadable_accept_is_forwarded_as_a_question_mark(self, app: FakeApp, name: str) -> None:
        send_raw(app, f"GET /{name}", "Accept: \xffapplication/json")
        assert app.received[0][1]["accept"] == "?"


class TestForwardedHeaders:
    CONDITIONS: ClassVar = {
        "If-Match": TAG,
        "If-None-Match": "*",
        "If-Unmodified-Since": CHANGED,
        "Idempotency-Key": '"k"',
    }
    PAGE: ClassVar = {"Origin": "http://a.example:1234", "Sec-Fetch-Site": "same-origin"}
    """A browser sends these headers about the page that writes."""

    @pytest.mark.parametrize("line", ["POST /r", "POST /r/batch", "PUT /r/7", "PATCH /r/7", "DELETE /r/7"])
    def test_write_is_forwarded_with_the_listed_headers_only(self, app: FakeApp, line: str) -> None:
        method, address = line.split()
        hostile = {"Cookie": "a=b", "X-HTTP-Method-Override": "GET", "If-Range": TAG, "Range": "bytes=0-1"}
        sent = {"Content-Type": "application/merge-patch+json", "Accept": "*/*", **self.CONDITIONS, **self.PAGE}
        requests.request(method, app.edge + address, headers={**sent, **hostile}, data=b"{}", timeout=5)
        [(line_received, received, body)] = app.received
        assert (line_received, body) == (line, b"{}")
        assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", received.pop("x-request-id"))
        assert received.pop("host") == urlsplit(app.edge).netloc
        assert received.pop("write-deadline")
        assert re.fullmatch("[0-9a-f]{32}", received.pop("client-digest"))
        assert received == {"content-length": "2", **{header.lower(): value for header, value in sent.items()}}

    def test_cached_read_is_forwarded_without_headers_of_the_client(self, app: FakeApp, name: str) -> None:
        get(app, f"/{name}", Accept="application/json", **{k.replace("-", "_"): v for k, v in self.CONDITIONS.items()})
        assert set(app.received[0][1]) == {"host", "x-request-id", "edge-read"}

    @pytest.mark.parametrize("rest", ["", "?foo=1"])
    def test_read_is_forwarded_without_the_origin_of_its_page(self, app: FakeApp, name: str, rest: str) -> None:
        get(app, f"/{name}{rest}", **{header.replace("-", "_"): value for header, value in self.PAGE.items()})
        [(_, received, _)] = app.received
        assert received["host"] == urlsplit(app.edge).hostname
        assert not {"origin", "sec-fetch-site"} & set(received)

    @pytest.mark.parametrize(
        ("host", "received"), [("A.example:1234", "A.example:1234"), ("[::1]:80", "[::1]:80"), ("\xe4.example", "?")]
    )
    def test_write_is_forwarded_with_the_host_and_port_that_the_client_sent(
        self, app: FakeApp, host: str, received: str
    ) -> None:
        send_bytes(app.edge, f"DELETE /r/7 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        assert app.received[0][1]["host"] == received

    @pytest.mark.parametrize("header", ["Content-Type", "Accept", *CONDITIONS, *PAGE])
    @pytest.mark.parametrize("value", ["a\x01b", "\x7f", "\xff", 'W/"\xc3\xa4"'])
    def test_unreadable_header_of_a_write_is_forwarded_as_a_value_that_the_app_refuses(
        self, app: FakeApp, header: str, value: str
    ) -> None:
        send_raw(app, "PUT /r/7", f"{header}: {value}")
        # "?" would be a valid key.
        assert app.received[0][1][header.lower()] == ("? ?" if header == "Idempotency-Key" else "?")

    @pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
    def test_etags_separated_by_tabs_are_forwarded(self, app: FakeApp, header: str) -> None:
        send_raw(app, "PUT /r/7", f'{header}: "a"\t,\t"b"')
        assert app.received[0][1][header.lower()] == '"a"\t,\t"b"'

    @pytest.mark.parametrize("header", ["Content-Type", *CONDITIONS, *PAGE])
    @pytest.mark.parametrize("line", ["PUT /r/7", "POST /r/batch"])
    def test_write_with_a_repeated_header_is_refused(self, app: FakeApp, line: str, header: str) -> None:
        many = [f"X-{n}: 1" for n in range(150)]
        response = send_raw(app, line, f"{header}: {TAG}", *many, f'{header}: "other"')
        assert "repeated" in check_problem(response, 400)
        assert not app.received

    @pytest.mark.parametrize("header", ["Content-Type", *CONDITIONS, *PAGE])
    def test_write_with_an_empty_header_is_refused(self, app: FakeApp, header: str) -> None:
        assert "empty" in check_problem(send_raw(app, "PUT /r/7", f"{header}: "), 400)
        assert not app.received

    @pytest.mark.parametrize(
        ("line", "times"), [("GET /r/502", 3), ("GET /r/502?x", 3), ("PUT /r/502", 1), ("POST /r/batch", 1)]
    )
    def test_failed_read_is_tried_three_times_and_a_write_once(self, app: FakeApp, line: str, times: int) -> None:
        app.respond = lambda request: plain(request, 502)
        assert send_raw(app, line).status_code == 502
        assert len(app.received) == times


class TestProblems:
    SLUGS: ClassVar = {
        "GET /.lease/renew": (404, "not-found"),
        "TRACE /r": (405, "method-not-allowed"),
        "A /r": (501, "not-implemented"),
        "A /r/batch": (501, "not-implemented"),
        "GET /" + "r" * 5000: (414, "uri-too-long"),
        "GET /r%": (400, "bad-request"),
    }

    @pytest.mark.parametrize("line", SLUGS)
    def test_problem_of_the_edge_has_the_form_of_a_problem_of_the_app(self, app: FakeApp, line: str) -> None:
        status, slug = self.SLUGS[line]
        response = send_raw(app, line)
        check_problem(response, status)
        body = response.json()
        assert list(body) == ["type", "title", "status", "detail", "request_id"]
        assert body["type"] == f"/problems/{slug}"
        assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", body["request_id"])
        assert body["request_id"] == response.headers["X-Request-Id"]
        assert response.headers["Cache-Control"] == "private, no-cache"

    def test_405_of_nginx_lists_the_allowed_methods(self, app: FakeApp) -> None:
        assert "PATCH" in send_raw(app, "TRACE /r").headers["Allow"]
        assert "Allow" not in send_raw(app, "A /r").headers

    def test_503_of_the_edge_says_when_to_retry(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: plain(request, 503)
        response = get(app, f"/{name}")
        check_problem(response, 503)
        assert response.headers["Retry-After"] == "1"

    @pytest.mark.parametrize(("line", "limit"), [("POST /r", 65536), ("PUT /r/7", 65536), ("POST /r/batch", 2097152)])
    def test_body_of_the_largest_size_passes_and_one_more_byte_is_413(
        self, app: FakeApp, line: str, limit: int
    ) -> None:
        assert send_raw(app, line, body=b"x" * limit).status_code == 200
        assert len(app.received[0][2]) == limit
        for header, value in (("Content-Length", str(limit + 1)), ("Transfer-Encoding", "chunked")):
            body = b"x" * (limit + 1)
            if header == "Transfer-Encoding":
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (limit + 1, body)
            head = f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}: {value}\r\n\r\n"
            received_bytes = send_bytes(app.edge, head.encode() + body)
            assert received_bytes.startswith(b"HTTP/1.1 413"), received_bytes
            assert f"larger than {limit} bytes" in json.loads(received_bytes.partition(b"\r\n\r\n")[2])["detail"]
        assert len(app.received) == 1

    @pytest.mark.parametrize(
        ("line", "headers", "size", "status", "in_chunks"),
        [
            ("POST /r/batch", b"", 100_000, 502, 502),
            ("POST /r/batch", b"", 2_000_000, 502, 502),
            ("POST /r/batch", b"", 3_000_000, 413, 413),
            ("POST /r/batch", b"If-Match: *\r\nIf-Match: *\r\n", 100_000, 400, 400),
            ("GET /r/batch", b"", 100_000, 502, 413),
            ("A /r/batch", b"", 100_000, 501, 501),
            ("A /r", b"", 100_000, 413, 501),
            ("FOO /r/batch", b"", 100_000, 502, 413),
            ("FOO /r", b"", 100_000, 413, 413),
            ("POST /r", b"", 60_000, 502, 502),
            ("PUT /r/7", b"", 100_000, 413, 413),
            ("PUT /r/7?x", b"", 3_000_000, 413, 413),
            ("GET /r/7", b"", 60_000, 502, 502),
            ("GET /r/7", b"", 100_000, 413, 502),
            ("POST /.lease/renew", b"", 100_000, 413, 404),
            ("POST /readyz", b"", 100_000, 413, 413),
            ("POST /.problem", b"", 100_000, 404, 404),
        ],
    )
    def test_failed_request_gets_its_problem_for_every_size_of_body(
        self, deserted: str, line: str, headers: bytes, size: int, status: int, in_chunks: int
    ) -> None:
        """`in_chunks`: the status of a chunked body, whose length Nginx knows only after it has read the body."""
        method, address = line.split()
        body = b"x" * size
        check_raw_problem(send_request(deserted, method, address, headers, body), status)
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
        check_raw_problem(
            send_request(deserted, method, address, headers + b"Transfer-Encoding: chunked\r\n", chunks), in_chunks
        )

    def test_stored_404_contains_the_id_of_the_request_that_it_answers(self, app: FakeApp, name: str) -> None:
        app.respond = missing
        app.grants_leases = True
        for result in ("MISS", "HIT", "HIT"):
            response = get(app, f"/{name}/7")
            assert response.headers["X-Cache-Status"] == result
            assert response.json()["request_id"] == response.headers["X-Request-Id"]
        assert requests.head(f"{app.edge}/{name}/7", timeout=5).status_code == 404
        app.respond, app.grants_leases = lambda request: plain(request, 503), False
        try:
            wait_until(lambda: get(app, f"/{name}/7").headers["X-Cache-Status"] == "STALE")
            response = get(app, f"/{name}/7")
            assert response.status_code == 404
            assert response.json()["request_id"] == response.headers["X-Request-Id"]
        finally:
            app.grants_leases = True
            wait_until(lambda: has_cache_lease(app.edge))

    def test_stored_200_is_sent_unchanged(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: storable(request, body=request.headers["X-Request-Id"].encode(), ETag=TAG)
        first, second = (get(app, f"/{name}/7") for _ in range(2))
        assert first.content == second.content == first.headers["X-Request-Id"].encode()
        assert second.headers["Content-Length"] == str(len(second.content))
        assert second.headers["ETag"] == TAG

    def test_404_without_a_request_id_is_forwarded_and_not_stored(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: storable(request, 404, b'{"status":404}')
        for _ in range(2):
            response = get(app, f"/{name}/7")
            assert (response.content, response.headers["X-Cache-Status"]) == (b'{"status":404}', "MISS")

    def test_response_with_a_repeated_header_is_forwarded_whole_and_not_stored(self, app: FakeApp, name: str) -> None:
        def twice(request: Request) -> Response:
            response = tagged(request)
            response.headers.add("Link", "</a>; rel=a")
            response.headers.add("Link", "</b>; rel=b")
            return response

        app.respond = twice
        for _ in range(2):
            response = get(app, f"/{name}/7")
            assert (response.headers["X-Cache-Status"], response.headers["Link"]) == (
                "MISS",
                "</a>; rel=a, </b>; rel=b",
            )

    def test_cache_status_of_a_cache_between_edge_and_app_is_kept(self, app: FakeApp, name: str) -> None:
        def through_another(request: Request) -> Response:
            response = tagged(request)
            response.headers.add("Cache-Status", "other; fwd=miss")
            return response

        app.respond = through_another
        responses = [get(app, f"/{name}/7") for _ in range(2)]
        assert responses[0].headers["Cache-Status"] == "redis; hit, other; fwd=miss, nginx; fwd=uri-miss; stored"
        assert responses[1].headers["Cache-Status"] == "nginx; hit"

    @pytest.mark.parametrize("status", [200, 404])
    def test_response_that_ends_early_is_502_and_not_stored(self, app: FakeApp, name: str, status: int) -> None:
        def cut_off(request: Request) -> Response:
            response = storable(request, status, b'{"id":7')
            response.headers["Content-Length"] = "9"
            response.automatically_set_content_length = False
            return response

        app.respond = cut_off
        assert get(app, f"/{name}/7").status_code == 502
        app.respond = tagged
        assert get(app, f"/{name}/7").headers["X-Cache-Status"] == "MISS"

    @pytest.mark.parametrize("size", [1_700, 1_900, 300_000, 3_000_000])
    def test_response_of_every_size_is_stored_to_the_byte(self, app: FakeApp, name: str, size: int) -> None:
        body = b'["' + b"0123456789" * (size // 10) + b'"]'
        app.respond = lambda request: storable(request, 200, body)
        responses = [get(app, f"/{name}") for _ in range(2)]
        assert [response.headers["X-Cache-Status"] for response in responses] == ["MISS", "HIT"]
        assert {response.content for response in responses} == {body}

    def test_response_that_grows_or_shrinks_replaces_the_stored_response(self, app: FakeApp, name: str) -> None:
        small, large = b'{"id":7}', b'["%s"]' % (b"0123456789" * 300)
        for body in (small, large, small):
            app.respond = lambda request, body=body: storable(request, 200, body)  # type: ignore[misc]
            wait_until(lambda body=body: get(app, f"/{name}/7").content == body)  # type: ignore[misc]
            response = get(app, f"/{name}/7")
            assert (response.content, response.headers["X-Cache-Status"]) == (body, "HIT")

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("head", ["Content-Length: 37", "Transfer-Encoding: chunked"])
    def test_body_of_a_read_is_not_taken_for_a_request(self, app: FakeApp, name: str, head: str, kept: bool) -> None:
        if kept:
            get(app, f"/{name}/7")
        inside = f"GET /{name}/8 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        body = inside[:37] if head.startswith("Content") else f"{len(inside):x}\r\n{inside}\r\n0\r\n\r\n"
        first = f"GET /{name}/7 HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n{body}"
        received_bytes = send_bytes(
            app.edge, f"{first}GET /{name}/9 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert received_bytes.count(b"HTTP/1.1 200 ") == 2
        assert [line for line, _, _ in app.received] == [f"GET /{name}/7", f"GET /{name}/9"]
        assert all(not body for _, _, body in app.received)

    @pytest.mark.parametrize("kept", [True, False])
    def test_range_request_gets_the_whole_response(self, app: FakeApp, name: str, kept: bool) -> None:
        if kept:
            get(app, f"/{name}/7")
        for wanted in ("bytes=0-1", "bytes=99-", "what?"):
            response = get(app, f"/{name}/7", Range=wanted)
            assert (response.status_code, response.content) == (200, b'{"id":7}')

    @pytest.mark.parametrize("kept", [True, False])
    def test_responses_on_one_connection_have_exact_lengths(self, app: FakeApp, name: str, kept: bool) -> None:
        app.respond = tagged if kept else lambda request: plain(request, 400, b"no")
        head = f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n"
        received_bytes = send_bytes(app.edge, f"{head}\r\n{head}\r\n{head}Connection: close\r\n\r\n".encode())
        bodies = re.findall(
            rb"Content-Length: (\d+)\r\n(?:[^\r]+\r\n)*\r\n(.*?)(?=HTTP/1\.1|$)", received_bytes, re.DOTALL
        )
        assert len(bodies) == 3
        for length, body in bodies:
            assert len(body) == int(length)


def missing(request: Request) -> Response:
    body = b'{"status":404,"request_id":"%s"}' % request.headers["X-Request-Id"].encode()
    return storable(request, 404, body)


@pytest.fixture(scope="module")
def users() -> Iterator[FakeApp]:
    """An app that names the resource users with each cache lease."""
    with fake_app("2400 - users:user", LOG_LEVEL="WARNING") as app:
        yield app


class TestAccessLog:
    def paths(self, app: FakeApp, *responses: requests.Response) -> list[str]:
        ids = [response.headers["X-Request-Id"] for response in responses]
        wait_until(lambda: all(request_id in app.log() for request_id in ids))
        lines = [json.loads(line) for line in app.log().splitlines() if line.startswith("{")]
        return [next(line["path"] for line in lines if line["request_id"] == request_id) for request_id in ids]

    def test_log_contains_the_path_of_a_route_without_its_query(self, app: FakeApp, name: str) -> None:
        reads = [get(app, f"/{name}/7"), get(app, f"/{name}/7"), get(app, f"/{name}?q=anna"), get(app, "/health")]
        app.respond = lambda request: plain(request, 422)
        writes = [send_raw(app, f"POST /{name}/batch"), send_raw(app, f"PATCH /{name}/7?a=b")]
        assert self.paths(app, *reads, *writes) == [
            f"/{name}/7",
            f"/{name}/7",
            f"/{name}",
            "/health",
            f"/{name}/batch",
            f"/{name}/7",
        ]

    @pytest.mark.parametrize("status", [400, 404, 405, 500, 502, 503])
    def test_log_does_not_contain_an_address_that_may_be_mistyped(self, app: FakeApp, status: int) -> None:
        app.respond = lambda request: plain(request, status)
        lines = ("GET /anna", "HEAD /anna/7", "PUT /anna", "POST /anna/batch", "GET /docs/anna", "GET /anna@b.c")
        assert set(self.paths(app, *(send_raw(app, line) for line in lines))) == {"(other)"}

    @pytest.mark.parametrize("status", [500, 502, 503])
    def test_log_contains_the_path_of_a_resource_whatever_the_status_is(self, users: FakeApp, status: int) -> None:
        app = users
        app.respond = lambda request: plain(request, status)
        lines = ("GET /users/7", "GET /users?q=a", "GET /users?unknown=a", "PUT /users/7", "POST /users/batch")
        found = self.paths(app, *(send_raw(app, line) for line in lines))
        assert found == ["/users/7", "/users", "/users", "/users/7", "/users/batch"]
        mistyped = ("GET /users/anna", "GET /usersanna", "PUT /users/7/anna", "DELETE /users/anna?a=b")
        assert set(self.paths(app, *(send_raw(app, line) for line in mistyped))) == {"(other)"}

    def test_line_has_a_level_and_the_time_to_the_millisecond(self, app: FakeApp, name: str) -> None:
        responses = [get(app, f"/{name}/7"), get(app, f"/{name}/7")]
        app.respond = lambda request: plain(request, 503)
        responses += [get(app, f"/{name}/8"), send_raw(app, f"PUT /{name}/8")]
        self.paths(app, *responses)
        ids = [response.headers["X-Request-Id"] for response in responses]
        read = [json.loads(line) for line in app.log().splitlines() if line.startswith("{")]
        lines = {line["request_id"]: line for line in read}
        assert [lines[request_id]["level"] for request_id in ids] == ["info", "info", "error", "error"]
        for request_id in ids:
            assert re.fullmatch(r"\d{10}\.\d{3}", f"{lines[request_id]['msec']:.3f}")

    def test_only_failed_requests_are_logged_at_higher_levels(self, users: FakeApp) -> None:
        users.respond = tagged
        silent = [get(users, "/users/7"), get(users, "/users/7"), send_raw(users, "PUT /users/7")]
        users.respond = lambda request: plain(request, 503)
        assert self.paths(users, get(users, "/users/8"), send_raw(users, "PUT /users/8")) == ["/users/8", "/users/8"]
        assert not [response for response in silent if response.headers["X-Request-Id"] in users.log()]
