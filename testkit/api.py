"""Helpers for tests that send requests to the API with the library requests."""

import time
from collections.abc import Callable

import requests

User = dict[str, str]
"""A user that a fixture created: `id`, `name`, `email`, `url`."""


def check_problem(response: requests.Response, status: int, field: str | None = None) -> str:
    """Check that the response is a problem with this status, about this field; return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    if field:
        assert field in [error["field"] for error in body["errors"]]
    assert body["detail"]
    return str(body["detail"])


def timed(request: Callable[[], requests.Response]) -> tuple[float, requests.Response]:
    """Return the seconds that the request takes, and its response."""
    began = time.monotonic()
    response = request()
    return time.monotonic() - began, response


def is_hit(url: str) -> bool:
    """Return whether the edge serves this address from its memory."""
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"
