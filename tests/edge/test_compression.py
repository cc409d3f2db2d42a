"""Nginx compresses lists for clients that accept it, and the ETags of compressed responses work as preconditions."""

import gzip
import json
import re
from collections.abc import Iterator

import pytest
import requests
from werkzeug import Request, Response

from testkit.api import User
from testkit.fake_app import FakeApp, fake_app, plain, storable
from testkit.nginx_proxy import nginx_proxy
from testkit.raw_http import RawResponse, send_request
from testkit.stack import ROOT, Stack

LIST = json.dumps([{"id": number, "name": f"Person {number}"} for number in range(2000)]).encode()
ROW = b'{"id":7}'
ETAG = '"0123456789abcdef01234567"'
WEAK = f"W/{ETAG}"
GZIP = b"Accept-Encoding: gzip, deflate, br\r\n"


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    with fake_app() as app:
        yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    def respond(request: Request) -> Response:
        if request.path == "/rows/404":
            return plain(request, 404, b'{"detail":"%s"}' % (b"x" * 4000))
        if request.path == "/locked":  # a writer is in flight, so the edge must not store the response
            return storable(request, body=LIST, ETag=ETAG, X_Accel_Expires="0")
        body = ROW if request.path == "/rows/7" else LIST
        if request.headers.get("If-None-Match"):
            return plain(request, 304, b"", ETag=ETAG)
        return storable(request, body=body, ETag=ETAG, Link='</rows?cursor=x>; rel="next"')

    module_app.respond = respond
    module_app.received.clear()
    return module_app


def get(app: FakeApp, target: str, headers: bytes = b"", method: str = "GET") -> RawResponse:
    return send_request(app.edge, method, target, headers)


@pytest.mark.parametrize("target", ["/rows", "/rows?limit=10", "/rows?foo=1", "/docs"])
def test_list_is_compressed_for_clients_that_accept_gzip(app: FakeApp, target: str) -> None:
    for _ in range(2):  # a miss and a hit
        compressed, whole = get(app, target, GZIP), get(app, target)
        assert compressed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(compressed.body) == whole.body == LIST
        assert len(compressed.body) < len(LIST) / 5
        assert "content-length" not in compressed.headers
        assert compressed.headers["vary"] == whole.headers["vary"] == "Accept-Encoding"
        assert (compressed.headers["etag"], whole.headers["etag"]) == (WEAK, ETAG)
        assert compressed.headers["link"] == whole.headers["link"]
        assert whole.headers["content-length"] == str(len(LIST))
        assert "content-encoding" not in whole.headers
    if "foo" not in target and target != "/docs":
        assert compressed.headers["x-cache-status"] == "HIT"


def test_compressed_problem_is_readable(app: FakeApp) -> None:
    response = get(app, "/rows/404", GZIP)
    assert (response.status, response.headers["content-encoding"]) == (404, "gzip")
    assert json.loads(gzip.decompress(response.body))["detail"]


@pytest.mark.parametrize("encoding", ["gzip;q=0", "br", "identity", "deflate"])
def test_list_is_not_compressed_for_other_clients(app: FakeApp, encoding: str) -> None:
    response = get(app, "/rows", f"Accept-Encoding: {encoding}\r\n".encode())
    assert response.body == LIST
    assert "content-encoding" not in response.headers


def test_client_behind_a_proxy_that_sends_via_gets_a_compressed_list(app: FakeApp) -> None:
    assert get(app, "/rows", GZIP + b"Via: 1.1 proxy\r\n").headers["content-encoding"] == "gzip"


def test_row_is_sent_as_it_is(app: FakeApp) -> None:
    for _ in range(2):
        response = get(app, "/rows/7", GZIP)
        assert (response.body, response.headers["etag"]) == (ROW, ETAG)
        assert response.headers["content-length"] == str(len(ROW))
        assert "vary" not in response.headers


