"""What the edge makes of HTTP by itself: whose answers it keeps, conditions, Accept, headers, problems of its own."""

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
from testkit.fake_app import FakeApp, cacheable, fake_app, uncacheable
from testkit.raw_http import ask, check, raw
from testkit.stack import wait_until

_numbers = count(1)

TAG = '"abc"'
CHANGED = "Mon, 01 Jan 2024 00:00:00 GMT"
LATER = "Tue, 02 Jan 2024 00:00:00 GMT"


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    with fake_app() as app:
        yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    """Its app has heard nothing yet, and answers everything with what may be stored."""
    module_app.received.clear()
    module_app.respond = tagged
    return module_app


@pytest.fixture(scope="module")
def deserted() -> Iterator[str]:
    """An edge whose app is away."""
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        with running_edge(f"127.0.0.1:{taken.getsockname()[1]}") as (edge, _):
            yield edge


@pytest.fixture
def name() -> str:
    """Of a resource that nobody has asked for yet."""
    return f"r{next(_numbers)}"


def tagged(request: Request) -> Response:
    return cacheable(request, ETag=TAG, Last_Modified=CHANGED)


def get(app: FakeApp, address: str, **headers: str) -> requests.Response:
    named = {header.replace("_", "-"): value for header, value in headers.items()}
    return requests.get(app.edge + address, headers=named, timeout=10)


def send(app: FakeApp, line: str, *headers: str, body: bytes = b"") -> requests.Response:
    """These very headers, repeated and unclean ones too."""
    lines = [line + " HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}", *headers, "", ""]
    head, _, got = raw(app.edge, "\r\n".join(lines).encode("latin-1") + body).partition(b"\r\n\r\n")
    answer = requests.Response()
    first, *rest = head.decode().split("\r\n")
    answer.status_code = int(first.split()[1])
    answer.headers.update(dict(header.split(": ", 1) for header in rest))
    answer._content = got
    return answer


def results(app: FakeApp, address: str, **headers: str) -> list[str]:
    """Of two reads; the address as it is, unlike what a library would make of it."""
    lines = [f"{header.replace('_', '-')}: {value}" for header, value in headers.items()]
    return [send(app, f"GET {address}", *lines).headers["X-Cache-Status"] for _ in range(2)]


