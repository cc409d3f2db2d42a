"""The scrape target of a whole stack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from testkit.metrics import Scrape, scrape, target_of
from testkit.stack import ROOT, Stack, children_of, folder, free_ports, refused, run, status_of, wait_until
from velikiy import metrics

COUNTING = """
import sys
from velikiy import metrics
metrics.DROP_ROUNDS.inc(int(sys.argv[1]))
metrics.RELAYS_LISTENING.set(1)
metrics.serve()
print("counted", flush=True)
sys.stdin.read()
"""


def start_counting(number: int, path: Path, **environment: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(number)],
        cwd=ROOT,
        env={**os.environ, metrics.FOLDER_VARIABLE: str(path), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "counted\n"
    return process


def totals(path: Path) -> tuple[float, float]:
    samples = [sample for family in metrics.Collector(path).collect() for sample in family.samples]
    values = {sample.name: sample.value for sample in samples}
    return values["velikiy_drop_rounds_total"], values.get("velikiy_relays_listening", 0)


def test_target_adds_up_the_requests_of_all_edges_and_apps(stack: Stack) -> None:
    before = scrape(stack)
    for edge in stack.edges:
        for _ in range(3):
            assert requests.get(f"{edge}/users/1", timeout=5).status_code == 200
    for app in stack.apps:
        assert requests.get(f"{app}/users/2", timeout=5).status_code == 200
        assert requests.get(f"{app}/users/999999", timeout=5).status_code == 404

    def counted() -> bool:  # the workers of an edge add up each second
        after = scrape(stack)

        def new(name: str, **labels: str) -> float:
            return after.value(name, **labels) - before.value(name, **labels)

        return (
            new("velikiy_edge_requests_total", route="/users/{id}", method="GET", code="200") == 6
            and new("velikiy_edge_request_duration_seconds_count", route="/users/{id}") == 6
            and new("velikiy_app_requests_total", route="/users/{id}", code="404") == 2
            and new("velikiy_app_requests_total", route="/users/{id}", code="200") >= 2
        )

    wait_until(counted, within=10)
    assert {sample.labels["edge"] for sample in scrape(stack).samples if sample.name == "velikiy_edge_up"} == {
        "edge1",
        "edge2",
    }


def test_write_counts_a_drop_and_its_round_and_each_edge_that_acknowledges(
    stack: Stack, new_user: dict[str, str]
) -> None:
    before = scrape(stack)
    changed = {"name": "Changed", "email": new_user["email"]}
    assert requests.put(new_user["url"], json=changed, timeout=5).status_code == 200

    def counted() -> bool:
        after = scrape(stack)
        names = ("velikiy_drop_duration_seconds_count", "velikiy_drop_rounds_total", "velikiy_edge_drops_total")
        return [after.value(name) - before.value(name) for name in names] == [1, 1, len(stack.edges)]

    wait_until(counted, within=10)


def test_state_of_caches_leases_pools_threads_and_memory_is_reported(stack: Stack) -> None:
    def complete() -> bool:
        now = scrape(stack)
        return (
            now.value("velikiy_caches", kind="edge", state="registered") == 2
            and now.value("velikiy_caches", kind="redis", state="registered") == 1
            and now.value("velikiy_edge_lease_held") == 2
            and now.value("velikiy_relays_listening") == 1
            and now.value("velikiy_redis_up") == 1
            and now.value("velikiy_redis_memory_bytes") > 0
            and now.value("velikiy_app_threads") == 2 * 2 * 8
            and now.value("velikiy_pool_connections", pool="reads") > 0
            and now.value("velikiy_edge_memory_bytes", store="small") > 0
            and now.value("velikiy_process_memory_bytes", process="app1") > 0
        )

    wait_until(complete, within=10)


def test_any_number_of_paths_makes_no_further_series(stack: Stack) -> None:
    def visit(number: int) -> None:
        for base in (stack.edge, stack.app):
            for path in (f"/users/{number}", f"/users/{number}/x", f"/any{number}", f"/users?limit={number}"):
                requests.get(f"{base}{path}", timeout=5)
        requests.request(f"M{number}X", stack.edge, timeout=5)

    def unknown() -> float:
        return scrape(stack).value("velikiy_edge_requests_total", route="(other)")

    before = unknown()
    for number in range(9101, 9106):
        visit(number)
    wait_until(lambda: unknown() >= before + 10, within=10)
    series = {str(sorted(sample.labels.items())) for sample in scrape(stack).samples}
    assert not [labels for labels in series if "910" in labels]


def test_clients_do_not_reach_the_metrics(stack: Stack) -> None:
    for base in (*stack.edges, *stack.apps):
        assert status_of(f"{base}/metrics") == 404
        assert status_of(f"{base}/.metrics") == 404
    assert target_of(stack).startswith("http://127.0.0.1:")
    assert stack.refresh()["metrics"] == target_of(stack)


def test_port_of_the_target_that_is_in_use_is_refused(stack: Stack) -> None:
    with folder() as data:
        message = refused("up", "--detach", "--data", str(data / "new"), METRICS_PORT=stack.port)
    assert f"METRICS_PORT={stack.port}" in message
    assert "in use" in message


class TestFiles:
    def test_processes_that_follow_each_other_count_in_the_same_files(self) -> None:
        with folder() as path:
            for _ in range(3):
                start_counting(5, path).communicate()
            assert totals(path) == (15, 0)
            assert len(list(path.glob("counter_*.db"))) == 1

    def test_processes_at_the_same_time_are_added_up_and_the_state_of_a_dead_process_disappears(self) -> None:
        with folder() as path:
            first, second = start_counting(1, path), start_counting(2, path)
            assert totals(path) == (3, 2)
            first.kill()
            first.communicate()
            assert totals(path) == (3, 1)
            second.communicate()
            assert totals(path) == (3, 0)

    def test_container_serves_the_metrics_of_its_processes(self) -> None:
        port = free_ports(1)
        with folder() as path:
            other = start_counting(2, path)
            process = start_counting(1, path, METRICS_LISTEN=f"127.0.0.1:{port}")
            wait_until(lambda: status_of(f"http://127.0.0.1:{port}/metrics"))
            assert Scrape(f"http://127.0.0.1:{port}/metrics").value("velikiy_drop_rounds_total") == 3
            process.communicate()
            other.communicate()

    def test_process_without_memory_for_its_files_works_and_counts_for_itself(self) -> None:
        with folder() as path:
            (path / "not a folder").touch()
            start_counting(1, path / "not a folder").communicate()


@pytest.mark.parametrize("name", ["velikiy_app_requests_total", "velikiy_edge_requests_total"])
def test_metrics_have_a_description_and_a_type(stack: Stack, name: str) -> None:
    families = {family.name: family for family in Scrape(target_of(stack)).families}
    assert families[name.removesuffix("_total")].documentation
    assert families[name.removesuffix("_total")].type == "counter"


@pytest.mark.long
def test_restarts_are_counted(own_stack: Stack) -> None:
    own_stack.supervisor.rpc.signalProcess("relay", "KILL")
    wait_until(lambda: scrape(own_stack).value("velikiy_process_starts_total", process="relay") == 2)
    worker = next(iter(children_of(own_stack.pids()["app1"])))
    before = scrape(own_stack).value("velikiy_app_worker_starts_total")
    os.kill(worker, 9)
    wait_until(lambda: scrape(own_stack).value("velikiy_app_worker_starts_total") == before + 1)
    # The new worker counts on where the killed worker has stopped, so no count becomes smaller.
    wait_until(lambda: scrape(own_stack).value("velikiy_app_threads") == 2 * 2 * 8)


@pytest.mark.long
def test_stack_without_metrics_has_no_target(own_stack: Stack) -> None:
    target = target_of(own_stack)
    changed = run("up", "--detach", "--data", str(own_stack.data), METRICS="off")
    assert changed.returncode == 0, changed.stderr
    assert status_of(target) == 0
    assert "metrics" not in own_stack.pids()
    assert requests.get(f"{own_stack.edge}/users/1", timeout=5).status_code == 200
