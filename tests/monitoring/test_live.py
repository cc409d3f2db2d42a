"""Each alert fires in a real Prometheus while its true cause is there, and the advice of its page ends it.

The rules are those of deploy/prometheus/rules.yaml with shorter times (testkit/prometheus.py). Advice is a command that
the page of the alert has word for word.
"""

import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, cycle
from typing import Any

import psutil
import psycopg
import pytest
import requests

from testkit.certificates import Authority
from testkit.metrics import target_of
from testkit.prometheus import Prometheus, fast_prometheus
from testkit.stack import ROOT, Stack, clean_environment, folder, free_ports, running, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

RUNBOOK = (ROOT / "docs/runbook.md").read_text()
PAGES = {
    name: " ".join(page.split()) for name, page in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.M | re.S)
}

SETTINGS: dict[str, Any] = {"EDGE_MEMORY": "4", "EDGE_TTL": "3600", "REDIS_MEMORY": "4", "REDIS_TTL": "3600"}
"""The settings of the shared stack, as the `.env` of its operator would have them. No entry expires before a memory is
full, however slow the machine is."""

USERS = 12_000
"""Rows. Neither an edge nor Redis has room for all of them, with SETTINGS."""


class Monitored:
    """A stack, and the Prometheus that reads its metrics."""

    def __init__(self, stack: Stack, prometheus: Prometheus) -> None:
        self.stack = stack
        self.prometheus = prometheus

    def own_prometheus(self) -> Prometheus:
        """Return the Prometheus of `./run up --monitoring`, whose rules have their own times."""
        return Prometheus(self.stack.refresh()["prometheus"])

    def follow(self, alert: str, command: str, **values: object) -> str:
        """Type a command that the page of this alert has, with these values for its words in capitals. Return what the
        command has printed."""
        assert f"`{command}`" in PAGES[alert], f"the page of {alert} has no `{command}`"
        for name, value in values.items():
            command = re.sub(rf"\b{name}\b", str(value), command)
        command = re.sub(
            r"^((?:\w+=\S+ )*)\./run (\w+)",
            rf"\1{shlex.quote(str(ROOT / 'run'))} \2 --data {self.stack.data}",
            command,
        )
        completed = subprocess.run(
            ["/bin/sh", "-c", command],
            env=clean_environment(**SETTINGS),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return completed.stdout + completed.stderr

    def pid(self, alert: str, name: str) -> int:
        """Return the process id that the advice `./run status` shows."""
        found = re.search(rf"^ +{name} +\S+ +(\d+) ", self.follow(alert, "./run status"), re.M)
        assert found, name
        return int(found[1])

    def kill_as_advised(self, alert: str, name: str) -> None:
        self.follow(alert, "kill -9 PID", PID=self.pid(alert, name))

    def over(self, *alerts: str) -> bool:
        """Return whether the alerts have ended while their metrics were read."""
        return bool(self.prometheus.query("up == 1")) and not self.prometheus.firing() & {*alerts, "VelikiyTargetDown"}

    @contextmanager
    def firing(self, *alerts: str, within: float = 60) -> Iterator[None]:
        """The alerts fire at the beginning of the block, which follows their advice, and end after it."""
        began = time.monotonic()
        missing = set(alerts)

        def fire() -> bool:
            missing.difference_update(self.prometheus.firing())  # also one that has ended meanwhile
            return not missing

        try:
            wait_until(fire, within=within, every=0.25)
        except AssertionError:
            raise AssertionError(f"{missing} did not fire within {within} s") from None
        fired = time.monotonic()
        yield
        advised = time.monotonic()
        wait_until(lambda: self.over(*alerts), within=90, every=0.25, what=f"the end of {alerts}")
        print(
            f"{', '.join(alerts)}: fired after {fired - began:.0f} s, advice took {advised - fired:.0f} s,"
            f" ended {time.monotonic() - advised:.0f} s later"
        )

    def stop(self, name: str) -> list[psutil.Process]:
        """Stop a process and its children as a debugger would."""
        master = psutil.Process(self.stack.pids()[name])
        processes = [master, *master.children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        return processes

    def write(self, number: int = 1) -> None:
        body = {"name": f"Someone {time.monotonic()}", "email": f"writer{number}@example.com"}
        requests.put(f"{self.stack.app}/users/{number}", json=body, timeout=30).raise_for_status()


@contextmanager
def repeating(work: Callable[[], object], clients: int = 1, pause_s: float = 0.05) -> Iterator[None]:
    """Let clients do this again and again. Failed requests and sessions are part of the cause."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(pause_s):
            with suppress(requests.RequestException, psycopg.Error, psutil.Error):
                work()

    threads = [threading.Thread(target=repeat) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def reader(address: str, last: int = USERS) -> Callable[[], object]:
    """Return a function that reads the next row each time."""
    numbers, sessions = cycle(range(1, last + 1)), threading.local()

    def read() -> None:
        if not hasattr(sessions, "own"):
            sessions.own = requests.Session()
        sessions.own.get(f"{address}/users/{next(numbers)}", timeout=10)

    return read


@pytest.fixture(scope="module")
def shared() -> Iterator[Monitored]:
    """A stack with two edges of little memory, and with a Prometheus of its own, whose rules have their own times."""
    port = free_ports(8) + 6
    with (
        running(
            *["--edges", "2", "--apps", "2", "--monitoring"],
            PROMETHEUS_PORT=str(port),
            **SETTINGS,
        ) as stack,
        folder() as path,
    ):
        stack.sql(
            # Long rows fill the memories with fewer requests.
            "INSERT INTO users (name, email) SELECT 'Someone ' || n || ' ' || repeat('x', 80), 'monitored' || n || '@' ||"
            " repeat(repeat('x', 50) || '.', 4) || 'com' FROM generate_series(1, %s) n ON CONFLICT DO NOTHING",
            USERS,
        )
        with fast_prometheus(path, target_of(stack).split("/")[2]) as prometheus:
            yield Monitored(stack, prometheus)


@pytest.fixture
def monitored(shared: Monitored) -> Iterator[Monitored]:
    wait_until(lambda: not shared.prometheus.firing(), within=90, every=0.5, what="a quiet start")
    yield shared
    wait_until(shared.stack.healthy, within=60)


def test_metrics_that_hang(monitored: Monitored) -> None:
    monitored.stop("metrics")
    with monitored.firing("VelikiyTargetDown"):
        monitored.kill_as_advised("VelikiyTargetDown", "metrics")


def test_port_that_another_program_has_taken(monitored: Monitored) -> None:
    supervisor = monitored.stack.supervisor
    supervisor.stop_program("edge2")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", int(monitored.stack.edges[1].rpartition(":")[2])))
        other.listen()
        supervisor.start_program("edge2")
        with monitored.firing("VelikiyProcessDown", "VelikiyProcessRestarts", "VelikiyEdgeDown"):
            for alert, command in (
                ("VelikiyProcessDown", "./run logs NAME -n 200"),
                ("VelikiyProcessRestarts", "./run logs NAME -n 200"),
                ("VelikiyEdgeDown", "./run logs NAME -n 200"),
            ):
                assert "Address already in use" in monitored.follow(alert, command, NAME="edge2")
            other.close()


def test_workers_that_end_again_and_again(monitored: Monitored) -> None:
    """In the own Prometheus of the stack: so many workers do not start in the short times of the other."""

    def kill_worker() -> None:
        for name in ("app1", "app2"):
            workers = psutil.Process(monitored.stack.pids()[name]).children()
            min(workers, key=psutil.Process.create_time).kill()

    own = monitored.own_prometheus()
    with repeating(kill_worker, pause_s=1):
        wait_until(lambda: "VelikiyWorkersRestart" in own.firing(), within=120, every=1)
    assert "SIGKILL" in monitored.follow("VelikiyWorkersRestart", "./run logs app -n 200")


def test_edge_that_hangs(monitored: Monitored) -> None:
    monitored.stop("edge2")
    monitored.write()
    with monitored.firing("VelikiyEdgeDown", "VelikiyDropsUnacknowledged"):
        assert "no acknowledgement" in monitored.follow("VelikiyDropsUnacknowledged", "./run logs app -n 200")
        monitored.kill_as_advised("VelikiyEdgeDown", "edge2")


def test_app_that_hangs(monitored: Monitored) -> None:
    monitored.stop("app2")
    with monitored.firing("VelikiyAppUnavailable"):
        monitored.kill_as_advised("VelikiyAppUnavailable", "app2")


def test_redis_that_hangs_while_a_writer_dies(monitored: Monitored) -> None:
    monitored.stop("redis")
    with repeating(monitored.write):
        wait_until(lambda: monitored.stack.sql("SELECT 1 FROM caches WHERE name = 'redis' AND fenced_at IS NOT NULL"))
        app = psutil.Process(monitored.stack.pids()["app1"])
        for process in (app, *app.children()):
            process.kill()
    with monitored.firing("VelikiyCacheFenced", "VelikiyRedisDown", "VelikiyRedisOutOfUse"):
        listed = monitored.follow(
            "VelikiyCacheFenced", "./run psql -c 'SELECT name, address, fenced_at, excluded FROM caches'"
        )
        assert re.search(r"redis +\|.*\| f", listed), listed
        assert "redis.unusable" in monitored.follow("VelikiyRedisOutOfUse", "./run logs relay")
        monitored.kill_as_advised("VelikiyRedisDown", "redis")


def test_postgresql_that_hangs(monitored: Monitored) -> None:
    monitored.stop("postgres")
    with (
        repeating(reader(monitored.stack.edge), clients=8),
        monitored.firing("VelikiyDatabaseFails", "VelikiyEdgeWithoutLease", "VelikiyErrors"),
    ):
        status = monitored.follow("VelikiyEdgeWithoutLease", "curl URL/readyz", URL=monitored.stack.edge)
        assert "PostgreSQL" in status
        monitored.follow("VelikiyDatabaseFails", "./run psql -c 'SELECT 1'")
        monitored.kill_as_advised("VelikiyDatabaseFails", "postgres")


def test_table_without_triggers(monitored: Monitored) -> None:
    monitored.stack.sql("ALTER TABLE users DISABLE TRIGGER USER")
    with monitored.firing("VelikiyTableWithoutTriggers"):
        log = monitored.follow("VelikiyTableWithoutTriggers", "./run logs relay")
        (statement,) = set(re.findall(r"CALL add_triggers\('\w+'\)", log))
        monitored.follow("VelikiyTableWithoutTriggers", '''./run psql -c "STATEMENT"''', STATEMENT=statement)


def test_relay_that_hangs(monitored: Monitored) -> None:
    monitored.stop("relay")
    with monitored.firing("VelikiyRelayDown"):
        monitored.kill_as_advised("VelikiyRelayDown", "relay")


def test_session_that_locks_a_table(monitored: Monitored) -> None:
    locking = psycopg.connect(monitored.stack.postgres)
    locking.execute("LOCK TABLE users")
    threading.Thread(target=lambda: suppress_all(locking.execute, "SELECT pg_sleep(120)"), daemon=True).start()
    with (
        repeating(reader(monitored.stack.edge), clients=30),
        monitored.firing("VelikiyDatabaseFails", "VelikiyErrors"),
    ):
        listed = monitored.follow(
            "VelikiyDatabaseFails",
            './run psql -c "SELECT pid, pg_blocking_pids(pid), query FROM pg_stat_activity WHERE'
            ' cardinality(pg_blocking_pids(pid)) > 0"',
        )
        pid = re.findall(r"\{(\d+)[,}]", listed)[0]
        monitored.follow("VelikiySlowRequests", './run psql -c "SELECT pg_terminate_backend(PID)"', PID=pid)


def suppress_all(call: Callable[..., object], *arguments: object) -> None:
    with suppress(psycopg.Error):
        call(*arguments)


@contextmanager
def slowed_down(*masters: psutil.Process, pause_s: float) -> Iterator[None]:
    """Let processes and their children run for a moment only, again and again, as on a CPU that others keep busy."""

    def each(action: Callable[[psutil.Process], None], processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                action(process)

    def pause() -> None:
        slow = [process for master in masters for process in (master, *master.children())]
        each(psutil.Process.suspend, slow)
        time.sleep(pause_s)
        each(psutil.Process.resume, slow)

    with repeating(pause, pause_s=0.02):
        yield


def test_postgresql_whose_cpu_is_busy(monitored: Monitored) -> None:
    postgres = psutil.Process(monitored.stack.pids()["postgres"])
    with ExitStack() as cause:
        cause.enter_context(slowed_down(postgres, pause_s=0.6))
        cause.enter_context(repeating(reader(monitored.stack.apps[0]), clients=30))
        cause.enter_context(repeating(reader(monitored.stack.apps[1]), clients=30))
        with monitored.firing("VelikiySlowRequests", "VelikiyThreadsBusy"):
            listed = monitored.follow(
                "VelikiySlowRequests",
                './run psql -c "SELECT pid, now() - query_start AS time, query FROM pg_stat_activity WHERE'
                " state = 'active'\"",
            )
            assert "FROM pg_stat_activity" in listed  # at least its own query
            cause.close()


def test_caches_that_all_acknowledge_slowly(monitored: Monitored) -> None:
    pids = monitored.stack.pids()
    caches = [psutil.Process(pids[name]) for name in ("redis", "edge1", "edge2")]

    def write_row_by_row() -> None:
        with psycopg.connect(monitored.stack.postgres, autocommit=True) as connection:
            for number in range(1, 100):
                connection.execute("UPDATE users SET name = %s WHERE id = %s", (f"Row {time.monotonic()}", number))
                time.sleep(0.01)

    with ExitStack() as cause:
        cause.enter_context(slowed_down(*caches, pause_s=0.33))
        cause.enter_context(repeating(monitored.write, clients=2))
        cause.enter_context(repeating(write_row_by_row))
        with monitored.firing("VelikiySlowDrops", "VelikiyRelayLag"):
            cause.close()


def test_writers_that_wait_for_a_cache_that_is_silent(monitored: Monitored) -> None:
    numbers = count(1)

    def write_many() -> None:
        operations = [{"op": "update", "id": next(numbers) % USERS + 1, "name": f"Batch {time.monotonic()}"}]
        requests.post(f"{monitored.stack.app}/users/batch", json={"operations": operations}, timeout=30)

    monitored.stop("edge2")
    with (
        repeating(lambda: monitored.write(next(numbers) % USERS + 1), clients=40),
        repeating(write_many, clients=16),
        monitored.firing("VelikiyWritesRefused"),
    ):
        monitored.kill_as_advised("VelikiyEdgeDown", "edge2")


def test_connections_that_another_program_has_taken(monitored: Monitored) -> None:
    held: list[psycopg.Connection] = []

    def take() -> None:
        with suppress(psycopg.Error):
            while True:
                held.append(psycopg.connect(monitored.stack.postgres))

    take()
    held[0].execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'velikiy'")
    take()
    with (
        repeating(reader(monitored.stack.app), clients=30),
        monitored.firing("VelikiyPoolExhausted"),
    ):
        assert "FATAL" in monitored.follow("VelikiyPoolExhausted", "./run logs postgres -n 200")
        postgres = monitored.pid("VelikiyPoolExhausted", "postgres")
        sessions = monitored.follow("VelikiyPoolExhausted", "ps --ppid PID -o pid,etime,args", PID=postgres)
        pids = re.findall(r"^ *(\d+) .*postgres: velikiy_owner ", sessions, re.M)
        monitored.follow("VelikiyPoolExhausted", "kill PID", PID=" ".join(pids))
    for connection in held:
        connection.close()


def test_edge_with_too_little_memory(monitored: Monitored) -> None:
    with (
        repeating(reader(monitored.stack.edge), clients=6, pause_s=0),
        monitored.firing("VelikiyFewHits", "VelikiyEdgeEvicts", within=120),
    ):
        assert "ready" in monitored.follow("VelikiyEdgeEvicts", "EDGE_MEMORY=256 ./run up --detach")


def test_redis_with_too_little_memory(monitored: Monitored) -> None:
    with (
        repeating(reader(monitored.stack.app), clients=6, pause_s=0),
        monitored.firing("VelikiyRedisEvicts", within=240),
    ):
        assert "ready" in monitored.follow("VelikiyRedisEvicts", "REDIS_MEMORY=512 ./run up --detach")


def test_alert_of_the_own_prometheus_of_a_stack(monitored: Monitored) -> None:
    own = monitored.own_prometheus()
    monitored.stop("redis")
    wait_until(lambda: "VelikiyRedisDown" in own.firing(), within=90, every=1)
    monitored.kill_as_advised("VelikiyRedisDown", "redis")
    wait_until(lambda: "VelikiyRedisDown" not in own.firing(), within=60, every=1)


def test_certificate_that_expires() -> None:
    with folder() as files, folder() as path:
        authority = Authority(files)
        cert, key = files / "fullchain.pem", files / "privkey.pem"
        authority.sign(cert, key, days=5)
        with (
            running(TLS_CERT=str(cert), TLS_KEY=str(key), APP_WORKERS="1") as stack,
            fast_prometheus(path, target_of(stack).split("/")[2]) as prometheus,
            Monitored(stack, prometheus).firing("VelikiyCertificateExpires"),
        ):
            authority.sign(cert, key)
