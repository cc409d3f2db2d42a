"""A real browser, and a web page of another origin."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or ""


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
