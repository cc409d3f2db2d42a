"""An edge's lease after clients have used up the edge's connections, and what it says while it has none."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, Stack, run, running, wait_until

CONNECTIONS = 64


@pytest.fixture
def small_edge(tmp_path: Path) -> Path:
    """The code of an edge whose single worker has few connections."""
    home = tmp_path / "edge"
    shutil.copytree(ROOT / "edge", home)
    (tmp_path / "velikiy/coherence/scripts").mkdir(parents=True)
    shutil.copy(ROOT / "velikiy/coherence/scripts/read.lua", tmp_path / "velikiy/coherence/scripts/read.lua")
    template = (home / "nginx.conf").read_text()
    assert template.count("worker_connections 4096;") == 1
    (home / "nginx.conf").write_text(template.replace("worker_connections 4096;", f"worker_connections {CONNECTIONS};"))
    return home


@pytest.fixture
def unreachable(stack: Stack) -> Iterator[str]:
    """An edge that no app can reach, and that gets no lease for that reason."""
    with running_edge(urlsplit(stack.app).netloc, EDGE_ADDRESS="192.0.2.1") as (edge, _):  # nobody's (RFC 5737)
        yield edge


def seconds_since_renewal(stack: Stack, edge: str) -> float:
    control = int(edge.rpartition(":")[2]) + 1
    [(seconds,)] = stack.sql(
        "SELECT extract(epoch FROM clock_timestamp() - renewed_at) FROM caches WHERE address LIKE %s", f"%:{control}"
    )
    return float(seconds)


def is_hit(url: str) -> bool:
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"


def test_edge_caches_again_after_clients_have_used_up_its_connections(stack: Stack, small_edge: Path) -> None:
    with running_edge(urlsplit(stack.app).netloc, small_edge) as (edge, _):
        url = f"{edge}/users/1"
        wait_until(lambda: has_cache_lease(edge) and is_hit(url))
        with ExitStack() as crowd:

            def exhausted() -> bool:
                # Again and again: a renewal that was under way gives its own connections back.
                for _ in range(8):
                    with suppress(OSError):  # nothing is left for it
                        client = crowd.enter_context(socket.create_connection(("127.0.0.1", urlsplit(edge).port), 5))
                        client.sendall(b"GET /users/1 HTTP/1.1\r\nHost: h\r\nX-Half: ")
                return seconds_since_renewal(stack, edge) > 3.5

            wait_until(exhausted, what="the lease has run out")
        wait_until(lambda: is_hit(url), within=5)


def test_readyz_names_an_edge_without_a_lease(unreachable: str) -> None:
    answer = requests.get(f"{unreachable}/readyz", timeout=5)
    assert answer.status_code == 200  # its answers are right, and only slower
    assert answer.json()["checks"]["edge"] == "no lease"
    assert any("does not use its cache" in warning for warning in answer.json()["warnings"])
    assert requests.get(f"{unreachable}/users/1", timeout=5).headers["X-Cache-Status"] == "BYPASS"


def test_readyz_says_of_an_edge_with_a_lease_that_it_is_ok(stack: Stack) -> None:
    wait_until(lambda: has_cache_lease(stack.edge))
    body = requests.get(f"{stack.edge}/readyz", timeout=5).json()
    assert body["checks"]["edge"] == "ok"
    assert "warnings" not in body
    assert "edge" not in requests.get(f"{stack.app}/readyz", timeout=5).json()["checks"]


def test_a_client_cannot_say_what_lease_an_edge_has(stack: Stack) -> None:
    wait_until(lambda: has_cache_lease(stack.edge))
    body = requests.get(f"{stack.edge}/readyz", headers={"Edge-Lease": "none"}, timeout=5).json()
    assert body["checks"]["edge"] == "ok"


def test_status_repeats_the_warnings_of_each_edge() -> None:
    # The second edge never gets its lease: its row is not written.
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
        assert state["ready"]
        assert len(state["warnings"]) == 1
        assert state["warnings"][0].startswith(f"{stack.edges[1]}: This edge has no cache lease")
        said = run("status", "--data", str(stack.data))
        assert said.returncode == 0
        assert said.stdout.startswith("ready, with warnings\n")
