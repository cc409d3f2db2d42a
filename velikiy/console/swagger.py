"""Swagger UI at /docs, which shows /openapi.json. Its files come from the package flask-swagger-ui."""

import hashlib
from importlib.resources import files
from pathlib import Path

from flask import Blueprint, Flask, Response
from werkzeug.exceptions import NotFound

from velikiy.console import headers
from velikiy.http import pages, requests

SWAGGER_UI = Path(str(files("flask_swagger_ui"))) / "dist"
"""The published files of Swagger UI. The page of the package is not used, because it has inline scripts."""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Velikiy Flask: the API</title>
<link rel="icon" href="favicon.ico">
<script src="{theme}"></script>
<link rel="stylesheet" href="{swagger_ui_style}">
<link rel="stylesheet" href="{style}">
<div id="page"><noscript>
This page needs JavaScript. Without it, read <a href="openapi.json">the OpenAPI document</a>.
</noscript></div>
<script src="{swagger_ui}"></script>
<script src="{start}"></script>
</html>
"""


def install(app: Flask) -> None:
    """Add `GET /docs` and the files that its page loads."""
    app.register_blueprint(_routes())


def _routes() -> Blueprint:
    routes = Blueprint("docs", __name__)
    assets: dict[str, Path] = {}

    def address(file: Path) -> str:
        # The name contains a digest of the content, so browsers may cache the file for ever: an upgrade has new names.
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        name = f"{file.stem}.{digest}{file.suffix}"
        assets[name] = file
        return f"docs/{name}"  # relative to the page

    page = PAGE.format(
        theme=address(Path(__file__).parent / "static/theme.js"),  # as in the console, also its choice
        swagger_ui_style=address(SWAGGER_UI / "swagger-ui.css"),
        style=address(Path(__file__).with_suffix(".css")),
        swagger_ui=address(SWAGGER_UI / "swagger-ui-bundle.js"),
        start=address(Path(__file__).with_suffix(".js")),
    )

    @routes.get("/docs")
    def show() -> Response:
        if not pages.is_navigation():  # links from mails and chats carry parameters of their own
            requests.parameters()
        return Response(page, content_type="text/html; charset=utf-8")

    @routes.get("/docs/")
    def without_slash() -> Response:
        return pages.moved_to("../docs")

    @routes.get("/docs/<name>")
    def asset(name: str) -> Response:
        requests.parameters()
        if name not in assets:
            raise NotFound
        return headers.of_file(assets[name])

    routes.after_request(headers.add_security_headers)
    return routes
