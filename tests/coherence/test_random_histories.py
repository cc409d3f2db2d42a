"""The promise, on a real stack, as far as it is kept today: read at the apps, through Redis and past Nginx, every read
behaves as if there were no cache."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.coherence.faults import Faults
from tests.coherence.load import Load
from tests.coherence.soak import Soak, progress
from tests.running import Stack, running

SEED = 1


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One of their own: processes of it are killed."""
    with running() as stack:
        yield stack


def promised(load: Load, seconds: float, faults: Faults | None = None) -> None:
    soak = Soak(load, across=True)
    for _ in soak.run(seconds, faults=faults):
        pass
    print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 100 * seconds  # a slow machine is no reason to fail, a load that does nothing is
    assert soak.verdict.writes["ok"] > seconds


def test_every_read_is_explained_by_the_writes(stack: Stack) -> None:
    promised(Load(tuple(stack.apps), seed=SEED), 12)


def test_every_read_is_explained_where_several_write_to_one_user(stack: Stack) -> None:
    promised(Load(tuple(stack.apps), seed=SEED, shared=True, users=2), 8)


def test_every_read_is_explained_while_processes_are_killed(stack: Stack) -> None:
    faults = Faults(stack, {"kill", "flush"}, SEED)
    promised(replace(Load(tuple(stack.apps), seed=SEED)), 12, faults)
