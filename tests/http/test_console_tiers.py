"""The console shows each cache tier's entry for a path, and purges the path."""

from typing import Any

import pytest
import requests

from testkit.api import User, check_problem, is_hit
from testkit.stack import Stack, wait_until


def tiers(stack: Stack, path: str) -> dict[str, dict[str, Any]]:
    response = requests.get(f"{stack.edge}/console/tiers", params={"path": path}, timeout=5)
    assert response.status_code == 200, response.text
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json()["path"] == path
    return {tier["tier"].split()[0]: tier for tier in response.json()["tiers"]}


def purge(stack: Stack, path: str, **more: str) -> requests.Response:
    return requests.post(f"{stack.edge}/console/purge", json={"path": path, **more}, timeout=10)


def warm(stack: Stack, path: str) -> None:
    for edge in stack.edges:
        wait_until(lambda edge=edge: is_hit(edge + path))  # type: ignore[misc]


def test_tiers_show_the_entries_of_a_path_until_it_is_purged(stack: Stack, new_user: User) -> None:
    path = f"/users/{new_user['id']}"
    warm(stack, path)
    shown = tiers(stack, path)
    assert shown["postgres"] == {"tier": "postgres", "writer_in_flight": False}
    assert list(shown["redis"]["entries"]) == [""]
    assert shown["edge"]["bytes"] > 0
    assert shown["edge"]["lease"] > 0
    response = purge(stack, path)
    assert (response.status_code, response.json()["message"], response.json()["silent"]) == (200, "Purged", [])
    shown = tiers(stack, path)
    assert shown["redis"]["entries"] == {}
    assert shown["edge"]["bytes"] is None


def test_purge_of_nginx_alone_leaves_the_entry_in_redis(stack: Stack, new_user: User) -> None:
    path = f"/users/{new_user['id']}"
    warm(stack, path)
    assert purge(stack, path, tier="nginx").status_code == 200
    shown = tiers(stack, path)
    assert shown["edge"]["bytes"] is None
    assert list(shown["redis"]["entries"]) == [""]
    assert requests.get(stack.edge + path, timeout=5).headers["Cache-Status"].startswith("redis; hit")


@pytest.mark.parametrize("path", ["", "/health", "/users/07", "/users/1/2", "users/1", "/nothing/1"])
def test_tiers_and_purges_refuse_addresses_that_are_not_cached(stack: Stack, path: str) -> None:
    check_problem(requests.get(f"{stack.edge}/console/tiers", params={"path": path}, timeout=5), 400, "path")
    check_problem(purge(stack, path), 400, "path")


def test_purge_follows_the_rules_for_writes_of_web_pages(stack: Stack, new_user: User) -> None:
    address, body = f"{stack.edge}/console/purge", f'{{"path":"/users/{new_user["id"]}"}}'
    check_problem(requests.post(address, data=body, headers={"Content-Type": "text/plain"}, timeout=5), 415)
    foreign = {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}
    check_problem(requests.post(address, data=body, headers=foreign, timeout=5), 403)
    check_problem(requests.get(address, timeout=5), 405)
