"""The page at /docs in a real browser, through an edge: it works under its own policy and loads nothing from elsewhere."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Locator, Page, expect

from testkit.api import check_problem
from testkit.stack import Stack

VERBS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


@dataclass
class Visit:
    """An open page, with the complaints of the browser and the addresses that it requested."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    def operation(self, verb: str, path: str) -> Locator:
        path_label = self.page.locator(f"[data-path='{path}']")
        return self.page.locator(f".opblock-{verb}").filter(has=path_label)


@pytest.fixture
def visit(stack: Stack, browser: Callable[..., Browser]) -> Iterator[Visit]:
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        visit = Visit(page)
        page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on("requestfailed", lambda request: visit.complaints.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: visit.requested.append(request.url))
        # The browser reports a violation of the policy that only blocks a style as an event, not as an error.
        page.expose_function(
            "violated", lambda text: visit.complaints.append(text)
        )  # playwright needs a Python function
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => violated(`${e.violatedDirective} ${e.blockedURI}`))"
        )
        page.goto(f"{stack.edge}/docs")
        yield visit


def assets(stack: Stack) -> list[str]:
    found: list[str] = re.findall('(?:src|href)="(docs/[^"]+)"', requests.get(f"{stack.edge}/docs", timeout=5).text)
    return [f"/{address}" for address in found]


class TestBrowser:
    def test_page_shows_each_operation_of_the_document(self, stack: Stack, visit: Visit) -> None:
        paths = requests.get(f"{stack.edge}/openapi.json", timeout=5).json()["paths"]
        operations = [(verb, path) for path, item in paths.items() for verb in item if verb in VERBS]
        assert operations
        for verb, path in operations:
            expect(visit.operation(verb, path)).to_be_visible()
        expect(visit.page.locator(".opblock")).to_have_count(len(operations))

    def test_operation_can_be_tried_without_a_violation_of_the_policy(self, stack: Stack, visit: Visit) -> None:
        users = visit.operation("get", "/users")
        expect(users).to_be_visible()
        is_open = visit.page.locator(".opblock.is-open")
        # One at a time: Swagger UI renders every open operation again after each click, a second of CPU for each.
        for control in visit.page.locator(".opblock-summary-control").all():
            for count in (1, 0):
                control.evaluate("control => control.click()")
                expect(is_open).to_have_count(count, timeout=30_000)
        users.locator(".opblock-summary-control").click()
        users.get_by_role("button", name="Try it out").click()
        with visit.page.expect_response(lambda response: urlsplit(response.url).path == "/users") as response_info:
            users.get_by_role("button", name="Execute").click()
        assert response_info.value.status == 200
        live = users.locator(".live-responses-table .response")
        expect(live.locator(".response-col_status")).to_contain_text("200")
        expect(live.locator(".highlight-code code").first).to_contain_text("email")
        visit.page.wait_for_load_state("networkidle")
        assert visit.complaints == []
        hosts = {urlsplit(url).netloc for url in visit.requested if urlsplit(url).scheme != "data"}
        assert hosts == {urlsplit(stack.edge).netloc}


class TestHeaders:
    def test_page_allows_only_its_own_files(self, stack: Stack) -> None:
        response = requests.get(f"{stack.edge}/docs", timeout=5)
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "private, no-cache"
        assert "<style" not in response.text
        assert all("src=" in tag for tag in re.findall("<script[^>]*>", response.text))

    def test_files_of_the_page_are_cached_for_ever(self, stack: Stack) -> None:
        kinds = []
        for path in assets(stack):
            response = requests.get(stack.edge + path, timeout=5)
            assert response.status_code == 200
            assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            compresses = len(response.content) >= 2048 and response.headers["Content-Type"] != "image/png"
            assert (response.headers.get("Content-Encoding") == "gzip") == compresses
            kinds.append(response.headers["Content-Type"].partition(";")[0])
        assert sorted(kinds) == ["image/png", "text/css", "text/javascript", "text/javascript"]

    def test_files_have_the_same_names_in_all_apps(self, stack: Stack) -> None:
        assert len({requests.get(f"{app}/docs", timeout=5).text for app in stack.apps}) == 1

    def test_head_has_the_headers_of_get(self, stack: Stack) -> None:
        for path in ["/docs", *assets(stack)]:
            # A HEAD has the headers of the response without compression.
            plain = {"Accept-Encoding": "identity"}
            responses = [
                requests.request(verb, stack.edge + path, headers=plain, timeout=5) for verb in ("HEAD", "GET")
            ]
            for name in ("Content-Type", "Content-Length", "Cache-Control", "Content-Security-Policy"):
                assert responses[0].headers[name] == responses[1].headers[name]
            assert responses[0].content == b""


class TestRefusals:
    @pytest.mark.parametrize(
        "path",
        [
            "/docs/",
            "/docs/index.html",
            "/docs/swagger-ui.css",
            "/docs/docs.py",
            "/docs/VERSION",
            "/docs/..%2Fdocs.py",
            "/docs/oauth2-redirect.html",
        ],
    )
    def test_other_file_names_are_not_found(self, stack: Stack, path: str) -> None:
        check_problem(requests.get(stack.edge + path, timeout=5), 404)

    def test_query_parameters_are_refused(self, stack: Stack) -> None:
        check_problem(requests.get(f"{stack.edge}/docs?url=https://example.com/other.json", timeout=5), 400)
        check_problem(requests.get(f"{stack.edge}{assets(stack)[0]}?v=1", timeout=5), 400)

    def test_post_is_refused(self, stack: Stack) -> None:
        check_problem(requests.post(f"{stack.edge}/docs", timeout=5), 405)
