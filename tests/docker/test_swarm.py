"""Docker Swarm: deploy/swarm/stack.yml on two nodes, with readers and writers outside all nodes.

The tests share one stack, and each leaves it running on both nodes. No read may be wrong, whatever happens. No request
may fail that an edge could answer: a request counts as failed if an edge accepted the connection and answered 5xx or not
at all. A refused connection leads a client to another edge.

When a node is lost, the outcome of the writes that were on their way to it is unknown, and PostgreSQL keeps their rows
locked for some seconds (velikiy/postgres/database.py:IDLE_S). So writes may fail for that long, and reads may not.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import requests

from testkit.certificates import Authority
from tests.consistency.checker import Checker
from tests.consistency.history import FOREVER, Operation
from tests.consistency.load import Load, Running
from tests.consistency.soak import progress

from .engine import Engine, Say
from .swarm import PORT, SERVICES, Node, Swarm, swarm

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(900)]

HTTPS_PORT = PORT + 1

LOST_WRITES_S = 20.0
"""Seconds for which writes may fail after a node is lost: rows of lost writers are locked, and one write waits until the
lost edge is excluded."""

START_LIMIT_S = 240.0
"""Seconds in which tasks start, also on a busy machine."""

SECRETS = {
    "postgres": ["app_password", "owner_password", "postgres_password"],
    "redis": ["redis.conf", "redis_password"],
    "app": ["database_url", "edge_secret", "redis_url"],
    "relay": ["database_url", "edge_secret", "redis_url"],
    "edge": ["edge_secret", "redis_url"],
}


@pytest.fixture(scope="module")
def deployed(engine: Engine, say: Say, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swarm, Path]]:
    with swarm(say, tmp_path_factory.mktemp("swarm")) as (formed, checkout):
        yield formed, checkout


@pytest.fixture
def stack(deployed: tuple[Swarm, Path]) -> Swarm:
    deployed[0].wait_until_ready()
    return deployed[0]


class Traffic:
    """Readers and writers through every edge, and what became of their requests."""

    def __init__(self, stack: Swarm) -> None:
        self.stack = stack
        self.checker = Checker()
        self.operations: list[Operation] = []
        urls = tuple(node.url for node in stack.nodes)
        # As long as an edge waits: for a lost app, before it tries another; for the exclusion of a lost edge.
        self._load = Load(urls, seed=1, writers=2, readers=2, pace=0.02, read_timeout=14.0, write_timeout=14.0)

    def _take(self, operations: "list[Operation]") -> None:
        for operation in operations:
            self.checker.add(operation)
            self.operations.append(operation)

    @contextmanager
    def flowing(self) -> Iterator["Traffic"]:
        """Send requests during the block, and for some seconds before and after it. Then no read was wrong."""
        running = Running(
            self._load,
            lambda operations: self._take(list(operations)),
            lambda complete: self.checker.advance(complete - 10**9),
        )
        ended = threading.Event()

        def pump() -> None:
            while not ended.is_set():
                running.pump(0.5)

        pumping = threading.Thread(target=pump)
        running.start()
        pumping.start()
        began = time.monotonic()
        try:
            time.sleep(2)
            yield self
            time.sleep(2)
        finally:
            ended.set()
            pumping.join()
            try:
                running.stop()
                self.checker.advance(FOREVER)
            finally:
                running.end()
        verdict = self.checker.verdict
        seconds = time.monotonic() - began
        print(progress(seconds, verdict, verdict.reads / seconds))
        for operation in self.failed()[:10]:
            print(operation)
        assert verdict.wrong == 0, verdict
        assert verdict.reads > 5 * seconds
        assert verdict.writes["ok"] > seconds / 2

    def failed(self, *nodes: Node) -> list[Operation]:
        """Return the requests that the edges of these nodes accepted and did not answer, or answered 5xx."""
        edges = {f"edge{self.stack.nodes.index(node) + 1}" for node in nodes or self.stack.nodes}
        return [it for it in self.operations if it.edge in edges and (it.outcome == "unknown" or it.status >= 500)]

    def stale(self) -> list[Operation]:
        return [it for it in self.operations if it.tier == "STALE"]


def assert_none_failed(traffic: Traffic) -> None:
    failed = traffic.failed()
    assert not failed, f"{len(failed)} requests failed: {failed[:5]}"


def assert_only_writes_failed(traffic: Traffic, node: Node, since: int) -> None:
    """Check the requests through this node after another node was lost at `since` (monotonic nanoseconds)."""
    failed = traffic.failed(node)
    reads = [it for it in failed if it.kind in ("read", "list")]
    assert not reads, f"{len(reads)} reads failed: {reads[:5]}"
    late = [it for it in failed if it.invoke > since + LOST_WRITES_S * 1e9]
    assert not late, f"{len(late)} writes failed late: {late[:5]}"
    print(f"{len(failed)} writes through the other edge failed after the loss")


def edges(stack: Swarm) -> int:
    return int(stack.sql("SELECT count(*) FROM caches WHERE kind = 'edge' AND fenced_at IS NULL"))


def wait_until_apps_run(stack: Swarm, number: int) -> None:
    stack.wait_until(lambda: len(stack.running("app")) == number, f"{number} apps run", limit=START_LIMIT_S)


def spread(stack: Swarm) -> None:
    """Put an app on each node: Docker leaves tasks where they are when a node comes back."""
    for number in (1, 2):
        stack.service("scale", "--detach", f"velikiy_app={number}")
        wait_until_apps_run(stack, number)
    stack.wait_until(
        lambda: all(node.container("app") for node in stack.nodes), "each node has an app", limit=START_LIMIT_S
    )


def test_services_run_on_both_nodes_with_their_own_secrets_only(stack: Swarm) -> None:
    wait_until_apps_run(stack, 2)
    assert edges(stack) == 2
    found = {}
    for service in SERVICES:
        for node in stack.nodes:
            container = node.container(service)
            if container is None:
                continue
            found[service] = node.docker("exec", container["Id"], "ls", "/run/secrets").split()
            host = container["HostConfig"]
            assert host["ReadonlyRootfs"], service
            assert host["CapDrop"] == ["ALL"], service
            assert host["Memory"] > 0, service
            assert host["NanoCpus"] > 0, service
            assert container["Config"]["User"].split(":")[0] not in ("", "0"), service
    assert found == SECRETS
    # An edge of each node has invalidated what a write through the other changed.
    with Traffic(stack).flowing() as traffic:
        pass
    assert_none_failed(traffic)


def test_apps_come_and_go_and_no_request_fails(stack: Swarm) -> None:
    with Traffic(stack).flowing() as traffic:
        for number in (3, 1, 2):
            stack.service("scale", "--detach", f"velikiy_app={number}")
            wait_until_apps_run(stack, number)
    assert_none_failed(traffic)


def test_edges_come_and_go_and_no_request_fails(stack: Swarm) -> None:
    with Traffic(stack).flowing() as traffic:
        stack.service("scale", "--detach", "velikiy_edge=1")
        stack.wait_until(lambda: edges(stack) == 1, "one edge is registered", limit=START_LIMIT_S)
        stack.service("scale", "--detach", "velikiy_edge=2")
        stack.wait_until(lambda: edges(stack) == 2, "both edges are registered", limit=START_LIMIT_S)
    assert_none_failed(traffic)


def test_image_that_never_becomes_healthy_is_rolled_back(stack: Swarm) -> None:
    with Traffic(stack).flowing() as traffic:
        stack.service(
            *("update", "--detach", "--no-resolve-image", "--health-start-period=5s"),
            "--image=velikiy-app:broken",
            "velikiy_app",
        )
        stack.wait_until(
            lambda: stack.update_state("app") == "rollback_completed", "Docker has gone back", limit=START_LIMIT_S
        )
        assert {image for image, _ in stack.running("app")} == {"velikiy-app:swarm"}
    assert_none_failed(traffic)


def test_new_version_replaces_apps_and_edges_and_no_request_fails(deployed: tuple[Swarm, Path], stack: Swarm) -> None:
    def is_replaced() -> bool:
        images = [image for service in ("app", "edge") for image, _ in stack.running(service)]
        states = [stack.update_state(service) for service in ("app", "relay", "edge")]
        return states == ["completed"] * 3 and sorted(images) == ["velikiy-app:next"] * 2 + ["velikiy-edge:next"] * 2

    with Traffic(stack).flowing() as traffic:
        stack.deploy(deployed[1], IMAGE_TAG="next")
        stack.wait_until(is_replaced, "both services have the new image", limit=START_LIMIT_S)
    assert_none_failed(traffic)


def test_tls_yml_serves_https_on_each_node(deployed: tuple[Swarm, Path], stack: Swarm, tmp_path: Path) -> None:
    authority, files = Authority(tmp_path), {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    authority.sign(files["tls_cert"], files["tls_key"], addresses=[node.host.address for node in stack.nodes])
    for name, file in files.items():
        stack.manager.docker("secret", "create", f"velikiy.{name}.1", str(file))
    try:
        stack.deploy(deployed[1], "tls", HTTPS_PORT=str(HTTPS_PORT))
        for node in stack.nodes:
            address = f"https://{node.host.address}:{HTTPS_PORT}/users/1"
            get = partial(requests.get, address, timeout=5, verify=str(authority.cert))
            stack.wait_until(get, "the node serves https", limit=START_LIMIT_S)
            get = partial(requests.get, f"{node.url}/users/1", timeout=5, allow_redirects=False)
            plain = stack.wait_until(get, "the node redirects", limit=START_LIMIT_S)
            assert (plain.status_code, plain.headers["Location"]) == (308, address)
    finally:
        stack.deploy(deployed[1])
        stack.wait_until_ready(limit=START_LIMIT_S)


def test_node_that_is_drained_gives_its_tasks_away_and_no_request_fails(stack: Swarm) -> None:
    node = stack.nodes[1]
    with Traffic(stack).flowing() as traffic:
        stack.manager.docker("node", "update", "--availability", "drain", stack.id_of(node))
        stack.wait_until(lambda: not node.docker("ps", "--quiet"), "the node is empty", limit=START_LIMIT_S)
        stack.manager.docker("node", "update", "--availability", "active", stack.id_of(node))
        stack.wait_until(node.is_ready, "the edge of the node is back", limit=START_LIMIT_S)
    assert_none_failed(traffic)


def test_node_without_its_clients_costs_the_others_nothing(stack: Swarm) -> None:
    node = stack.nodes[1]
    with Traffic(stack).flowing() as traffic:
        stack.machines.cut(stack.machines.outside, node.host)
        time.sleep(5)
        stack.machines.mend()
        stack.wait_until(node.is_ready, "the node is reached again", limit=START_LIMIT_S)
    assert not traffic.failed(stack.manager)
    assert not traffic.stale()


def lose(stack: Swarm, cut: Callable[[], None], mend: Callable[[], None]) -> tuple[Traffic, int]:
    """Lose the second node for some seconds. Return the traffic and the moment of the loss."""
    spread(stack)
    with Traffic(stack).flowing() as traffic:
        since = time.monotonic_ns()
        cut()
        time.sleep(LOST_WRITES_S + 5)
        mend()
        stack.wait_until(stack.nodes[1].is_ready, "the node is back", limit=START_LIMIT_S)
    return traffic, since


def test_node_cut_off_from_the_other_fails_alone(stack: Swarm) -> None:
    """Its own clients reach an edge without PostgreSQL: marked responses, or 503."""
    first, second = stack.nodes
    traffic, since = lose(stack, lambda: stack.machines.isolate(second.host), stack.machines.mend)
    assert_only_writes_failed(traffic, first, since)
    assert {it.edge for it in traffic.stale()} <= {"edge2"}


def test_killed_node_fails_alone_and_returns(stack: Swarm) -> None:
    first, second = stack.nodes
    traffic, since = lose(stack, second.kill, second.start)
    assert_only_writes_failed(traffic, first, since)
    assert requests.get(f"{second.url}/users/1", timeout=5).status_code in (200, 404)
