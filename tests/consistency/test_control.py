"""Control experiments for the load and the checker. On a stack without caches, a wrong read would be a mistake of the
load or the checker. In a design that is known to be wrong, the checker must find wrong reads."""

from collections.abc import Iterator

import pytest

from bench.cache_aside.stack import cache_aside
from testkit.stack import Stack, running, status_of, wait_until
from tests.consistency.faults import Faults
from tests.consistency.load import Load
from tests.consistency.soak import Soak

pytestmark = pytest.mark.exclusive

UNREACHABLE_REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def uncached() -> Iterator[Stack]:
    """Start a stack that is read at its apps, past the edges, with a Redis that does not exist."""
    with running(REDIS_URL=UNREACHABLE_REDIS) as stack:
        yield stack


@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.long), True])
def test_stack_without_caches_has_no_wrong_read_while_processes_are_killed(uncached: Stack, shared: bool) -> None:
    faults = Faults(uncached, {"kill", "kill-postgres"}, 1, every=1)
    # A process that the case before has killed may still be starting.
    wait_until(lambda: all(status_of(f"{app}/users/count") == 200 for app in uncached.apps))
    load = Load(tuple(uncached.apps), seed=1, shared=shared, users=2 if shared else 8, writers=3)
    soak = Soak(load, across=True)
    for _ in soak.run(8, faults=faults):
        pass
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 500
    assert faults.done


def test_checker_finds_stale_reads_in_a_cache_aside_service_within_seconds() -> None:
    with cache_aside(edges=2) as edges:
        soak = Soak(Load(tuple(edges), seed=1))
        for _ in soak.run(6):
            pass
    assert soak.verdict.stale > 0, soak.verdict
    # Stale reads are late but true. An impossible read would show that the peer is broken, and not only stale.
    assert soak.verdict.impossible == 0, soak.verdict
