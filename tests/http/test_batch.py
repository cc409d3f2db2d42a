"""Many writes as one: all or none, each error named, and everything that was touched is seen at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import requests

from testkit.api import User, problem
from testkit.failpoints import SteppedApp, caching, stepped_app
from testkit.stack import Stack, wait_until
from velikiy.http import batch
from velikiy.resources.base import registry

_numbers = count(1)

Operation = dict[str, Any]


def send(door: str, *operations: Operation) -> requests.Response:
    return requests.post(f"{door}/users/batch", json={"operations": operations}, timeout=20)


def done(door: str, *operations: Operation) -> list[dict[str, Any]]:
    answer = send(door, *operations)
    assert answer.status_code == 200, answer.text
    assert answer.json()["message"] == "Done"
    results: list[dict[str, Any]] = answer.json()["results"]
    assert [result["op"] for result in results] == [operation["op"] for operation in operations]
    return results


def create(email: str, name: str = "Batch") -> Operation:
    return {"op": "create", "name": name, "email": f"{email}@example.com"}


def update(number: int, **changes: str) -> Operation:
    return {"op": "update", "id": number, **changes}


def delete(number: int) -> Operation:
    return {"op": "delete", "id": number}


def prefix() -> str:
    return f"batch{next(_numbers)}x"


def get(door: str, number: int) -> requests.Response:
    return requests.get(f"{door}/users/{number}", timeout=5)


@pytest.fixture
def some(stack: Stack) -> Iterator[list[int]]:
    """A hundred: more than have locks of their own."""
    begun = prefix()
    numbers = [result["id"] for result in done(stack.app, *(create(f"{begun}{n}") for n in range(100)))]
    yield numbers
    there = {row[0] for row in stack.sql("SELECT id FROM users WHERE id = ANY(%s)", numbers)}
    if there:
        done(stack.app, *map(delete, there))


class TestAll:
    def test_it_creates_updates_and_deletes(self, stack: Stack, door: str, new_user: User) -> None:
        begun, first = prefix(), int(new_user["id"])
        results = done(door, create(f"{begun}a"), update(first, name="By batch"), create(f"{begun}b"))
        a, b = results[0]["id"], results[2]["id"]
        assert [result["status"] for result in results] == [201, 200, 201]
        assert results[1]["id"] == first
        for result in results:
            assert get(door, result["id"]).headers["ETag"] == result["etag"]
        assert get(door, first).json()["name"] == "By batch"
        assert done(door, delete(a), delete(b)) == [{"op": "delete", "id": n, "status": 200} for n in (a, b)]
        for door_ in (door, *stack.edges):
            assert [get(door_, number).status_code for number in (a, b)] == [404, 404]

    def test_operations_follow_one_another(self, door: str, new_user: User) -> None:
        first, begun = int(new_user["id"]), prefix()
        results = done(
            door,
            update(first, name="One"),
            update(first, name="Two", email=f"{begun}@example.com"),
            create(new_user["email"].removesuffix("@example.com")),  # free by now
        )
        assert (get(door, first).json()["name"], get(door, first).json()["version"]) == ("Two", 3)
        done(door, delete(results[2]["id"]), update(first, email=new_user["email"]))

    def test_two_users_can_change_places(self, door: str, some: list[int]) -> None:
        a, b = (get(door, number).json()["email"] for number in some[:2])
        done(door, update(some[0], email="between@example.com"), update(some[1], email=a), update(some[0], email=b))
        assert [get(door, number).json()["email"] for number in some[:2]] == [b, a]

    def test_a_thousand_fit(self, stack: Stack, door: str) -> None:
        begun = prefix()
        numbers = [result["id"] for result in done(door, *(create(f"{begun}{n}", "x" * 100) for n in range(1000)))]
        assert len(set(numbers)) == 1000
        done(door, *(update(number, name="ф" * 100) for number in numbers))
        assert {row["name"] for row in requests.get(f"{stack.edge}/users?q={begun}", timeout=5).json()} == {"ф" * 100}
        done(door, *map(delete, numbers))
        assert requests.get(f"{stack.edge}/users?q={begun}", timeout=5).json() == []


class TestNone:
    def refused(self, door: str, *operations: Operation) -> list[dict[str, Any]]:
        answer = send(door, *operations)
        problem(answer, 409)
        assert answer.json()["type"] == "/problems/batch-refused"
        errors: list[dict[str, Any]] = answer.json()["errors"]
        return errors

    def test_every_operation_that_cannot_be_done_is_named(self, stack: Stack, door: str, new_user: User) -> None:
        begun, first = prefix(), int(new_user["id"])
        before = stack.sql("SELECT md5(string_agg(users::text, '' ORDER BY id)) FROM users")
        errors = self.refused(
            door,
            create(f"{begun}a"),
            create("ALICE"),
            update(first, name="Not done"),
            update(999999999, name="Nobody"),
            delete(first),
            update(first, name="Deleted above"),
            create(f"{begun}A"),
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
        assert get(door, first).json()["version"] == 1

    def test_of_a_thousand_that_are_all_refused_each_is_named(self, door: str) -> None:
        assert len(self.refused(door, *(create("alice") for _ in range(1000)))) == 1000

    def test_the_last_of_a_thousand_undoes_all(self, stack: Stack, door: str) -> None:
        begun = prefix()
        errors = self.refused(door, *(create(f"{begun}{n}") for n in range(999)), create("alice"))
        assert [error["index"] for error in errors] == [999]
        assert stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"{begun}%") == [(0,)]


class TestFreshness:
    def test_everything_that_it_touched_is_dropped_and_nothing_else(self, stack: Stack, some: list[int]) -> None:
        for many in (3, 100):
            word = f"fresh{prefix()}"
            invalidates = some[:many]
            looks = ["/users", "/users/count", f"/users?q={word}&sort=-name", f"/users/count?q={word}"]
            looks += [f"/users/{number}" for number in (invalidates[0], invalidates[-1])]
            for edge in stack.edges:
                for look in [*looks, "/users/3"]:
                    wait_until(lambda url=edge + look: hit(url))  # type: ignore[misc]
            done(stack.edge, *(update(number, name=word) for number in invalidates))
            for edge in stack.edges:
                assert hit(f"{edge}/users/3")
                assert not any(hit(edge + look) for look in looks)
                for number in invalidates:
                    assert get(edge, number).json()["name"] == word
                assert requests.get(f"{edge}/users/count?q={word}", timeout=5).json() == {"count": many}
                assert len(requests.get(f"{edge}/users?q={word}&sort=-name", timeout=5).json()) == many

    def test_a_user_that_was_not_there_is(self, stack: Stack) -> None:
        (last,) = stack.sql("SELECT last_value FROM users_id_seq")[0]
        for edge in stack.edges:
            for number in range(last + 1, last + 4):
                assert get(edge, number).status_code == 404
        begun = prefix()
        numbers = [result["id"] for result in done(stack.edge, *(create(f"{begun}{n}") for n in range(3)))]
        assert numbers[0] == last + 1
        for edge in stack.edges:
            assert [get(edge, number).status_code for number in numbers] == [200] * 3
        done(stack.edge, *map(delete, numbers))


def hit(url: str) -> bool:
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"


@pytest.fixture(scope="module")
def stepped(stack: Stack) -> Iterator[SteppedApp]:
    with stepped_app(stack) as app:
        wait_until(lambda: caching(app.edge))
        yield app


@pytest.mark.parametrize("place", ["before the drops", "between the drops", "before the commit"])
@pytest.mark.parametrize("many", [3, 100])
def test_what_is_read_while_a_batch_stands_is_not_kept(
    stepped: SteppedApp, some: list[int], place: str, many: int
) -> None:
    edges = [stepped.edge, *stepped.stack.edges]
    word, old = f"stands{prefix()}", f"old{prefix()}"
    invalidates = some[:many]
    done(stepped.stack.app, *(update(number, name=old) for number in invalidates))

    def look() -> list[tuple[str, int]]:
        return [
            (
                get(edge, invalidates[0]).json()["name"],
                int(requests.get(f"{edge}/users/count?q={word}", timeout=5).json()["count"]),
            )
            for edge in edges
            for _ in range(2)
        ]

    seen: list[tuple[str, int]] = []
    stepped.steps.steps[place] = lambda: seen.extend(look())
    model = batch.model(registry()["users"])
    asked = model.model_validate({"operations": [update(number, name=word) for number in invalidates]})
    assert batch.run(stepped.users.rows, asked, None).status == 200
    assert set(seen) == {(old, 0)}
    assert set(look()) == {(word, many)}


class TestTogether:
    @pytest.mark.exclusive
    def test_batches_over_the_same_rows_in_any_order_do_not_wait_in_a_circle(
        self, stack: Stack, some: list[int]
    ) -> None:
        def run(number: int) -> int:
            order = some if number % 2 else some[::-1]
            return send(
                stack.apps[number // 2 % 2], *(update(one, name=f"Round {number}") for one in order)
            ).status_code

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(run, range(12))) == {200}
        rows = stack.sql("SELECT DISTINCT name FROM users WHERE id = ANY(%s)", some)
        assert len(rows) == 1  # all of one of them

    def test_nor_do_those_that_want_the_same_emails(self, stack: Stack) -> None:
        for _ in range(4):
            begun = prefix()
            wanted = [create(f"{begun}{n}") for n in range(200)]

            def run(number: int, wanted: list[Operation] = wanted) -> requests.Response:
                return send(stack.apps[number % 2], *(wanted if number % 2 else wanted[::-1]))

            with ThreadPoolExecutor(2) as pool:
                answers = list(pool.map(run, range(2)))
            assert sorted(answer.status_code for answer in answers) == [200, 409]
            for answer in answers:
                if answer.status_code == 200:
                    done(stack.app, *(delete(result["id"]) for result in answer.json()["results"]))

    def test_a_batch_beside_single_writers_loses_nothing(self, stack: Stack, some: list[int]) -> None:
        def single(number: int) -> int:
            url = f"{stack.edges[number % 2]}/users/{some[number % 100]}"
            return requests.put(url, json={"name": f"Single {number}"}, timeout=10).status_code

        def many(number: int) -> int:
            return send(stack.edge, *(update(one, name=f"Many {number}") for one in some)).status_code

        with ThreadPoolExecutor(4) as pool:
            statuses = [*pool.map(many, range(6)), *pool.map(single, range(60))]
        assert set(statuses) == {200}
        for edge in stack.edges:
            names = {number: get(edge, number).json()["name"] for number in some}
            assert names == dict(stack.sql("SELECT id, name FROM users WHERE id = ANY(%s)", some))
