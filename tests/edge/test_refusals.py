"""Every error of the edge is a problem, for each method and size, and its line in the log has the request's method."""

import json
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from testkit.certificates import Authority
from testkit.failpoints import running_edge
from testkit.fake_app import FakeApp, fake_app, plain
from testkit.raw_http import RawResponse, check_raw_problem, parse_response, send_bytes, send_request
from testkit.stack import folder, wait_until

UNUSED = (
    "Cookie",
    "Authorization",
    "Referer",
    "User-Agent",
    "Accept-Language",
    "Forwarded",
    "X-Forwarded-For",
    "X-Any",
)

LINES = ["GET /r/1", "HEAD /r/1", "GET /health", "POST /r", "PUT /r/1", "PATCH /r/1", "DELETE /r/1", "POST /r/batch"]


@pytest.fixture(scope="module")
def module_app() -> Iterator[FakeApp]:
    with fake_app() as app:
        yield app


@pytest.fixture
def app(module_app: FakeApp) -> FakeApp:
    module_app.received.clear()
    module_app.respond = plain
    return module_app


def log_line(log: Callable[[], str], response: RawResponse) -> dict[str, object]:
    request_id = response.headers["x-request-id"]
    found = wait_until(lambda: [line for line in log().splitlines() if f'"request_id":"{request_id}"' in line])
    line: dict[str, object] = json.loads(found[0])
    return line


class TestHeaders:
    @pytest.mark.parametrize("name", UNUSED)
    @pytest.mark.parametrize("line", LINES)
    def test_header_that_is_not_used_may_have_8_kilobytes(self, app: FakeApp, line: str, name: str) -> None:
        method, address = line.split()
        assert send_request(app.edge, method, address, f"{name}: {'a' * 8192}\r\n".encode()).status == 200

    def test_several_headers_may_have_8_kilobytes_each(self, app: FakeApp) -> None:
        lines = "".join(f"{name}: {'a' * 8192}\r\n" for name in UNUSED[:4])
        assert send_request(app.edge, "PUT", "/r/1", lines.encode(), b"{}").status == 200
        assert app.received[0].body == b"{}"

    @pytest.mark.parametrize(
        "name", ["If-Match", "If-None-Match", "Accept", "Content-Type", "Idempotency-Key", "Origin"]
    )
    def test_header_that_is_used_reaches_the_app_whole(self, app: FakeApp, name: str) -> None:
        assert send_request(app.edge, "PUT", "/r/1", f"{name}: {'a' * 8192}\r\n".encode(), b"{}").status == 200
        assert app.received[0].headers[name.lower()] == "a" * 8192

    @pytest.mark.parametrize("line", LINES)
    @pytest.mark.parametrize("sizes", [(16_384,), (100_000,), (8_192,) * 12])
    def test_larger_header_is_431(self, app: FakeApp, line: str, sizes: tuple[int, ...]) -> None:
        method, address = line.split()
        lines = "".join(f"X-{n}: {'a' * size}\r\n" for n, size in enumerate(sizes))
        response = send_request(app.edge, method, address, lines.encode())
        if method != "HEAD":
            check_raw_problem(response, 431)
        assert response.status == 431

    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "FOO"])
    @pytest.mark.parametrize("address", ["/{}", "/r?{}", "/r/batch?{}", "/readyz?{}", "/docs/{}"])
    @pytest.mark.parametrize("size", [4_097, 8_192, 20_000])
    def test_longer_address_is_414(self, app: FakeApp, method: str, address: str, size: int) -> None:
        response = send_request(app.edge, method, address.format("r" * (size - len(address) + 2)))
        check_raw_problem(response, 414)
        assert not app.received

    def test_longest_address_reaches_the_app(self, app: FakeApp) -> None:
        address = "/" + "r" * 4095
        assert send_request(app.edge, "GET", address).status == 200
        assert app.received[0].line == f"GET {address}"


