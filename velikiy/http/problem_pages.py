"""Pages for people below /problems/: the meaning of each kind of problem, and what to do about it."""

from html import escape

from flask import Blueprint, Flask, Response, g

from velikiy.http.problems import DETAILS
from velikiy.resources.problems import KINDS, Problem

POLICY = {"Content-Security-Policy": "default-src 'none'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"}

pages = Blueprint("problems", __name__, url_prefix="/problems")


def install(app: Flask) -> None:
    app.register_blueprint(pages)


@pages.get("/", strict_slashes=False)
def list_problems() -> Response:
    items = "".join(
        f'<li><a href="{g.path_prefix}/problems/{name}">{kind.status} {escape(kind.title)}</a>:'
        f" {escape(kind.advice)}</li>"
        for name, kind in KINDS.items()
    )
    introduction = "<p>The <code>type</code> of an error links to one of these pages.</p>"
    return _page("Problems", f"{introduction}<ul>{items}</ul>")


@pages.get("/<name>")
def show_problem(name: str) -> Response:
    if name not in KINDS:
        raise Problem("not-found", DETAILS[404])
    kind = KINDS[name]
    return _page(
        f"{kind.status} {kind.title}",
        f"<p>{escape(kind.advice)}</p><p><code>{g.path_prefix}/problems/{name}</code></p>"
        f'<p><a href="{g.path_prefix}/problems/">All problems</a>, <a href="{g.path_prefix}/docs">the API</a></p>',
    )


def _page(title: str, body: str) -> Response:
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="{g.path_prefix}/favicon.ico"><h1>{escape(title)}</h1>{body}</html>'
    )
    return Response(html, headers=POLICY, content_type="text/html; charset=utf-8")
