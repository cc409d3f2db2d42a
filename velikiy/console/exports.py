"""The download of rows, for the console (docs/console.md).

A download is a navigation of the browser, which writes it to the disk as it comes and sends no Authorization. So the
page asks for an address first, with its key, and the browser downloads from this address. The address contains a ticket
with a time and a MAC, and no data. It counts for a minute.

The parameters `q` and `sort` choose the rows and their order. The ticket does not contain them, because it allows to
read all rows. The browser keeps the address of a navigation in its list of downloads, so the page fetches the rows of a
search by itself.
"""

import errno
import hmac
import re
import threading
import time
from collections.abc import Iterator, Mapping

import structlog
from flask import Blueprint, Flask, Response, g

from velikiy import logs
from velikiy.bulk import exporter
from velikiy.coherence import Gate
from velikiy.http import requests, responses
from velikiy.http.problems import DETAILS
from velikiy.postgres import DatabaseUnavailable
from velikiy.resources.base import Resource
from velikiy.resources.problems import RETRY_LATER, Problem

FORMATS = {
    "csv": ("csv", "text/csv; charset=utf-8"),
    "excel": ("csv", "text/csv; charset=utf-8"),
    "ndjson": ("ndjson", "application/x-ndjson"),
}
"""The format of the exporter, which is also the suffix of the file, and the media type."""

TICKET_S = 60

TICKET = re.compile("(csv|excel|ndjson)-([0-9]{1,12})-([0-9a-f]{64})")

GRACE_S = 15.0

MIN_BYTES_PER_S = 32 * 1024
"""The rate that a client must keep after GRACE_S. A thread of the app sends the rows as fast as the client takes them,
and a client that takes a byte a second would keep it for years."""

log = structlog.get_logger()


def install(app: Flask, resources: Mapping[str, Resource], gate: Gate, secret: str) -> None:
    """Add `GET /console/export?format=` and `GET /console/downloads/<ticket>/<file>?q=&sort=`.

    Args:
        secret: EDGE_SECRET, which all apps of a database share: any of them may get the download.
    """
    routes = Blueprint("console_export", __name__, url_prefix="/console")
    resource = resources["users"]
    one_at_a_time = threading.Semaphore()
    """Downloads take one thread of a process, so that other requests do not wait for them."""

    def mac(file_format: str, until: str) -> str:
        return hmac.digest(secret.encode(), f"export\n{file_format}\n{until}".encode(), "sha256").hex()

    @routes.get("/export")
    def ask() -> Response:
        file_format = requests.parameters("format").get("format", "csv")
        if file_format not in FORMATS:
            raise requests.bad("format", f"must be one of {', '.join(FORMATS)}")
        if key := g.get("api_key"):
            logs.audit(key_id=key.id, key=key.name, method="GET", route="/console/export", request_id=g.request_id)
        until = str(int(time.time()) + TICKET_S)
        ticket = f"{file_format}-{until}-{mac(file_format, until)}"
        address = f"/console/downloads/{ticket}/{resource.name}.{FORMATS[file_format][0]}"
        return responses.uncached({"address": address, "expires_in": TICKET_S})

    @routes.get("/downloads/<ticket>/<name>")
    def download(ticket: str, name: str) -> Response:
        page = requests.export(resource)
        read = TICKET.fullmatch(ticket)
        if not read or not hmac.compare_digest(read[3], mac(read[1], read[2])) or int(read[2]) < time.time():
            raise Problem("not-found", "This download has expired. Ask for it again.")
        suffix, media_type = FORMATS[read[1]]
        if name != f"{resource.name}.{suffix}":
            raise Problem("not-found", DETAILS[404])
        if not one_at_a_time.acquire(blocking=False):
            raise Problem("unavailable", "Another download is in progress. Try again later.", headers=RETRY_LATER)
        try:
            parts = exporter.parts(resource, gate, suffix, page, for_excel=read[1] == "excel")
            first = next(parts)  # an error of PostgreSQL is still a response of its own here
        except BaseException:
            one_at_a_time.release()
            raise
        response = Response(_paced(first, parts), content_type=media_type)
        response.call_on_close(one_at_a_time.release)
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        response.headers["Cache-Control"] = "no-store"
        return response

    app.register_blueprint(routes)


def _paced(first: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the parts, and end early if the client does not take them at MIN_BYTES_PER_S."""
    sent, waited = 0, 0.0
    content: bytes | None = first
    while content is not None:
        began = time.monotonic()
        yield content
        sent, waited = sent + len(content), waited + time.monotonic() - began
        if sent < (waited - GRACE_S) * MIN_BYTES_PER_S:
            log.info("export.too_slow", sent=sent, seconds=round(waited))
            raise _cut_off()
        try:
            content = next(parts, None)
        except DatabaseUnavailable:
            raise _cut_off() from None


def _cut_off() -> OSError:
    """Return the error with which gunicorn closes the connection. A complete end would look like a complete file."""
    return OSError(errno.EPIPE, "the download is cut off")
