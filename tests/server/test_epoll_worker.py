"""The worker (velikiy/server/epoll_worker.py), with an app that responds at the moment that a test chooses. The shares of
the threads are the same with gunicorn's own worker (velikiy/server/plain_worker.py)."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import psutil
import pytest
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER

from testkit.stack import ROOT, free_ports, has_ended, wait_until
from velikiy.server.shares import COSTLY_QUEUE_FACTOR, MAX_COSTLY_WAIT_S
from velikiy.server.stopping import LEAVING_S

THREADS = 2

EPOLL = "velikiy.server.epoll_worker.Worker"

PLAIN = "velikiy.server.plain_worker.Worker"
"""gunicorn's own worker."""

BOTH = pytest.mark.parametrize("worker_class", [EPOLL, pytest.param(PLAIN, marks=pytest.mark.plain_worker)])


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Return the body of the request, or its path. With `?begun=FILE`, create that file first; with `?until=FILE`, wait
    until that file exists."""
    parameters = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    for file in parameters.get("begun", []):
        Path(file).touch()
    for file in parameters.get("until", []):
        wait_until(Path(file).exists)
    if "pieces" in parameters:
        start_response("200 OK", [("Content-Type", "text/plain")])  # without a length, so the response is chunked
        return [b"x" * 50_000, b"y" * 50_000, b"z"]
    if environ["gunicorn.socket"].refused_as:
        start_response("503 Busy", [("Content-Length", "0")])
        return []
    if "exit" in parameters:
        raise SystemExit
    body = b"unread" if "unread" in parameters else environ["wsgi.input"].read() or environ["PATH_INFO"].encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


@dataclass
class Server:
    port: int
    process: "subprocess.Popen[str]"
    folder: Path

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker

    def hold(self, connection: http.client.HTTPConnection, name: str, method: str = "GET") -> Callable[[], None]:
        """Send a request, and wait until the app has begun with it. The app responds when the result is called."""
        begun, until = self.folder / f"{name}-begun", self.folder / f"{name}-until"
        connection.request(method, f"/{name}?begun={begun}&until={until}")
        wait_until(begun.exists)
        return until.touch


@contextmanager
def serve(folder: Path, *options: str, worker_class: str = EPOLL) -> Iterator[Server]:
    port = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "--worker-class", worker_class, "--bind", f"127.0.0.1:{port}"]
    command += ["--threads", str(THREADS), "--graceful-timeout", "20", *options, "tests.server.test_epoll_worker:app"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=log, stderr=log, env={**os.environ})
    try:
        wait_until(lambda: is_serving(port), what=(folder / "log").read_text())
        yield Server(port, process, folder)
    finally:
        process.kill()
        process.wait()


def is_serving(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"GET /probe HTTP/1.0\r\n\r\n")
            return b"/probe" in probe.makefile("rb").read()
    except OSError:
        return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps idle connections for longer than a test takes."""
    with serve(tmp_path_factory.mktemp("worker"), "--keep-alive", "60") as shared:
        yield shared


def fetch(connection: http.client.HTTPConnection, path: str, body: bytes | None = None) -> bytes:
    connection.request("POST" if body else "GET", path, body)
    return connection.getresponse().read()


def test_few_threads_serve_many_connections_repeatedly(shared: Server) -> None:
    connections = [shared.connect() for _ in range(10 * THREADS)]
    for number in range(3):
        for index, connection in enumerate(connections):
            connection.request("GET", f"/{number}/{index}")
        for index, connection in enumerate(connections):
            assert connection.getresponse().read() == f"/{number}/{index}".encode()
    for connection in connections:
        connection.close()


def test_chunked_response_arrives_complete_and_in_order(shared: Server) -> None:
    connection = shared.connect()
    for _ in range(2):
        assert fetch(connection, "/?pieces") == b"x" * 50_000 + b"y" * 50_000 + b"z"
    connection.close()


def test_response_to_unread_body_arrives_before_the_body_ends(shared: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), 10) as client:
        client.sendall(b"POST /?unread HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf of it")
        client.settimeout(2)  # the worker waits five seconds for the rest of the body
        assert client.recv(4096).endswith(b"\r\n\r\nunread")


def test_slow_request_does_not_delay_other_connections(shared: Server) -> None:
    late, other = shared.connect(), shared.connect()
    go_on = shared.hold(late, "late")
    assert [fetch(other, f"/{n}") for n in range(3)] == [b"/0", b"/1", b"/2"]
    go_on()
    assert late.getresponse().read() == b"/late"
    assert fetch(late, "/again") == b"/again"


