from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from testkit.browser import CHROMIUM, Visit, launch, watch
from testkit.stack import Stack, run, running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of a file. Each test has a context of its own: nothing is kept between two tests."""
    if not CHROMIUM:
        pytest.skip("there is no chromium; on Debian ./run test installs it")
    with sync_playwright() as playwright, launch(playwright) as browser:
        yield browser


@pytest.fixture
def open_console(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Yield a function that opens an address in a new context, with options of the browser such as `locale`."""
    contexts = []

    def open_console(address: str, **options: Any) -> Visit:
        defaults: Any = {"locale": "en-GB", "viewport": {"width": 1280, "height": 800}}
        context = chromium.new_context(**{**defaults, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        visit = watch(context.new_page())
        visit.page.goto(address)
        return visit

    yield open_console
    for context in contexts:
        context.close()


@pytest.fixture(scope="package")
def keyed_edges() -> Iterator[tuple[Stack, str]]:
    """Two edges that require keys, and a key that may write. Tests may stop parts and have to start them again."""
    with running("--edges", "2", "--apps", "1", AUTH="all") as stack:
        completed = run("velikiy", "--data", str(stack.data), "keys", "create", "console", "--scope", "write")
        assert completed.returncode == 0, completed.stderr
        yield stack, completed.stdout.strip()


@pytest.fixture
def open_with_key(open_console: Callable[..., Visit]) -> Callable[..., Visit]:
    """Open a view with a key in the tab."""

    def open_with_key(address: str, key: str, **options: Any) -> Visit:
        visit = open_console("about:blank", **options)
        visit.page.add_init_script(f"sessionStorage.setItem('key', '{key}')")
        visit.page.goto(address)
        return visit

    return open_with_key
