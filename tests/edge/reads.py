"""Reads and writes of one user through an edge, for the tests of races and of Redis."""

import requests

from testkit.failpoints import FailpointApp


def edges(app: FailpointApp) -> list[str]:
    """Return the edge in front of the stepped app and the edges of the stack."""
    return [app.edge, *app.stack.edges]


def get(edge: str, user: int) -> requests.Response:
    return requests.get(f"{edge}/users/{user}", timeout=10)


def name(edge: str, user: int) -> str | None:
    """Return the name of the user, or None for a 404. A read with the STALE mark fails the test."""
    response = get(edge, user)
    assert response.status_code in (200, 404), response.text
    assert response.headers["X-Cache-Status"] != "STALE"
    return str(response.json()["name"]) if response.status_code == 200 else None


def listed(edge: str, user: int) -> str | None:
    """Return the name of the user in the list, or None."""
    response = requests.get(f"{edge}/users", timeout=10)
    assert response.status_code == 200
    assert response.headers["X-Cache-Status"] != "STALE"
    return next((row["name"] for row in response.json() if row["id"] == user), None)


def put(app: FailpointApp, user: int, new: str) -> None:
    """Change the name through another process: the stack's own app."""
    assert requests.put(f"{app.stack.edge}/users/{user}", json={"name": new}, timeout=10).status_code == 200
