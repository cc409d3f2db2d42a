"""Reads and writes of one user through an edge, for the tests of races and of Redis."""

import requests

from testkit.failpoints import FailpointApp


def edges(app: FailpointApp) -> list[str]:
    return [app.edge, *app.stack.edges]


def get(edge: str, user: int) -> requests.Response:
    return requests.get(f"{edge}/users/{user}", timeout=10)


def name(edge: str, user: int) -> str | None:
    """None where there is no such user."""
    answer = get(edge, user)
    assert answer.status_code in (200, 404), answer.text
    assert answer.headers["X-Cache-Status"] != "STALE"
    return str(answer.json()["name"]) if answer.status_code == 200 else None


def listed(edge: str, user: int) -> str | None:
    answer = requests.get(f"{edge}/users", timeout=10)
    assert answer.status_code == 200
    assert answer.headers["X-Cache-Status"] != "STALE"
    return next((row["name"] for row in answer.json() if row["id"] == user), None)


def put(app: FailpointApp, user: int, new: str) -> None:
    """By another process: the stack's own app."""
    assert requests.put(f"{app.stack.edge}/users/{user}", json={"name": new}, timeout=10).status_code == 200
