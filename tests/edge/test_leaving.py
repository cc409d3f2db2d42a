"""The state of an edge as an orchestrator sees it, and an edge that leaves before it is stopped."""

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from testkit.api import is_hit
from testkit.failpoints import has_cache_lease, running_edge
from testkit.inside import control_listener
from testkit.outages import hanging
from testkit.stack import ROOT, Stack, has_ended, running, wait_until
from testkit.tcp_proxy import ProxiedConnection, tcp_proxy


def readiness(edge: str) -> tuple[int, str]:
    response = requests.get(f"{control_listener(edge)}/readyz", timeout=5)
    return response.status_code, response.text


def is_registered(stack: Stack, edge: str) -> bool:
    control = control_listener(edge).rpartition(":")[2]
    return bool(stack.sql("SELECT 1 FROM caches WHERE address LIKE %s", f"%:{control}"))


@pytest.fixture
def leaving(stack: Stack, new_user: dict[str, str]) -> Iterator[tuple[str, str, "subprocess.Popen[bytes]"]]:
    """An edge that is about to leave, a user that it has cached, and the command that lets it leave."""
    with running_edge(urlsplit(stack.app).netloc) as (edge, data):
        wait_until(lambda: has_cache_lease(edge))
        user = f"{edge}/users/{new_user['id']}"
        wait_until(lambda: requests.get(user, timeout=5).headers["X-Cache-Status"] == "HIT")
        Path(data).chmod(0o777)  # the workers of root's Nginx are another user, and remove a file there
        yield edge, user, subprocess.Popen([ROOT / "edge/leave", "1"], env={"PATH": "/bin:/usr/bin", "EDGE_DATA": data})


def test_leaving_edge_closes_connections_first_and_gives_its_lease_up_then(
    stack: Stack, leaving: tuple[str, str, "subprocess.Popen[bytes]"], new_user: dict[str, str]
) -> None:
    edge, user, command = leaving
    wait_until(lambda: readiness(edge) == (503, "leaving"))
    # Clients that are left still get hits: without the cache they would load the apps at once.
    wait_until(lambda: requests.get(user, timeout=5).headers.get("Connection") == "close", within=1)
    assert requests.get(user, timeout=5).headers["X-Cache-Status"] == "HIT"
    wait_until(lambda: not is_registered(stack, edge), within=5)
    assert not has_cache_lease(edge)
    assert command.wait(10) == 0
    began = time.monotonic()
    assert requests.put(new_user["url"], json={"name": "After the edge"}, timeout=5).status_code == 200
    assert time.monotonic() - began < 1, "a write waited for an edge that has resigned"
    response = requests.get(user, timeout=5)
    assert (response.json()["name"], response.headers["X-Cache-Status"]) == ("After the edge", "BYPASS")
    time.sleep(1.5)  # longer than the pause between two renewals
    assert not has_cache_lease(edge), "an edge that has resigned registered again"


def test_stopped_edge_that_has_left_delays_no_write(
    stack: Stack, leaving: tuple[str, str, "subprocess.Popen[bytes]"], new_user: dict[str, str]
) -> None:
    _, _, command = leaving
    took = []
    while command.poll() is None:  # writes go on during each step of the edge
        began = time.monotonic()
        assert requests.put(new_user["url"], json={"name": f"{began}"}, timeout=5).status_code == 200
        took.append(time.monotonic() - began)
    assert len(took) > 10
    assert max(took) < 1


def test_edge_is_alive_and_ready_for_an_orchestrator_without_a_signature(stack: Stack) -> None:
    with running_edge(urlsplit(stack.app).netloc) as (edge, _):
        wait_until(lambda: readiness(edge) == (200, "ready"))
        assert requests.get(f"{control_listener(edge)}/livez", timeout=5).text == "alive"
        assert requests.get(f"{control_listener(edge)}/show", timeout=5).status_code == 401


