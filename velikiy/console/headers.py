"""Headers of the pages for people and of their files."""

from pathlib import Path

from flask import Response, send_file

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # icons inside style sheets
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png", ".svg": "image/svg+xml"}
"""Media types by suffix. The system's own table differs between machines; a wrong type breaks the page (`nosniff`)."""


def of_file(file: Path) -> Response:
    """Return a file under a name that changes with its content, so that browsers may cache it for ever."""
    response = send_file(file, mimetype=MEDIA_TYPES[file.suffix])
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return response


def add_security_headers(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
