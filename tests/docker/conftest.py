"""Fixtures: one Engine and one clean copy of the checkout for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .engine import Engine, Say, Unavailable, engine_for_tests
from .stack import clean_copy

STANDINS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Return a function that prints at once although pytest captures output: the first start of an Engine and the first
    build of the images take minutes."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")

    def write(text: str) -> None:
        if reporter:
            reporter.ensure_newline()
            reporter.write_line(text)
            reporter.flush()

    return write


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config, say: Say) -> Iterator[Engine]:
    try:
        with engine_for_tests(say) as engine:
            pytestconfig.stash[STANDINS] = engine.standins
            yield engine
    except Unavailable as reason:
        pytest.fail(str(reason), pytrace=False)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("checkout"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    standins = config.stash.get(STANDINS, None)
    if standins:
        names = ", ".join(standins)
        terminalreporter.write_line(f"Stand-ins, built from Debian packages, replaced the images {names}.")
    elif standins is not None:
        terminalreporter.write_line("All base images were the official ones.")
