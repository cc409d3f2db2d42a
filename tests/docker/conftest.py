"""One Engine and one clean copy of the checkout for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .engine import Engine, NotToBeHad, Say, engine_for_tests
from .stack import clean_copy

STANDINS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Tells at once, whatever pytest captures: making an Engine and images takes minutes the first time."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")

    def tell(text: str) -> None:
        if reporter:
            reporter.ensure_newline()
            reporter.write_line(text)
            reporter.flush()

    return tell


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config, say: Say) -> Iterator[Engine]:
    try:
        with engine_for_tests(say) as engine:
            pytestconfig.stash[STANDINS] = engine.standins
            yield engine
    except NotToBeHad as reason:
        pytest.fail(str(reason), pytrace=False)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("checkout"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    standins = config.stash.get(STANDINS, None)
    if standins:
        names = ", ".join(standins)
        terminalreporter.write_line(f"Stand-ins, made of Debian packages, took the place of the images {names}.")
    elif standins is not None:
        terminalreporter.write_line("All base images were the official ones.")
