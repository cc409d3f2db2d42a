"""A client that sends its request byte by byte is cut off, and a client on a slow link is served."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from urllib.parse import urlsplit

import pytest
from werkzeug import Request, Response

from testkit.edge_copy import copy_edge, replace_once
from testkit.fake_app import FakeApp, fake_app, plain
from testkit.raw_http import RawResponse, check_raw_problem, parse_response, send_bytes, send_request
from testkit.stack import folder, wait_until
from velikiy.hang_ups import is_hung_up

CUT_OFF_WITHIN_S = 6
"""Much less than a trickling request would take."""


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    """An edge with shorter times."""
    with folder() as checkout:
        edge = copy_edge(checkout)
        replace_once(edge / "lua/bodies.lua", "local GRACE_S = 8 ", "local GRACE_S = 0.5 ")
        replace_once(edge / "lua/bodies.lua", "local CHECK_INTERVAL_S = 1\n", "local CHECK_INTERVAL_S = 0.1\n")
        replace_once(edge / "conf/timeouts_and_sizes.conf", "client_header_timeout 10s;", "client_header_timeout 1s;")
        with fake_app(home=edge) as app:
            app.respond = plain
            yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    module_app.received.clear()
    return module_app


def send_slowly(app: FakeApp, head: bytes, pieces: list[bytes], interval_s: float) -> bytes:
    """Send the head at once and each piece after an interval. Stop when the edge responds or closes the connection, and
    return all bytes of the response."""
    address = urlsplit(app.edge)
    received = b""
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 20) as connection:
        connection.sendall(head)
        for piece in pieces:
            connection.settimeout(interval_s)
            try:
                received = connection.recv(65536)
                break
            except TimeoutError:
                pass
            except ConnectionError:
                return b""
            connection.sendall(piece)
        connection.settimeout(20)
        with suppress(ConnectionError):
            while more := connection.recv(65536):
                received += more
    return received


def head(line: str, *fields: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *fields, "", ""]).encode()


def trickle(app: FakeApp, line: str, *fields: str, piece: bytes = b" ") -> RawResponse:
    began = time.monotonic()
    response = parse_response(send_slowly(app, head(line, *fields), [piece] * 200, 0.1))
    assert time.monotonic() - began < CUT_OFF_WITHIN_S
    return response


@pytest.mark.parametrize(
    ("line", "framing", "piece"),
    [
        ("POST /rows", "Content-Length: 60000", b" "),
        ("PUT /rows/1", "Content-Length: 60000", b" " * 20),
        ("POST /rows/batch", "Content-Length: 2000000", b" " * 20),
        ("POST /rows", "Transfer-Encoding: chunked", b"1\r\n \r\n"),
        ("GET /rows?unknown=1", "Content-Length: 60000", b" "),
        ("GET /readyz", "Content-Length: 60000", b" "),
    ],
)
def test_body_that_trickles_is_a_problem_and_reaches_no_app(
    app: FakeApp, line: str, framing: str, piece: bytes
) -> None:
    response = trickle(app, line, framing, "Content-Type: application/json", piece=piece)
    check_raw_problem(response, 408)
    assert response.json["type"] == "/problems/request-timeout"
    assert response.headers["connection"] == "close"
    assert not app.received


def test_body_on_a_slow_link_arrives(app: FakeApp) -> None:
    pieces = [b" " * 250] * 14 + [b"{}"]  # twice the minimum rate, for five times the grace
    whole = head("POST /rows", f"Content-Length: {sum(map(len, pieces))}", "Content-Type: application/json")
    assert parse_response(send_slowly(app, whole, pieces, 0.12)).status == 200
    [received] = app.received
    assert received.body == b"".join(pieces)


def test_edge_goes_on_after_many_bodies_that_trickled(app: FakeApp) -> None:
    with ThreadPoolExecutor(20) as threads:
        fields = ("Content-Length: 60000", "Content-Type: application/json")
        tries = [threads.submit(trickle, app, "POST /rows", *fields) for _ in range(20)]
        assert {each.result().status for each in tries} == {408}
    assert send_request(app.edge, "POST", "/rows", b"Content-Type: application/json\r\n", b"{}").status == 200
    assert "exited on signal" not in app.log()
    wait_until(lambda: '"status":408' in app.log())  # Nginx writes its buffer each second


def test_header_that_trickles_is_cut_off(app: FakeApp) -> None:
    began = time.monotonic()
    whole = b"GET /rows/1 HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    assert send_slowly(app, whole, [b"x"] * 200, 0.1) == b""
    assert time.monotonic() - began < CUT_OFF_WITHIN_S


@pytest.mark.parametrize("target", ["/rows/1", "/rows?unknown=1", "/rows?q=word", "/readyz"])
def test_client_that_closes_its_sending_side_behind_a_read_is_answered(app: FakeApp, target: str) -> None:
    def respond(request: Request) -> Response:
        time.sleep(0.3)  # the edge learns meanwhile that the client has closed its side
        return plain(request)

    app.respond = respond
    try:
        request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        assert parse_response(send_bytes(app.edge, request, half_close=True)).status == 200
    finally:
        app.respond = plain


def test_write_of_a_client_that_closes_its_sending_side_is_given_up(app: FakeApp) -> None:
    """Such a client may have hung up and sent the write again, so the app must notice (docs/races.md)."""
    arrived, given_up = Event(), Event()

    def respond(request: Request) -> Response:
        arrived.set()
        if wait_until(lambda: is_hung_up(request.environ["werkzeug.socket"])):
            given_up.set()
        return plain(request)

    app.respond = respond
    try:
        body = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        request = f"PUT /rows/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{body}".encode()
        address = urlsplit(app.edge)
        with socket.create_connection((str(address.hostname), int(address.port or 80)), timeout=10) as client:
            client.sendall(request)
            assert arrived.wait(10)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1000) == b""
        assert given_up.wait(10)
    finally:
        app.respond = plain
