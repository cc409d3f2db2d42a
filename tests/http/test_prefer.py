"""A write returns the row to a client that prefers it (RFC 7240), and without the header nothing changes."""

import uuid

import pytest
import requests

from testkit.stack import Stack
from velikiy.http.browsers import EXPOSED_HEADERS

REPRESENTATION = {"Prefer": "return=representation"}
APPLIED = "return=representation"


@pytest.fixture
def user(stack: Stack, email: str) -> int:
    return int(requests.post(f"{stack.app}/users", json={"name": "Row", "email": email}, timeout=5).json()["id"])


def check_row(response: requests.Response, base_url: str, status: int) -> None:
    """Check that the response has the row, and the headers that it has without the preference."""
    assert response.status_code == status, response.text
    assert response.headers["Preference-Applied"] == APPLIED
    read = requests.get(f"{base_url}/users/{response.json()['id']}", timeout=5)
    assert response.content == read.content
    assert response.headers["ETag"] == read.headers["ETag"]


def test_post_put_and_patch_return_the_row(base_url: str, email: str) -> None:
    body = {"name": 'Zoë 🙂 \\\\ " /', "email": email}
    created = requests.post(f"{base_url}/users", json=body, headers=REPRESENTATION, timeout=5)
    check_row(created, base_url, 201)
    url = base_url + created.headers["Location"]
    check_row(requests.put(url, json={"name": "Put"}, headers=REPRESENTATION, timeout=5), base_url, 200)
    check_row(requests.patch(url, json={"name": "Patched"}, headers=REPRESENTATION, timeout=5), base_url, 200)
    deleted = requests.delete(url, headers=REPRESENTATION, timeout=5)
    assert (deleted.json(), "Preference-Applied" in deleted.headers) == ({"message": "Deleted"}, False)
    again = {**REPRESENTATION, "If-None-Match": "*"}
    check_row(requests.put(url, json=body, headers=again, timeout=5), base_url, 201)


@pytest.mark.parametrize(
    ("preference", "applied"),
    [
        ("RETURN = representation", APPLIED),
        ('return="representation"', APPLIED),
        ("respond-async, wait=10, return=representation; x=1", APPLIED),
        ("return=minimal, return=representation", "return=minimal"),
        ("return=minimal", "return=minimal"),
        ("return=everything", None),
        ("representation", None),
        ('foo="a, return=representation"', None),
        ("xreturn=representation", None),
        ("Ünlesbar", None),
    ],
)
def test_preference_is_read_as_rfc_7240_says(base_url: str, user: int, preference: str, applied: str | None) -> None:
    response = requests.patch(
        f"{base_url}/users/{user}", json={"name": "New"}, headers={"Prefer": preference.encode()}, timeout=5
    )
    assert response.headers.get("Preference-Applied") == applied
    assert ("version" in response.json()) == (applied == APPLIED)


def test_response_without_the_header_is_as_before(base_url: str, user: int) -> None:
    response = requests.put(f"{base_url}/users/{user}", json={"name": "New"}, timeout=5)
    assert response.json() == {"message": "Updated"}
    assert "Preference-Applied" not in response.headers


def test_batch_returns_the_rows_in_its_results(base_url: str, user: int, email: str) -> None:
    operations = [
        {"op": "update", "id": user, "name": "New"},
        {"op": "create", "name": "Row", "email": f"{email}.org"},
        {"op": "delete", "id": user},
    ]
    response = requests.post(
        f"{base_url}/users/batch", json={"operations": operations}, headers=REPRESENTATION, timeout=5
    )
    updated, created, deleted = response.json()["results"]
    assert response.headers["Preference-Applied"] == APPLIED
    assert updated["row"]["name"] == "New"
    assert created["row"] == requests.get(f"{base_url}/users/{created['id']}", timeout=5).json()
    assert "row" not in deleted


def test_replay_of_an_idempotency_key_returns_the_row_of_the_first_response(base_url: str, email: str) -> None:
    headers = {**REPRESENTATION, "Idempotency-Key": str(uuid.uuid4())}
    first, second = (
        requests.post(f"{base_url}/users", json={"name": "Once", "email": email}, headers=headers, timeout=5)
        for _ in range(2)
    )
    check_row(first, base_url, 201)
    assert second.content == first.content
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.headers["Preference-Applied"] == APPLIED


def test_refused_write_returns_its_problem(base_url: str, user: int) -> None:
    response = requests.put(f"{base_url}/users/{user}", json={"name": ""}, headers=REPRESENTATION, timeout=5)
    assert response.status_code == 422
    assert "Preference-Applied" not in response.headers


def test_web_pages_of_allowed_origins_may_read_preference_applied() -> None:
    assert "Preference-Applied" in EXPOSED_HEADERS.split(", ")
