"""The HTTP contract of an app without an edge in front of it.

tests/edge tests the edge, and test_bad_input.py tests the responses to invalid input.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
import requests

from testkit.api import User, check_problem
from testkit.stack import Stack


class TestReading:
    def test_user_has_exactly_the_documented_fields(self, new_user: User) -> None:
        response = requests.get(new_user["url"], timeout=5)
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "application/json"
        user = response.json()
        assert list(user) == ["id", "name", "email", "created_at", "updated_at", "version"]
        assert (user["id"], user["name"], user["email"]) == (new_user["id"], new_user["name"], new_user["email"])
        assert user["version"] == 1
        for time in (user["created_at"], user["updated_at"]):
            assert datetime.fromisoformat(time).utcoffset() is not None

    def test_list_is_an_array_in_the_order_of_ids(self, stack: Stack, new_user: User) -> None:
        users = requests.get(f"{stack.app}/users", timeout=5).json()
        ids = [user["id"] for user in users]
        assert ids == sorted(ids)
        assert new_user["id"] in ids

    @pytest.mark.parametrize(
        "spelling",
        ["007", "%37", "٧", "+7", "7 ", "", "9" * 4000],
    )
    def test_id_in_any_other_spelling_is_404(self, stack: Stack, spelling: str) -> None:
        session = requests.Session()
        request = requests.Request("GET", f"{stack.app}/users/1").prepare()
        request.url = f"{stack.app}/users/{spelling}"  # set here, because the library would normalize it
        response = session.send(request, timeout=5)
        check_problem(response, 404)

    def test_largest_id_is_a_valid_id(self, stack: Stack) -> None:
        detail = check_problem(requests.get(f"{stack.app}/users/9223372036854775807", timeout=5), 404)
        assert "9223372036854775807" in detail

    def test_pages_of_a_long_list_contain_each_user_once(self, stack: Stack) -> None:
        stack.sql(
            "INSERT INTO users (name, email) SELECT 'Many', 'many' || n || '@example.com' FROM generate_series(1, 2100) n"
        )
        stack.redis().delete("all_users")
        try:
            expected = [row[0] for row in stack.sql("SELECT id FROM users ORDER BY id")]
            seen, sizes, page = [], [], "/users"
            while page:
                response = requests.get(stack.app + page, timeout=5)
                seen += [user["id"] for user in response.json()]
                sizes.append(len(response.json()))
                page = response.links.get("next", {}).get("url", "")
            assert seen == expected
            assert sizes[:2] == [1000, 1000]
            assert 0 < sizes[2] <= 1000
        finally:
            stack.sql("DELETE FROM users WHERE name = 'Many'")
            stack.redis().delete("all_users")


class TestCreating:
    def test_post_returns_the_id_and_the_location(self, stack: Stack) -> None:
        response = requests.post(f"{stack.app}/users", json={"name": "Zoë", "email": "zoe@example.com"}, timeout=5)
        assert response.status_code == 201
        user_id = response.json()["id"]
        assert response.json() == {"id": user_id, "message": "Created"}
        assert response.headers["Location"] == f"/users/{user_id}"
        deleted = requests.delete(f"{stack.app}/users/{user_id}", timeout=5)
        assert (deleted.status_code, deleted.json()) == (200, {"message": "Deleted"})

    def test_name_and_email_are_trimmed(self, stack: Stack) -> None:
        body = {"name": " \t Gleb\u00a0 ", "email": " gleb@example.com\n"}
        location = requests.post(f"{stack.app}/users", json=body, timeout=5).headers["Location"]
        user = requests.get(stack.app + location, timeout=5).json()
        requests.delete(stack.app + location, timeout=5)
        assert (user["name"], user["email"]) == ("Gleb", "gleb@example.com")

    @pytest.mark.parametrize(
        "name",
        ["<script>alert(1)</script>", "'; DROP TABLE users; --", 'quo"te\\back', "👩‍👩‍👧 семья", "x" * 100, "😀" * 100],
    )
    def test_text_is_returned_unchanged(self, stack: Stack, name: str) -> None:
        body = {"name": name, "email": "texts@example.com"}
        location = requests.post(f"{stack.app}/users", json=body, timeout=5).headers["Location"]
        user = requests.get(stack.app + location, timeout=5).json()
        requests.delete(stack.app + location, timeout=5)
        assert user["name"] == name

    @pytest.mark.parametrize(
        "email",
        ["a@b.co", "x" * 64 + "@example.com", "почта@пример.рф", "o'brien+tag@mail.example.com", "me@team.test"],
    )
    def test_valid_email_is_accepted(self, stack: Stack, email: str) -> None:
        response = requests.post(f"{stack.app}/users", json={"name": "E", "email": email}, timeout=5)
        assert response.status_code == 201, response.text
        requests.delete(stack.app + response.headers["Location"], timeout=5)

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({}, "name"),
            ({"name": "A"}, "email"),
            ({"name": "A", "email": "f@example.com", "admin": True}, "admin"),
            ([], "body"),
            ("text", "body"),
            (None, "body"),
        ],
    )
    def test_missing_or_unknown_field_is_422_and_named(self, stack: Stack, body: object, field: str) -> None:
        headers = {"Content-Type": "application/json"}
        check_problem(
            requests.post(f"{stack.app}/users", data=json.dumps(body), headers=headers, timeout=5), 422, field
        )

    def test_one_of_many_concurrent_posts_with_the_same_email_creates_a_user(self, stack: Stack) -> None:
        def create(n: int) -> requests.Response:
            email = "Wanted@Example.com" if n % 2 else "wanted@example.com"
            return requests.post(f"{stack.app}/users", json={"name": "W", "email": email}, timeout=10)

        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(create, range(16)))
        created = [response for response in responses if response.status_code == 201]
        try:
            assert len(created) == 1
            for response in responses:
                if response not in created:
                    check_problem(response, 409, "email")
        finally:
            for response in created:
                requests.delete(stack.app + response.headers["Location"], timeout=5)


class TestChanging:
    def test_put_changes_only_the_fields_that_it_contains(self, new_user: User) -> None:
        response = requests.put(new_user["url"], json={"name": "Renamed"}, timeout=5)
        assert (response.status_code, response.json()) == (200, {"message": "Updated"})
        user = requests.get(new_user["url"], timeout=5).json()
        assert (user["name"], user["email"], user["version"]) == ("Renamed", new_user["email"], 2)
        assert user["updated_at"] > user["created_at"]

    def test_put_with_equal_values_increments_the_version(self, new_user: User) -> None:
        requests.put(new_user["url"], json={"name": new_user["name"]}, timeout=5)
        assert requests.get(new_user["url"], timeout=5).json()["version"] == 2

    def test_put_ignores_the_read_only_fields_of_a_body_that_was_read(self, new_user: User) -> None:
        user = requests.get(new_user["url"], timeout=5).json()
        user["name"] = "Sent back"
        user["id"], user["version"], user["created_at"] = 1, 99, "never"
        assert requests.put(new_user["url"], json=user, timeout=5).status_code == 200
        after = requests.get(new_user["url"], timeout=5).json()
        assert (after["id"], after["name"], after["version"]) == (new_user["id"], "Sent back", 2)

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({}, "body"),
            ({"id": 3}, "body"),
            ({"name": None}, "name"),
            ({"email": None}, "email"),
            ({"name": ""}, "name"),
            ({"nickname": "x"}, "nickname"),
            ([], "body"),
        ],
    )
    def test_empty_or_invalid_change_is_422(self, new_user: User, body: object, field: str) -> None:
        check_problem(requests.put(new_user["url"], json=body, timeout=5), 422, field)
        assert requests.get(new_user["url"], timeout=5).json()["version"] == 1

    def test_email_in_use_is_409_regardless_of_case(self, new_user: User) -> None:
        check_problem(requests.put(new_user["url"], json={"email": "ALICE@example.com"}, timeout=5), 409, "email")

    def test_user_can_change_the_case_of_its_own_email(self, new_user: User) -> None:
        changed = new_user["email"].upper()
        assert requests.put(new_user["url"], json={"email": changed}, timeout=5).status_code == 200
        assert requests.get(new_user["url"], timeout=5).json()["email"] == changed

    def test_missing_user_is_404_for_read_write_and_delete(self, stack: Stack) -> None:
        url = f"{stack.app}/users/999999999"
        check_problem(requests.put(url, json={"name": "Nobody"}, timeout=5), 404)
        check_problem(requests.delete(url, timeout=5), 404)
        check_problem(requests.get(url, timeout=5), 404)

    def test_deleted_user_is_404(self, new_user: User) -> None:
        assert requests.get(new_user["url"], timeout=5).status_code == 200
        requests.delete(new_user["url"], timeout=5)
        check_problem(requests.get(new_user["url"], timeout=5), 404)


class TestTakenIds:
    """SQL has inserted rows with explicit ids that the sequence has not reached."""

    @pytest.fixture
    def next_id(self, stack: Stack) -> Iterator[int]:
        """Return the next id of the sequence; delete the rows from there on afterwards."""
        [(last,)] = stack.sql("SELECT nextval('users_id_seq')")
        yield last + 1
        stack.sql("DELETE FROM users WHERE id > %s", last)

    def take(self, stack: Stack, *ids: int) -> None:
        for user_id in ids:
            stack.sql(
                "INSERT INTO users (id, name, email) VALUES (%s, 'T', %s)", user_id, f"taken{user_id}@example.com"
            )

    def test_create_gets_the_next_free_id(self, stack: Stack, next_id: int) -> None:
        self.take(stack, next_id, next_id + 1, next_id + 3)
        body = {"name": "New", "email": "next-free@example.com"}
        response = requests.post(f"{stack.app}/users", json=body, timeout=5)
        assert (response.status_code, response.json()["id"]) == (201, next_id + 2)

    def test_create_whose_email_is_taken_too_is_refused_by_field(self, stack: Stack, next_id: int) -> None:
        self.take(stack, next_id)
        body = {"name": "New", "email": f"taken{next_id}@example.com"}
        check_problem(requests.post(f"{stack.app}/users", json=body, timeout=5), 409, "email")

    def test_create_survives_the_largest_id(self, stack: Stack, next_id: int) -> None:
        self.take(stack, next_id, 2**63 - 1)
        body = {"name": "New", "email": "beside-largest@example.com"}
        assert requests.post(f"{stack.app}/users", json=body, timeout=5).json()["id"] == next_id + 1

    def test_batch_gets_free_ids(self, stack: Stack, next_id: int) -> None:
        self.take(stack, next_id, next_id + 2, next_id + 4)
        rows = [{"op": "create", "name": "B", "email": f"batch{n}@free.example.com"} for n in range(5)]
        response = requests.post(f"{stack.app}/users/batch", json={"operations": rows}, timeout=5)
        assert response.status_code == 200, response.text
        assert len({result["id"] for result in response.json()["results"]}) == 5

    def test_idempotent_create_is_stored_once_after_the_ids_are_skipped(self, stack: Stack, next_id: int) -> None:
        self.take(stack, next_id)
        body, key = {"name": "New", "email": "once-free@example.com"}, {"Idempotency-Key": f"free-{next_id}"}
        first, second = (requests.post(f"{stack.app}/users", json=body, headers=key, timeout=5) for _ in range(2))
        assert first.json() == second.json() == {"id": next_id + 1, "message": "Created"}


class TestUnchangedFields:
    """Values that today's rules refuse: SQL wrote them, or the table was adopted."""

    @pytest.fixture
    def old_row(self, stack: Stack) -> Iterator[str]:
        [(user_id,)] = stack.sql("INSERT INTO users (name, email) VALUES (E'tab\\tname', 'no address') RETURNING id")
        yield f"{stack.app}/users/{user_id}"
        stack.sql("DELETE FROM users WHERE id = %s", user_id)

    @pytest.mark.parametrize("method", ["PUT", "PATCH"])
    def test_update_accepts_an_invalid_value_that_is_stored_already(self, old_row: str, method: str) -> None:
        row = requests.get(old_row, timeout=5).json()
        response = requests.request(method, old_row, json={**row, "name": "New"}, timeout=5)
        assert response.status_code == 200, response.text
        after = requests.get(old_row, timeout=5).json()
        assert (after["name"], after["email"], after["version"]) == ("New", "no address", 2)

    def test_update_with_nothing_but_stored_values_increments_the_version(self, old_row: str) -> None:
        row = requests.get(old_row, timeout=5).json()
        assert requests.put(old_row, json=row, timeout=5).status_code == 200
        after = requests.get(old_row, timeout=5).json()
        assert (after["name"], after["email"], after["version"]) == ("tab\tname", "no address", 2)

    def test_update_to_another_invalid_value_is_refused_by_field(self, old_row: str) -> None:
        body = {"name": "New", "email": "another no address"}
        check_problem(requests.put(old_row, json=body, timeout=5), 422, "email")
        assert requests.get(old_row, timeout=5).json()["name"] == "tab\tname"

    def test_one_invalid_value_that_differs_is_refused_beside_one_that_is_stored(self, old_row: str) -> None:
        body = {"name": "", "email": "no address"}
        check_problem(requests.put(old_row, json=body, timeout=5), 422, "name")

    def test_update_of_a_missing_row_names_the_invalid_field(self, stack: Stack) -> None:
        body = {"email": "no address"}
        check_problem(requests.put(f"{stack.app}/users/999999999", json=body, timeout=5), 422, "email")


class TestAddresses:
    @pytest.mark.parametrize("path", ["/user", "/users/", "//users", "/users/1/", "/Users", "/users/1/x"])
    def test_unknown_address_is_404(self, stack: Stack, path: str) -> None:
        check_problem(requests.get(stack.app + path, timeout=5, allow_redirects=False), 404)
