"""Every request of a client enters the edge once (edge/lua/entrance.lua), whatever answers it, and a step can refuse it."""

from collections.abc import Iterator

import pytest
import requests
from werkzeug import Request, Response

from testkit.edge_copy import copy_edge, replace_once
from testkit.fake_app import FakeApp, fake_app, storable
from testkit.raw_http import send_bytes
from testkit.stack import Stack, folder, wait_until

STEP = """
local STEPS = { limits.refuse, hosts.refuse, function(route)
    ngx.log(ngx.EMERG, "entered ", route, " ", ngx.var.request_uri, ";")
    if ngx.var.http_x_refuse then
        return 429
    end
end }
"""
"""A step that logs each request, and refuses a request with the header X-Refuse."""

ETAG = '"0123"'


def respond(request: Request) -> Response:
    body = b'{"text":"%s"}' % (b"x" * 4000) if request.path.startswith("/large") else b'{"id":7}'
    return storable(request, 404 if request.path == "/rows/404" else 200, body, ETag=ETAG)


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    with folder() as checkout:
        edge = copy_edge(checkout)
        replace_once(edge / "lua/entrance.lua", "local STEPS = { limits.refuse, hosts.refuse }\n", STEP)
        with fake_app(home=edge) as app:
            yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    module_app.respond = respond
    module_app.received.clear()
    return module_app


def entered(app: FakeApp, address: str) -> list[str]:
    """Return the route of each request for this address that entered."""
    lines = [line.partition("entered ")[2] for line in app.log().splitlines() if "entered " in line]
    return [line.split(" ")[0] for line in lines if line.split(" ")[1].startswith(f"{address};")]


@pytest.mark.parametrize(
    ("method", "address", "headers", "status", "result", "route"),
    [
        ("GET", "/rows/1", {}, 200, "HIT", "@read"),
        ("HEAD", "/rows/2", {}, 200, "HIT", "@read"),
        ("GET", "/rows/3", {"If-None-Match": ETAG}, 304, "HIT", "@read"),
        ("GET", "/large/4", {}, 200, "HIT", "@read"),
        ("GET", "/rows/5", {"Accept": "text/plain;q=1, application/json;q=0"}, 200, "BYPASS", "@bypass"),
        ("OPTIONS", "/rows/6", {}, 200, "BYPASS", "@bypass"),
        ("PUT", "/rows/7", {}, 200, "BYPASS", "@write"),
        ("POST", "/rows/batch", {}, 200, "BYPASS", "@write"),
        ("BREW", "/rows/8", {}, 200, "BYPASS", "@bypass"),
        ("A", "/rows/8", {}, 501, "BYPASS", "@unknown_method"),
        ("GET", "/readyz", {}, 200, "BYPASS", "@bypass"),
        ("GET", "/.other", {}, 404, "BYPASS", "@bypass"),
    ],
)
def test_each_kind_of_request_enters_once(
    app: FakeApp, method: str, address: str, headers: dict[str, str], status: int, result: str, route: str
) -> None:
    if result == "HIT":
        assert requests.get(app.edge + address, timeout=5).headers["X-Cache-Status"] == "MISS"
    before = len(entered(app, address))
    response = requests.request(method, app.edge + address, headers=headers, timeout=5)
    assert (response.status_code, response.headers["X-Cache-Status"]) == (status, result)
    assert entered(app, address)[before:] == [route]


def test_a_miss_enters_once_although_the_edge_fetches_it_by_a_subrequest(app: FakeApp) -> None:
    assert requests.get(f"{app.edge}/rows/20", timeout=5).headers["X-Cache-Status"] == "MISS"
    assert len(app.received) == 1
    assert entered(app, "/rows/20") == ["@read"]


def test_a_stale_response_enters_once(app: FakeApp) -> None:
    address = "/rows/21"
    assert requests.get(app.edge + address, timeout=5).status_code == 200
    app.respond = lambda request: Response(b"", 503)

    def is_stale() -> bool:
        return requests.get(app.edge + address, timeout=5).headers["X-Cache-Status"] == "STALE"

    wait_until(is_stale, every=0.5)  # after EDGE_TTL
    before = len(entered(app, address))
    assert is_stale()
    assert entered(app, address)[before:] == ["@read"]


def test_a_request_line_that_cannot_be_parsed_is_answered_without_entering(app: FakeApp) -> None:
    assert send_bytes(app.edge, b"GET /rows/22 HTTP/x\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert entered(app, "/rows/22") == []


@pytest.mark.parametrize(
    ("method", "address"),
    [
        ("GET", "/rows/30"),
        ("OPTIONS", "/rows/31"),
        ("PUT", "/rows/32"),
        ("POST", "/rows/batch"),
        ("GET", "/readyz"),
        ("GET", "/.edge"),
    ],
)
def test_a_refused_request_is_a_problem_and_reaches_no_app(app: FakeApp, method: str, address: str) -> None:
    if address == "/rows/30":  # a hit
        requests.get(app.edge + address, timeout=5)
        app.received.clear()
    response = requests.request(method, app.edge + address, headers={"X-Refuse": "yes"}, timeout=5)
    assert response.status_code == 429
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["type"] == "/problems/too-many-requests"
    assert response.headers["Retry-After"] == "1"
    assert app.received == []


def test_a_refusal_concerns_one_request_and_not_the_next_on_its_connection(app: FakeApp) -> None:
    with requests.Session() as session:
        refused = session.get(f"{app.edge}/rows/33", headers={"X-Refuse": "yes"}, timeout=5)
        passed = session.get(f"{app.edge}/rows/33", timeout=5)
    assert (refused.status_code, passed.status_code) == (429, 200)


@pytest.mark.parametrize(
    "path", ["/.lease/renew", "/.lease/register", "/.app", "/.https", "/drop", "/show", "/close_connections"]
)
def test_addresses_of_the_inside_are_not_found_by_clients(stack: Stack, path: str) -> None:
    for method in ("GET", "POST"):
        assert requests.request(method, stack.edge + path, timeout=5).status_code in (404, 405)
