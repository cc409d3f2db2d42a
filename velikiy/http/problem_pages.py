"""Pages for people below /problems/: the meaning of each kind of problem, and what to do about it."""

from html import escape
from pathlib import Path

from flask import Blueprint, Flask, Response, g

from velikiy.http import pages
from velikiy.http.problems import DETAILS
from velikiy.resources.problems import KINDS, Problem

STYLE = (Path(__file__).parent / "page.css").read_bytes()

routes = Blueprint("problems", __name__, url_prefix="/problems")


def install(app: Flask) -> None:
    app.register_blueprint(routes)


@routes.get("/", strict_slashes=False)
def list_problems() -> Response:
    items = "".join(
        f'<li><a href="{g.path_prefix}/problems/{name}">{kind.status} {escape(kind.title)}</a>:'
        f" {escape(kind.advice)}</li>"
        for name, kind in KINDS.items()
    )
    introduction = "<p>The <code>type</code> of an error links to one of these pages.</p>"
    return pages.page("Problems", f"{introduction}<ul>{items}</ul>")


@routes.get("/page.css")
def style() -> Response:
    """The look of these pages, and of a problem that a browser shows."""
    return Response(STYLE, content_type="text/css; charset=utf-8")


@routes.get("/<name>")
def show_problem(name: str) -> Response:
    if name not in KINDS:
        raise Problem("not-found", DETAILS[404])
    kind = KINDS[name]
    return pages.page(
        f"{kind.status} {kind.title}",
        f"<p>{escape(kind.advice)}</p><p><code>{g.path_prefix}/problems/{name}</code></p>"
        f'<p><a href="{g.path_prefix}/problems/">All problems</a>, <a href="{g.path_prefix}/docs">the API</a></p>',
    )
