"""PostgreSQL fails over, by Patroni, under readers and writers whose every read is judged.

Apps and edges run on the same three hosts. Redis runs on the first host, which leads at the beginning.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from testkit.machine import root_only
from tests.consistency.history import Operation
from tests.consistency.load import Load
from tests.consistency.soak import Soak, progress
from tests.scale.patroni import Failover, Node, failover
from velikiy.coherence.timing import DROP_TIMEOUT_S, EXCLUSION_S

pytestmark = [pytest.mark.scale, pytest.mark.exclusive, root_only]

BACK_WITHIN_S = 2.0
"""Seconds from when another host takes writes until a write through an edge is acknowledged."""

FENCES_S = EXCLUSION_S + 3 * DROP_TIMEOUT_S
"""Seconds that the first write waits in addition if the caches of a host are cut off: Redis and an edge in turn do not
acknowledge, both are excluded, and the edges are invalidated again."""


@pytest.fixture(scope="module")
def service() -> Iterator[Failover]:
    with failover() as service:
        yield service


class Watched(Soak):
    """A load that notes when its writes were acknowledged."""

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self.acknowledged: list[float] = []

    def _take(self, operations: Iterable[Operation]) -> None:
        operations = list(operations)
        self.acknowledged += [
            it.returned / 1e9 for it in operations if it.outcome == "ok" and it.kind in ("create", "update", "delete")
        ]
        super()._take(operations)


def assert_promise_survives(
    service: Failover,
    seize: Callable[[Node], object],
    give_back: Callable[[Node], object],
    *,
    believes: bool = False,
    within: float = BACK_WITHIN_S,
) -> None:
    """Take the leader away and, some seconds after another host has taken over, give it back.

    Args:
        believes: Whether the old leader still takes writes at the end, as far as it knows.
        within: Seconds from when another host takes writes until one of the clients' writes is acknowledged.
    """
    old = service.leader()
    soak = Watched(Load(service.edges, seed=1, writers=4, readers=3, pace=0.02))
    over, failures, promoted = threading.Event(), [], []

    def fault() -> None:
        try:
            seize(old)
            service.successor(old)
            promoted.append(time.monotonic())
            time.sleep(FENCES_S + 8)  # no condition: that nothing goes wrong takes time to see
            if believes:
                assert old.takes_writes()
            give_back(old)
            service.leader()
            time.sleep(3)  # no condition, for the same reason
        except BaseException as error:
            failures.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=fault, daemon=True)
    for line in soak.run(120, every=1):
        print(line)
        if not thread.ident and soak.acknowledged:
            thread.start()
        if over.is_set():
            soak.began = -soak.seconds  # the run ends
    thread.join(10)
    if failures:
        raise failures[0]
    print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
    if soak.verdict.wrong:
        print(soak.verdict)
        from pathlib import Path

        for n in service.nodes:
            for f in ("patroni", "app"):
                Path(f"/tmp/log-{n.host.name}-{f}").write_text(n.host.log(f))
        print(
            time.strftime("%T"),
            old.host.name,
            [(n.host.name, n.has_role("primary"), n.takes_writes()) for n in service.nodes],
        )
    assert soak.verdict.wrong == 0, soak.verdict
    back = min(at for at in soak.acknowledged if at > promoted[0]) - promoted[0]
    print(f"writes are back {back:.2f} s after the promotion")
    assert back < within


def test_leader_that_is_cut_off_and_still_believes_serves_nothing_old(service: Failover) -> None:
    """Its Patroni hangs, so nothing demotes PostgreSQL, and clients still reach its app and its edge."""

    def seize(old: Node) -> None:
        old.host.signal(signal.SIGSTOP, "/usr/bin/patroni")
        service.cluster.isolate(old.host)

    def give_back(old: Node) -> None:
        service.cluster.mend()
        old.host.signal(signal.SIGCONT, "/usr/bin/patroni")

    assert_promise_survives(service, seize, give_back, believes=True, within=BACK_WITHIN_S + FENCES_S)


def test_leader_that_is_cut_off_loses_no_acknowledged_write(service: Failover) -> None:
    def seize(old: Node) -> None:
        service.cluster.isolate(old.host)

    assert_promise_survives(service, seize, lambda old: service.cluster.mend(), within=BACK_WITHIN_S + FENCES_S)


def test_leader_that_is_killed_loses_no_acknowledged_write(service: Failover) -> None:
    def seize(old: Node) -> None:
        old.host.kill("/usr/bin/patroni", "postgres")

    assert_promise_survives(service, seize, service.start_patroni)


def test_leader_without_its_patroni_is_left_by_every_app(service: Failover) -> None:
    """Every app reaches the old leader, which still takes connections, as well as the new one."""

    def seize(old: Node) -> None:
        old.host.kill("/usr/bin/patroni")

    assert_promise_survives(service, seize, service.start_patroni, believes=True)


def test_switchover_loses_no_acknowledged_write(service: Failover) -> None:
    assert_promise_survives(service, service.switch_over, lambda old: None)
