"""gunicorn's worker (velikiy/server/epoll_worker.py), with an app that answers when it is told to."""

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

from testkit.stack import ROOT, free_ports, wait_until

THREADS = 2


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Says what it was sent; with `?until=FILE` when this file is there, and `?begun=FILE` makes one before."""
    asked = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    for file in asked.get("begun", []):
        Path(file).touch()
    for file in asked.get("until", []):
        wait_until(Path(file).exists)
    if "pieces" in asked:
        start_response("200 OK", [("Content-Type", "text/plain")])  # of a length that nobody knows: chunked
        return [b"x" * 50_000, b"y" * 50_000, b"z"]
    if "exit" in asked:
        raise SystemExit
    body = b"unread" if "unread" in asked else environ["wsgi.input"].read() or environ["PATH_INFO"].encode()
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

    def holding(self, connection: http.client.HTTPConnection, name: str, method: str = "GET") -> Callable[[], None]:
        """Asks for what is answered only after this is called; the app is at it when this returns."""
        begun, until = self.folder / f"{name}-begun", self.folder / f"{name}-until"
        connection.request(method, f"/{name}?begun={begun}&until={until}")
        wait_until(begun.exists)
        return until.touch


@contextmanager
def server(folder: Path, *options: str) -> Iterator[Server]:
    port = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        "velikiy.server.epoll_worker.Worker",
        "--bind",
        f"127.0.0.1:{port}",
    ]
    command += ["--threads", str(THREADS), "--graceful-timeout", "20", *options, "tests.server.test_epoll_worker:app"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=log, stderr=log, env={**os.environ})
    try:
        wait_until(lambda: answers(port), what=(folder / "log").read_text())
        yield Server(port, process, folder)
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"GET /probe HTTP/1.0\r\n\r\n")
            return b"/probe" in probe.makefile("rb").read()
    except OSError:
        return False


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It keeps connections for longer than a test takes."""
    with server(tmp_path_factory.mktemp("worker"), "--keep-alive", "60") as kept:
        yield kept


def ask(connection: http.client.HTTPConnection, path: str, body: bytes | None = None) -> bytes:
    connection.request("POST" if body else "GET", path, body)
    return connection.getresponse().read()


def test_more_connections_than_threads_are_answered_again_and_again(kept: Server) -> None:
    connections = [kept.connect() for _ in range(10 * THREADS)]
    for number in range(3):
        for place, connection in enumerate(connections):
            connection.request("GET", f"/{number}/{place}")
        for place, connection in enumerate(connections):
            assert connection.getresponse().read() == f"/{number}/{place}".encode()
    for connection in connections:
        connection.close()


def test_an_answer_in_pieces_arrives_whole_and_in_order(kept: Server) -> None:
    connection = kept.connect()
    for _ in range(2):
        assert ask(connection, "/?pieces") == b"x" * 50_000 + b"y" * 50_000 + b"z"
    connection.close()


def test_who_sends_a_body_that_nobody_reads_is_answered_before_its_end(kept: Server) -> None:
    with socket.create_connection(("127.0.0.1", kept.port), 10) as client:
        client.sendall(b"POST /?unread HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf of it")
        client.settimeout(2)  # the worker waits for the rest for five seconds
        assert client.recv(4096).endswith(b"\r\n\r\nunread")


def test_who_is_answered_late_holds_up_nobody_else(kept: Server) -> None:
    late, other = kept.connect(), kept.connect()
    go_on = kept.holding(late, "late")
    assert [ask(other, f"/{n}") for n in range(3)] == [b"/0", b"/1", b"/2"]
    go_on()
    assert late.getresponse().read() == b"/late"
    assert ask(late, "/again") == b"/again"


