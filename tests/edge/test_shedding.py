"""An edge refuses what would wait too long for an app (edge/lua/shedding.lua); the others are served in time."""

import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from werkzeug import Request, Response

from testkit.fake_app import FakeApp, fake_app, plain
from testkit.raw_http import RawResponse, check_raw_problem, parse_response, send_request

SERVICE_S = 0.03
"""The time that the app has for each request; it carries them out one after the other."""

PATIENCE_S = 2.0
"""Longer than the edge lets a request wait, and shorter than the wait without a limit."""

pytestmark = pytest.mark.exclusive


class Answer(NamedTuple):
    sent: float
    """Seconds after the begin."""

    seconds: float
    response: RawResponse


class Line:
    """An app that carries out requests in the order in which they arrive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def respond(self, request: Request) -> Response:
        if request.path == "/livez":
            return plain(request)
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + SERVICE_S
            mine = self._free_at
        time.sleep(max(0, mine - time.monotonic()))
        return plain(request)


@pytest.fixture(scope="module")
def app() -> Iterator[FakeApp]:
    with fake_app(EDGE_WORKERS="1") as app:
        app.respond = Line().respond
        yield app


def offer(app: FakeApp, head: str, count: int, rate: float) -> list[Answer]:
    """Send so many requests, each when it is due, and return the answers. A number takes the place of %d."""
    address = urlsplit(app.edge)
    selector, answers = selectors.DefaultSelector(), []
    began, waiting, sent = time.monotonic(), 0, 0
    while sent < count or waiting:
        now = time.monotonic() - began
        while sent < count and now >= sent / rate:
            client = socket.create_connection((str(address.hostname), int(address.port or 80)), 5)
            rest = "\r\n" if head.startswith("GET") else "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
            lines = f"{head.replace('%d', str(sent + 1))} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            client.sendall((lines + rest).encode())
            selector.register(client, selectors.EVENT_READ, time.monotonic() - began)
            sent, waiting = sent + 1, waiting + 1
        for key, _ in selector.select(0.002):
            assert isinstance(key.fileobj, socket.socket)
            with key.fileobj as client:
                selector.unregister(client)
                received = client.recv(65536)
            answers.append(Answer(key.data, time.monotonic() - began - key.data, parse_response(received)))
            waiting -= 1
    return answers


@pytest.mark.parametrize("head", ["GET /rows/%d", "PUT /rows/%d"])
def test_requests_beyond_the_capacity_are_refused_at_once_and_the_others_are_served_in_time(
    app: FakeApp, head: str
) -> None:
    answers = offer(app, head, count=300, rate=3 / SERVICE_S)
    late = [it for it in answers if it.sent > 1]  # the edge has noticed
    served = [it for it in late if it.response.status == 200]
    refused = [it for it in late if it.response.status == 503]
    assert len(served) + len(refused) == len(late)
    assert len(served) > 0.4 * (max(it.sent for it in late) - 1) / SERVICE_S
    assert median(it.seconds for it in served) < PATIENCE_S
    assert median(it.seconds for it in refused) < median(it.seconds for it in served)
    check_raw_problem(refused[-1].response, 503)
    assert refused[-1].response.headers["retry-after"] == "1"
    assert send_request(app.edge, "GET", "/rows/1").status == 200  # the queue is short again


def test_few_reads_are_sent_twice_because_the_apps_are_busy() -> None:
    with fake_app(instances=2, EDGE_WORKERS="1") as app:
        app.respond = Line().respond
        offer(app, "GET /rows/%d", count=300, rate=3 / SERVICE_S)
        sent = Counter(request.line for request in app.received if "/rows/" in request.line)
    twice = sum(times > 1 for times in sent.values())
    assert len(sent) > 60
    assert 0 < twice < 16 + 0.2 * len(sent)  # 16 at once, and a tenth of the others


def test_burst_after_silence_is_served_completely(app: FakeApp) -> None:
    answers = offer(app, "GET /rows/%d", count=40, rate=10_000)
    assert {it.response.status for it in answers} == {200}


def test_searches_are_left_to_the_apps(app: FakeApp) -> None:
    answers = offer(app, "GET /rows?q=%d", count=100, rate=3 / SERVICE_S)
    assert {it.response.status for it in answers} == {200}