@pytest.mark.parametrize("target", ["/rows", "/rows?limit=10", "/rows?foo=1", "/locked"])
def test_304_has_the_etag_of_the_response_that_it_stands_for(app: FakeApp, target: str) -> None:
    """A cache must not update what it stores under a weak ETag by a 304 with a strong one (RFC 9111, 4.3.4)."""
    for headers, etag in ((GZIP, WEAK), (b"", ETAG)):
        assert get(app, target, headers).headers["etag"] == etag
        for tags in (etag, f'"other", {etag}', f'W/"other" ,{etag},"x"', ETAG, WEAK):
            response = get(app, target, headers + f"If-None-Match: {tags}\r\n".encode())
            assert (response.status, response.body, response.headers["etag"]) == (304, b"", etag)
    if "foo" not in target:
        assert get(app, target, GZIP + b'If-None-Match: "other"\r\n').status == 200


def test_head_has_no_body_and_the_length_of_the_plain_one(app: FakeApp) -> None:
    get(app, "/rows")
    response = get(app, "/rows", GZIP, "HEAD")
    assert (response.status, response.body) == (200, b"")
    assert response.headers["content-length"] == str(len(LIST))
    assert "content-encoding" not in response.headers
    assert response.headers["etag"] == WEAK


def test_range_of_a_list_is_ignored(app: FakeApp) -> None:
    for headers in (b"", GZIP):
        response = get(app, "/rows", headers + b"Range: bytes=0-9\r\n")
        assert response.status == 200
        assert LIST in (response.body, gzip.decompress(response.body) if headers else b"")


def test_edge_and_store_agree_on_the_smallest_compressed_body() -> None:
    configured = re.search(r"gzip_min_length (\d+);", (ROOT / "edge/conf/compression.conf").read_text())
    stored = re.search(r"MIN_COMPRESSED_BYTES = (\d+)", (ROOT / "edge/lua/store.lua").read_text())
    assert configured and stored and configured[1] == stored[1]


@pytest.fixture(scope="module")
def proxy(stack: Stack) -> Iterator[str]:
    directives = "gzip on; gzip_min_length 1; gzip_proxied any; gzip_types application/json;"
    with nginx_proxy(stack.edge, directives) as proxy:
        yield proxy


class TestBehindACompressingProxy:
    """A proxy that compresses makes strong ETags weak, and the clients behind it never see another."""

    def test_retry_loop_of_the_client_guide_ends_with_a_success(self, proxy: str, new_user: User) -> None:
        guide = (ROOT / "docs/clients.md").read_text()
        [change] = re.findall(r"```python\n(def change\(.*?\n)\n\n", guide, re.DOTALL)
        variables = {"requests": requests, "session": requests.Session(), "SERVICE": proxy}
        exec(change, variables)
        path = f"/users/{new_user['id']}"
        assert requests.get(proxy + path, timeout=5).headers["ETag"].startswith('W/"')
        for number in range(3):
            variables["change"](path, lambda user, number=number: {"name": f"{user['name']} {number}"})  # type: ignore[operator]
        assert requests.get(proxy + path, timeout=5).json()["name"] == f"{new_user['name']} 0 1 2"

    def test_write_over_a_newer_version_is_still_refused(self, proxy: str, new_user: User) -> None:
        url = f"{proxy}/users/{new_user['id']}"
        etag = requests.get(url, timeout=5).headers["ETag"]
        assert requests.patch(url, json={"name": "First"}, headers={"If-Match": etag}, timeout=5).status_code == 200
        assert requests.patch(url, json={"name": "Second"}, headers={"If-Match": etag}, timeout=5).status_code == 412
        assert requests.get(url, timeout=5).json()["name"] == "First"

    def test_read_with_the_weak_etag_is_304(self, proxy: str, new_user: User) -> None:
        for url in (f"{proxy}/users/{new_user['id']}", f"{proxy}/users"):
            etag = requests.get(url, timeout=5).headers["ETag"]
            assert requests.get(url, headers={"If-None-Match": etag}, timeout=5).status_code == 304

    def test_412_names_the_proxy_that_replaced_the_etag(self, stack: Stack, new_user: User) -> None:
        with nginx_proxy(stack.edge, "proxy_hide_header ETag; add_header ETag '\"of-the-proxy\"';") as proxy:
            url = f"{proxy}/users/{new_user['id']}"
            etag = requests.get(url, timeout=5).headers["ETag"]
            refused = requests.patch(url, json={"name": "New"}, headers={"If-Match": etag}, timeout=5)
        assert refused.status_code == 412
        assert "a proxy in between has replaced the ETag" in refused.json()["detail"]
