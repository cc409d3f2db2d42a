"""The console at `/`: a page that manages users over the API and shows what the cache tiers do.

The page has no data of its own. Its files are ES modules, without a build step. They are served below one folder whose
name is a digest of all of them, so that modules import each other by `./name.js` and browsers may cache them for ever.
"""

import hashlib
import re
from importlib.metadata import distribution
from pathlib import Path

from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import NotFound

from velikiy.console import headers
from velikiy.http import pages, requests, responses
from velikiy.http.auth import Auth
from velikiy.resources.base import registry
from velikiy.resources.problems import Problem

STATIC = Path(__file__).parent / "static"

PACKAGED = {
    "bootstrap.css": ("Bootstrap-Flask", "flask_bootstrap/static/bootstrap5/css/bootstrap.min.css"),
}
"""Files of packages: the package and the file in it, by the name that the page loads. The packages are not imported."""

JOINED = {
    "first.css": ("bootstrap.css", "console.css", "users.css"),
    "first.js": ("theme.js", "first_reads.js"),
}
"""Files that the page loads as one, because nothing is shown without all of them. A request costs more than a join."""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Velikiy Flask</title>
<link rel="icon" href="{files}/icon.svg" type="image/svg+xml">
<script src="{files}/first.js"></script>
<link rel="stylesheet" href="{files}/first.css">
{preloads}
<script type="module" src="{files}/console.js"></script>
<body><noscript>This page needs JavaScript. Without it, use <a href="{docs}">the API</a>.</noscript></body>
</html>
"""

PRELOADED = (
    *("api", "badge", "dom", "rights", "states", "texts"),
    *("user_table", "users", "texts/shell", "texts/users"),
)
"""The modules that the first rows need. Without these hints a browser learns of a module only from the one that imports
it, and each level of imports costs a round trip."""


def install(app: Flask, auth: Auth) -> None:
    """Add `GET /`, the files of the page, and `GET /console/key`."""
    app.register_blueprint(_routes(auth))


def _files() -> dict[str, tuple[Path, ...]]:
    """Return the parts of each file: one part, or the parts of a joined file."""
    own = {file.relative_to(STATIC).as_posix(): file for file in STATIC.rglob("*") if file.is_file()}
    packaged = {name: Path(str(distribution(package).locate_file(path))) for name, (package, path) in PACKAGED.items()}
    single = {**own, **packaged}
    joined = {name: tuple(single[part] for part in parts) for name, parts in JOINED.items()}
    return dict(sorted({**{name: (file,) for name, file in single.items()}, **joined}.items()))


def _digest(files: dict[str, tuple[Path, ...]]) -> str:
    digest = hashlib.sha256()
    for name, parts in files.items():
        content = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts)
        digest.update(b"%b %b " % (name.encode(), content))
    return digest.hexdigest()[:12]


def _routes(auth: Auth) -> Blueprint:
    routes = Blueprint("console", __name__)
    files = _files()
    digest = _digest(files)

    def page() -> Response:
        # Whatever the query is: links from mails and chats carry parameters of their own.
        #
        # Relative addresses, for a proxy that adds a prefix without saying so; an address without a slash at its end
        # would lead them astray, so a known prefix is written out.
        base = f"{g.path_prefix}/" if g.path_prefix else ""
        folder = f"{base}console/{digest}"
        preloads = "\n".join(f'<link rel="modulepreload" href="{folder}/{name}.js">' for name in PRELOADED)
        html = PAGE.format(files=folder, preloads=preloads, docs=f"{base}docs")
        return Response(html, content_type="text/html; charset=utf-8")

    def index() -> Response:
        requests.parameters()
        addresses = {
            **{name: f"{g.path_prefix}/{name}" for name in registry()},
            "documentation": f"{g.path_prefix}/docs",
            "openapi": f"{g.path_prefix}/openapi.json",
            "problems": f"{g.path_prefix}/problems/",
            "health": f"{g.path_prefix}/health",
        }
        return responses.json({"service": "Velikiy Flask", "addresses": addresses})

    @routes.get("/")
    def root() -> Response:
        accept = request.environ.get("HTTP_ACCEPT", "")
        # The first of equals: a program that accepts anything gets JSON, and browsers name text/html first.
        best = request.accept_mimetypes.best_match(["application/json", "text/html"])
        if best == "text/html":
            response = page()
        elif not accept or requests.takes_json(accept):
            response = index()
        else:
            detail = "Responses are JSON or HTML: allow application/json or text/html in the Accept header."
            raise Problem("not-acceptable", detail)
        response.headers.add("Vary", "Accept")
        return response

    @routes.get("/index.html")
    @routes.get("/console")
    def moved() -> Response:
        return pages.moved_to("./")

    @routes.get("/console/")
    def moved_up() -> Response:
        return pages.moved_to("../")

    @routes.get("/console/<version>/<path:name>")
    def file(version: str, name: str) -> Response:
        requests.parameters()
        if not re.fullmatch("[0-9a-f]{12}", version) or name not in files:
            raise NotFound
        response = headers.of_file(*files[name])
        if version != digest:
            # Another version of the page: one that was opened before an upgrade, or whose app is not replaced yet.
            response.headers["Cache-Control"] = "no-store"
        return response

    @routes.get("/console/key")
    def key() -> Response:
        requests.parameters()
        return responses.uncached(auth.describe())

    routes.after_request(headers.add_security_headers)
    return routes
