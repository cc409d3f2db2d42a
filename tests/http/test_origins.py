"""A web page of another origin cannot write, whatever the browser; programs and the API's own page can."""

import json
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Page, Response, expect

from testkit.browser import open_page
from testkit.raw_http import RawResponse, check_raw_problem, parse_response, send_bytes, send_request
from testkit.stack import Stack, running, wait_until

HOST = "localhost:1234"

WRITES = [
    *[("POST", "/users"), ("POST", "/users/batch")],
    *[(method, "/users/999999999") for method in ("PUT", "PATCH", "DELETE")],
    *[(method, target) for method in ("POST", "DELETE") for target in ("/docs", "/problems/", "/nothing", "/%75sers")],
]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack that is also reached under a name."""
    with running("--apps", "1", ALLOWED_HOSTS="users.example") as stack:
        yield stack


def write(base_url: str, lines: str, host: str = HOST, method: str = "POST", target: str = "/users") -> RawResponse:
    """Send a write with these header lines. Its body is invalid, so a write that is not forbidden gets 422."""
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return parse_response(send_bytes(base_url, f"{head}Content-Length: 2\r\n{lines}\r\n".encode("latin-1") + b"{}"))


def is_forbidden(response: RawResponse) -> bool:
    if response.status != 403:
        return False
    check_raw_problem(response, 403)
    assert response.json["type"] == "/problems/forbidden"
    assert "Origin" in response.json["detail"]
    return True


class TestHeaders:
    @pytest.mark.parametrize(
        ("host", "lines"),
        [
            (HOST, ""),
            (HOST, "Sec-Fetch-Site: same-origin\r\n"),
            (HOST, "Sec-Fetch-Site: none\r\n"),
            # A proxy may have changed the host.
            (HOST, "Sec-Fetch-Site: same-origin\r\nOrigin: https://users.example\r\n"),
            (HOST, "Origin: http://localhost:1234\r\n"),
            (HOST, "Origin: https://localhost:1234\r\n"),
            (HOST, "Origin: HTTP://LocalHost:1234\r\n"),
            ("LOCALHOST:1234", "Origin: http://localhost:1234\r\n"),
            ("localhost", "Origin: http://localhost\r\n"),
            ("localhost", "Origin: https://localhost\r\n"),
            ("localhost", "Origin: http://localhost:80\r\n"),
            ("localhost", "Origin: https://localhost:443\r\n"),
            ("localhost:80", "Origin: http://localhost\r\n"),
            ("localhost:443", "Origin: https://localhost\r\n"),
            ("[::1]:1234", "Origin: http://[::1]:1234\r\n"),
            ("[::1]", "Origin: http://[::1]\r\n"),
        ],
    )
    def test_program_and_page_of_the_same_origin_can_write(self, base_url: str, host: str, lines: str) -> None:
        assert write(base_url, lines, host).status == 422

    @pytest.mark.parametrize(
        ("host", "lines"),
        [
            (HOST, "Sec-Fetch-Site: cross-site\r\n"),
            (HOST, "Sec-Fetch-Site: same-site\r\n"),
            (HOST, "Sec-Fetch-Site: Same-Origin\r\n"),
            (HOST, "Sec-Fetch-Site: \xff\r\n"),
            (HOST, "Sec-Fetch-Site: cross-site\r\nOrigin: http://localhost:1234\r\n"),
            (HOST, "Origin: null\r\n"),
            (HOST, "Origin: http://evil.example\r\n"),
            (HOST, "Origin: http://localhost\r\n"),
            (HOST, "Origin: http://localhost:1235\r\n"),
            (HOST, "Origin: http://127.0.0.1:1234\r\n"),
            (HOST, "Origin: http://localhost:1234.evil.example\r\n"),
            (HOST, "Origin: http://evil.example/localhost:1234\r\n"),
            (HOST, "Origin: http://evil.example http://localhost:1234\r\n"),
            (HOST, "Origin: chrome-extension://localhost\r\n"),
            (HOST, "Origin: localhost:1234\r\n"),
            (HOST, "Origin: \xff\r\n"),
            ("localhost", "Origin: http://localhost:443\r\n"),
            ("localhost", "Origin: https://localhost:80\r\n"),
            ("localhost:443", "Origin: http://localhost\r\n"),
            ("localhost:80", "Origin: https://localhost\r\n"),
        ],
    )
    def test_page_of_another_origin_cannot_write(self, base_url: str, host: str, lines: str) -> None:
        assert is_forbidden(write(base_url, lines, host))

    @pytest.mark.parametrize(("method", "target"), WRITES)
    def test_page_of_another_origin_can_write_at_no_address(self, base_url: str, method: str, target: str) -> None:
        for lines in ("Sec-Fetch-Site: cross-site\r\n", "Origin: null\r\n"):
            assert is_forbidden(write(base_url, lines, method=method, target=target))

    def test_page_of_another_origin_cannot_request_a_cache_lease(self, stack: Stack) -> None:
        for target in ("/.lease/renew", "/.lease/register"):
            assert is_forbidden(write(stack.app, "Origin: null\r\n", target=target))

    def test_read_by_a_page_of_another_origin_is_served_from_the_cache(self, stack: Stack) -> None:
        lines = b"Sec-Fetch-Site: cross-site\r\nOrigin: http://evil.example\r\n"
        for base_url in (stack.app, stack.edge):
            for method in ("GET", "HEAD", "OPTIONS"):
                assert send_request(base_url, method, "/users/1", lines).status in (200, 204)
        wait_until(lambda: send_request(stack.edge, "GET", "/users/1", lines).headers["x-cache-status"] == "HIT")


EMAIL = "foreign@example.com"
NEW = json.dumps({"name": "Foreign", "email": EMAIL})
# A form sends a "=" between the name of a field and its value; here it becomes a part of the user's name, "Foreign=".
FORM_FIELD = ('{"name": "Foreign', NEW.removeprefix('{"name": "Foreign'))

CROSS_ORIGIN_REQUESTS = {
    "fetch without a type": "fetch(url, {method: 'POST', mode: 'no-cors', body: new Blob([body])})",
    "fetch with a type": "fetch(url, {method: 'POST', mode: 'no-cors', body: body})",
    "a beacon without a type": "navigator.sendBeacon(url, new Blob([body]))",
    "a beacon with a type": "navigator.sendBeacon(url, body)",
}
"""Requests that a browser sends to any origin without a preflight. It only hides the response from the page."""

SUBMIT_FORM = """([url, name, value]) => {
    const form = document.createElement("form");
    Object.assign(form, {method: "post", action: url, enctype: "text/plain"});
    const field = document.createElement("input");
    Object.assign(field, {name, value});
    form.append(field);
    document.body.append(form);
    form.submit();
}"""


@pytest.fixture
def was_created(stack: Stack) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a page has created its user; delete that user afterwards."""
    yield lambda: stack.sql("SELECT count(*) FROM users WHERE email = %s", EMAIL) != [(0,)]
    for (user_id,) in stack.sql("SELECT id FROM users WHERE email = %s", EMAIL):
        requests.delete(f"{stack.app}/users/{user_id}", timeout=5)