class TestMethods:
    @pytest.mark.parametrize(
        ("line", "lines", "size", "status"),
        [
            ("POST /r", "", 70_000, 413),
            ("PUT /r/1", "", 70_000, 413),
            ("PATCH /r/1", "Expect: 100-continue", 70_000, 413),
            ("DELETE /r/1", "", 70_000, 413),
            ("POST /r/batch", "", 3_000_000, 413),
            ("POST /r", "Content-Type: a\r\nContent-Type: b", 0, 400),
            ("POST /r/batch", "Content-Type: a\r\nContent-Type: b", 100_000, 400),
            ("POST /r", "Transfer-Encoding: gzip", 0, 501),
            ("DELETE /r/1", "Host: twice", 0, 400),
            ("TRACE /r", "", 0, 405),
            ("FO /r", "", 0, 501),
            ("PUT /.lease/renew", "", 0, 404),
            ("POST /r%", "", 0, 400),
            ("POST /r", f"X: {'a' * 20_000}", 0, 431),
            ("PUT /r/1", f"X: {'a' * 20_000}", 0, 431),
            (f"POST /{'r' * 20_000}", "", 0, 414),
            (f"PATCH /{'r' * 5_000}", "", 0, 414),
            ("OPTIONS /\xff", "", 0, 400),
        ],
    )
    def test_log_has_the_method_of_a_request_that_the_edge_refuses(
        self, app: FakeApp, line: str, lines: str, size: int, status: int
    ) -> None:
        method, address = line.split(" ", 1)
        headers = f"{lines}\r\n" if lines else ""
        response = send_request(app.edge, method, address.encode("latin-1"), headers.encode(), b"x" * size)
        check_raw_problem(response, status)
        logged = log_line(app.log, response)
        assert (logged["method"], logged["status"]) == (method, status)

    @pytest.mark.parametrize(
        ("request_bytes", "status", "method"),
        [
            (b"PUT /r/1 HTTP/1.1\r\n\r\n", 400, "PUT"),
            (b"PUT /r/1 HTTP/2.0\r\nHost: localhost\r\n\r\n", 505, "PUT"),
            (b"PUT /r/1 HTTP/x\r\nHost: localhost\r\n\r\n", 400, "PUT"),
            (b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "CONNECT"),
            (b"post /r HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, ""),
            (b'GET"} /r HTTP/1.1\r\nHost: localhost\r\n\r\n', 400, ""),
            (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, ""),
        ],
    )
    def test_request_that_cannot_be_parsed_is_a_problem(
        self, app: FakeApp, request_bytes: bytes, status: int, method: str
    ) -> None:
        response = parse_response(send_bytes(app.edge, request_bytes))
        check_raw_problem(response, status)
        assert log_line(app.log, response)["method"] == method


# ---- apps that fail while they receive a request ----


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close_at_once(_: socket.socket) -> None:
    """Close the connection without reading."""


def reset_at_once(connection: socket.socket) -> None:
    reset(connection)


def reset_in_the_body(connection: socket.socket) -> None:
    connection.recv(1000)
    reset(connection)


def answer_early_and_reset(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n")
    reset(connection)


def send_half_a_header(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Ty")


def send_a_large_header(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Large: " + b"a" * 40_000 + b"\r\n\r\n")


@contextmanager
def broken_app(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run an app that treats each connection in this way; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def treat(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                behave(connection)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=treat, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "behave",
    [
        close_at_once,
        reset_at_once,
        reset_in_the_body,
        answer_early_and_reset,
        send_half_a_header,
        send_a_large_header,
    ],
)
def test_app_that_fails_while_it_receives_a_request_is_502(behave: Callable[[socket.socket], None]) -> None:
    with broken_app(behave) as address, running_edge(address) as (edge, data):
        for line, size in [
            ("POST /r", 10),
            ("PUT /r/1", 60_000),
            ("POST /r/batch", 100_000),
            ("POST /r/batch", 2_000_000),
        ]:
            method, target = line.split()
            response = send_request(edge, method, target, b"", b"x" * size)
            check_raw_problem(response, 502)
            logged = log_line((Path(data) / "log").read_text, response)
            assert (logged["method"], logged["status"]) == (method, 502)
        for target in ("/r/1", "/health"):
            check_raw_problem(send_request(edge, "GET", target), 502)


def test_app_that_answers_a_batch_before_it_has_read_it_is_heard() -> None:
    """The app refuses by the header alone and reads the rest, as gunicorn does."""
    body = b'{"type":"/problems/forbidden","status":403}'
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"

    def refuse(connection: socket.socket) -> None:
        id_line = b"".join(re.findall(rb"X-Request-Id: [^\r]+\r\n", connection.recv(1000)))
        connection.sendall(head + id_line + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while connection.recv(65536):
            pass

    with broken_app(refuse) as address, running_edge(address) as (edge, _):
        for size in (100_000, 2_000_000):
            response = send_request(edge, "POST", "/r/batch", b"", b"x" * size)
            assert (response.status, response.body) == (403, body)


def test_app_that_does_not_answer_is_504() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with running_edge(address, DATABASE_TIMEOUT="0.1") as (edge, data):
            response = send_request(edge, "POST", "/r/batch", b"", b"x" * 100_000)
            check_raw_problem(response, 504)
            logged = log_line((Path(data) / "log").read_text, response)
            assert (logged["method"], logged["status"]) == ("POST", 504)


def test_read_is_504_when_no_app_answers_and_502_when_none_is_known() -> None:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        apps = ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
        edge, data = stack.enter_context(running_edge(apps, DATABASE_TIMEOUT="0.1"))
        for target in ("/health", "/r/1", "/r"):
            response = send_request(edge, "GET", target)
            check_raw_problem(response, 504)
            assert log_line((Path(data) / "log").read_text, response)["status"] == 504
        files = stack.enter_context(folder())
        authority, cert, key = Authority(files), files / "cert.pem", files / "key.pem"
        authority.sign(cert, key)
        edge, _ = stack.enter_context(
            running_edge(apps, DATABASE_TIMEOUT="0.1", TLS_CERT=str(cert), TLS_KEY=str(key)),
        )
        curl = ["curl", "--noproxy", "*", "-si", "--http2", "--cacert", str(authority.cert)]
        shown = subprocess.check_output([*curl, f"https{edge.removeprefix('http')}/r/1"], text=True)
        assert shown.startswith("HTTP/2 504")
        assert "/problems/gateway-timeout" in shown
    with running_edge("nowhere.invalid:1") as (edge, _):
        for method, target in (("GET", "/health"), ("GET", "/r/1"), ("PUT", "/r/1")):
            check_raw_problem(send_request(edge, method, target), 502)


def test_client_that_sends_no_more_of_its_body_gets_a_problem(app: FakeApp) -> None:
    head = b"POST /r/batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nxx"
    response = parse_response(send_bytes(app.edge, head))
    check_raw_problem(response, 408)
    logged = log_line(app.log, response)
    assert (logged["method"], logged["status"]) == ("POST", 408)
