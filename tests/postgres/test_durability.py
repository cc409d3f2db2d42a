"""An acknowledged write is on disk: it survives the end of PostgreSQL, and its response follows the flush of the log."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import requests

from testkit.stack import Stack, children_of, folder, running, wait_until

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("KILLS", "100"))
WRITERS = 8


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running("--edges", "2", "--apps", "2") as stack:
        yield stack


def new_user(stack: Stack, name: str) -> int:
    body = {"name": f"{name} 0", "email": f"{name}@example.com"}
    return int(requests.post(f"{stack.edge}/users", json=body, timeout=10).json()["id"])


class Writers:
    """Clients that write one row each, again and again: the names of a row count upwards."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.users = [new_user(stack, f"writer{number}") for number in range(WRITERS)]
        self.acknowledged = [0] * WRITERS
        self._finished = threading.Event()

    def _write(self, number: int) -> None:
        counted = 0
        while not self._finished.is_set():
            counted += 1
            edge = self.stack.edges[counted % len(self.stack.edges)]
            with suppress(requests.RequestException):
                body = {"name": f"writer{number} {counted}"}
                response = requests.put(f"{edge}/users/{self.users[number]}", json=body, timeout=15)
                if response.status_code == 200:
                    self.acknowledged[number] = counted
                else:
                    time.sleep(0.02)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._finished.set()
            for thread in threads:
                thread.join()

    def committed(self) -> list[int]:
        """Return the number that each row has in PostgreSQL itself."""
        statement = "SELECT id, split_part(name, ' ', 2)::int FROM users WHERE id = ANY (%s)"
        rows = dict(self.stack.sql(statement, self.users))
        return [rows[user] for user in self.users]


def kill_postgres(stack: Stack) -> None:
    """Kill the postmaster and every other process of PostgreSQL at once."""
    postmaster = int((stack.supervisor.plan.cluster / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGSTOP)  # else it would shut the others down in order
    for pid in [*children_of(postmaster), postmaster]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1800)
def test_no_acknowledged_write_is_lost_when_postgresql_is_killed_a_hundred_times(stack: Stack) -> None:
    writers = Writers(stack)
    with writers.running():
        for _ in range(KILLS):
            before = list(writers.acknowledged)
            wait_until(
                lambda: all(now > then for now, then in zip(writers.acknowledged, before, strict=True)),  # noqa: B023
                within=60,
                what="each client writes again",
            )
            kill_postgres(stack)
            acknowledged = list(writers.acknowledged)
            wait_until(lambda: is_back(stack), within=60, what="PostgreSQL is back")
            lost = [
                (user, was, is_now)
                for user, was, is_now in zip(writers.users, acknowledged, writers.committed(), strict=True)
                if is_now < was
            ]
            assert not lost


def is_back(stack: Stack) -> bool:
    with suppress(psycopg.OperationalError):
        return bool(stack.sql("SELECT 1"))
    return False


LINE = re.compile(r"(\d+) +[\d.]+ (.*)")
FLUSHED = re.compile(r"(fdatasync\(\d+\)|<\.\.\. fdatasync resumed>\)) += 0")
COMMITTED = re.compile(r'sendto\(\d+, ".*C\\0\\0\\0\\vCOMMIT')
"""PostgreSQL tells an app that a COMMIT is done (CommandComplete)."""

ANSWERED = re.compile(r'sendto\(\d+, "HTTP/1\.1 200 .*traced row')
PUTS = 10
WITH_ROW = {"Prefer": "return=representation"}


def named(number: int) -> dict[str, str]:
    return {"name": f"traced row {number}"}


@contextmanager
def traced(file: Path, pids: list[int]) -> Iterator[None]:
    """Record the flushes and the sent messages of these processes, with their times."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    options = ["-f", "-ttt", "-s", "1000", "-e", "trace=fdatasync,sendto", "-o", str(file)]
    strace = subprocess.Popen(
        ["strace", *options, *(part for pid in pids for part in ("-p", str(pid)))], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr
    try:
        for _ in pids:
            line = strace.stderr.readline()
            if "attached" not in line:
                pytest.skip(f"no process can be traced here: {line}")
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(20)


def test_log_is_flushed_before_the_response_of_a_write_is_sent(stack: Stack) -> None:
    user = new_user(stack, "traced")
    postmaster = int((stack.supervisor.plan.cluster / "postmaster.pid").read_text().split()[0])
    servers = [*children_of(postmaster), *(pid for app in ("app1", "app2") for pid in children_of(stack.pids()[app]))]
    with folder() as path:
        with traced(path / "trace", servers):
            number = done = 0
            while done < PUTS:  # strace slows PostgreSQL down, so a write may be refused
                number += 1
                url = f"{stack.edge}/users/{user}"
                done += requests.put(url, json=named(number), headers=WITH_ROW, timeout=20).status_code == 200
        lines = (path / "trace").read_text().splitlines()
    flushes = commits = answers = 0
    flushes_before: dict[str, int] = {}
    for line in lines:
        process, call = LINE.fullmatch(line).groups()  # type: ignore[union-attr]
        flushes += bool(FLUSHED.match(call))
        if COMMITTED.match(call):
            # Since the last COMMIT of this session the log was flushed, by it or by another process.
            assert flushes > flushes_before.get(process, 0)
            flushes_before[process] = flushes
            commits += 1
        if ANSWERED.match(call):
            answers += 1
            assert commits >= answers
    assert answers >= PUTS
