"""Pages for people: documents without scripts, and problems as a browser shows them."""

import re
from html import escape

from flask import Response, g, request
from werkzeug.exceptions import NotFound

from velikiy.resources.problems import KINDS, Problem

POLICY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
}

MEDIA_TYPE = "text/html; charset=utf-8"

NAVIGATION = r"text/html,[ ]?application/xhtml\+xml[ ]*[,;]"
"""The beginning of Accept in the navigations of every browser: a person has opened the address. Programs that accept
HTML, as Java's own client does, get JSON."""


def is_navigation() -> bool:
    """Return whether a browser has sent this request for a person who wants to see a page."""
    return request.method in ("GET", "HEAD") and bool(re.match(NAVIGATION, request.headers.get("Accept", "")))


def moved_to(address: str) -> Response:
    """Redirect a browser from an address that people try to the one that exists. Answer programs with 404.

    Args:
        address: A relative address, because a proxy may add a prefix that the app does not know.
    """
    if not is_navigation():
        raise NotFound
    return Response(status=302, headers={"Location": address, "Vary": "Accept"})


def page(title: str, body: str) -> Response:
    """Return a page. `body`: HTML."""
    return Response(document(escape(title), body, g.path_prefix), headers=POLICY, content_type=MEDIA_TYPE)


def problem_page(problem: Problem) -> Response:
    """Return the problem as a page."""
    title = f"{problem.status} {KINDS[problem.kind].title}"
    html = problem_document(title, escape(problem.detail), g.path_prefix, escape(g.request_id))
    headers = {**POLICY, **problem.headers, "Vary": "Accept"}
    return Response(html, problem.status, headers, content_type=MEDIA_TYPE)


def document(title: str, body: str, prefix: str) -> str:
    """Return a document of HTML. Each argument is HTML, or a variable of Nginx (velikiy/http/edge_config.py)."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="{prefix}/favicon.ico"><link rel="stylesheet" href="{prefix}/problems/page.css">'
        f"<main><h1>{title}</h1>{body}</main></html>"
    )


def problem_document(title: str, detail: str, prefix: str, request_id: str) -> str:
    """Return a problem as a document, from the same arguments as `document`."""
    body = (
        f'<p>{detail}</p><p><a href="">Load the page again</a>, <a href="{prefix}/">the console</a>,'
        f' <a href="{prefix}/docs">the API</a></p><p><small>Request <code>{request_id}</code></small></p>'
    )
    return document(title, body, prefix)
