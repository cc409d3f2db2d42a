"""A stack for the bulk commands, empty before each test."""

from collections.abc import Iterator

import pytest
import requests

from testkit.stack import Stack, running, wait_until


@pytest.fixture(scope="package")
def bulk_stack() -> Iterator[Stack]:
    """Start a stack that no other package of tests uses, so that a test may count the users.

    No entry of an edge expires by itself while a test judges what an import, which may take long, has left in the caches.
    """
    with running("--edges", "2", EDGE_TTL="600") as stack:
        yield stack


@pytest.fixture(autouse=True)
def _empty_tables(request: pytest.FixtureRequest) -> None:
    """Delete the users and the progress of imports, and wait until the caches show no user of an earlier test."""
    if "bulk_stack" in request.fixturenames:
        stack: Stack = request.getfixturevalue("bulk_stack")
        stack.sql("DELETE FROM imports")
        stack.sql("DELETE FROM users")
        wait_until(lambda: all(requests.get(f"{edge}/users", timeout=5).json() == [] for edge in stack.edges))
