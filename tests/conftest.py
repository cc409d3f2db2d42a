from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import count

import pytest
import requests
from playwright.sync_api import Browser, sync_playwright

from testkit.browser import CHROMIUM, launch
from testkit.isolation import slot_for_test
from testkit.stack import Stack, run, running
from velikiy.postgres import Database


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with slot_for_test(exclusive=item.get_closest_marker("exclusive") is not None):
        return (yield)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Two edges and two apps. All tests share this stack, so each test leaves it unchanged."""
    with running("--edges", "2") as stack:
        yield stack


@pytest.fixture
def own_stack() -> Iterator[Stack]:
    """A stack for one test, which may break it."""
    with running("--edges", "2") as stack:
        yield stack


@pytest.fixture(scope="module")
def restartable_stack() -> Iterator[Stack]:
    with running() as stack:
        yield stack


@pytest.fixture
def stopped_stack(restartable_stack: Stack) -> Stack:
    """A stack that ran and was stopped. Tests change its files and start it again."""
    run("down", "--data", str(restartable_stack.data))
    return restartable_stack


@pytest.fixture(params=["app", "edge"])
def base_url(request: pytest.FixtureRequest, stack: Stack) -> str:
    """The address of an app, and the address of an edge: a test with this fixture runs against both."""
    return stack.app if request.param == "app" else stack.edge


@pytest.fixture
def database(stack: Stack) -> Iterator[Database]:
    """The database of the stack, opened as an app opens it."""
    database = Database(stack.postgres, size=8, timeout=5)
    database.open()
    yield database
    database.close()


@pytest.fixture
def browser() -> Iterator[Callable[..., Browser]]:
    """Yield a function that starts a browser with further arguments.

    Each test starts its own Playwright: a second one in the same process is refused while the first one runs.
    """
    if not CHROMIUM:
        pytest.skip("there is no chromium; on Debian ./run test installs it")
    with sync_playwright() as playwright:
        yield partial(launch, playwright)


_numbers = count(1)


@pytest.fixture
def new_user(stack: Stack) -> Iterator[dict[str, str]]:
    """A user for one test, `{"id", "name", "email", "url"}`. The fixture deletes it afterwards."""
    number = next(_numbers)
    name, email = f"Person {number}", f"person{number}@example.com"
    response = requests.post(f"{stack.app}/users", json={"name": name, "email": email}, timeout=5)
    assert response.status_code == 201, response.text
    user_id = response.json()["id"]
    yield {"id": user_id, "name": name, "email": email, "url": f"{stack.app}/users/{user_id}"}
    requests.delete(f"{stack.app}/users/{user_id}", timeout=5)
