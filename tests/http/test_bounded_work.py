"""Validation of one request stops at a bounded number of errors and of slow checks."""

from typing import Any

import pytest
import requests

from testkit.stack import Stack
from velikiy.resources.validation import MAX_ERRORS
from velikiy.resources.work_limit import MAX_SLOW_CHECKS, MAX_UNKNOWN_MEMBERS

MANY = 150_000
UNKNOWN = {f"x{n}": 1 for n in range(MANY)}
"""Members that no body has."""


def refused(url: str, body: Any) -> dict[str, Any]:
    response = requests.post(url, json=body, timeout=20)
    assert response.status_code == 422, response.text[:500]
    assert len(response.content) < 400_000
    problem: dict[str, Any] = response.json()
    return problem


@pytest.mark.parametrize(
    "body",
    [
        UNKNOWN,
        {"operations": [{"op": "create", **UNKNOWN}]},
        {"operations": [{"op": "create", **{f"x{n}": 1 for n in range(MANY // 1000)}} for _ in range(1000)]},
    ],
    ids=["in the body", "in one operation", "in every operation"],
)
def test_many_unknown_members_are_counted_and_a_few_are_listed(stack: Stack, body: dict[str, Any]) -> None:
    problem = refused(f"{stack.edge}/users/batch", body)
    unknown = [error for error in problem["errors"] if error["detail"] == "is not a known field"]
    assert len(unknown) == MAX_UNKNOWN_MEMBERS
    assert len(problem["errors"]) <= MAX_ERRORS
    assert "more are not listed" in problem["detail"]


def test_every_error_is_listed_or_counted(stack: Stack) -> None:
    members = {f"x{n}": 1 for n in range(MAX_UNKNOWN_MEMBERS + 7)}
    problem = refused(f"{stack.edge}/users", {"name": "", "email": "nobody", **members})
    assert [error["field"] for error in problem["errors"][:3]] == ["name", "email", "x0"]
    assert len(problem["errors"]) == MAX_UNKNOWN_MEMBERS + 2
    assert problem["detail"].endswith(
        f"`errors` lists the first {MAX_UNKNOWN_MEMBERS + 2} errors, and 7 more are not listed"
    )


def test_refusal_with_few_errors_counts_none(stack: Stack) -> None:
    assert "listed" not in refused(f"{stack.edge}/users", {"name": "A", "email": "a@example.com", "x": 1})["detail"]


def test_update_with_many_unknown_members_is_refused(stack: Stack) -> None:
    body = {f"x{n}": 1 for n in range(5000)}
    response = requests.put(f"{stack.edge}/users/1", json=body, timeout=20)
    assert response.status_code == 422
    assert len(response.json()["errors"]) == MAX_UNKNOWN_MEMBERS


def international(number: int) -> dict[str, Any]:
    users = [{"op": "create", "name": "П", "email": f"почта{n}@ящик{n}.рф"} for n in range(number)]
    return {"operations": users}


def test_slow_checks_of_a_batch_are_limited(stack: Stack) -> None:
    problem = refused(f"{stack.edge}/users/batch", international(1000))
    assert len(problem["errors"]) == 1000 - MAX_SLOW_CHECKS
    assert "was not checked" in problem["errors"][0]["detail"]


def test_batch_with_as_many_slow_checks_as_allowed_is_carried_out(stack: Stack) -> None:
    done = requests.post(f"{stack.edge}/users/batch", json=international(MAX_SLOW_CHECKS), timeout=20)
    assert done.status_code == 200, done.text
    deletes = [{"op": "delete", "id": result["id"]} for result in done.json()["results"]]
    assert requests.post(f"{stack.edge}/users/batch", json={"operations": deletes}, timeout=20).status_code == 200
