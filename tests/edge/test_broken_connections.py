"""Connections between an edge and its apps break, are refused, or carry noise."""

import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from testkit.certificates import Authority
from testkit.failpoints import running_edge
from testkit.stack import folder, wait_until
from velikiy.findings.caches import edge as findings_of_edge

Respond = Callable[[bytes], bytes]
"""Returns what the app sends for a request. After b"" it closes the connection."""


def header(request: bytes, name: bytes) -> bytes:
    return next((line.split(b": ", 1)[1] for line in request.split(b"\r\n") if line.startswith(name + b": ")), b"")


def answer(request: bytes, status: bytes = b"200 OK", body: bytes = b'{"id":7}', more: bytes = b"") -> bytes:
    lines = [
        b"HTTP/1.1 " + status,
        b"X-Request-Id: " + header(request, b"X-Request-Id"),
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join(lines) + b"\r\n" + more + b"\r\n" + body


def noise(_: bytes) -> bytes:
    return random.Random(1).randbytes(40) + b"\r\n\r\n200 OK"


def answer_to_another_request(request: bytes) -> bytes:
    return answer(request).replace(header(request, b"X-Request-Id"), b"another")


def part_of_an_answer(request: bytes) -> bytes:
    return answer(request).replace(b"Content-Length: 8", b"Content-Length: 9\r\nConnection: close")


def postgres_is_silent(request: bytes) -> bytes:
    return answer(request, b"503 Service Unavailable", b"{}", b"Postgres: silent\r\n")


@dataclass
class RawApp:
    """An app that sends exact bytes, and is healthy for an edge that checks it."""

    respond: Respond = answer
    received: list[bytes] = field(default_factory=list)
    """The requests, in order; without checks and renewals of leases."""
    pause_s: float = 0
    """The time between two halves of a response."""

    def __post_init__(self) -> None:
        self.port = 0
        self._connections: list[socket.socket] = []
        self.listen()

    def listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections, and close all that are open."""
        for it in (self._listener, *self._connections):
            with suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with closing(connection), suppress(OSError):
            while request := connection.recv(65_536):
                is_check = request.startswith((b"GET /livez ", b"POST /.lease/"))
                if not is_check:
                    self.received.append(request)
                response = answer(request) if is_check else self.respond(request)
                half = len(response) // 2 if self.pause_s and not is_check else 0
                connection.sendall(response[:half])
                time.sleep(self.pause_s if half else 0)
                connection.sendall(response[half:])
                if not response or b"Connection: close" in response:
                    break


@dataclass
class Service:
    edge: str
    apps: list[RawApp]

    def get(self) -> requests.Response:
        return requests.get(f"{self.edge}/users/7", timeout=15)

    @property
    def writes(self) -> int:
        """How often a write has arrived at an app."""
        return sum(request.startswith(b"PUT ") for app in self.apps for request in app.received)

    def put(self) -> requests.Response:
        return requests.put(f"{self.edge}/users/7", json={}, timeout=15)


@contextmanager
def running_service(number: int, **settings: Any) -> Iterator[Service]:
    apps = [RawApp() for _ in range(number)]
    addresses = ",".join(f"127.0.0.1:{app.port}" for app in apps)
    with running_edge(addresses, DATABASE_TIMEOUT="1", **settings) as (edge, _):
        yield Service(edge, apps)
    for app in apps:
        app.refuse()


@pytest.fixture(scope="module")
def module_service() -> Iterator[Service]:
    with running_service(2) as service:
        yield service


@pytest.fixture(scope="module")
def http2() -> Iterator[Service]:
    """An edge with TLS, because browsers send HTTP/2 with TLS only."""
    with folder() as files:
        Authority(files).sign(files / "cert.pem", files / "key.pem")
        with running_service(2, TLS_CERT=str(files / "cert.pem"), TLS_KEY=str(files / "key.pem")) as service:
            yield service


@pytest.fixture
def service(module_service: Service) -> Service:
    for app in module_service.apps:
        app.respond, app.pause_s = answer, 0
    wait_until(lambda: all_are_chosen(module_service))
    for app in module_service.apps:
        app.received.clear()
    return module_service


def all_are_chosen(service: Service) -> bool:
    for app in service.apps:
        app.received.clear()
    for _ in range(2 * len(service.apps)):
        service.get()
    return all(app.received for app in service.apps)


def status_of_put(service: Service) -> int:
    """Return the status, or 0 if the edge closes the connection."""
    try:
        return service.put().status_code
    except requests.ConnectionError:
        return 0


@pytest.mark.parametrize("respond", [noise, answer_to_another_request])
def test_write_is_not_acknowledged_by_anything_but_its_own_answer(service: Service, respond: Respond) -> None:
    for app in service.apps:
        app.respond = respond
    assert status_of_put(service) in (0, 502)
    assert service.writes == 1, "it is sent once"


@pytest.mark.parametrize("respond", [noise, answer_to_another_request, part_of_an_answer, postgres_is_silent])
def test_read_that_one_app_fails_is_answered_by_the_other(service: Service, respond: Respond) -> None:
    service.apps[0].respond = respond
    for _ in range(4):
        response = service.get()
        assert (response.status_code, response.content) == (200, b'{"id":7}')
    assert service.apps[0].received


@pytest.mark.parametrize("respond", [noise, answer_to_another_request, part_of_an_answer])
def test_read_that_every_app_fails_is_502(service: Service, respond: Respond) -> None:
    for app in service.apps:
        app.respond = respond
    assert service.get().status_code == 502


def test_read_is_503_where_postgres_answers_no_app(service: Service) -> None:
    """One app waits for PostgreSQL while the edge waits 0.3 s for it, and another for a second (DATABASE_TIMEOUT)."""

    def postgres_is_away(request: bytes) -> bytes:
        time.sleep(1)
        return postgres_is_silent(request)

    for app in service.apps:
        app.respond = postgres_is_away
    began = time.monotonic()
    response = service.get()
    assert response.status_code == 503
    assert "Postgres" not in response.headers
    assert time.monotonic() - began < 1.8


@pytest.mark.parametrize("respond", [noise, answer_to_another_request, part_of_an_answer, postgres_is_silent])
def test_read_over_http2_that_one_app_fails_is_answered_by_the_other(http2: Service, respond: Respond) -> None:
    http2.apps[0].respond = respond
    http2.apps[0].received.clear()
    curl = ["curl", "--noproxy", "*", "-ski", "--http2", f"https{http2.edge.removeprefix('http')}/users/7"]
    for _ in range(4):
        shown = subprocess.check_output(curl, text=True)
        assert shown.startswith("HTTP/2 200")
        assert shown.endswith('{"id":7}')
    assert http2.apps[0].received


@pytest.mark.parametrize("path", ["/docs/swagger.js", "/console/0123456789ab/console.js", "/openapi.json"])
def test_file_whose_parts_are_apart_arrives_as_a_whole(service: Service, path: str) -> None:
    """An app without CPU pauses between two parts, and the edge has sent the first part to the client already."""
    for app in service.apps:
        app.respond, app.pause_s = lambda request: answer(request, body=b"x" * 100_000), 0.6
    response = requests.get(f"{service.edge}{path}", timeout=15)
    assert response.content == b"x" * 100_000


def test_read_that_no_app_answers_is_504(service: Service) -> None:
    over = threading.Event()
    for app in service.apps:
        app.respond = lambda request: answer(request) if over.wait(9) else b""
    response = service.get()
    over.set()
    assert response.status_code == 504


def test_write_on_a_connection_that_leads_nowhere_is_answered_in_five_seconds(service: Service) -> None:
    """Something between edge and app acknowledges its packets, and nothing else happens."""
    over = threading.Event()
    for app in service.apps:
        app.respond = lambda request: answer(request) if over.wait(9) else b""
    began = time.monotonic()
    response = service.put()
    over.set()
    assert response.status_code == 504
    assert "outcome of a write is unknown" in response.json()["detail"]
    assert 4.5 < time.monotonic() - began < 6
    assert service.writes == 1, "it is sent once"


def test_write_goes_to_the_other_app_if_one_refuses_its_connection(service: Service) -> None:
    service.apps[0].refuse()
    try:
        assert [status_of_put(service) for _ in range(6)] == [200] * 6
        assert service.writes == 6
    finally:
        service.apps[0].listen()


def test_write_whose_connection_breaks_is_sent_once(service: Service) -> None:
    for app in service.apps:
        app.respond = lambda _: b""
    assert status_of_put(service) == 502
    assert service.writes == 1


def test_write_that_one_app_refuses_and_the_next_breaks_off_is_sent_once() -> None:
    """A try on a kept connection does not count for Nginx, so a third one would follow."""
    with running_service(3) as service:
        wait_until(lambda: all_are_chosen(service))
        first, *others = service.apps
        for app in others:
            app.respond = lambda request: b"" if request.startswith(b"PUT ") else answer(request)
        first.refuse()
        for number in range(1, 4):
            assert service.put().status_code == 502
            assert service.writes == number


def test_account_of_an_edge_names_the_apps_and_the_redis_that_it_does_not_reach() -> None:
    check, found = findings_of_edge("held; redis=silent; apps=10.0.0.7:5000,unix:../run/app1.sock")
    assert check == "ok"
    assert [it.name for it in found] == ["app.silent", "edge.redis_silent"]
    assert "10.0.0.7:5000, unix:../run/app1.sock" in found[0].what
