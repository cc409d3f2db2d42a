import threading
import uuid
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from testkit.browser import OtherOrigin
from testkit.stack import Stack


@pytest.fixture(scope="session")
def other_port() -> Iterator[int]:
    """The port of a server of another origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherOrigin) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def email(stack: Stack) -> Iterator[str]:
    """An unused address. The fixture deletes the users whose addresses begin with it."""
    address = f"{uuid.uuid4()}@example.com"
    yield address
    stack.sql("DELETE FROM users WHERE email LIKE %s", f"{address}%")
