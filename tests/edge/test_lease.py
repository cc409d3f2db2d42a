"""An edge's cache lease while clients use up the edge's connections, and the warnings of an edge without a lease."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from testkit.edge_copy import copy_edge, replace_once
from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import Stack, children_of, run, running, wait_until
from velikiy.coherence.timing import LEASE_S

CONNECTIONS = 64


@pytest.fixture
def small_edge(tmp_path: Path) -> Path:
    """The code of an edge whose workers have few connections each."""
    home = copy_edge(tmp_path)
    replace_once(home / "nginx.conf", "worker_connections 8192;", f"worker_connections {CONNECTIONS};")
    return home


@pytest.fixture
def unreachable(stack: Stack) -> Iterator[str]:
    """An edge without a lease, because no app can reach it."""
    with running_edge(urlsplit(stack.app).netloc, EDGE_ADDRESS="192.0.2.1") as (
        edge,
        _,
    ):  # an address without a machine (RFC 5737)
        yield edge


def seconds_since_renewal(stack: Stack, edge: str) -> float:
    control = int(edge.rpartition(":")[2]) + 1
    [(seconds,)] = stack.sql(
        "SELECT extract(epoch FROM clock_timestamp() - renewed_at) FROM caches WHERE address LIKE %s", f"%:{control}"
    )
    return float(seconds)


def is_fenced(stack: Stack, edge: str) -> bool:
    control = int(edge.rpartition(":")[2]) + 1
    [(fenced,)] = stack.sql("SELECT fenced_at IS NOT NULL FROM caches WHERE address LIKE %s", f"%:{control}")
    return bool(fenced)


def is_hit(url: str) -> bool:
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"


def send_unfinished_requests(edge: str, crowd: ExitStack, count: int) -> None:
    for _ in range(count):
        with suppress(OSError):  # no connection is left
            client = crowd.enter_context(socket.create_connection(("127.0.0.1", urlsplit(edge).port), 5))
            client.sendall(b"GET /users/1 HTTP/1.1\r\nHost: localhost\r\nX-Half: ")


def test_edge_keeps_its_lease_while_clients_hold_all_connections(
    stack: Stack, small_edge: Path, new_user: dict[str, str]
) -> None:
    with running_edge(urlsplit(stack.app).netloc, small_edge) as (edge, data):
        url = f"{edge}/users/{new_user['id']}"
        wait_until(lambda: has_cache_lease(edge) and is_hit(url))
        with ExitStack() as crowd:
            send_unfinished_requests(edge, crowd, 2 * CONNECTIONS)
            log = Path(data) / "log"
            wait_until(lambda: "worker_connections are not enough" in log.read_text(), what="no connection is left")
            exhausted_at = time.monotonic()
            while time.monotonic() < exhausted_at + 2 * LEASE_S:
                send_unfinished_requests(edge, crowd, 4)  # Nginx has ended some meanwhile
                assert seconds_since_renewal(stack, edge) < LEASE_S
                time.sleep(0.1)
            # The edge acknowledges the drop, or it would be fenced and the write would wait for its exclusion.
            written = requests.put(new_user["url"], json={"name": "Meanwhile"}, timeout=5)
            assert written.status_code == 200
            assert not is_fenced(stack, edge)
        wait_until(lambda: is_hit(url), within=3)
        assert requests.get(url, timeout=5).json()["name"] == "Meanwhile"


def test_worker_for_drops_accepts_no_clients_and_comes_back(stack: Stack) -> None:
    with running_edge(urlsplit(stack.app).netloc, EDGE_WORKERS="2") as (edge, data):
        wait_until(lambda: has_cache_lease(edge))
        master = int((Path(data) / "nginx.pid").read_text())
        before = {pid for pid, command in children_of(master).items() if "worker process" in command}
        assert len(before) == 3
        os.kill(min(before), signal.SIGKILL)  # Nginx starts worker 0 first
        wait_until(lambda: len(set(children_of(master)) - before) == 1)
        wait_until(lambda: seconds_since_renewal(stack, edge) < 1, within=5)
        assert all(requests.get(f"{edge}/users/1", timeout=5).status_code == 200 for _ in range(20))
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: not before & set(children_of(master)), what="all workers are new")
        assert all(requests.get(f"{edge}/users/1", timeout=5).status_code == 200 for _ in range(20))
        wait_until(lambda: has_cache_lease(edge))
        assert "epoll_ctl" not in (Path(data) / "log").read_text()


def test_readyz_warns_of_an_edge_without_a_lease(unreachable: str) -> None:
    response = requests.get(f"{unreachable}/readyz", timeout=5)
    assert response.status_code == 200  # its responses are right, and only slower
    assert response.json()["checks"]["edge"] == "no lease"
    assert any("does not use its cache" in warning for warning in response.json()["warnings"])
    assert requests.get(f"{unreachable}/users/1", timeout=5).headers["X-Cache-Status"] == "BYPASS"


def test_readyz_reports_an_edge_with_a_lease_as_ok(stack: Stack) -> None:
    wait_until(lambda: has_cache_lease(stack.edge))
    body = requests.get(f"{stack.edge}/readyz", timeout=5).json()
    assert body["checks"]["edge"] == "ok"
    assert "warnings" not in body
    assert "edge" not in requests.get(f"{stack.app}/readyz", timeout=5).json()["checks"]


def test_readyz_ignores_the_edge_lease_header_of_a_client(stack: Stack) -> None:
    wait_until(lambda: has_cache_lease(stack.edge))
    body = requests.get(f"{stack.edge}/readyz", headers={"Edge-Lease": "none"}, timeout=5).json()
    assert body["checks"]["edge"] == "ok"


def test_status_names_the_edge_without_a_lease() -> None:
    # The second edge never gets a lease, because PostgreSQL refuses to write its row.
    with running("--edges", "2") as stack:
        stack.sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''refused''; END'"
        )
        control = stack.supervisor.plan.control_ports[1]
        stack.sql(
            "CREATE TRIGGER refuse BEFORE UPDATE OR INSERT ON caches FOR EACH ROW"
            f" WHEN (NEW.address LIKE '%%:{control}') EXECUTE FUNCTION refuse()"
        )
        wait_until(lambda: not has_cache_lease(stack.edges[1]), within=10)
        state = stack.refresh()
        assert (state["ready"], state["serves"]) == (False, True)
        [found] = [it for it in state["findings"] if it["name"] == "edge.no_lease"]
        assert found["where"] == "edge2"
        status = run("status", "--data", str(stack.data))
        assert status.returncode == 1
        assert "edge2: This edge has no cache lease" in status.stdout
