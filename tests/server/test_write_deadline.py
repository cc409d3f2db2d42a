"""A write whose client was already answered 504 is not carried out later, over newer writes."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
import pytest
import requests

from testkit.failpoints import FailpointGate, Failpoints, Users, failpoint_gate
from testkit.fake_app import fake_app
from testkit.outages import pids_of, stopped
from testkit.raw_http import send_request
from testkit.stack import Stack, running, wait_until
from velikiy.coherence import TooLate
from velikiy.coherence.deadline import CLOCK, Deadline, deadline_of, parse
from velikiy.coherence.timing import now
from velikiy.postgres import Connection, database


@pytest.fixture(scope="module", params=["epoll", pytest.param("gthread", marks=pytest.mark.plain_worker)])
def slow(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Start two apps of one worker each. This DATABASE_TIMEOUT gives the edge its shortest wait for a write: 4 s."""
    settings = {"DATABASE_TIMEOUT": "0.9", "APP_WORKERS": "1", "APP_WORKER_CLASS": request.param}
    with running("--apps", "2", "--edges", "2", **settings) as stack:
        yield stack


@contextmanager
def stopped_app(stack: Stack, name: str) -> Iterator[None]:
    """Stop an app with its master, which would kill a worker that is stopped alone."""
    with stopped(pids_of(stack, name)):
        yield


def puts(stack: Stack, app: str) -> int:
    """Return the number of PUTs that this app has answered, or discarded because the edge had hung up."""
    return stack.log(app).count('"method":"PUT"') + stack.log(app).count("write.abandoned")


def name_of(url: str) -> str:
    return str(requests.get(url, timeout=5).json()["name"])


def test_write_that_waits_in_a_stopped_app_does_not_overwrite_a_newer_write(slow: Stack) -> None:
    url = f"{slow.edge}/users/1"
    before = puts(slow, "app1")
    with ThreadPoolExecutor(4) as pool:
        with stopped_app(slow, "app1"):
            # An edge takes its apps in turn, so some of these requests wait in the stopped app.
            late = list(
                pool.map(lambda n: requests.put(url, json={"name": f"Late {n}"}, timeout=20).status_code, range(4))
            )
            assert 504 in late
            assert requests.put(url, json={"name": "Newer"}, timeout=20).status_code == 200
        wait_until(
            lambda: puts(slow, "app1") == before + late.count(504),
            what="the worker has finished the writes that waited",
        )
    for base in (*slow.edges, *slow.apps):
        assert name_of(f"{base}/users/1") == "Newer"


def test_app_without_the_clock_of_the_edge_counts_the_deadline_from_the_arrival_of_the_request(slow: Stack) -> None:
    def put(left_ms: int) -> tuple[int, str]:
        header = b"Content-Type: application/json\r\nWrite-Deadline: elsewhere 1 %d\r\n" % left_ms
        response = send_request(slow.app, "PUT", "/users/2", header, b'{"name": "Elsewhere %d"}' % left_ms)
        return response.status, response.body.decode()

    with ThreadPoolExecutor(2) as pool:
        with stopped_app(slow, "app1"):
            hasty, patient = pool.submit(put, 1000), pool.submit(put, 60_000)
            time.sleep(1.5)  # longer than the first deadline, and shorter than the second
        assert patient.result()[0] == 200
        status, body = hasty.result()
    assert status == 503
    assert "not carried out" in body
    assert name_of(f"{slow.app}/users/2") == "Elsewhere 60000"


class Update:
    """An update of a user through a gate of this process, which stops at failpoints."""

    def __init__(self, stack: Stack, gate: FailpointGate, user: int) -> None:
        self.stack, self.gate, self.user = stack, gate, user
        self.failpoints = gate.failpoints
        self.rows = Users(gate).rows
        self.new = self.rows.resource.update_model.model_validate({"name": "After"})

    def run(self, deadline: Deadline) -> None:
        self.gate.write(lambda connection: self.rows.update(connection, self.user, self.new, None), deadline=deadline)

    def check_that_nothing_was_committed(self) -> None:
        for base in (*self.stack.edges, *self.stack.apps):
            assert name_of(f"{base}/users/{self.user}") == "Before"


