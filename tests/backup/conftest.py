"""The rows of the shared stack before each test, and again after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.stack import Stack
from tests.backup.commands import back_up, content, restore


@pytest.fixture(scope="package")
def original(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of the rows that the stack had first."""
    file = tmp_path_factory.mktemp("original") / "original.dump"
    back_up(stack, file)
    return file


@pytest.fixture(autouse=True)
def _original_rows(stack: Stack, original: Path) -> Iterator[None]:
    before = content(stack)
    yield
    if content(stack) != before:
        stack.sql("DELETE FROM api_keys")
        restore(stack, original)
