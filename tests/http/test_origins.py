"""A web page of another origin writes nothing, in whichever browser it is open; programs and the API's own page do."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from testkit.raw_http import Told, ask, check, raw, told
from testkit.stack import Stack, wait_until

CHROMIUM = shutil.which("chromium") or ""
HOST = "localhost:1234"

WRITES = [
    *[("POST", "/users"), ("POST", "/users/batch")],
    *[(method, "/users/999999999") for method in ("PUT", "PATCH", "DELETE")],
    *[(method, target) for method in ("POST", "DELETE") for target in ("/docs", "/problems/", "/nothing", "/%75sers")],
]


def write(base_url: str, lines: str, host: str = HOST, method: str = "POST", target: str = "/users") -> Told:
    """Send these lines of a header with a write that would be refused as invalid, at the latest."""
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return told(raw(base_url, f"{head}Content-Length: 2\r\n{lines}\r\n".encode("latin-1") + b"{}"))


def is_forbidden(response: Told) -> bool:
    if response.status != 403:
        return False
    check(response, 403)
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
    def test_a_program_and_a_page_of_the_same_origin_may_write(self, base_url: str, host: str, lines: str) -> None:
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
    def test_a_page_of_another_origin_may_not(self, base_url: str, host: str, lines: str) -> None:
        assert is_forbidden(write(base_url, lines, host))

    @pytest.mark.parametrize(("method", "target"), WRITES)
    def test_a_foreign_page_may_write_at_no_address(self, base_url: str, method: str, target: str) -> None:
        for lines in ("Sec-Fetch-Site: cross-site\r\n", "Origin: null\r\n"):
            assert is_forbidden(write(base_url, lines, method=method, target=target))

    def test_a_foreign_page_cannot_pass_for_an_edge(self, stack: Stack) -> None:
        for target in ("/.lease/renew", "/.lease/register"):
            assert is_forbidden(write(stack.app, "Origin: null\r\n", target=target))

    def test_a_read_of_a_foreign_page_comes_from_the_cache(self, stack: Stack) -> None:
        lines = b"Sec-Fetch-Site: cross-site\r\nOrigin: http://evil.example\r\n"
        for base_url in (stack.app, stack.edge):
            for method in ("GET", "HEAD", "OPTIONS"):
                assert ask(base_url, method, "/users/1", lines).status in (200, 204)
        wait_until(lambda: ask(stack.edge, "GET", "/users/1", lines).headers["x-cache-status"] == "HIT")


EMAIL = "foreign@example.com"
NEW = json.dumps({"name": "Foreign", "email": EMAIL})
# A form puts a "=" between a name and its value; here it becomes a part of the name "Foreign=".
IN_A_FORM = ('{"name": "Foreign', NEW.removeprefix('{"name": "Foreign'))

FOREIGN = {
    "fetch without a type": "fetch(url, {method: 'POST', mode: 'no-cors', body: new Blob([body])})",
    "fetch with a type": "fetch(url, {method: 'POST', mode: 'no-cors', body: body})",
    "a beacon without a type": "navigator.sendBeacon(url, new Blob([body]))",
    "a beacon with a type": "navigator.sendBeacon(url, body)",
}
"""A page may send these to anybody: its browser does not ask first, and hides the response."""

FORM = """([url, name, value]) => {
    const form = document.createElement("form");
    Object.assign(form, {method: "post", action: url, enctype: "text/plain"});
    const field = document.createElement("input");
    Object.assign(field, {name, value});
    form.append(field);
    document.body.append(form);
    form.submit();
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[..., Browser]]:
    """Return a browser that takes these arguments."""
    if not CHROMIUM:
        pytest.skip("there is no chromium; on Debian ./run test installs it")
    with sync_playwright() as playwright:
        # Its sandbox does not start as root.
        yield lambda *more: playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *more])


class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    """The port of a server that has a page of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def nobody(stack: Stack) -> Iterator[Callable[[], bool]]:
    """Tell whether there is no user that a page has made."""
    yield lambda: stack.sql("SELECT count(*) FROM users WHERE email = %s", EMAIL) == [(0,)]
    for (number,) in stack.sql("SELECT id FROM users WHERE email = %s", EMAIL):
        requests.delete(f"{stack.app}/users/{number}", timeout=5)


@contextmanager
def foreign_page(browser: Browser, address: str) -> Iterator[Page]:
    with browser:
        page = browser.new_page()
        page.goto(address)
        yield page


# To the second name a browser sends no Sec-Fetch-Site, since it does not trust plain HTTP of other machines.
NAMES = pytest.mark.parametrize("name", ["127.0.0.1", "users.example"])


class TestInABrowser:
    @NAMES
    @pytest.mark.parametrize("way", FOREIGN)
    def test_a_foreign_page_creates_no_user(
        self,
        base_url: str,
        browser: Callable[..., Browser],
        elsewhere: int,
        nobody: Callable[[], bool],
        way: str,
        name: str,
    ) -> None:
        url = f"http://{name}:{urlsplit(base_url).port}/users"
        with foreign_page(browser(f"--host-resolver-rules=MAP {name} 127.0.0.1"), f"http://{name}:{elsewhere}") as page:
            with page.expect_response(url) as answered:
                page.evaluate(f"([url, body]) => {{ {FOREIGN[way]} }}", [url, NEW])
            assert nobody()
            assert answered.value.status == 403

    @NAMES
    def test_the_form_of_a_foreign_page_creates_no_user(
        self, base_url: str, browser: Callable[..., Browser], elsewhere: int, nobody: Callable[[], bool], name: str
    ) -> None:
        url = f"http://{name}:{urlsplit(base_url).port}/users"
        with foreign_page(browser(f"--host-resolver-rules=MAP {name} 127.0.0.1"), f"http://{name}:{elsewhere}") as page:
            with page.expect_response(url) as answered:
                page.evaluate(FORM, [url, *IN_A_FORM])
            assert nobody()
            assert answered.value.status == 403

    def test_a_foreign_page_that_has_to_ask_first_creates_no_user(
        self, base_url: str, browser: Callable[..., Browser], elsewhere: int, nobody: Callable[[], bool]
    ) -> None:
        with foreign_page(browser(), f"http://127.0.0.1:{elsewhere}") as page:
            refused = page.evaluate(
                "([url, body]) => fetch(url, {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
                ".catch(String)",
                [f"{base_url}/users", NEW],
            )
            assert "TypeError" in refused
            assert nobody()

    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost:1234", "users.example:1234"])
    def test_the_apis_own_page_writes_under_whatever_address_it_is_reached(
        self, base_url: str, browser: Callable[..., Browser], nobody: Callable[[], bool], name: str
    ) -> None:
        here = urlsplit(base_url).netloc
        address = here if name == "127.0.0.1" else name
        with foreign_page(browser(f"--host-resolver-rules=MAP {address} {here}"), f"http://{address}/docs") as page:
            response = self.create_in_swagger_ui(page)
            assert response.status == 201
            assert urlsplit(response.url).netloc == address
            assert not nobody()

    def create_in_swagger_ui(self, page: Page) -> Response:
        create = page.locator(".opblock-post").filter(has=page.locator("[data-path='/users']"))
        expect(create).to_be_visible()
        create.locator(".opblock-summary-control").click()
        create.get_by_role("button", name="Try it out").click()
        create.locator("textarea").first.fill(NEW)
        with page.expect_response(lambda response: urlsplit(response.url).path == "/users") as answered:
            create.get_by_role("button", name="Execute").click()
        return answered.value
