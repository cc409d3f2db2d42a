"""Other clients read the right rows after each of many hostile requests, with cold and with warm caches."""

import json
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from testkit.edge_copy import copy_edge, replace_once
from testkit.failpoints import has_cache_lease, running_edge
from testkit.nginx_proxy import nginx_proxy
from testkit.stack import Stack, folder, running, wait_until
from tests.edge.raw_frames import EVIL, Frame, corpus, http2_frames

FRAMES = corpus()

IDLE_S = 0.05
"""A server that has not responded for so long waits for the rest of the frame, or has nothing to say to it."""

KEPT_OPEN = 5
"""The attacker closes a connection only after some more frames, so that every response has time to arrive."""

UNCACHED = {"Accept": '*/*;x="y"'}
"""With this header a read passes the edge's cache and uses a connection between the edge and an app."""


def unverified(*protocols: str) -> ssl.SSLContext:
    context = ssl._create_unverified_context()
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


READS: tuple[tuple[str, dict[str, str]], ...] = (
    ("/users/2", {}),
    ("/users/2", UNCACHED),
    ("/users", {}),
    ("/users?limit=1", {}),  # its Link contains addresses of the service
)
"""The reads of a victim: what is cached, and what an app answers."""


def head(method: str, path: str, headers: dict[str, str]) -> bytes:
    fields = {"Host": "localhost", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


class Victim:
    """A client that reads a user and the list through one address, on one connection.

    It sends its reads together, so that a check of all victims takes one round trip.
    """

    def __init__(self, base: str) -> None:
        address = urlsplit(base)
        connection = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10)
        self.connection = unverified().wrap_socket(connection) if address.scheme == "https" else connection
        self.received = self.connection.makefile("rb")

    def receive(self) -> bytes:
        """Return the body of the next response."""
        status_line, length = self.received.readline(), 0
        lines = []
        while (line := self.received.readline()) not in (b"\r\n", b""):
            lines.append(line.lower())
            name, _, value = line.lower().partition(b":")
            assert name != b"transfer-encoding", "the length of the response is not known"
            length = int(value) if name == b"content-length" else length
        content = self.received.read(length)
        assert status_line.split(b" ")[1:2] == [b"200"], (status_line, content)
        assert not any(line.startswith(b"x-cache-status: stale") for line in lines)
        assert EVIL not in content + b"".join(lines)
        return content

    def rename(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.connection.sendall(head("PUT", "/users/2", headers) + body)
        self.receive()

    def send_reads(self) -> None:
        self.connection.sendall(b"".join(head("GET", path, headers) for path, headers in READS))

    def check_reads(self, name: str) -> None:
        cached, uncached, rows, _ = [json.loads(self.receive()) for _ in READS]
        assert [cached["name"], uncached["name"]] == [name, name]
        assert [row["name"] for row in rows if row["id"] == 2] == [name]

    def close(self) -> None:
        self.received.close()
        self.connection.close()


def check(victims: list[Victim], name: str) -> None:
    """Let all victims read at the same time."""
    for victim in victims:
        victim.send_reads()
    for victim in victims:
        victim.check_reads(name)


class Attack:
    """Frames that are sent to `front`, while victims read through `edges`."""

    def __init__(self, front: str, edges: list[str]) -> None:
        self.front = front
        self.victims = [Victim(address) for address in dict.fromkeys([*edges, front])]
        self.open: deque[socket.socket] = deque()
        self.answered = 0

    def run(self, frames: list[Frame], *, cold: bool, protocol: str = "http/1.1") -> None:
        name = f"victim, {'cold' if cold else 'warm'}"
        self.victims[0].rename(name)
        check(self.victims, name)
        for number, frame in enumerate(frames):
            if cold:
                name = f"victim {number}"
                self.victims[0].rename(name)
            self.send(frame, protocol)
            try:
                check(self.victims, name)
            except Exception as error:
                raise AssertionError(f"after frame {number} of {frame.kind}: {frame.data[:400]!r}") from error

        assert self.answered > len(frames) / 2, "the frames do not reach the service"
        while self.open:
            self.open.popleft().close()
        for victim in self.victims:
            victim.close()

    def send(self, frame: Frame, protocol: str) -> None:
        """Send the frame, and receive the beginning of the response."""
        address = urlsplit(self.front)
        connection = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5)
        if address.scheme == "https":
            connection = unverified(protocol).wrap_socket(connection)
        self.open.append(connection)
        with suppress(OSError):  # the server may close the connection
            connection.sendall(frame.data)
            connection.settimeout(IDLE_S)
            self.answered += bool(connection.recv(65536))
        if len(self.open) > KEPT_OPEN:
            self.open.popleft().close()


@pytest.fixture(scope="module")
def tls_stack() -> Iterator[Stack]:
    with running("--edges", "2", "--tls-self-signed") as stack:
        yield stack


def test_the_corpus_is_large_and_has_no_duplicates() -> None:
    assert len({frame.data for frame in FRAMES}) > 500


def test_control_finds_an_edge_that_stores_a_header_of_a_client(stack: Stack) -> None:
    apps = ",".join(urlsplit(app).netloc for app in stack.apps)
    with folder() as checkout:
        edge = copy_edge(checkout)
        old = "        proxy_set_header Fill-Lease $fill_lease;\n"
        replace_once(edge / "conf/site.conf", old, old + "        proxy_set_header Path-Prefix $http_path_prefix;\n")
        poisoned = [frame for frame in FRAMES if b"Path-Prefix: /evil" in frame.data]
        with running_edge(apps, edge) as (address, _):
            wait_until(lambda: has_cache_lease(address))
            with pytest.raises(AssertionError, match="after frame 1 of unkeyed_headers"):
                Attack(address, [address]).run(poisoned, cold=True)


@pytest.mark.parametrize("cold", [True, False])
def test_victims_read_the_right_rows_after_each_frame(stack: Stack, cold: bool) -> None:
    Attack(stack.edge, stack.edges).run(FRAMES, cold=cold)


def test_victims_behind_another_nginx_read_the_right_rows(stack: Stack) -> None:
    with nginx_proxy(stack.edge, "") as proxy:
        Attack(proxy, stack.edges).run(FRAMES, cold=True)


def test_victims_read_the_right_rows_over_tls(tls_stack: Stack) -> None:
    Attack(tls_stack.edge, tls_stack.edges).run(FRAMES, cold=True)


@pytest.mark.parametrize("cold", [True, False])
def test_http2_frames_are_not_split_into_two_requests(tls_stack: Stack, cold: bool) -> None:
    Attack(tls_stack.edge, tls_stack.edges).run(http2_frames(), cold=cold, protocol="h2")
