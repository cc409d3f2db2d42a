"""Read the values that the edge passes on about the client and the proxies in front of it (edge/conf/proxies.conf)."""

import re

from flask import g, request

from velikiy.settings import PATH_PREFIX

CLIENT_REQUEST_ID = "[A-Za-z0-9._:=+/-]{1,128}"
"""The X-Request-Id of a client, as far as it is logged. It cannot be an e-mail address."""

TRACEPARENT = "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
"""W3C Trace Context. Later versions may append more, which is not logged."""


LOGGED_IDS = (
    ("client_request_id", "HTTP_CLIENT_REQUEST_ID", re.compile(f"({CLIENT_REQUEST_ID})")),
    ("traceparent", "HTTP_TRACEPARENT", re.compile(f"({TRACEPARENT})(?:-.*)?")),
)
"""Members of a log line, each with its header and the form of that. The group is logged, and another value as "?"."""


def path_prefix() -> str:
    """Return the path before the service's own addresses, as the client sees them: "", or "/api"."""
    prefix: str = request.environ.get("HTTP_PATH_PREFIX", "")
    return prefix if prefix and re.fullmatch(PATH_PREFIX, prefix) else ""


def client_ids() -> dict[str, str]:
    """Return the client's own ids of the request, for the log."""
    ids, environ = {}, request.environ
    for name, header, form in LOGGED_IDS:
        if value := environ.get(header):
            match = form.fullmatch(value)
            ids[name] = match[1] if match else "?"
    return ids


def prefixed_problem(body: bytes) -> bytes:
    """Return a stored problem with the path prefix of this request in its `type`. No stored body contains a prefix."""
    return body.replace(b'{"type":"/', b'{"type":"%b/' % g.path_prefix.encode(), 1)


def prefixed_links(link: str) -> str:
    """Return a Link header with the path prefix of this request in its addresses."""
    return link.replace("</", f"<{g.path_prefix}/")
