import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import pytest
from playwright.sync_api import Browser, sync_playwright

from testkit.browser import CHROMIUM, OtherOrigin


@pytest.fixture(scope="session")
def browser() -> Iterator[Callable[..., Browser]]:
    """Yield a function that starts a browser with further arguments."""
    if not CHROMIUM:
        pytest.skip("there is no chromium; on Debian ./run test installs it")
    with sync_playwright() as playwright:
        # The browser's sandbox does not start as root.
        yield lambda *more: playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *more])


@pytest.fixture(scope="session")
def other_port() -> Iterator[int]:
    """The port of a server of another origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherOrigin) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