def test_what_was_sent_ahead_is_answered_in_order(kept: Server) -> None:
    with socket.create_connection(("127.0.0.1", kept.port), 10) as client:
        client.sendall(
            b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none"
            b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\ntwo"
            b"GET /three HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        said = client.makefile("rb").read()
    assert said.count(b"200 OK") == 3
    assert said.index(b"one") < said.index(b"two") < said.index(b"/three")


def test_clients_that_hang_up_at_any_point_cost_no_thread(kept: Server) -> None:
    whole = b"POST /hang-up HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nonly some of it"
    for cut in (0, 1, 20, len(whole) - 5, len(whole)):
        for _ in range(2 * THREADS):
            with socket.create_connection(("127.0.0.1", kept.port), 10) as client:
                client.sendall(whole[:cut])
    for broken in (b"\0\0\0", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", kept.port), 10) as client:
            client.sendall(broken)
            client.shutdown(socket.SHUT_WR)
            assert client.makefile("rb").read().startswith((b"", b"HTTP/1.1 4")[broken != b"\0\0\0"])
    everybody_answers(kept)


def test_an_app_that_raises_costs_no_thread(kept: Server) -> None:
    for _ in range(2 * THREADS):
        connection = kept.connect()
        connection.request("GET", "/?exit=1")
        with suppress(http.client.RemoteDisconnected):
            assert connection.getresponse().status == 500
    everybody_answers(kept)


def everybody_answers(kept: Server) -> None:
    """All threads at the same time."""
    connections = [kept.connect() for _ in range(THREADS)]
    go_on = [kept.holding(it, f"all-{id(connections)}-{n}") for n, it in enumerate(connections)]
    for release in go_on:
        release()
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()


def test_connections_that_are_closed_leave_nothing_open(kept: Server) -> None:
    def sockets() -> int:
        return len([it for it in kept.worker().net_connections("tcp") if it.status != psutil.CONN_LISTEN])

    wait_until(lambda: sockets() == 0)
    connections = [kept.connect() for _ in range(5)]
    for connection in connections:
        assert ask(connection, "/") == b"/"
    assert sockets() == 5
    for connection in connections:
        connection.close()
    wait_until(lambda: sockets() == 0)


def test_who_is_silent_for_too_long_is_hung_up_on(tmp_path: Path) -> None:
    with server(tmp_path, "--keep-alive", "1") as hasty:
        silent, mute = hasty.connect(), hasty.connect()
        assert ask(silent, "/") == b"/"
        mute.connect()
        for connection in (silent, mute):
            assert connection.sock.recv(1) == b""
        long = hasty.connect()
        go_on = hasty.holding(long, "long")  # not silent: it is answered
        again = hasty.connect()
        assert ask(again, "/") == b"/"
        assert again.sock.recv(1) == b""
        go_on()
        assert long.getresponse().read() == b"/long"


def test_who_stops_answers_first_what_has_begun_and_what_still_comes(tmp_path: Path) -> None:
    with server(tmp_path, "--keep-alive", "60") as stopping:
        begun, idle = stopping.connect(), stopping.connect()
        go_on = stopping.holding(begun, "begun")
        assert ask(idle, "/") == b"/"
        worker = stopping.worker()
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: says_close(idle), within=1.5, every=0.01)
        go_on()
        assert begun.getresponse().read() == b"/begun"
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_who_stops_answers_what_has_come_though_no_thread_had_time_for_it_yet(tmp_path: Path) -> None:
    with server(tmp_path, "--keep-alive", "60") as stopping:
        busy = [stopping.connect() for _ in range(THREADS)]
        waiting = [stopping.connect() for _ in range(3)]
        for connection in waiting:
            assert ask(connection, "/") == b"/"
        go_on = [stopping.holding(connection, f"busy-{n}") for n, connection in enumerate(busy)]
        for connection in waiting:
            connection.request("POST", "/", b"came before the end")
        stopping.worker().send_signal(signal.SIGTERM)
        time.sleep(STOP_KEEPALIVE_LINGER + 0.5)  # what is idle has been hung up on by now
        for release in go_on:
            release()
        for connection in waiting:
            answer = connection.getresponse()
            assert (answer.read(), answer.getheader("Connection")) == (b"came before the end", "close")
            connection.close()


def says_close(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.read() == b"/"
    return answer.getheader("Connection") == "close"


def test_many_clients_at_once_get_each_their_own_answer(kept: Server) -> None:
    wrong: list[bytes] = []

    def client(name: int) -> None:
        connection = kept.connect()
        for number in range(200):
            said = f"{name}-{number}".encode()
            if (answer := ask(connection, "/", said)) != said:
                wrong.append(answer)
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8 * THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@contextmanager
def held(server: Server, count: int, method: str) -> Iterator[list[http.client.HTTPConnection]]:
    """So many requests of this method that are being carried out, each in a thread, until the block ends."""
    connections = [server.connect() for _ in range(count)]
    names = [f"held-{id(connections)}-{n}" for n in range(count)]
    go_on = [server.holding(it, name, method) for it, name in zip(connections, names, strict=True)]
    try:
        yield connections
    finally:
        for release in go_on:
            release()
        for connection in connections:
            assert connection.getresponse().status == 200
            connection.close()


def test_writes_take_at_most_three_quarters_of_the_threads(tmp_path: Path) -> None:
    with server(tmp_path, "--threads", "4") as four:
        waiting, reader = four.connect(), four.connect()
        with held(four, 3, "PUT"):
            waiting.request("PUT", "/waiting", b"a write")
            assert [ask(reader, f"/{n}") for n in range(3)] == [b"/0", b"/1", b"/2"]
            waiting.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                waiting.sock.recv(1)
            waiting.sock.settimeout(10)
        assert waiting.getresponse().read() == b"a write"


def test_writes_that_queue_are_answered_in_their_order(tmp_path: Path) -> None:
    with server(tmp_path, "--threads", "1") as one:
        connections = [one.connect() for _ in range(5)]
        with held(one, 1, "PUT"):
            for number, connection in enumerate(connections):
                connection.request("PUT", f"/{number}", b"%d" % number)
        assert [it.getresponse().read() for it in connections] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_write_that_was_sent_ahead_waits_for_a_place_too(tmp_path: Path) -> None:
    with server(tmp_path, "--threads", "4") as four, socket.create_connection(("127.0.0.1", four.port), 10) as client:
        with held(four, 3, "PUT"):
            client.sendall(
                b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n"
                b"PUT /second HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\ntwo"
            )
            assert client.recv(4096).endswith(b"/first")
            reader = four.connect()
            assert ask(reader, "/other") == b"/other"
        assert client.makefile("rb").read().endswith(b"two")


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_leases_and_health_are_served_while_every_thread_is_busy(tmp_path: Path, method: str) -> None:
    with server(tmp_path, "--threads", "4") as four, held(four, 4 if method == "GET" else 3, method):
        crowd = [four.connect() for _ in range(20)]
        for connection in crowd:
            connection.request(method, "/crowd")
        if method == "PUT":
            reads = [four.connect(), four.connect()]
            reads[0].request("GET", f"/last?until={tmp_path}/end")
            reads[1].request("GET", "/waits")
        for path in ("/.lease/renew", "/livez", "/readyz", "/health"):
            known = four.connect()
            for _ in range(2):  # over a new connection, and over one that is kept
                known.request("POST" if path.startswith("/.") else "GET", path)
                assert known.getresponse().read() == path.encode()
            known.close()
        (tmp_path / "end").touch()


def test_a_write_whose_client_hangs_up_in_the_queue_is_not_carried_out(tmp_path: Path) -> None:
    with server(tmp_path, "--threads", "1") as one:
        done = [tmp_path / f"done-{n}" for n in range(3)]
        connections = [one.connect() for _ in done]
        with held(one, 1, "PUT"):
            for file, connection in zip(done, connections, strict=True):
                # As an edge sends it; a client of another kind may close its sending side and wait for the answer.
                deadline = {} if file == done[1] else {"Write-Deadline": "clock 1 1"}
                connection.request("PUT", f"/?begun={file}", b"x", deadline)
            connections[0].close()
            connections[1].sock.shutdown(socket.SHUT_WR)
        assert [it.getresponse().status for it in connections[1:]] == [200, 200]
        assert [file.exists() for file in done] == [False, True, True]
