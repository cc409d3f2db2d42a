import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from testkit.browser import OtherOrigin


@pytest.fixture(scope="session")
def other_port() -> Iterator[int]:
    """The port of a server of another origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherOrigin) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