def test_pipelined_requests_are_answered_in_order(shared: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), 10) as client:
        client.sendall(
            b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none"
            b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\ntwo"
            b"GET /three HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        responses = client.makefile("rb").read()
    assert responses.count(b"200 OK") == 3
    assert responses.index(b"one") < responses.index(b"two") < responses.index(b"/three")


def test_clients_that_hang_up_at_any_point_cost_no_thread(shared: Server) -> None:
    whole = b"POST /hang-up HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nonly some of it"
    for cut in (0, 1, 20, len(whole) - 5, len(whole)):
        for _ in range(2 * THREADS):
            with socket.create_connection(("127.0.0.1", shared.port), 10) as client:
                client.sendall(whole[:cut])
    for broken in (b"\0\0\0", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", shared.port), 10) as client:
            client.sendall(broken)
            client.shutdown(socket.SHUT_WR)
            assert client.makefile("rb").read().startswith((b"", b"HTTP/1.1 4")[broken != b"\0\0\0"])
    assert_all_threads_serve(shared)


def test_app_that_raises_system_exit_costs_no_thread(shared: Server) -> None:
    for _ in range(2 * THREADS):
        connection = shared.connect()
        connection.request("GET", "/?exit=1")
        with suppress(http.client.RemoteDisconnected):
            assert connection.getresponse().status == 500
    assert_all_threads_serve(shared)


def assert_all_threads_serve(shared: Server) -> None:
    """Check that all threads serve requests at the same time."""
    connections = [shared.connect() for _ in range(THREADS)]
    go_on = [shared.hold(it, f"all-{id(connections)}-{n}") for n, it in enumerate(connections)]
    for release in go_on:
        release()
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()


def test_closed_connections_leave_no_socket_open(shared: Server) -> None:
    def sockets() -> int:
        return len([it for it in shared.worker().net_connections("tcp") if it.status != psutil.CONN_LISTEN])

    wait_until(lambda: sockets() == 0)
    connections = [shared.connect() for _ in range(5)]
    for connection in connections:
        assert fetch(connection, "/") == b"/"
    assert sockets() == 5
    for connection in connections:
        connection.close()
    wait_until(lambda: sockets() == 0)


def test_idle_connection_is_closed_after_keepalive_and_busy_connection_is_not(tmp_path: Path) -> None:
    with serve(tmp_path, "--keep-alive", "1") as hasty:
        idle, unused = hasty.connect(), hasty.connect()
        assert fetch(idle, "/") == b"/"
        unused.connect()
        for connection in (idle, unused):
            assert connection.sock.recv(1) == b""
        long = hasty.connect()
        go_on = hasty.hold(long, "long")
        again = hasty.connect()
        assert fetch(again, "/") == b"/"
        assert again.sock.recv(1) == b""
        go_on()
        assert long.getresponse().read() == b"/long"


def test_stopping_worker_serves_begun_requests_and_requests_on_idle_connections(tmp_path: Path) -> None:
    with serve(tmp_path, "--keep-alive", "60") as stopping:
        begun, idle = stopping.connect(), stopping.connect()
        go_on = stopping.hold(begun, "begun")
        assert fetch(idle, "/") == b"/"
        worker = stopping.worker()
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: announces_close(idle), within=LEAVING_S + 1.5, every=0.01)
        go_on()
        assert begun.getresponse().read() == b"/begun"
        wait_until(lambda: has_ended(worker))


def test_stopping_worker_serves_requests_that_wait_for_a_thread(tmp_path: Path) -> None:
    with serve(tmp_path, "--keep-alive", "60") as stopping:
        busy = [stopping.connect() for _ in range(THREADS)]
        waiting = [stopping.connect() for _ in range(3)]
        for connection in waiting:
            assert fetch(connection, "/") == b"/"
        go_on = [stopping.hold(connection, f"busy-{n}") for n, connection in enumerate(busy)]
        for connection in waiting:
            connection.request("POST", "/", b"arrived before the stop")
        stopping.worker().send_signal(signal.SIGTERM)
        time.sleep(LEAVING_S + STOP_KEEPALIVE_LINGER + 0.5)  # the worker has closed idle connections by now
        for release in go_on:
            release()
        for connection in waiting:
            response = connection.getresponse()
            assert (response.read(), response.getheader("Connection")) == (b"arrived before the stop", "close")
            connection.close()


@pytest.mark.parametrize("worker_class", [EPOLL, PLAIN])
def test_stopping_worker_serves_what_waits_in_the_queue_of_its_listener(tmp_path: Path, worker_class: str) -> None:
    with serve(tmp_path, worker_class=worker_class) as stopping:
        worker = stopping.worker()
        worker.suspend()
        # Before it stops, it could still notice a SIGTERM, which the kernel delivers before a SIGSTOP.
        wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
        waiting = [stopping.connect() for _ in range(20)]
        for number, connection in enumerate(waiting):
            connection.request("POST", "/", f"{number}".encode())
        stopping.process.terminate()
        wait_until(lambda: signal.SIGTERM in pending_signals(worker.pid))
        worker.resume()
        for number, connection in enumerate(waiting):
            assert connection.getresponse().read() == f"{number}".encode()
            connection.close()
        assert stopping.process.wait(timeout=20) == 0


def pending_signals(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    [mask] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:")]
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_replaced_worker_leaves_it_to_the_client_to_close_an_idle_connection(tmp_path: Path) -> None:
    with serve(tmp_path, "--keep-alive", "60") as server:
        idle = server.connect()
        assert fetch(idle, "/") == b"/"
        replaced = server.worker()
        replaced.send_signal(signal.SIGWINCH)
        time.sleep(STOP_KEEPALIVE_LINGER + 1)  # a worker that stops has closed idle connections by now
        assert announces_close(idle)
        wait_until(lambda: has_ended(replaced))


def announces_close(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.read() == b"/"
    return response.getheader("Connection") == "close"


def test_concurrent_clients_each_receive_their_own_response(shared: Server) -> None:
    wrong: list[bytes] = []

    def client(name: int) -> None:
        connection = shared.connect()
        for number in range(200):
            body = f"{name}-{number}".encode()
            if (response := fetch(connection, "/", body)) != body:
                wrong.append(response)
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8 * THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@contextmanager
def requests_in_progress(server: Server, count: int, method: str) -> Iterator[list[http.client.HTTPConnection]]:
    """Keep several requests of this method in progress, each in a thread, until the block ends."""
    connections = [server.connect() for _ in range(count)]
    names = [f"held-{id(connections)}-{n}" for n in range(count)]
    go_on = [server.hold(it, name, method) for it, name in zip(connections, names, strict=True)]
    try:
        yield connections
    finally:
        for release in go_on:
            release()
        for connection in connections:
            assert connection.getresponse().status == 200
            connection.close()


@BOTH
def test_writes_take_at_most_five_eighths_of_the_threads(tmp_path: Path, worker_class: str) -> None:
    with serve(tmp_path, "--threads", "4", worker_class=worker_class) as four:
        waiting, reader = four.connect(), four.connect()
        with requests_in_progress(four, 2, "PUT"):
            waiting.request("PUT", "/waiting", b"a write")
            assert [fetch(reader, f"/{n}") for n in range(3)] == [b"/0", b"/1", b"/2"]
            waiting.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                waiting.sock.recv(1)
            waiting.sock.settimeout(10)
        assert waiting.getresponse().read() == b"a write"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/users?q=word"),
        ("HEAD", "/users?limit=2&q=word"),
        ("GET", "/users/count?%71=word"),
        ("POST", "/users/batch"),
        ("POST", "/users/batch?x"),
    ],
)
def test_costly_requests_take_at_most_a_quarter_of_the_threads(tmp_path: Path, method: str, target: str) -> None:
    with serve(tmp_path, "--threads", "4") as four:
        costly, waiting, other = four.connect(), four.connect(), four.connect()
        joint = "&" if "?" in target else "?"
        costly.request(method, f"{target}{joint}begun={tmp_path}/begun&until={tmp_path}/until")
        wait_until((tmp_path / "begun").exists)
        waiting.request(method, target)
        with requests_in_progress(four, 2, "PUT"):  # the whole share of the writes
            assert [fetch(other, f"/{n}?sort=name") for n in range(3)] == [b"/0", b"/1", b"/2"]
        waiting.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.sock.recv(1)
        waiting.sock.settimeout(10)
        (tmp_path / "until").touch()
        assert costly.getresponse().status == 200
        assert waiting.getresponse().status == 200


@BOTH
def test_costly_requests_beyond_the_queue_are_refused_at_once(tmp_path: Path, worker_class: str) -> None:
    with serve(tmp_path, "--threads", "4", worker_class=worker_class) as four:
        costly = [four.connect() for _ in range(1 + COSTLY_QUEUE_FACTOR)]
        costly[0].request("GET", f"/users?q=0&begun={tmp_path}/begun&until={tmp_path}/until")
        wait_until((tmp_path / "begun").exists)
        for number, connection in enumerate(costly[1:], 1):
            connection.request("GET", f"/users?q={number}")
        refused = four.connect()
        wait_until(lambda: status(refused, "/users?q=x") == 503)
        assert status(refused, "/users") == 200  # the same connection goes on
        time.sleep(MAX_COSTLY_WAIT_S)  # the requests in the queue become too old
        (tmp_path / "until").touch()
        assert [it.getresponse().status for it in costly] == [200, *[503] * COSTLY_QUEUE_FACTOR]
        assert status(refused, "/users?q=x") == 200


def status(connection: http.client.HTTPConnection, path: str) -> int:
    """Return the status of a request, or 0 if no response arrives soon."""
    connection.request("GET", path)
    assert connection.sock is not None
    connection.sock.settimeout(0.3)
    try:
        response = connection.getresponse()
    except TimeoutError:
        connection.close()
        return 0
    response.read()
    return response.status


@BOTH
def test_queued_writes_are_served_in_order_of_arrival(tmp_path: Path, worker_class: str) -> None:
    with serve(tmp_path, "--threads", "1", worker_class=worker_class) as one:
        connections = [one.connect() for _ in range(5)]
        with requests_in_progress(one, 1, "PUT"):
            for number, connection in enumerate(connections):
                connection.request("PUT", f"/{number}", b"%d" % number)
        assert [it.getresponse().read() for it in connections] == [b"0", b"1", b"2", b"3", b"4"]


@BOTH
def test_pipelined_write_waits_in_the_write_queue(tmp_path: Path, worker_class: str) -> None:
    with (
        serve(tmp_path, "--threads", "4", worker_class=worker_class) as four,
        socket.create_connection(("127.0.0.1", four.port), 10) as client,
    ):
        with requests_in_progress(four, 2, "PUT"):
            client.sendall(
                b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n"
                b"PUT /second HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\ntwo"
            )
            first = b""
            while not first.endswith(b"/first"):
                first += client.recv(4096)
            reader = four.connect()
            assert fetch(reader, "/other") == b"/other"
        assert client.makefile("rb").read().endswith(b"two")


@BOTH
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_leases_and_health_checks_are_served_while_every_thread_is_busy(
    tmp_path: Path, method: str, worker_class: str
) -> None:
    with (
        serve(tmp_path, "--threads", "4", worker_class=worker_class) as four,
        requests_in_progress(four, 4 if method == "GET" else 2, method),
    ):
        crowd = [four.connect() for _ in range(20)]
        for connection in crowd:
            connection.request(method, "/crowd")
        if method == "PUT":
            reads = [four.connect() for _ in range(3)]
            for read in reads[:2]:
                read.request("GET", f"/last?until={tmp_path}/end")
            reads[2].request("GET", "/waits")
        for path in ("/.lease/renew", "/livez", "/readyz", "/health"):
            known = four.connect()
            for _ in range(2):  # on a new connection, then on a kept connection
                known.request("POST" if path.startswith("/.") else "GET", path)
                assert known.getresponse().read() == path.encode()
            known.close()
        (tmp_path / "end").touch()


@BOTH
@pytest.mark.parametrize(("method", "field"), [("PUT", "Write-Deadline"), ("GET", "Edge-Read")])
def test_waiting_request_of_an_edge_that_hangs_up_is_not_carried_out(
    tmp_path: Path, method: str, field: str, worker_class: str
) -> None:
    with serve(tmp_path, "--threads", "1", worker_class=worker_class) as one:
        done = [tmp_path / f"done-{n}" for n in range(3)]
        connections = [one.connect() for _ in done]
        with requests_in_progress(one, 1, method):
            for file, connection in zip(done, connections, strict=True):
                # Only edges send this header. Another client may close its sending side and wait for the response.
                of_edge = {} if file == done[1] else {field: "clock 1 1"}
                connection.request(method, f"/?begun={file}", b"x" if method == "PUT" else None, of_edge)
            connections[0].close()
            connections[1].sock.shutdown(socket.SHUT_WR)
        assert [it.getresponse().status for it in connections[1:]] == [200, 200]
        assert [file.exists() for file in done] == [False, True, True]
