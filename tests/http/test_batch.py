"""Batches: all operations are carried out or none, each error is named, and every read sees the batch at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import requests

from testkit.api import User, check_problem, is_hit
from testkit.failpoints import WRITER_FAILPOINTS, FailpointApp, failpoint_app, has_cache_lease
from testkit.stack import Stack, wait_until
from velikiy.http import batch
from velikiy.resources.base import registry

_numbers = count(1)

Operation = dict[str, Any]


def send(base_url: str, *operations: Operation) -> requests.Response:
    return requests.post(f"{base_url}/users/batch", json={"operations": operations}, timeout=20)


def run_batch(base_url: str, *operations: Operation) -> list[dict[str, Any]]:
    """Send the batch, check that it was carried out, and return its results."""
    response = send(base_url, *operations)
    assert response.status_code == 200, response.text
    assert response.json()["message"] == "Done"
    results: list[dict[str, Any]] = response.json()["results"]
    assert [result["op"] for result in results] == [operation["op"] for operation in operations]
    return results


def create(email: str, name: str = "Batch") -> Operation:
    return {"op": "create", "name": name, "email": f"{email}@example.com"}


def update(user_id: int, **changes: str) -> Operation:
    return {"op": "update", "id": user_id, **changes}


def delete(user_id: int) -> Operation:
    return {"op": "delete", "id": user_id}


def new_prefix() -> str:
    return f"batch{next(_numbers)}x"


def get(base_url: str, user_id: int) -> requests.Response:
    return requests.get(f"{base_url}/users/{user_id}", timeout=5)


@pytest.fixture
def user_ids(stack: Stack) -> Iterator[list[int]]:
    """A hundred users: a write of so many takes the lock of every path (`locks.MAX_PATH_LOCKS`)."""
    prefix = new_prefix()
    ids = [result["id"] for result in run_batch(stack.app, *(create(f"{prefix}{n}") for n in range(100)))]
    yield ids
    remaining = {row[0] for row in stack.sql("SELECT id FROM users WHERE id = ANY(%s)", ids)}
    if remaining:
        run_batch(stack.app, *map(delete, remaining))


class TestCarriedOut:
    def test_batch_creates_updates_and_deletes(self, stack: Stack, base_url: str, new_user: User) -> None:
        prefix, first = new_prefix(), int(new_user["id"])
        results = run_batch(base_url, create(f"{prefix}a"), update(first, name="By batch"), create(f"{prefix}b"))
        a, b = results[0]["id"], results[2]["id"]
        assert [result["status"] for result in results] == [201, 200, 201]
        assert results[1]["id"] == first
        for result in results:
            assert get(base_url, result["id"]).headers["ETag"] == result["etag"]
        assert get(base_url, first).json()["name"] == "By batch"
        assert run_batch(base_url, delete(a), delete(b)) == [{"op": "delete", "id": n, "status": 200} for n in (a, b)]
        for url in (base_url, *stack.edges):
            assert [get(url, user_id).status_code for user_id in (a, b)] == [404, 404]

    def test_operations_of_a_batch_run_in_order(self, base_url: str, new_user: User) -> None:
        first, prefix = int(new_user["id"]), new_prefix()
        results = run_batch(
            base_url,
            update(first, name="One"),
            update(first, name="Two", email=f"{prefix}@example.com"),
            create(new_user["email"].removesuffix("@example.com")),  # the update before has freed this email
        )
        assert (get(base_url, first).json()["name"], get(base_url, first).json()["version"]) == ("Two", 3)
        run_batch(base_url, delete(results[2]["id"]), update(first, email=new_user["email"]))

    def test_batch_can_swap_the_emails_of_two_users(self, base_url: str, user_ids: list[int]) -> None:
        a, b = (get(base_url, user_id).json()["email"] for user_id in user_ids[:2])
        run_batch(
            base_url,
            update(user_ids[0], email="between@example.com"),
            update(user_ids[1], email=a),
            update(user_ids[0], email=b),
        )
        assert [get(base_url, user_id).json()["email"] for user_id in user_ids[:2]] == [b, a]

    def test_batch_of_a_thousand_operations_is_carried_out(self, stack: Stack, base_url: str) -> None:
        prefix = new_prefix()
        ids = [
            result["id"] for result in run_batch(base_url, *(create(f"{prefix}{n}", "x" * 100) for n in range(1000)))
        ]
        assert len(set(ids)) == 1000
        run_batch(base_url, *(update(user_id, name="ф" * 100) for user_id in ids))
        assert {row["name"] for row in requests.get(f"{stack.edge}/users?q={prefix}", timeout=5).json()} == {"ф" * 100}
        run_batch(base_url, *map(delete, ids))
        assert requests.get(f"{stack.edge}/users?q={prefix}", timeout=5).json() == []


class TestRefused:
    def refused(self, base_url: str, *operations: Operation) -> list[dict[str, Any]]:
        """Send the batch, check that it was refused, and return its errors."""
        response = send(base_url, *operations)
        check_problem(response, 409)
        assert response.json()["type"] == "/problems/batch-refused"
        errors: list[dict[str, Any]] = response.json()["errors"]
        return errors

    def test_refused_batch_changes_nothing_and_names_every_failed_operation(
        self, stack: Stack, base_url: str, new_user: User
    ) -> None:
        prefix, first = new_prefix(), int(new_user["id"])
        before = stack.sql("SELECT md5(string_agg(users::text, '' ORDER BY id)) FROM users")
        errors = self.refused(
            base_url,
            create(f"{prefix}a"),
            create("ALICE"),
            update(first, name="Not done"),
            update(999999999, name="Nobody"),
            delete(first),
            update(first, name="Deleted above"),
            create(f"{prefix}A"),
            delete(999999998),
            update(2, email="alice@example.com"),
        )
        assert [(error["index"], error["field"], error["status"]) for error in errors] == [
            (1, "operations.1.email", 409),
            (3, "operations.3.id", 404),
            (5, "operations.5.id", 404),
            (6, "operations.6.email", 409),
            (7, "operations.7.id", 404),
            (8, "operations.8.email", 409),
        ]
        assert all(error["detail"] for error in errors)
        assert stack.sql("SELECT md5(string_agg(users::text, '' ORDER BY id)) FROM users") == before
        assert get(base_url, first).json()["version"] == 1

    def test_each_of_a_thousand_failed_operations_is_named(self, base_url: str) -> None:
        assert len(self.refused(base_url, *(create("alice") for _ in range(1000)))) == 1000

    def test_failure_of_the_last_of_a_thousand_operations_rolls_back_all(self, stack: Stack, base_url: str) -> None:
        prefix = new_prefix()
        errors = self.refused(base_url, *(create(f"{prefix}{n}") for n in range(999)), create("alice"))
        assert [error["index"] for error in errors] == [999]
        assert stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"{prefix}%") == [(0,)]


class TestFreshness:
    def test_batch_invalidates_every_path_that_it_changes_and_no_other(self, stack: Stack, user_ids: list[int]) -> None:
        for size in (3, 100):
            word = f"fresh{new_prefix()}"
            changed = user_ids[:size]
            targets = ["/users", "/users/count", f"/users?q={word}&sort=-name", f"/users/count?q={word}"]
            targets += [f"/users/{user_id}" for user_id in (changed[0], changed[-1])]
            for edge in stack.edges:
                for target in [*targets, "/users/3"]:
                    wait_until(lambda url=edge + target: is_hit(url))  # type: ignore[misc]
            run_batch(stack.edge, *(update(user_id, name=word) for user_id in changed))
            for edge in stack.edges:
                assert is_hit(f"{edge}/users/3")
                assert not any(is_hit(edge + target) for target in targets)
                for user_id in changed:
                    assert get(edge, user_id).json()["name"] == word
                assert requests.get(f"{edge}/users/count?q={word}", timeout=5).json() == {"count": size}
                assert len(requests.get(f"{edge}/users?q={word}&sort=-name", timeout=5).json()) == size

    def test_cached_404_is_invalidated_by_a_batch_that_creates_the_user(self, stack: Stack) -> None:
        (last,) = stack.sql("SELECT last_value FROM users_id_seq")[0]
        for edge in stack.edges:
            for user_id in range(last + 1, last + 4):
                assert get(edge, user_id).status_code == 404
        prefix = new_prefix()
        ids = [result["id"] for result in run_batch(stack.edge, *(create(f"{prefix}{n}") for n in range(3)))]
        assert ids[0] == last + 1
        for edge in stack.edges:
            assert [get(edge, user_id).status_code for user_id in ids] == [200] * 3
        run_batch(stack.edge, *map(delete, ids))


@pytest.fixture(scope="module")
def app(stack: Stack) -> Iterator[FailpointApp]:
    with failpoint_app(stack) as app:
        wait_until(lambda: has_cache_lease(app.edge))
        yield app


@pytest.mark.parametrize("failpoint", WRITER_FAILPOINTS[1:])
@pytest.mark.parametrize("size", [3, 100])
def test_read_while_a_batch_is_in_flight_is_cached_nowhere(
    app: FailpointApp, user_ids: list[int], failpoint: str, size: int
) -> None:
    edges = [app.edge, *app.stack.edges]
    word, old = f"inflight{new_prefix()}", f"old{new_prefix()}"
    changed = user_ids[:size]
    run_batch(app.stack.app, *(update(user_id, name=old) for user_id in changed))

    def read() -> list[tuple[str, int]]:
        return [
            (
                get(edge, changed[0]).json()["name"],
                int(requests.get(f"{edge}/users/count?q={word}", timeout=5).json()["count"]),
            )
            for edge in edges
            for _ in range(2)
        ]

    during: list[tuple[str, int]] = []
    app.failpoints.actions[failpoint] = lambda: during.extend(read())
    model = batch.model(registry()["users"])
    body = model.model_validate({"operations": [update(user_id, name=word) for user_id in changed]})
    assert batch.run(app.users.rows, body, lambda write: write).status == 200
    assert set(during) == {(old, 0)}
    assert set(read()) == {(word, size)}


class TestConcurrency:
    @pytest.mark.exclusive
    def test_concurrent_batches_of_the_same_rows_in_opposite_orders_all_succeed(
        self, stack: Stack, user_ids: list[int]
    ) -> None:
        def run(number: int) -> int:
            ordered = user_ids if number % 2 else user_ids[::-1]
            operations = [update(user_id, name=f"Round {number}") for user_id in ordered]
            return send(stack.apps[number // 2 % 2], *operations).status_code

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(run, range(12))) == {200}
        rows = stack.sql("SELECT DISTINCT name FROM users WHERE id = ANY(%s)", user_ids)
        assert len(rows) == 1  # every name is from the same batch

    def test_one_of_two_concurrent_batches_that_create_the_same_emails_succeeds(self, stack: Stack) -> None:
        for _ in range(4):
            prefix = new_prefix()
            operations = [create(f"{prefix}{n}") for n in range(200)]

            def run(number: int, operations: list[Operation] = operations) -> requests.Response:
                return send(stack.apps[number % 2], *(operations if number % 2 else operations[::-1]))

            with ThreadPoolExecutor(2) as pool:
                responses = list(pool.map(run, range(2)))
            assert sorted(response.status_code for response in responses) == [200, 409]
            for response in responses:
                if response.status_code == 200:
                    run_batch(stack.app, *(delete(result["id"]) for result in response.json()["results"]))

    def test_edges_serve_the_committed_names_after_concurrent_batches_and_single_writes(
        self, stack: Stack, user_ids: list[int]
    ) -> None:
        def write_one(number: int) -> int:
            url = f"{stack.edges[number % 2]}/users/{user_ids[number % 100]}"
            return requests.put(url, json={"name": f"Single {number}"}, timeout=10).status_code

        def write_all(number: int) -> int:
            return send(stack.edge, *(update(user_id, name=f"All {number}") for user_id in user_ids)).status_code

        with ThreadPoolExecutor(4) as pool:
            statuses = [*pool.map(write_all, range(6)), *pool.map(write_one, range(60))]
        assert set(statuses) == {200}
        for edge in stack.edges:
            names = {user_id: get(edge, user_id).json()["name"] for user_id in user_ids}
            assert names == dict(stack.sql("SELECT id, name FROM users WHERE id = ANY(%s)", user_ids))
