"""Requests of the service to itself, as an edge, a writer or a stranger sends them."""

from urllib.parse import urlencode, urlsplit

import requests

from testkit.stack import EDGE_SECRET
from velikiy.signatures import HEADER, Signer

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def signed_post(base: str, target: str, form: dict[str, str], secret: str = EDGE_SECRET) -> requests.Response:
    """Send a form to an app, signed with this secret."""
    body = urlencode(form)
    signed, _ = Signer(secret).sign_request("POST", target, body=body)
    return requests.post(f"{base}{target}", data=body, headers={**FORM, HEADER: signed}, timeout=5)


def control_listener(edge: str) -> str:
    """Return the address of the control listener of an edge of `testkit.failpoints.running_edge`."""
    return f"http://127.0.0.1:{(urlsplit(edge).port or 0) + 1}"
