"""A real browser, and a web page of another origin."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Playwright, Route

CHROMIUM = shutil.which("chromium") or ""

AXE = Path(str(distribution("axe-playwright-python").locate_file("axe_playwright_python/axe.min.js")))
"""axe-core. The package's own functions would import Playwright's asynchronous half as well."""


def launch(playwright: Playwright, *more: str) -> Browser:
    """Start the browser with further arguments. Its sandbox does not start as root."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *more])


class OtherOrigin(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another origin</title>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def open_page(browser: Browser, address: str) -> Iterator[Page]:
    with browser:
        page = browser.new_page()
        page.goto(address)
        yield page


@dataclass
class Visit:
    """An open page, with the complaints of the browser and the addresses that it requested."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(url).netloc for url in self.requested if urlsplit(url).scheme not in ("data", "blob")}


def watch(page: Page) -> Visit:
    """Note what the browser complains about: errors, failed requests, and violations of the policy."""
    visit = Visit(page)
    page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("request", lambda request: visit.requested.append(request.url))
    # The browser reports a violation that only blocks a style as an event, not as an error.
    page.expose_function("violated", lambda text: visit.complaints.append(text))  # playwright needs a Python function
    page.add_init_script(
        "addEventListener('securitypolicyviolation', e => violated(`${e.violatedDirective} ${e.blockedURI}`))"
    )
    return visit


def lose_responses(page: Page, address: str, method: str) -> None:
    """Let requests with this method reach the service, and lose their responses."""

    def lose(route: Route) -> None:
        if route.request.method == method:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route(address, lose)


def serious_findings(page: Page) -> list[str]:
    """Return what axe finds on the page that is serious or critical, each as `rule: elements`."""
    # Colours on their way to others have less contrast.
    page.evaluate("() => document.getAnimations().filter(it => it instanceof CSSTransition).forEach(it => it.finish())")
    # Evaluated by the browser's own tools, which the policy of the page does not concern.
    page.evaluate(AXE.read_text())
    result = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{finding['id']}: {'; '.join(node['html'][:200] for node in finding['nodes'][:3])}"
        for finding in result["violations"]
        if finding["impact"] in ("serious", "critical")
    ]
