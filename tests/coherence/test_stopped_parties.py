"""A party that stops or is slow costs the others little, and is replaced or taken out of use."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from testkit.api import is_hit, timed
from testkit.failpoints import lease_ms
from testkit.outages import is_recovered, pids_of, stopped
from testkit.stack import Stack, children_of, running, wait_until
from velikiy.coherence.timing import SLOW_S

MAX_STALL_S = 1.0
"""The longest stall that a stopped worker may cause."""

ON_A_BUSY_MACHINE_S = 0.5


@pytest.fixture(
    scope="module", params=["epoll", pytest.param("gthread", marks=[pytest.mark.plain_worker, pytest.mark.long])]
)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running("--edges", "2", "--apps", "2", EDGE_TTL="1", APP_WORKER_CLASS=request.param) as stack:
        yield stack


def put(edge: str, name: str) -> tuple[float, int]:
    seconds, response = timed(lambda: requests.put(f"{edge}/users/1", json={"name": name}, timeout=20))
    return seconds, response.status_code


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_stopped_worker_of_an_app_costs_a_request_at_most_a_second_and_is_replaced(stack: Stack) -> None:
    urls = [f"{edge}/users?limit={number}" for number in range(1, 40) for edge in stack.edges]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(requests.get, urls))  # the edges have connections to every worker
        worker = next(iter(children_of(stack.pids()["app1"])))
        with stopped([worker]):
            reads = list(pool.map(lambda url: timed(lambda: requests.get(f"{url}&sort=name", timeout=20)), urls))
            writes = list(pool.map(lambda n: put(stack.edges[n % 2], f"Writer {n}"), range(8)))
            wait_until(lambda: has_ended(worker), within=3)
    assert {response.status_code for _, response in reads} == {200}
    assert max(seconds for seconds, _ in reads) < MAX_STALL_S + ON_A_BUSY_MACHINE_S
    assert {status for _, status in writes} <= {200, 502}  # 502: the outcome is unknown
    assert max(seconds for seconds, _ in writes) < MAX_STALL_S + ON_A_BUSY_MACHINE_S
    assert "A stopped worker is killed" in stack.log("app1")
    wait_until(lambda: len(children_of(stack.pids()["app1"])) == 2)


def test_stopped_workers_of_an_edge_are_replaced_before_its_lease_ends(stack: Stack) -> None:
    wait_until(lambda: is_hit(f"{stack.edges[1]}/users/2"))
    workers = list(children_of(stack.pids()["edge2"]))
    for worker in (workers[0], workers[-1]):  # one of them accepts drops and renews the lease
        lost = []
        with stopped([worker]):
            until = time.monotonic() + 4
            while time.monotonic() < until:
                lost.append(lease_ms(stack.edges[1]) == 0)
                time.sleep(0.1)
            assert has_ended(worker)
        assert not any(lost)
    assert stack.log("edge2").count("a stopped worker is killed") == 2


def test_apps_that_hang_cost_a_stored_response_no_more_than_a_second_and_a_half(stack: Stack) -> None:
    url = f"{stack.edge}/users/3"
    wait_until(lambda: is_hit(url))
    with stopped([*pids_of(stack, "app1"), *pids_of(stack, "app2")]):
        time.sleep(2.5)  # the lease ends, and the entry is older than EDGE_TTL
        found = [timed(lambda: requests.get(url, timeout=20)) for _ in range(4)]
    since = time.time()
    assert {response.headers["X-Cache-Status"] for _, response in found} == {"STALE"}
    assert max(seconds for seconds, _ in found) < 1.5 + ON_A_BUSY_MACHINE_S / 5
    wait_until(lambda: is_recovered(stack, since))


@contextmanager
def pausing(pids: list[int]) -> Iterator[None]:
    """Stop these processes for 0.3 s again and again."""
    over = threading.Event()

    def pause() -> None:
        while not over.is_set():
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            over.wait(0.03)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_edge_that_pauses_again_and_again_is_taken_out_of_use_and_comes_back_after_a_pause(stack: Stack) -> None:
    control = stack.supervisor.plan.control_ports[1]

    def is_in_use() -> bool:
        return bool(stack.sql("SELECT 1 FROM caches WHERE address = %s AND fenced_at IS NULL", f"127.0.0.1:{control}"))

    durations: list[float] = []
    with pausing(pids_of(stack, "edge2")):
        until = time.monotonic() + 25
        while time.monotonic() < until and (is_in_use() or len(durations) < 5):
            durations.append(put(stack.edge, f"Name {len(durations)}")[0])
        slow = [seconds for seconds in durations if seconds > SLOW_S]
        assert not is_in_use(), durations
        assert max(durations) < 1  # it has acknowledged, so no write waits for its exclusion
        assert len(slow) < 16
        wait_until(lambda: "cache.slow" in stack.log("app1") + stack.log("app2"))
    wait_until(is_in_use, within=20)
