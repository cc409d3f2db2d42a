"""The promise on a real stack with two edges: every read behaves as if there were no cache."""

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
    """Start a stack for this module alone, because its processes are killed and stopped."""
    with running("--edges", "2") as stack:
        yield stack


def assert_promise_holds(load: Load, seconds: float, faults: Faults | None = None) -> None:
    soak = Soak(load)
    for _ in soak.run(seconds, faults=faults):
        pass
    print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 100 * seconds  # low enough for a slow machine, and fails for a load that does nothing
    assert soak.verdict.writes["ok"] > seconds


def test_random_reads_are_explained_by_the_writes(stack: Stack) -> None:
    assert_promise_holds(Load(tuple(stack.edges), seed=SEED), 12)


def test_random_reads_are_explained_if_several_writers_share_a_user(stack: Stack) -> None:
    assert_promise_holds(Load(tuple(stack.edges), seed=SEED, shared=True, users=2), 8)


@pytest.mark.parametrize("kinds", ["kill,flush", "stop-edge", "stop-redis"])
def test_random_reads_are_explained_while_processes_are_killed_or_stopped(stack: Stack, kinds: str) -> None:
    faults = Faults(stack, set(kinds.split(",")), SEED, stopped=6)
    assert_promise_holds(Load(tuple(stack.edges), seed=SEED), 12, faults)


def test_random_reads_are_explained_while_sql_bypasses_the_app(stack: Stack) -> None:
    assert_promise_holds(Load(tuple(stack.edges), seed=SEED, database=stack.postgres), 8)


@pytest.mark.long
@pytest.mark.plain_worker
def test_random_reads_are_explained_with_the_plain_worker() -> None:
    with running("--edges", "2", APP_WORKER_CLASS="gthread") as stack:
        assert_promise_holds(Load(tuple(stack.edges), seed=SEED, shared=True, users=2), 8)
