"""`./run chaos` notices what it is for: a wrong read, a lost write, a fault that status does not name, a limit."""

import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

import pytest

from testkit.stack import ROOT, run, running, wait_until
from testkit.tcp_proxy import CloseConnection, ProxiedConnection, TcpProxy, tcp_proxy
from tests.chaos.fault import Fault, Limits
from tests.chaos.probes import Meter
from tests.chaos.run import Chaos, Options, Outcome
from tests.chaos.service import Kind, Service
from tests.chaos.table import faults
from tests.consistency.history import Operation

MS = 10**6
READ = re.compile(rb"GET (/users/\d+) ")


class Replay:
    """Answers each read of a row with the first response that passed."""

    def __init__(self) -> None:
        self.paths: dict[ProxiedConnection, bytes] = {}
        self.first: dict[bytes, bytes] = {}

    def request(self, connection: ProxiedConnection, data: bytes) -> bytes:
        read = READ.match(data)
        self.paths[connection] = read[1] if read else b""
        return data

    def reply(self, connection: ProxiedConnection, data: bytes) -> bytes:
        path = self.paths.get(connection)
        return self.first.setdefault(path, data) if path and data.startswith(b"HTTP/1.1 200") else data


def at_edge1(service: Service) -> TcpProxy:
    return service.proxies["edge1"]


@contextmanager
def replay(service: Service, random: random.Random) -> Iterator[None]:
    proxy, hooks = at_edge1(service), Replay()
    proxy.on_request, proxy.on_reply = hooks.request, hooks.reply
    yield
    proxy.reset_hooks()


@contextmanager
def hang_up(service: Service, random: random.Random) -> Iterator[None]:
    def refuse(connection: ProxiedConnection, data: bytes) -> bytes:
        raise CloseConnection

    at_edge1(service).on_reply = refuse
    yield
    at_edge1(service).reset_hooks()


@contextmanager
def delay(service: Service, random: random.Random) -> Iterator[None]:
    def wait(connection: ProxiedConnection, data: bytes) -> bytes:
        service.wait(1.5)  # longer than the slowest hit of calm on a busy machine
        return data

    at_edge1(service).on_reply = wait
    yield
    at_edge1(service).reset_hooks()


@contextmanager
def lose_a_row(service: Service, random: random.Random) -> Iterator[None]:
    with service.connect() as connection:
        connection.execute("DELETE FROM users WHERE name LIKE '% probe hit 2 %'")
    yield


@contextmanager
def nothing(service: Service, random: random.Random) -> Iterator[None]:
    yield


@contextmanager
def broken_promise(service: Service, random: random.Random) -> Iterator[None]:
    service.violation("a late write was committed")
    yield


@pytest.fixture(scope="module")
def outcome() -> Iterator[Outcome]:
    """The outcome of a run with faults that break the promise, and one that does nothing."""
    with running("--edges", "2") as stack:
        address = urlsplit(stack.edge)
        with tcp_proxy((str(address.hostname), int(address.port or 0))) as proxy:
            edges = [f"http://127.0.0.1:{proxy.port}", stack.edges[1]]
            kind = Kind("behind a proxy", lambda: nullcontext(Service(stack, edges, {"edge1": proxy})))
            loose = Limits(reads=0.0, hit_s=60, miss_s=60, write_s=60, recovery_s=60)
            table = [
                Fault("nothing", "", nothing, 0.3, unnamed="it is nothing", limits=loose, kind=kind),
                Fault("unnamed", "", nothing, 0.0, named=("redis.fenced",), limits=loose, kind=kind),
                Fault("violation", "", broken_promise, 0.0, unnamed="a test", limits=loose, kind=kind),
                Fault("hang-up", "", hang_up, 0.5, unnamed="a test", kind=kind),
                Fault("victim", "", hang_up, 0.5, unnamed="a test", victims=("edge1",), kind=kind),
                Fault("delay", "", delay, 0.5, unnamed="a test", limits=Limits(hit_s=0.05), kind=kind),
                Fault("replay", "", replay, 2.0, unnamed="a test", limits=loose, kind=kind),
                Fault("lost-row", "", lose_a_row, 0.6, unnamed="a test", limits=loose, kind=kind),
            ]
            # The row is lost at the end, because each later look at PostgreSQL shows it again.
            options = Options(90, 1, {it.name: it for it in table}, pairs=False, readers=1, writers=1, shuffle=False)
            yield Chaos(options, print).run()


def failures(outcome: Outcome, name: str) -> list[str]:
    return [failure for result in outcome.results if result.name == name for failure in result.failures]


