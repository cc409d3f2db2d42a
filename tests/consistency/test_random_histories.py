"""The promise, on a real stack, through two edges: every read behaves as if there were no cache."""

from collections.abc import Iterator

import pytest

from testkit.stack import Stack, running
from tests.consistency.faults import Faults
from tests.consistency.load import Load
from tests.consistency.soak import Soak, progress

pytestmark = pytest.mark.exclusive

SEED = 1


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One of their own: processes of it are killed and stopped."""
    with running("--edges", "2") as stack:
        yield stack


def promised(load: Load, seconds: float, faults: Faults | None = None) -> None:
    soak = Soak(load)
    for _ in soak.run(seconds, faults=faults):
        pass
    print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 100 * seconds  # a slow machine is no reason to fail, a load that does nothing is
    assert soak.verdict.writes["ok"] > seconds


def test_every_read_is_explained_by_the_writes(stack: Stack) -> None:
    promised(Load(tuple(stack.edges), seed=SEED), 12)


def test_every_read_is_explained_where_several_write_to_one_user(stack: Stack) -> None:
    promised(Load(tuple(stack.edges), seed=SEED, shared=True, users=2), 8)


@pytest.mark.parametrize("kinds", ["kill,flush", "stop-edge", "stop-redis"])
def test_every_read_is_explained_while_processes_are_killed_or_stopped(stack: Stack, kinds: str) -> None:
    faults = Faults(stack, set(kinds.split(",")), SEED, stopped=6)
    promised(Load(tuple(stack.edges), seed=SEED), 12, faults)


def test_every_read_is_explained_while_sql_is_written_past_the_app(stack: Stack) -> None:
    promised(Load(tuple(stack.edges), seed=SEED, database=stack.postgres), 8)


@pytest.mark.plain_worker
def test_every_read_is_explained_by_the_writes_with_the_plain_worker() -> None:
    with running("--edges", "2", APP_WORKER_CLASS="gthread") as stack:
        promised(Load(tuple(stack.edges), seed=SEED, shared=True, users=2), 8)
