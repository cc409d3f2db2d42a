"""The load and the checker on a stack whose caches are out of play: what they find there would be their own mistakes."""

from collections.abc import Iterator

import pytest

from tests.coherence.faults import Faults
from tests.coherence.load import Load
from tests.coherence.soak import Soak
from tests.running import Stack, running

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def uncached() -> Iterator[Stack]:
    """Read at the apps, past the edges, with a Redis that is not there."""
    with running(REDIS_URL=NOWHERE) as stack:
        yield stack


@pytest.mark.parametrize("shared", [False, True])
def test_without_caches_nothing_is_wrong_whatever_is_killed(uncached: Stack, shared: bool) -> None:
    faults = Faults(uncached, {"kill", "kill-postgres"}, 1, every=1)
    load = Load(tuple(uncached.apps), seed=1, shared=shared, users=2 if shared else 8, writers=3)
    soak = Soak(load, across=True)
    for _ in soak.run(8, faults=faults):
        pass
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 500
    assert faults.done