@pytest.fixture
def update(stack: Stack) -> Iterator[Update]:
    gate = failpoint_gate(stack.postgres, stack.redis_url, Failpoints())
    gate.database.open()
    users = Users(gate)
    user = users.create("Before", "deadline@example.com")
    yield Update(stack, gate, user)
    users.delete(user)
    gate.database.close()


def test_write_that_becomes_too_late_just_before_its_commit_is_rolled_back(update: Update) -> None:
    update.failpoints.actions["before the commit"] = lambda: time.sleep(0.4)
    with pytest.raises(TooLate):
        update.run(Deadline(now() + 0.3))
    update.check_that_nothing_was_committed()


def test_process_that_is_stopped_between_the_comparison_and_commit_commits_nothing_when_it_continues(
    update: Update, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = database._commit

    def stopped(connection: Connection, until: float | None) -> None:
        monkeypatch.undo()
        time.sleep(0.5)
        commit(connection, until)

    monkeypatch.setattr(database, "_commit", stopped)
    with pytest.raises(TooLate):
        update.run(Deadline(now() + 0.4))
    update.check_that_nothing_was_committed()


def test_wait_for_a_row_counts_once(stack: Stack, update: Update) -> None:
    """A write that waits for its row and then for a cache, is in time."""
    update.failpoints.actions["before the commit"] = lambda: time.sleep(0.4)
    with psycopg.connect(stack.postgres) as outside, ThreadPoolExecutor(1) as pool:
        outside.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (update.user,))
        written = pool.submit(update.run, Deadline(now() + 1.6))
        time.sleep(0.7)
        outside.rollback()
        written.result()
    assert name_of(f"{stack.app}/users/{update.user}") == "After"


def test_write_whose_client_hangs_up_before_its_commit_is_rolled_back(update: Update) -> None:
    edge, app = socket.socketpair()
    with edge, app:
        update.failpoints.actions["before the commit"] = edge.close
        with pytest.raises(TooLate):
            update.run(Deadline(now() + 10, app))
    update.check_that_nothing_was_committed()


def test_write_without_a_deadline_of_an_edge_has_one_of_the_app() -> None:
    """Its client may have given up, and an app that was stopped for long cannot know."""
    for header in (None, "malformed"):
        deadline = deadline_of(header, None, timeout=1)
        assert 8.9 < deadline.moment - now() <= 9
        assert deadline.edge is None


def test_edge_counts_from_the_end_of_the_body_and_lets_no_client_choose() -> None:
    with fake_app(DATABASE_TIMEOUT="1") as app:
        requests.get(f"{app.edge}/users/1", timeout=5)
        requests.post(f"{app.edge}/users", json={}, headers={"Write-Deadline": f"{CLOCK} 1 1"}, timeout=5)
        requests.post(f"{app.edge}/users/batch", json={}, timeout=5)
        address = urlsplit(app.edge)
        with socket.create_connection(("127.0.0.1", address.port or 80), 10) as client:
            client.sendall(
                b"PUT /users/1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: 2\r\n\r\n"
            )
            time.sleep(2.5)  # a client that is slow to send its body
            client.sendall(b"{}")
            client.makefile("rb").read()
        read, post, batch, put = (headers.get("write-deadline") for _, headers, _ in app.received)
        assert read is None
        # 5 s, and 10 s for many rows, less half a second for the way back.
        for header, left in ((post, 4500), (batch, 9500), (put, 4500)):
            given = re.fullmatch(rf"{CLOCK} (\d+) {left}", header or "")
            assert given, header
            assert left / 1000 - 2 < int(given[1]) / 1000 - now() <= left / 1000 or header != put


@pytest.mark.parametrize(
    "header", ["", "x", "x 1", "x 1 2 3", "x -1 1", "x 1 1e9", f"{CLOCK} {'9' * 30} 1", "ü 1 1", "x 1 \uff11"]
)
def test_malformed_deadline_is_ignored(header: str) -> None:
    assert parse(header, None) is None


def test_deadline_on_the_same_clock_is_used_unchanged() -> None:
    assert parse(f"{CLOCK} 12345 999999", None) == 12.345


def test_time_that_a_request_waits_in_the_kernel_counts_towards_its_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"PUT")
        time.sleep(0.5)
        accepted, _ = server.accept()
        with accepted:
            moment = parse("elsewhere 1 1000", accepted)
            assert moment is not None
            assert 0.3 < moment - now() < 0.6
