from collections.abc import Generator, Iterator
from itertools import count

import pytest
import requests

from testkit.isolation import slot_for_test
from testkit.stack import Stack, run, running
from velikiy.postgres import Database


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with slot_for_test(exclusive=item.get_closest_marker("exclusive") is not None):
        return (yield)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Two edges, two apps; shared, so tests leave it as they found it."""
    with running("--edges", "2") as stack:
        yield stack


@pytest.fixture
def own_stack() -> Iterator[Stack]:
    """For tests that break something: one of their own."""
    with running("--edges", "2") as stack:
        yield stack


@pytest.fixture(scope="module")
def restartable() -> Iterator[Stack]:
    with running() as stack:
        yield stack


@pytest.fixture
def stopped(restartable: Stack) -> Stack:
    """One that ran and was stopped. Tests do something to its files, and start it again."""
    run("down", "--data", str(restartable.data))
    return restartable


@pytest.fixture(params=["app", "edge"])
def door(request: pytest.FixtureRequest, stack: Stack) -> str:
    """Where a client may come in: an app itself, and an edge before it."""
    return stack.app if request.param == "app" else stack.edge


@pytest.fixture
def database(stack: Stack) -> Iterator[Database]:
    """The stack's, as an app has it."""
    database = Database(stack.postgres, size=8, timeout=5)
    database.open()
    yield database
    database.close()


_numbers = count(1)


@pytest.fixture
def new_user(stack: Stack) -> Iterator[dict[str, str]]:
    """A user made for one test, `{"id", "name", "email", "url"}`; deleted afterwards."""
    number = next(_numbers)
    name, email = f"Person {number}", f"person{number}@example.com"
    answer = requests.post(f"{stack.app}/users", json={"name": name, "email": email}, timeout=5)
    assert answer.status_code == 201, answer.text
    user_id = answer.json()["id"]
    yield {"id": user_id, "name": name, "email": email, "url": f"{stack.app}/users/{user_id}"}
    requests.delete(f"{stack.app}/users/{user_id}", timeout=5)