class TestWhatIsKept:
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
        ],
    )
    def test_of_any_resource_what_has_the_shape_of_one(self, app: FakeApp, name: str, rest: str) -> None:
        assert results(app, f"/{name}{rest}") == ["MISS", "HIT"]
        assert len(app.received) == 1

    @pytest.mark.parametrize(
        "rest",
        [
            "?",
            "?limit=5&",
            "?&limit=5",
            "?limit=5&limit=5",
            "?limit=5&cursor=a",
            "?sort=name&q=a",
            "?limit=50000",
            "?q=",
            "?q=a=b",
            "?foo=1",
            "?sort=Name",
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
    def test_another_spelling_goes_past_the_cache(self, app: FakeApp, name: str, rest: str) -> None:
        assert results(app, f"/{name}{rest}") == ["BYPASS", "BYPASS"]
        assert [line for line, _, _ in app.received] == [f"GET /{name}{rest}"] * 2

    @pytest.mark.parametrize(
        "address", ["/health", "/livez", "/readyz", "/docs", "/docs/7", "/problems", "/problems/7", "/openapi.json"]
    )
    def test_what_is_no_resource_goes_past_it_too(self, app: FakeApp, address: str) -> None:
        assert results(app, address) == ["BYPASS", "BYPASS"]

    @pytest.mark.parametrize("address", ["/healthy", "/docs_7", "/problems_2/7"])
    def test_a_resource_may_begin_like_one_of_those(self, app: FakeApp, address: str) -> None:
        assert results(app, address) == ["MISS", "HIT"]

    @pytest.mark.parametrize("status", [200, 404])
    def test_what_did_not_come_through_the_apps_fence_is_not_kept(self, app: FakeApp, name: str, status: int) -> None:
        app.respond = lambda request: uncacheable(request, status)
        for _ in range(2):
            answer = get(app, f"/{name}")
            assert answer.status_code == status
            assert answer.headers["Cache-Status"] == "nginx; fwd=uri-miss"

    def test_nor_what_the_app_says_is_not_to_be_kept(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: cacheable(request, X_Accel_Expires="0")
        assert results(app, f"/{name}") == ["MISS", "MISS"]

    @pytest.mark.parametrize("address", ["/health", "/docs", "/r?foo=1"])
    def test_an_error_of_what_is_not_cached_is_the_apps_own(self, app: FakeApp, address: str) -> None:
        app.respond = lambda request: uncacheable(request, 503, b'{"status": "unhealthy"}')
        answer = get(app, address)
        assert (answer.status_code, answer.json()) == (503, {"status": "unhealthy"})


class TestConditions:
    @pytest.mark.parametrize("condition", [TAG, f'"other", {TAG}', f"W/{TAG}", "*"])
    def test_what_the_client_has_already_is_said_by_the_edge_alone(
        self, app: FakeApp, name: str, condition: str
    ) -> None:
        get(app, f"/{name}")
        for method in ("GET", "HEAD"):
            answer = requests.request(method, f"{app.edge}/{name}", headers={"If-None-Match": condition}, timeout=5)
            assert (answer.status_code, answer.content) == (304, b"")
            assert answer.headers["X-Cache-Status"] == "HIT"
            assert answer.headers["Cache-Status"] == "nginx; hit"
            assert answer.headers["ETag"] == TAG
            assert answer.headers["Cache-Control"] == "private, no-cache"
        assert len(app.received) == 1

    def test_the_first_reader_may_be_told_so_too_and_the_next_one_gets_it_whole(self, app: FakeApp, name: str) -> None:
        first = get(app, f"/{name}", If_None_Match=TAG)
        assert (first.status_code, first.headers["X-Cache-Status"]) == (304, "MISS")
        second = get(app, f"/{name}")
        assert (second.status_code, second.headers["X-Cache-Status"], second.content) == (200, "HIT", b'{"id":7}')
        assert "if-none-match" not in app.received[0][1]

    @pytest.mark.parametrize("condition", ['"other"', "abc", '"ab'])
    def test_what_it_has_not_it_gets(self, app: FakeApp, name: str, condition: str) -> None:
        get(app, f"/{name}")
        assert get(app, f"/{name}", If_None_Match=condition).status_code == 200

    @pytest.mark.parametrize("date", [CHANGED, LATER])
    def test_no_date_makes_an_answer_unchanged(self, app: FakeApp, name: str, date: str) -> None:
        """It has whole seconds, and two writes may share one."""
        for _ in range(2):
            assert get(app, f"/{name}", If_Modified_Since=date).status_code == 200
            assert get(app, f"/{name}", If_Modified_Since=date, If_None_Match='"other"').status_code == 200
            assert get(app, f"/{name}", If_Modified_Since=date, If_None_Match=TAG).status_code == 304
            assert get(app, f"/{name}", If_Unmodified_Since=CHANGED).status_code == 200
            assert get(app, f"/{name}", If_Range=date, Range="bytes=0-1").status_code == 200

    @pytest.mark.parametrize("condition", ['"other"', TAG, "*", ""])
    def test_what_is_for_writes_is_left_aside_and_no_worker_dies_of_it(
        self, app: FakeApp, name: str, condition: str
    ) -> None:
        pid = int((app.data / "nginx.pid").read_text())
        workers = {it.pid for it in psutil.Process(pid).children()}
        for _ in range(2):  # a miss, a hit
            assert get(app, f"/{name}", If_Match=condition).status_code == 200
            assert get(app, f"/{name}", If_Unmodified_Since=condition).status_code == 200
        assert {it.pid for it in psutil.Process(pid).children()} == workers

    def test_past_the_cache_the_app_judges(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: uncacheable(request, 304)
        answer = get(app, f"/{name}?foo=1", If_None_Match=TAG, If_Modified_Since=CHANGED, If_Match=TAG)
        assert answer.status_code == 304
        (_, heard, _), *more = app.received
        assert not more
        assert heard["if-none-match"] == TAG
        assert not {"if-modified-since", "if-match"} & set(heard)

    def test_without_a_lease_too(self, app: FakeApp, name: str) -> None:
        get(app, f"/{name}")
        app.grants_leases = False
        try:
            wait_until(lambda: not has_cache_lease(app.edge))
            app.received.clear()
            answer = get(app, f"/{name}", If_None_Match=TAG, If_Modified_Since=CHANGED)
            assert (answer.status_code, answer.headers["X-Cache-Status"]) == (304, "BYPASS")
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
        ],
    )
    def test_who_plainly_takes_json_is_answered_from_the_cache(self, app: FakeApp, name: str, accept: str) -> None:
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
    def test_of_everybody_else_the_app_judges(self, app: FakeApp, name: str, accept: str) -> None:
        get(app, f"/{name}")
        app.respond = lambda request: uncacheable(request, 406)
        answer = get(app, f"/{name}", Accept=accept)
        assert (answer.status_code, answer.headers["X-Cache-Status"]) == (406, "BYPASS")
        assert app.received[-1][1]["accept"] == accept
        assert get(app, f"/{name}").status_code == 200

    def test_one_that_cannot_be_read_is_no_missing_one(self, app: FakeApp, name: str) -> None:
        send(app, f"GET /{name}", "Accept: \xffapplication/json")
        assert app.received[0][1]["accept"] == "?"


class TestWhatTheAppHears:
    CONDITIONS: ClassVar = {
        "If-Match": TAG,
        "If-None-Match": "*",
        "If-Unmodified-Since": CHANGED,
        "Idempotency-Key": '"k"',
    }
    PAGE: ClassVar = {"Origin": "http://a.example:1234", "Sec-Fetch-Site": "same-origin"}
    """A browser says this of the page that writes."""

    @pytest.mark.parametrize("line", ["POST /r", "POST /r/batch", "PUT /r/7", "PATCH /r/7", "DELETE /r/7"])
    def test_of_a_write_these_headers_and_no_others(self, app: FakeApp, line: str) -> None:
        method, address = line.split()
        hostile = {"Cookie": "a=b", "X-HTTP-Method-Override": "GET", "If-Range": TAG, "Range": "bytes=0-1"}
        said = {"Content-Type": "application/merge-patch+json", "Accept": "*/*", **self.CONDITIONS, **self.PAGE}
        requests.request(method, app.edge + address, headers={**said, **hostile}, data=b"{}", timeout=5)
        [(heard_line, heard, body)] = app.received
        assert (heard_line, body) == (line, b"{}")
        assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", heard.pop("x-request-id"))
        assert heard.pop("host") == urlsplit(app.edge).netloc
        assert heard.pop("write-deadline")
        assert heard == {"content-length": "2", **{header.lower(): value for header, value in said.items()}}

    def test_of_a_read_that_is_kept_none(self, app: FakeApp, name: str) -> None:
        get(app, f"/{name}", Accept="application/json", **{k.replace("-", "_"): v for k, v in self.CONDITIONS.items()})
        assert set(app.received[0][1]) == {"host", "x-request-id"}

    @pytest.mark.parametrize("rest", ["", "?foo=1"])
    def test_a_read_does_not_say_which_page_it_comes_from(self, app: FakeApp, name: str, rest: str) -> None:
        get(app, f"/{name}{rest}", **{header.replace("-", "_"): value for header, value in self.PAGE.items()})
        [(_, heard, _)] = app.received
        assert heard["host"] == urlsplit(app.edge).hostname
        assert not {"origin", "sec-fetch-site"} & set(heard)

    @pytest.mark.parametrize(
        ("host", "heard"), [("A.example:1234", "A.example:1234"), ("[::1]:80", "[::1]:80"), ("\xe4.example", "?")]
    )
    def test_a_write_has_the_host_as_the_client_named_it(self, app: FakeApp, host: str, heard: str) -> None:
        raw(app.edge, f"DELETE /r/7 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        assert app.received[0][1]["host"] == heard

    @pytest.mark.parametrize("header", ["Content-Type", "Accept", *CONDITIONS, *PAGE])
    @pytest.mark.parametrize("value", ["a\x01b", "\x7f", "\xff", 'W/"\xc3\xa4"'])
    def test_what_cannot_be_passed_on_is_not_dropped_in_silence(self, app: FakeApp, header: str, value: str) -> None:
        send(app, "PUT /r/7", f"{header}: {value}")
        # "?" would be a key like any other.
        assert app.received[0][1][header.lower()] == ("? ?" if header == "Idempotency-Key" else "?")

    @pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
    def test_a_list_of_etags_may_have_tabs(self, app: FakeApp, header: str) -> None:
        send(app, "PUT /r/7", f'{header}: "a"\t,\t"b"')
        assert app.received[0][1][header.lower()] == '"a"\t,\t"b"'

    @pytest.mark.parametrize("header", ["Content-Type", *CONDITIONS, *PAGE])
    @pytest.mark.parametrize("line", ["PUT /r/7", "POST /r/batch"])
    def test_of_two_conditions_or_keys_none_is_passed_over(self, app: FakeApp, line: str, header: str) -> None:
        many = [f"X-{n}: 1" for n in range(150)]
        answer = send(app, line, f"{header}: {TAG}", *many, f'{header}: "other"')
        assert "repeated" in check_problem(answer, 400)
        assert not app.received

    @pytest.mark.parametrize("header", ["Content-Type", *CONDITIONS, *PAGE])
    def test_nor_is_an_empty_one(self, app: FakeApp, header: str) -> None:
        assert "empty" in check_problem(send(app, "PUT /r/7", f"{header}: "), 400)
        assert not app.received

    @pytest.mark.parametrize(
        ("line", "times"), [("GET /r/502", 2), ("GET /r/502?x", 2), ("PUT /r/502", 1), ("POST /r/batch", 1)]
    )
    def test_a_read_that_fails_is_asked_again_and_a_write_never(self, app: FakeApp, line: str, times: int) -> None:
        app.respond = lambda request: uncacheable(request, 502)
        assert send(app, line).status_code == 502
        assert len(app.received) == times


class TestProblems:
    SLUGS: ClassVar = {
        "GET /.lease/renew": (404, "not-found"),
        "TRACE /r": (405, "method-not-allowed"),
        "FOO /r": (501, "not-implemented"),
        "FOO /r/batch": (501, "not-implemented"),
        "GET /" + "r" * 5000: (414, "uri-too-long"),
        "GET /r%": (400, "bad-request"),
    }

    @pytest.mark.parametrize("line", SLUGS)
    def test_one_of_our_own_is_like_the_apps(self, app: FakeApp, line: str) -> None:
        status, slug = self.SLUGS[line]
        answer = send(app, line)
        check_problem(answer, status)
        body = answer.json()
        assert list(body) == ["type", "title", "status", "detail", "request_id"]
        assert body["type"] == f"/problems/{slug}"
        assert re.fullmatch(r"[0-9a-f]{16}-\d+-\d+", body["request_id"])
        assert body["request_id"] == answer.headers["X-Request-Id"]
        assert answer.headers["Cache-Control"] == "private, no-cache"

    def test_a_method_that_nginx_refuses_is_told_the_others(self, app: FakeApp) -> None:
        assert "PATCH" in send(app, "TRACE /r").headers["Allow"]
        assert "Allow" not in send(app, "FOO /r").headers

    def test_one_who_is_to_come_again_is_told_when(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: uncacheable(request, 503)
        answer = get(app, f"/{name}")
        check_problem(answer, 503)
        assert answer.headers["Retry-After"] == "1"

    @pytest.mark.parametrize(("line", "limit"), [("POST /r", 65536), ("PUT /r/7", 65536), ("POST /r/batch", 2097152)])
    def test_a_body_may_be_this_large_and_not_a_byte_larger(self, app: FakeApp, line: str, limit: int) -> None:
        assert send(app, line, body=b"x" * limit).status_code == 200
        assert len(app.received[0][2]) == limit
        for header, value in (("Content-Length", str(limit + 1)), ("Transfer-Encoding", "chunked")):
            body = b"x" * (limit + 1)
            if header == "Transfer-Encoding":
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (limit + 1, body)
            head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}: {value}\r\n\r\n"
            got = raw(app.edge, head.encode() + body)
            assert got.startswith(b"HTTP/1.1 413"), got
            assert f"larger than {limit} bytes" in json.loads(got.partition(b"\r\n\r\n")[2])["detail"]
        assert len(app.received) == 1

    @pytest.mark.parametrize(
        ("line", "headers", "size", "status", "in_chunks"),
        [
            ("POST /r/batch", b"", 100_000, 502, 502),
            ("POST /r/batch", b"", 2_000_000, 502, 502),
            ("POST /r/batch", b"", 3_000_000, 413, 413),
            ("POST /r/batch", b"If-Match: *\r\nIf-Match: *\r\n", 100_000, 400, 400),
            ("GET /r/batch", b"", 100_000, 502, 413),
            ("FOO /r/batch", b"", 100_000, 501, 501),
            ("FOO /r", b"", 100_000, 413, 501),
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
    def test_a_failed_request_gets_its_problem_however_large_its_body(
        self, deserted: str, line: str, headers: bytes, size: int, status: int, in_chunks: int
    ) -> None:
        """`in_chunks`: the status where Nginx does not know the length before it has read the body."""
        method, address = line.split()
        body = b"x" * size
        check(ask(deserted, method, address, headers, body), status)
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
        check(ask(deserted, method, address, headers + b"Transfer-Encoding: chunked\r\n", chunks), in_chunks)

    def test_a_kept_404_names_the_request_that_it_answers(self, app: FakeApp, name: str) -> None:
        app.respond = missing
        app.grants_leases = True
        for result in ("MISS", "HIT", "HIT"):
            answer = get(app, f"/{name}/7")
            assert answer.headers["X-Cache-Status"] == result
            assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
        assert requests.head(f"{app.edge}/{name}/7", timeout=5).status_code == 404
        app.respond, app.grants_leases = lambda request: uncacheable(request, 503), False
        try:
            wait_until(lambda: get(app, f"/{name}/7").headers["X-Cache-Status"] == "STALE")
            answer = get(app, f"/{name}/7")
            assert answer.status_code == 404
            assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
        finally:
            app.grants_leases = True
            wait_until(lambda: has_cache_lease(app.edge))

    def test_what_is_there_is_passed_on_as_it_is(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: cacheable(request, body=request.headers["X-Request-Id"].encode(), ETag=TAG)
        first, second = (get(app, f"/{name}/7") for _ in range(2))
        assert first.content == second.content == first.headers["X-Request-Id"].encode()
        assert second.headers["Content-Length"] == str(len(second.content))
        assert second.headers["ETag"] == TAG

    def test_one_that_names_no_request_is_passed_on_and_not_kept(self, app: FakeApp, name: str) -> None:
        app.respond = lambda request: cacheable(request, 404, b'{"status":404}')
        for _ in range(2):
            answer = get(app, f"/{name}/7")
            assert (answer.content, answer.headers["X-Cache-Status"]) == (b'{"status":404}', "MISS")

    def test_of_a_header_that_comes_twice_nothing_is_lost_and_nothing_kept(self, app: FakeApp, name: str) -> None:
        def twice(request: Request) -> Response:
            answer = tagged(request)
            answer.headers.add("Link", "</a>; rel=a")
            answer.headers.add("Link", "</b>; rel=b")
            return answer

        app.respond = twice
        for _ in range(2):
            answer = get(app, f"/{name}/7")
            assert (answer.headers["X-Cache-Status"], answer.headers["Link"]) == ("MISS", "</a>; rel=a, </b>; rel=b")

    def test_another_cache_before_the_app_may_have_its_say(self, app: FakeApp, name: str) -> None:
        def through_another(request: Request) -> Response:
            answer = tagged(request)
            answer.headers.add("Cache-Status", "other; fwd=miss")
            return answer

        app.respond = through_another
        answers = [get(app, f"/{name}/7") for _ in range(2)]
        assert answers[0].headers["Cache-Status"] == "redis; hit, other; fwd=miss, nginx; fwd=uri-miss; stored"
        assert answers[1].headers["Cache-Status"] == "nginx; hit"

    @pytest.mark.parametrize("status", [200, 404])
    def test_one_that_is_cut_off_is_none(self, app: FakeApp, name: str, status: int) -> None:
        def cut_off(request: Request) -> Response:
            answer = cacheable(request, status, b'{"id":7')
            answer.headers["Content-Length"] = "9"
            answer.automatically_set_content_length = False
            return answer

        app.respond = cut_off
        assert get(app, f"/{name}/7").status_code == 502
        app.respond = tagged
        assert get(app, f"/{name}/7").headers["X-Cache-Status"] == "MISS"

    @pytest.mark.parametrize("size", [1_700, 1_900, 300_000, 3_000_000])
    def test_a_large_one_is_kept_to_the_byte(self, app: FakeApp, name: str, size: int) -> None:
        body = b'["' + b"0123456789" * (size // 10) + b'"]'
        app.respond = lambda request: cacheable(request, 200, body)
        answers = [get(app, f"/{name}") for _ in range(2)]
        assert [answer.headers["X-Cache-Status"] for answer in answers] == ["MISS", "HIT"]
        assert {answer.content for answer in answers} == {body}

    def test_one_that_has_grown_or_shrunk_takes_the_place_of_the_one_before(self, app: FakeApp, name: str) -> None:
        small, large = b'{"id":7}', b'["%s"]' % (b"0123456789" * 300)
        for body in (small, large, small):
            app.respond = lambda request, body=body: cacheable(request, 200, body)  # type: ignore[misc]
            wait_until(lambda body=body: get(app, f"/{name}/7").content == body)  # type: ignore[misc]
            answer = get(app, f"/{name}/7")
            assert (answer.content, answer.headers["X-Cache-Status"]) == (body, "HIT")

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("head", ["Content-Length: 37", "Transfer-Encoding: chunked"])
    def test_what_a_read_has_for_a_body_is_no_request(self, app: FakeApp, name: str, head: str, kept: bool) -> None:
        if kept:
            get(app, f"/{name}/7")
        inside = f"GET /{name}/8 HTTP/1.1\r\nHost: inside\r\n\r\n"
        body = inside[:37] if head.startswith("Content") else f"{len(inside):x}\r\n{inside}\r\n0\r\n\r\n"
        first = f"GET /{name}/7 HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{body}"
        got = raw(app.edge, f"{first}GET /{name}/9 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert got.count(b"HTTP/1.1 200 ") == 2
        assert [line for line, _, _ in app.received] == [f"GET /{name}/7", f"GET /{name}/9"]
        assert all(not body for _, _, body in app.received)

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_part_that_is_asked_for_may_come_whole(self, app: FakeApp, name: str, kept: bool) -> None:
        if kept:
            get(app, f"/{name}/7")
        for asked in ("bytes=0-1", "bytes=99-", "what?"):
            answer = get(app, f"/{name}/7", Range=asked)
            assert (answer.status_code, answer.content) == (200, b'{"id":7}')

    @pytest.mark.parametrize("kept", [True, False])
    def test_answers_on_one_connection_follow_each_other_to_the_byte(self, app: FakeApp, name: str, kept: bool) -> None:
        app.respond = tagged if kept else lambda request: uncacheable(request, 400, b"no")
        head = f"GET /{name} HTTP/1.1\r\nHost: x\r\n"
        got = raw(app.edge, f"{head}\r\n{head}\r\n{head}Connection: close\r\n\r\n".encode())
        bodies = re.findall(rb"Content-Length: (\d+)\r\n(?:[^\r]+\r\n)*\r\n(.*?)(?=HTTP/1\.1|$)", got, re.DOTALL)
        assert len(bodies) == 3
        for length, body in bodies:
            assert len(body) == int(length)


def missing(request: Request) -> Response:
    body = b'{"status":404,"request_id":"%s"}' % request.headers["X-Request-Id"].encode()
    return cacheable(request, 404, body)


class TestWhatIsLogged:
    def paths(self, app: FakeApp, *answers: requests.Response) -> list[str]:
        ids = [answer.headers["X-Request-Id"] for answer in answers]
        wait_until(lambda: all(one in app.log() for one in ids))
        lines = [json.loads(line) for line in app.log().splitlines() if line.startswith("{")]
        return [next(line["path"] for line in lines if line["request_id"] == one) for one in ids]

    def test_the_path_of_a_route_without_its_query(self, app: FakeApp, name: str) -> None:
        reads = [get(app, f"/{name}/7"), get(app, f"/{name}/7"), get(app, f"/{name}?q=anna"), get(app, "/health")]
        app.respond = lambda request: uncacheable(request, 422)
        writes = [send(app, f"POST /{name}/batch"), send(app, f"PATCH /{name}/7?a=b")]
        assert self.paths(app, *reads, *writes) == [
            f"/{name}/7",
            f"/{name}/7",
            f"/{name}",
            "/health",
            f"/{name}/batch",
            f"/{name}/7",
        ]

    @pytest.mark.parametrize("status", [400, 404, 405, 500, 502, 503])
    def test_of_an_address_that_may_be_mistyped_nothing(self, app: FakeApp, status: int) -> None:
        app.respond = lambda request: uncacheable(request, status)
        lines = ("GET /anna", "HEAD /anna/7", "PUT /anna", "POST /anna/batch", "GET /docs/anna", "GET /anna@b.c")
        assert set(self.paths(app, *(send(app, line) for line in lines))) == {"(other)"}
