"""Alerts of a real Prometheus: each fires when its cause is there, and the advice of its page ends it."""

import os
import re
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
import requests

from testkit.stack import Stack, free_ports, run, running, wait_until

pytestmark = pytest.mark.long


class Monitored:
    """A stack with a Prometheus of its own."""

    def __init__(self, stack: Stack, prometheus: str) -> None:
        self.stack = stack
        self.prometheus = prometheus

    def firing(self) -> set[str]:
        answer = requests.get(f"{self.prometheus}/api/v1/alerts", timeout=5).json()
        return {it["labels"]["alertname"] for it in answer["data"]["alerts"] if it["state"] == "firing"}

    def stop(self, name: str) -> None:
        """Stop a process and its children as a debugger would."""
        master = psutil.Process(self.stack.pids()[name])
        for process in (master, *master.children(recursive=True)):
            process.send_signal(signal.SIGSTOP)

    def kill(self, name: str) -> None:
        os.kill(self.stack.pids()[name], signal.SIGKILL)

    def write(self) -> None:
        body = {"name": "Someone", "email": "monitored@example.com"}
        requests.put(f"{self.stack.app}/users/1", json=body, timeout=20)


@pytest.fixture(scope="module")
def monitored() -> Iterator[Monitored]:
    port = free_ports(8) + 6
    with running("--monitoring", PROMETHEUS_PORT=str(port)) as stack:
        prometheus = f"http://127.0.0.1:{port}"
        target = f"{prometheus}/api/v1/query?query=velikiy_relays_listening"
        wait_until(lambda: requests.get(target, timeout=5).json()["data"]["result"], within=60)
        yield Monitored(stack, prometheus)


def hang(name: str) -> Callable[[Monitored], None]:
    return lambda monitored: monitored.stop(name)


def kill(name: str) -> Callable[[Monitored], None]:
    return lambda monitored: monitored.kill(name)


def disable_triggers(monitored: Monitored) -> None:
    monitored.stack.sql("ALTER TABLE users DISABLE TRIGGER USER")


def enable_triggers_as_the_log_advises(monitored: Monitored) -> None:
    statement = re.findall(r"CALL add_triggers\('\w+'\)", monitored.stack.log("relay"))[-1]
    executed = run("psql", "--data", str(monitored.stack.data), "-c", statement)
    assert executed.returncode == 0, executed.stderr


def hang_redis_and_write(monitored: Monitored) -> None:
    monitored.stop("redis")
    monitored.write()


@pytest.mark.parametrize(
    ("alert", "cause", "advice"),
    [
        ("VelikiyRelayDown", hang("relay"), kill("relay")),
        ("VelikiyEdgeDown", hang("edge1"), kill("edge1")),
        ("VelikiyRedisDown", hang("redis"), kill("redis")),
        ("VelikiyRedisOutOfUse", hang_redis_and_write, kill("redis")),
        ("VelikiyTableWithoutTriggers", disable_triggers, enable_triggers_as_the_log_advises),
        ("VelikiyTargetDown", hang("metrics"), kill("metrics")),
    ],
)
def test_alert_fires_and_its_advice_ends_it(
    monitored: Monitored, alert: str, cause: Callable[[Monitored], None], advice: Callable[[Monitored], None]
) -> None:
    assert alert not in monitored.firing()
    cause(monitored)
    wait_until(lambda: alert in monitored.firing(), within=150, every=1, what=alert)
    advice(monitored)
    wait_until(lambda: alert not in monitored.firing(), within=150, every=1, what=f"the end of {alert}")
    wait_until(monitored.stack.healthy, within=30)
