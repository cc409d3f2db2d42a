"""The files that browsers and crawlers request from every site: /favicon.ico and /robots.txt."""

import struct
import urllib.robotparser
import zlib

import pytest
import requests

from testkit.api import check_problem
from testkit.stack import Stack

FILES = {"/favicon.ico": "image/x-icon", "/robots.txt": "text/plain; charset=utf-8"}


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers=headers, timeout=5)


@pytest.mark.parametrize("path", FILES)
class TestBoth:
    def test_browser_may_keep_the_file_for_a_day(self, base_url: str, path: str) -> None:
        response = get(base_url + path, Accept="image/avif,image/webp,*/*;q=0.8")
        assert (response.status_code, response.headers["Content-Type"]) == (200, FILES[path])
        assert response.headers["Cache-Control"] == "public, max-age=86400"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert len(response.content) < 1000

    def test_browser_that_has_the_file_receives_no_body(self, base_url: str, path: str) -> None:
        etag = get(base_url + path).headers["ETag"]
        response = get(base_url + path, **{"If-None-Match": etag})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["ETag"].removeprefix("W/") == etag.removeprefix("W/")

    def test_head_has_the_headers_of_get(self, base_url: str, path: str) -> None:
        head = requests.head(base_url + path, timeout=5)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == str(len(get(base_url + path).content))

    def test_all_apps_have_the_same_file(self, stack: Stack, path: str) -> None:
        assert len({get(app + path).headers["ETag"] for app in stack.apps}) == 1

    def test_writes_and_parameters_are_refused(self, base_url: str, path: str) -> None:
        check_problem(requests.post(base_url + path, timeout=5), 405)
        check_problem(get(f"{base_url}{path}?v=2"), 400)
        check_problem(get(f"{base_url}{path}/1"), 404)


def test_icon_is_a_picture_that_browsers_can_decode(stack: Stack) -> None:
    content = get(f"{stack.edge}/favicon.ico").content
    assert struct.unpack_from("<HHH", content) == (0, 1, 1)  # an icon with one picture
    width, height, _, _, _, bits, size, offset = struct.unpack_from("<BBBBHHII", content, 6)
    assert (width, height, bits, offset + size) == (32, 32, 32, len(content))
    png, kinds, pixels = content[offset:], [], b""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    place = 8
    while place < len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        data = png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length)[0] == zlib.crc32(kind + data)
        kinds.append(kind)
        pixels += data if kind == b"IDAT" else b""
        place += length + 12
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    assert len(zlib.decompress(pixels)) == height * (1 + width * 4)


def test_no_crawler_may_read_anything(stack: Stack) -> None:
    rules = urllib.robotparser.RobotFileParser()
    rules.parse(get(f"{stack.edge}/robots.txt").text.splitlines())
    for crawler in ("Googlebot", "*"):
        for path in ("/", "/users", "/docs", "/problems/", "/openapi.json"):
            assert not rules.can_fetch(crawler, path)


@pytest.mark.parametrize("page", ["/docs", "/problems/", "/problems/taken"])
def test_pages_name_the_icon(stack: Stack, page: str) -> None:
    response = get(stack.edge + page)
    assert 'rel="icon" href="favicon.ico"' in response.text or 'rel="icon" href="/favicon.ico"' in response.text
    assert "img-src 'self'" in response.headers["Content-Security-Policy"]
