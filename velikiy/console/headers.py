"""Headers of the pages for people and of their files."""

from io import BytesIO
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


def of_file(first: Path, *more: Path) -> Response:
    """Return a file under a name that changes with its content, so that browsers may cache it for ever.

    Args:
        first: The file.
        more: Files of the same type that are joined to it.
    """
    parts = (first, *more)
    content = BytesIO(b"\n".join(part.read_bytes() for part in parts)) if more else first
    response = send_file(content, mimetype=MEDIA_TYPES[first.suffix])
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return response


def add_security_headers(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