def test_every_fault_of_the_table_is_injected(outcome: Outcome) -> None:
    assert outcome.not_reached == {}
    assert outcome.errors == []
    assert [result.name for result in outcome.results][-1] == "lost-row"


def test_fault_that_costs_nothing_does_not_fail(outcome: Outcome) -> None:
    assert failures(outcome, "nothing") == []


def test_fault_that_status_does_not_name_fails(outcome: Outcome) -> None:
    assert failures(outcome, "unnamed") == ["status did not name it within 3 s: it showed nothing, not redis.fenced"]


def test_violation_that_only_the_fault_sees_fails(outcome: Outcome) -> None:
    assert failures(outcome, "violation") == ["a late write was committed"]


def test_unanswered_read_is_an_exceeded_limit(outcome: Outcome) -> None:
    assert any("availability of reads" in it for it in failures(outcome, "hang-up"))


def test_requests_through_a_victim_do_not_count(outcome: Outcome) -> None:
    assert failures(outcome, "victim") == []


def test_slow_hit_is_an_exceeded_limit(outcome: Outcome) -> None:
    assert any(it.startswith("slowest hit: ") for it in failures(outcome, "delay"))


def test_replayed_response_is_a_wrong_read(outcome: Outcome) -> None:
    assert any("wrong reads" in it for it in failures(outcome, "replay"))
    assert outcome.wrong_reads


def test_row_that_is_gone_from_postgresql_is_a_lost_write(outcome: Outcome) -> None:
    assert "an acknowledged write was lost" in failures(outcome, "lost-row")
    assert outcome.lost_writes


def test_availability_is_a_share_of_time() -> None:
    """A request that hangs for a second counts as a second, and not as one request among many."""
    meter = Meter()
    for began, took, status in [(0, 10, 200), (20, 10, 200), (40, 960, 0), (1000, 10, 200)]:
        read = Operation(
            began * MS, (began + took) * MS, "read", "/users/1", "ok", status, "edge1", worker="probe hit 1"
        )
        meter.watch(read)
    figures = meter.figures(0, 2000 * MS, since=0)
    assert figures.reads == pytest.approx(0.52)
    assert figures.seconds("hit") == pytest.approx(0.96)


def test_request_that_an_earlier_fault_has_cut_off_does_not_count() -> None:
    meter = Meter()
    meter.watch(Operation(0, 900 * MS, "read", "/users/1", "unknown", 0, "edge1", worker="probe hit 1"))
    figures = meter.figures(500 * MS, 1000 * MS, since=100 * MS)
    assert figures.reads == 1.0
    assert figures.seconds("hit") == 0.0


def test_request_that_a_fault_slows_down_does_not_count_as_calm() -> None:
    """Calm is measured to tell a slow machine from a fault. A request that is under way when a fault begins would hide
    this fault, and those after it."""
    meter = Meter()
    for began, returned in [(0, 10), (20, 900)]:
        meter.watch(Operation(began * MS, returned * MS, "read", "/users/1", "ok", 200, "edge1", worker="probe hit 1"))
    assert meter.slowest_s(0, 100 * MS)["hit"] == pytest.approx(0.01)
    assert meter.figures(100 * MS, 200 * MS, since=0).seconds("hit") == pytest.approx(0.88)


def test_reset_reaches_the_client_although_a_forked_process_has_inherited_the_connection() -> None:
    """The processes of the load are forked while connections pass the proxies. One read that hangs for another reason
    than the fault would be counted against the service."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        tcp_proxy(server.getsockname()) as proxy,
        socket.create_connection((proxy.address, proxy.port), 5) as client,
    ):
        accepted, _ = server.accept()
        wait_until(lambda: proxy.connections)
        ready, inherited = os.pipe()
        child = os.fork()
        if not child:
            os.write(inherited, b"x")
            time.sleep(30)
            os._exit(0)
        try:
            os.read(ready, 1)
            proxy.reset_connections()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            accepted.close()


def test_findings_that_faults_expect_exist() -> None:
    known = set[str]()
    for file in (ROOT / "velikiy").rglob("*.py"):
        known.update(re.findall(r'"([a-z_]+\.[a-z_]+)"', file.read_text()))
    for fault in faults().values():
        assert set(fault.named) <= known, fault.name
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.name)


@pytest.mark.long
@pytest.mark.exclusive
@pytest.mark.timeout(400)
def test_a_minute_of_chaos_finds_nothing_wrong() -> None:
    completed = run("chaos", "--minutes", "1", "--seed", "1")
    assert completed.returncode == 0, completed.stdout + completed.stderr
