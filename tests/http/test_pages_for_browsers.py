"""Addresses that a person opens in a browser: links with foreign parameters, mistyped addresses, and errors as pages."""

import re

import pytest
import requests

from testkit.api import check_problem
from testkit.stack import Stack

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"


def visit(stack: Stack, address: str, accept: str = CHROMIUM, *, follows: bool = True) -> requests.Response:
    return requests.get(f"{stack.edge}{address}", headers={"Accept": accept}, timeout=5, allow_redirects=follows)


def check_page(response: requests.Response, status: int, text: str) -> None:
    assert response.status_code == status
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Vary"] == "Accept"
    assert response.headers["Cache-Control"] == "private, no-cache"
    assert f"<h1>{status} " in response.text
    assert text in response.text
    assert 'href="/"' in response.text
    assert f"<code>{response.headers['X-Request-Id']}</code>" in response.text


@pytest.mark.parametrize("address", ["/?utm_source=x", "/?", "/?a=1&a=2", "/docs?fbclid=1", "/?q=%FF"])
def test_page_opens_whatever_the_query_of_a_link_is(stack: Stack, address: str) -> None:
    page = visit(stack, address)
    assert page.status_code == 200
    assert page.text.startswith("<!doctype html>")
    if "=" in address:
        check_problem(visit(stack, address, "*/*"), 400)


@pytest.mark.parametrize(
    ("tried", "right"), [("/index.html", "/"), ("/console", "/"), ("/console/", "/"), ("/docs/", "/docs")]
)
def test_address_that_people_try_leads_to_the_page(stack: Stack, tried: str, right: str) -> None:
    page = visit(stack, tried)
    assert page.url == f"{stack.edge}{right}"
    assert page.status_code == 200
    assert visit(stack, tried, follows=False).headers["Location"].startswith(".")
    check_problem(visit(stack, tried, "application/json"), 404)


@pytest.mark.parametrize("accept", [CHROMIUM, FIREFOX])
@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        ("/nothing", 404, "Nothing exists at this address."),
        ("/nothing.html", 404, "Nothing exists at this address."),
        ("/users/", 404, "Nothing exists at this address."),
        ("/Users", 404, "Nothing exists at this address."),
        ("/users/999999999", 404, "user 999999999"),
        ("/users/999999999/history", 404, "user 999999999"),
        ("/users?utm_source=x", 400, "utm_source: is not a parameter of /users"),
        ("/users?limit=0", 400, "limit: must be"),
        ("/problems/nothing", 404, "Nothing exists at this address."),
        ("/docs/nothing", 404, "Nothing exists at this address."),
        ("/.nothing", 404, "Nothing exists at this address."),
        (f"/{'x' * 5000}", 414, "The address is longer than 4 kB."),
        ("/users?q=<b>", 200, ""),
        ("/<b>", 404, "Nothing exists"),
    ],
)
def test_error_is_a_page_in_a_browser_and_a_problem_in_a_program(
    stack: Stack, accept: str, address: str, status: int, text: str
) -> None:
    for _ in range(2):  # the second time, an edge may have the answer
        if status == 200:
            assert visit(stack, address, accept).headers["Content-Type"] == "application/json"
            continue
        check_page(visit(stack, address, accept), status, text)
        for program in ("*/*", "application/json", JAVA):
            check_problem(visit(stack, address, program), status)


def test_page_about_an_error_repeats_nothing_of_its_address_as_html(stack: Stack) -> None:
    page = visit(stack, "/users?<script>=<b>")
    assert page.status_code == 400
    assert "<script>" not in page.text
    assert "<b>" not in page.text


def test_rows_are_json_also_in_a_browser_and_stay_in_the_cache(stack: Stack) -> None:
    for _ in range(3):
        response = visit(stack, "/users/1")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Cache-Status"] == "HIT"


def test_head_of_an_error_page_has_its_headers(stack: Stack) -> None:
    get, head = (
        requests.request(method, f"{stack.edge}/nothing", headers={"Accept": FIREFOX}, timeout=5)
        for method in ("GET", "HEAD")
    )
    assert head.status_code == get.status_code == 404
    assert head.content == b""
    for name in ("Content-Type", "Content-Security-Policy", "Cache-Control"):
        assert head.headers[name] == get.headers[name]


def test_write_of_a_browser_gets_a_problem(stack: Stack) -> None:
    check_problem(requests.post(f"{stack.edge}/nothing", json={}, headers={"Accept": CHROMIUM}, timeout=5), 404)


def test_pages_have_their_style(stack: Stack) -> None:
    [style] = re.findall('rel="stylesheet" href="([^"]+)"', visit(stack, "/nothing").text)
    response = visit(stack, style, "text/css,*/*;q=0.1")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/css; charset=utf-8"
