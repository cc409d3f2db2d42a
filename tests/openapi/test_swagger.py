"""The page at /docs in a real browser, through an edge: it works under its own policy and loads nothing from elsewhere."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Locator, Page, expect

from testkit.api import check_problem
from testkit.browser import serious_findings
from testkit.stack import Stack, run, running

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


def opened_operations(page: Page) -> Iterator[str]:
    """Open one operation after another, ready to be tried out, and yield its name."""
    controls = page.locator(".opblock-summary-control")
    expect(controls.first).to_be_visible()
    for number in range(controls.count()):
        controls.nth(number).evaluate("control => control.click()")
        expect(page.locator(".opblock.is-open")).to_have_count(1, timeout=30_000)
        page.get_by_role("button", name="Try it out").click()
        expect(page.get_by_role("button", name="Execute")).to_be_visible()
        yield controls.nth(number).inner_text()
        controls.nth(number).evaluate("control => control.click()")
        expect(page.locator(".opblock.is-open")).to_have_count(0)


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

    def test_page_lists_no_methods_that_every_address_supports(self, visit: Visit) -> None:
        expect(visit.operation("get", "/users")).to_be_visible()
        expect(visit.page.locator(".opblock-head, .opblock-options")).to_have_count(0)
        expect(visit.page.locator(".info")).to_contain_text("Every address also supports HEAD")

    def test_page_follows_the_colours_of_the_system(self, visit: Visit) -> None:
        expect(visit.operation("get", "/users")).to_be_visible()
        schemes: tuple[Literal["dark", "light"], ...] = ("dark", "light", "dark")
        for scheme in schemes:
            is_dark = scheme == "dark"
            visit.page.emulate_media(color_scheme=scheme)
            for place in ("body", ".info .title", ".opblock-summary-path"):
                expect(visit.page.locator("html")).to_have_class(re.compile("dark-mode") if is_dark else "")
                ground, text = visit.page.evaluate(LUMINANCES, place)
                assert (ground < text) == is_dark, (scheme, place)
                assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 4.5, (scheme, place)
        assert visit.complaints == []

    def test_page_is_accessible(self, visit: Visit) -> None:
        users = visit.operation("get", "/users")
        users.locator(".opblock-summary-control").click()
        users.get_by_role("button", name="Try it out").click()
        expect(users.get_by_role("combobox", name="sort")).to_be_visible()
        schemes: tuple[Literal["dark", "light"], ...] = ("dark", "light")
        for scheme in schemes:
            visit.page.emulate_media(color_scheme=scheme)
            expect(visit.page.locator("html")).to_have_class(re.compile("dark-mode") if scheme == "dark" else "")
            assert serious_findings(visit.page) == [], scheme
        assert visit.complaints == []

    @pytest.mark.long
    @pytest.mark.parametrize("scheme", ["dark", "light"])
    @pytest.mark.parametrize("width", [1200, 360])
    def test_each_operation_is_accessible(self, visit: Visit, scheme: Literal["dark", "light"], width: int) -> None:
        visit.page.emulate_media(color_scheme=scheme)
        visit.page.set_viewport_size({"width": width, "height": 800})
        for name in opened_operations(visit.page):
            assert serious_findings(visit.page) == [], name

    @pytest.mark.long
    def test_page_fits_a_phone(self, visit: Visit) -> None:
        visit.page.set_viewport_size({"width": 360, "height": 740})
        for name in opened_operations(visit.page):
            assert visit.page.evaluate(TOO_WIDE) == [], name


LUMINANCES = """place => {
    const luminance = colour => {
        const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(part => {
            const share = Number(part) / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    let ground = document.querySelector(place);
    while (ground && /^rgba\\(.*, 0(\\.\\d+)?\\)$/.test(getComputedStyle(ground).backgroundColor)) {
        ground = ground.parentElement;
    }
    const behind = ground ? getComputedStyle(ground).backgroundColor : "rgb(255, 255, 255)";
    return [luminance(behind), luminance(getComputedStyle(document.querySelector(place)).color)];
}"""
"""The luminance (WCAG) of the ground of an element, and that of its text."""

TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll("body *")].filter(each => each.getBoundingClientRect().right > innerWidth + 1)
        .map(each => each.tagName + "." + each.className).slice(0, 20)
"""


@pytest.fixture(scope="module")
def new_stack() -> Iterator[Stack]:
    """A stack with a new database, on which every request needs a key."""
    with running("--apps", "1", AUTH="all") as stack:
        yield stack


@pytest.mark.long
def test_each_example_works_on_a_new_database_with_a_key_and_no_condition(
    new_stack: Stack, browser: Callable[..., Browser]
) -> None:
    created = run("velikiy", "--data", str(new_stack.data), "keys", "create", "docs-reader", "--scope", "write")
    assert created.returncode == 0, created.stderr
    key = created.stdout.strip()
    paths = requests.get(f"{new_stack.edge}/openapi.json", timeout=5).json()["paths"]
    operations = [(verb, path) for path, item in paths.items() for verb in item]
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        visit = Visit(page)
        page.goto(f"{new_stack.edge}/docs")
        page.get_by_role("button", name="Authorize").click()
        page.get_by_label("auth-bearer-value").fill(key)
        page.get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").click()
        for verb, path in operations:
            operation = visit.operation(verb, path)
            operation.locator(".opblock-summary-control").click()
            operation.get_by_role("button", name="Try it out").click()
            filled = {
                row.get_attribute("data-param-name"): row.locator("input, select").first.input_value()
                for row in operation.locator("tr[data-param-name]").all()
            }
            filled = {name: value for name, value in filled.items() if value not in ("", "--")}
            assert filled.keys() <= {"id", "limit", "sort"}, (verb, path, filled)
            address = re.compile(re.escape(new_stack.edge) + path.replace("{id}", r"\d+") + r"(\?.*)?$")
            with page.expect_response(address) as received:
                operation.get_by_role("button", name="Execute").click()
            request = received.value.request
            assert received.value.ok, (verb, path, received.value.status, received.value.text())
            assert request.all_headers().get("authorization") == f"Bearer {key}", (verb, path, request.url)
            assert not {"if-match", "if-none-match", "idempotency-key"} & set(request.headers)
            operation.locator(".opblock-summary-control").click()
            expect(page.locator(".opblock.is-open")).to_have_count(0)


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
            assert (response.headers.get("Content-Encoding") == "gzip") == (len(response.content) >= 2048)
            kinds.append(response.headers["Content-Type"].partition(";")[0])
        assert sorted(kinds) == ["text/css", "text/css", *["text/javascript"] * 3]

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