def test_edge_that_no_app_reaches_is_alive_and_not_ready(stack: Stack) -> None:
    with running_edge(urlsplit(stack.app).netloc, EDGE_ADDRESS="192.0.2.1") as (edge, _):
        time.sleep(0.5)
        assert readiness(edge) == (503, "no cache lease")
        assert requests.get(f"{control_listener(edge)}/livez", timeout=5).status_code == 200


def test_renewal_that_returns_after_the_edge_has_resigned_grants_nothing(
    stack: Stack, new_user: dict[str, str]
) -> None:
    resigned, held_back = threading.Event(), threading.Event()

    def hold_renewals_back(connection: ProxiedConnection, data: bytes) -> bytes:
        if line.requests and any(b"/.lease/resign" in it for it in line.requests[-4:]):
            resigned.set()
        elif armed.is_set() and not held_back.is_set():
            held_back.set()
            resigned.wait(0.7)  # the edge gives up after 0.8 s
        return data

    armed = threading.Event()
    with (
        tcp_proxy(("127.0.0.1", urlsplit(stack.app).port or 0)) as line,
        running_edge(f"127.0.0.1:{line.port}") as (
            edge,
            data,
        ),
    ):
        line.on_reply = hold_renewals_back
        wait_until(lambda: has_cache_lease(edge))
        armed.set()
        wait_until(held_back.is_set)
        Path(data).chmod(0o777)
        subprocess.run([ROOT / "edge/leave", "0"], env={"PATH": "/bin:/usr/bin", "EDGE_DATA": data}, check=True)
        assert resigned.is_set()
        assert not has_cache_lease(edge)
        assert not is_registered(stack, edge)
        assert requests.put(new_user["url"], json={"name": "Later"}, timeout=5).status_code == 200
        response = requests.get(f"{edge}/users/{new_user['id']}", timeout=5)
        assert (response.json()["name"], response.headers["X-Cache-Status"]) == ("Later", "BYPASS")


@pytest.mark.scale
def test_edge_stays_ready_while_postgresql_is_away_and_not_while_it_reaches_no_app() -> None:
    with running("--apps", "1") as stack, running_edge(urlsplit(stack.app).netloc) as (edge, _):
        created = requests.post(f"{edge}/users", json={"name": "Ann", "email": "ann@example.com"}, timeout=5).json()
        user = f"{edge}/users/{created['id']}"
        wait_until(lambda: requests.get(user, timeout=5).headers["X-Cache-Status"] == "HIT")
        with hanging(stack, "postgres"):
            wait_until(lambda: not has_cache_lease(edge), within=5)
            assert {readiness(edge) for _ in range(50)} == {(200, "ready, without PostgreSQL")}
            assert requests.get(user, timeout=5).headers["X-Cache-Status"] == "STALE"
        wait_until(lambda: has_cache_lease(edge))
        stack.supervisor.rpc.stopProcess("app1")
        # The edge cannot know whether other edges reach an app, so they serve its clients.
        wait_until(lambda: readiness(edge) == (503, "no cache lease"), within=10)


def test_container_of_an_edge_leaves_first_and_refuses_connections_before_it_ends(
    stack: Stack, new_user: dict[str, str]
) -> None:
    with running_edge(urlsplit(stack.app).netloc, program="container") as (edge, data):
        url = f"{edge}/users/{new_user['id']}"
        wait_until(lambda: has_cache_lease(edge) and is_hit(url))
        assert requests.get(f"{edge}/readyz", timeout=5).status_code == 200
        container = psutil.Process(int((Path(data) / "nginx.pid").read_text())).parent()
        assert container
        Path(data).chmod(0o777)
        container.terminate()
        wait_until(lambda: requests.get(url, timeout=5).headers["Connection"] == "close")
        readiness = requests.get(f"{edge}/readyz", timeout=5)
        assert (readiness.status_code, readiness.json()["checks"]["edge"]) == (503, "leaving")
        wait_until(lambda: not is_registered(stack, edge), within=8)
        began = time.monotonic()
        assert requests.put(f"{stack.app}/users/{new_user['id']}", json={"name": "Left"}, timeout=10).ok
        assert time.monotonic() - began < 1  # no writer waits for this edge
        wait_until(lambda: has_ended(container))
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)