# To the second host a browser sends no Sec-Fetch-Site, because it does not trust plain HTTP of other machines.
each_host = pytest.mark.parametrize("host", ["127.0.0.1", "users.example"])


class TestInABrowser:
    @each_host
    @pytest.mark.parametrize("kind", CROSS_ORIGIN_REQUESTS)
    def test_script_of_a_page_of_another_origin_creates_no_user(
        self,
        base_url: str,
        browser: Callable[..., Browser],
        other_port: int,
        was_created: Callable[[], bool],
        kind: str,
        host: str,
    ) -> None:
        url = f"http://{host}:{urlsplit(base_url).port}/users"
        with open_page(browser(f"--host-resolver-rules=MAP {host} 127.0.0.1"), f"http://{host}:{other_port}") as page:
            with page.expect_response(url) as received:
                page.evaluate(f"([url, body]) => {{ {CROSS_ORIGIN_REQUESTS[kind]} }}", [url, NEW])
            assert not was_created()
            assert received.value.status == 403

    @each_host
    def test_form_of_a_page_of_another_origin_creates_no_user(
        self,
        base_url: str,
        browser: Callable[..., Browser],
        other_port: int,
        was_created: Callable[[], bool],
        host: str,
    ) -> None:
        url = f"http://{host}:{urlsplit(base_url).port}/users"
        with open_page(browser(f"--host-resolver-rules=MAP {host} 127.0.0.1"), f"http://{host}:{other_port}") as page:
            with page.expect_response(url) as received:
                page.evaluate(SUBMIT_FORM, [url, *FORM_FIELD])
            assert not was_created()
            assert received.value.status == 403

    def test_request_of_another_origin_that_needs_a_preflight_creates_no_user(
        self, base_url: str, browser: Callable[..., Browser], other_port: int, was_created: Callable[[], bool]
    ) -> None:
        with open_page(browser(), f"http://127.0.0.1:{other_port}") as page:
            refused = page.evaluate(
                "([url, body]) => fetch(url, {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
                ".catch(String)",
                [f"{base_url}/users", NEW],
            )
            assert "TypeError" in refused
            assert not was_created()

    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost:1234", "users.example:1234"])
    def test_own_page_of_the_api_can_write_under_every_address_that_reaches_it(
        self, base_url: str, browser: Callable[..., Browser], was_created: Callable[[], bool], name: str
    ) -> None:
        server = urlsplit(base_url).netloc
        address = server if name == "127.0.0.1" else name
        with open_page(browser(f"--host-resolver-rules=MAP {address} {server}"), f"http://{address}/docs") as page:
            response = self.create_in_swagger_ui(page)
            assert response.status == 201
            assert urlsplit(response.url).netloc == address
            assert was_created()

    def create_in_swagger_ui(self, page: Page) -> Response:
        create = page.locator(".opblock-post").filter(has=page.locator("[data-path='/users']"))
        expect(create).to_be_visible()
        create.locator(".opblock-summary-control").click()
        create.get_by_role("button", name="Try it out").click()
        create.locator("textarea").first.fill(NEW)
        with page.expect_response(lambda response: urlsplit(response.url).path == "/users") as received:
            create.get_by_role("button", name="Execute").click()
        return received.value
