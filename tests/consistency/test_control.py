"""The load and the checker themselves. On a stack whose caches are out of play, what they find would be their own
mistakes; in a design that is known to be wrong, what they do not find would be."""

from collections.abc import Iterator

import pytest

from bench.classic.stack import classic
from testkit.stack import Stack, running, status_of, wait_until
from tests.consistency.faults import Faults
from tests.consistency.load import Load
from tests.consistency.soak import Soak

pytestmark = pytest.mark.exclusive

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def uncached() -> Iterator[Stack]:
    """Read at the apps, past the edges, with a Redis that is not there."""
    with running(REDIS_URL=NOWHERE) as stack:
        yield stack


@pytest.mark.parametrize("shared", [False, True])
def test_without_caches_nothing_is_wrong_whatever_is_killed(uncached: Stack, shared: bool) -> None:
    faults = Faults(uncached, {"kill", "kill-postgres"}, 1, every=1)
    # What the case before has killed last may not be back.
    wait_until(lambda: all(status_of(f"{app}/users/count") == 200 for app in uncached.apps))
    load = Load(tuple(uncached.apps), seed=1, shared=shared, users=2 if shared else 8, writers=3)
    soak = Soak(load, across=True)
    for _ in soak.run(8, faults=faults):
        pass
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 500
    assert faults.done


def test_in_the_classic_design_wrong_reads_are_found_within_seconds() -> None:
    with classic(edges=2) as edges:
        soak = Soak(Load(tuple(edges), seed=1))
        for _ in soak.run(6):
            pass
    assert soak.verdict.stale > 0, soak.verdict
    # It is late with what is true, and shows nothing else: else it would be no peer but a broken program.
    assert soak.verdict.impossible == 0, soak.verdict
