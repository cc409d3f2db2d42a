"""The promise while Redis fails over or moves its slots: readers and writers go on, and the checker judges every read."""

import signal
import threading
import time
from collections.abc import Callable
from itertools import cycle

import pytest
import requests

from testkit.redis_cluster import NODE_TIMEOUT_MS, cluster, program_path, replicas, sentinels
from testkit.stack import Stack, run, running, wait_until
from tests.consistency.load import Load
from tests.consistency.soak import Soak, progress
from velikiy.coherence.redis_servers import RedisServers
from velikiy.coherence.shards import ShardMap, slot_of
from velikiy.coherence.timing import EXCLUSION_S

pytestmark = [pytest.mark.exclusive, pytest.mark.scale, pytest.mark.timeout(400)]

RECOVERY_S = NODE_TIMEOUT_MS / 1000 + 2 + EXCLUSION_S + 6
"""Seconds until a killed primary has a successor, and until the relay has registered it: it looks each second, waits for
the exclusion, and lets the cluster settle. Twice the usual time, for a slow machine."""


class Scenario:
    """Runs a function beside a soak, as faults are injected."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.over = threading.Event()
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        if self._thread.is_alive():
            self._thread.join()
        if self._error:
            raise self._error


def in_use(stack: Stack) -> ShardMap | None:
    [(address, fenced)] = stack.sql("SELECT address, fenced_at IS NOT NULL FROM caches WHERE name = 'redis'")
    return ShardMap.parse(address) if address and not fenced else None


def places(stack: Stack) -> set[str]:
    """Return where the servers are that are in use; none while Redis is out of use."""
    shards = in_use(stack)
    return {it.place for it in shards.servers} if shards else set()


def assert_promise_holds(stack: Stack, act: Callable[[], None], seconds: float) -> None:
    wait_until(lambda: places(stack), within=60)
    soak = Soak(Load(tuple(stack.edges), seed=1, pace=0.02))
    for _ in soak.run(seconds, faults=Scenario(act)):
        pass
    print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 50 * seconds
    assert soak.verdict.writes["ok"] > seconds
    wait_until(lambda: is_redis_hit(stack), within=60)


def is_redis_hit(stack: Stack) -> bool:
    return "redis; hit" in requests.get(f"{stack.app}/users/count", timeout=10).headers["Cache-Status"]


def timed(what: str, condition: Callable[[], object], within: float) -> None:
    began = time.monotonic()
    wait_until(condition, within=within, what=what)
    print(f"{what}: {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("program", ["redis-server", "valkey-server"])
def test_killed_primary_and_planned_failovers_cost_no_wrong_read(program: str) -> None:
    if not program_path(program):
        pytest.skip(f"{program} is not installed")
    with cluster(3, 1, program=program) as nodes, running("--edges", "2", REDIS_URL=nodes.url) as stack:

        def act() -> None:
            time.sleep(4)
            killed = nodes.owner(slot_of("all_users"))
            killed.kill()
            timed(
                "in use without the killed primary",
                lambda: places(stack) and killed.place not in places(stack),
                RECOVERY_S,
            )
            time.sleep(4)
            killed.start()
            wait_until(lambda: killed.client.info("replication").get("master_link_status") == "up", within=30)
            for _ in range(2):  # to the node that was killed, and back
                time.sleep(3)
                [replica] = [node for node in nodes.nodes if not node.is_primary and node.owns_with(killed)]
                replica.cluster("FAILOVER")
                timed("in use after a planned failover", lambda it=replica: it.place in places(stack), RECOVERY_S)  # type: ignore[misc]

        assert_promise_holds(stack, act, 50)
        assert run("redis", "--data", str(stack.data), "PING").stdout == "PONG\n"
        assert "redis" in run("velikiy", "cache", "show", "/users/count", DATA=str(stack.data)).stdout


def test_slots_that_move_under_load_cost_no_wrong_read() -> None:
    with cluster(3) as nodes, running("--edges", "2", REDIS_URL=nodes.url) as stack:

        def act() -> None:
            time.sleep(4)
            slots = [slot_of("all_users"), slot_of("count_users"), *(slot_of(f"user:{n}") for n in range(1, 15))]
            end = time.monotonic() + 20
            for slot, target in zip(cycle(slots), cycle(nodes.nodes[number] for number in (0, 1, 2, 1)), strict=False):
                if time.monotonic() > end:
                    break
                if nodes.owner(slot) is not target:
                    nodes.move_slots([slot], target, pause=0.2)
            found = RedisServers(nodes.url, 1).discover()
            timed("in use after the last slot has moved", lambda: (it := in_use(stack)) and it.id == found.id, 30)
            time.sleep(4)

        assert_promise_holds(stack, act, 45)


def test_primary_that_hangs_and_is_replaced_by_sentinels_costs_no_wrong_read() -> None:
    """The old primary continues after its successor is in use, with data from before, and becomes its replica."""
    with replicas(2) as nodes, sentinels(nodes[0], "main") as watchers:
        hosts = ",".join(node.place for node in watchers)
        with running("--edges", "2", REDIS_URL=f"redis+sentinel://{hosts}/main/0") as stack:

            def act() -> None:
                for _ in range(2):
                    time.sleep(4)
                    [primary] = [node for node in nodes if node.place in places(stack)]
                    primary.send_signal(signal.SIGSTOP)
                    try:
                        timed(
                            "in use after the primary hung",
                            lambda it=primary: places(stack) and it.place not in places(stack),  # type: ignore[misc]
                            RECOVERY_S + 10,
                        )
                    finally:
                        primary.send_signal(signal.SIGCONT)
                    wait_until(lambda it=primary: not it.is_primary, within=30)  # type: ignore[misc]

            assert_promise_holds(stack, act, 60)
