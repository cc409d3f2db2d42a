"""Tier 1 as a writer sees it: edges, each with a control listener that takes drops (edge/lua/control.lua)."""

import http.client
import select
import socket
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import quote

import structlog

from velikiy.coherence.entry import Path
from velikiy.coherence.membership import PATIENCE, Cache

log = structlog.get_logger()

MANY = 60_000
"""Bytes of paths. More do not fit into an edge's buffer (client_body_buffer_size 64k), and everything is dropped."""

LONG = 4096
"""Bytes; no edge says as much to a drop."""


class EdgeTier:
    """Connections are kept, several to an edge where several writers are at work; threads may share this."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[socket.socket]] = defaultdict(deque)

    def drop(self, edges: Sequence[Cache], paths: Sequence[Path] | None) -> list[Cache]:
        """Forget these paths, or with None all of them, at each of these edges; those that do not answer.

        In parallel: all are asked before the first is listened to. An edge beside us where nobody listens is dead: it
        starts again with nothing.
        """
        self._let_go_of_others(edges)
        until = time.monotonic() + PATIENCE
        body = "*" if paths is None else "\n".join(path.path for path in paths)
        body = body if len(body) <= MANY else "*"
        # Over kept connections first: to connect to one that is cut off may take all the time that there is.
        drops = sorted((_Drop(edge, body, self._kept(edge)) for edge in edges), key=lambda drop: not drop.kept)
        _drop_all(drops, until)
        silent = []
        for drop in drops:
            if not drop.done:
                log.warning("edge.unavailable", cache=drop.edge.name, address=drop.edge.address)
                drop.close()
                # What is behind the others may be the same worker, which is stopped while those beside it answer.
                self._let_go(drop.edge.address)
                silent.append(drop.edge)
            elif drop.socket is not None:
                self._idle[drop.edge.address].append(drop.socket)
        return silent

    def reaches(self, edge: Cache) -> bool:
        """It has answered, now, at this address and as this edge. Only then may a refusal at this address be taken for
        its death later."""
        drop = _Drop(edge, "*", self._kept(edge))
        _drop_all([drop], time.monotonic() + PATIENCE)
        reached = drop.socket is not None and drop.done
        drop.close()
        return reached

    def show(self, edge: Cache, uri: str) -> dict[str, str] | None:
        """For people: what the edge says of itself and of this address (edge/lua/control.lua); None: no answer."""
        connection = http.client.HTTPConnection(*_host_and_port(edge), timeout=PATIENCE)
        try:
            connection.request("GET", f"/show?uri={quote(uri, safe='')}")
            answer = connection.getresponse()
            lines = answer.read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return dict(line.split(" ", 1) for line in lines) if answer.status == 200 else None

    def _let_go_of_others(self, edges: Sequence[Cache]) -> None:
        """Connections to those who are not on the list any more."""
        for address in set(self._idle).difference(edge.address for edge in edges):
            self._let_go(address)

    def _let_go(self, address: str) -> None:
        idle = self._idle.pop(address, None)
        with suppress(IndexError):
            while idle:  # not `for`: another thread may be giving one back
                idle.pop().close()

    def _kept(self, edge: Cache) -> socket.socket | None:
        try:
            return self._idle[edge.address].pop()
        except IndexError:
            return None


class _Drop:
    """One drop at one edge: HTTP in its smallest form. A library would take longer for it than the edge."""

    DROPPED = b"HTTP/1.1 204 "

    def __init__(self, edge: Cache, body: str, kept: socket.socket | None) -> None:
        self.edge = edge
        self.request = (
            f"POST /drop HTTP/1.1\r\nHost: {edge.address}\r\nX-Edge: {edge.place}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self.socket = kept
        self.kept = kept is not None
        self.head = b""
        self.done = False
        """The edge has dropped it, or is dead."""

    def ask(self, until: float) -> None:
        """Without a socket afterwards: it will not answer."""
        self.head, self.done = b"", False
        try:
            if self.socket is None:
                self.kept = False
                self.socket = socket.create_connection(_host_and_port(self.edge), _left(until))
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.socket.setblocking(False)
            sent = self.socket.send(self.request)
            if sent < len(self.request):
                self.socket.settimeout(_left(until))
                self.socket.sendall(self.request[sent:])
                self.socket.setblocking(False)
        except ConnectionRefusedError:
            self.close()
            self.done = self.edge.beside_us
        except (OSError, UnicodeError):  # the second: a host that is none, such as a..b
            self.close()

    def hear(self) -> bool:
        """What has come; whether it was all."""
        assert self.socket is not None
        try:
            piece = self.socket.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        if not piece:
            self.close()
            return True
        self.head += piece
        # The answer that means a drop has nothing behind its head; of any other the beginning is enough.
        if self.head.startswith(self.DROPPED):
            self.done = self.head.endswith(b"\r\n\r\n")
            return self.done or len(self.head) > LONG
        return not self.DROPPED.startswith(self.head)

    @property
    def hung_up(self) -> bool:
        """A kept connection was closed at the other end meanwhile: a new one tells who is there now. A path may be
        dropped twice."""
        return self.kept and self.socket is None

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def _drop_all(drops: Sequence[_Drop], until: float) -> None:
    """Ask all, and listen until each has answered or has had its time."""
    answers = select.poll()
    waiting: dict[int, _Drop] = {}

    def ask(drop: _Drop) -> None:
        drop.ask(until)
        if drop.socket is not None:
            waiting[drop.socket.fileno()] = drop
            answers.register(drop.socket, select.POLLIN)

    for drop in drops:
        ask(drop)
    for drop in drops:
        if drop.hung_up:
            ask(drop)
    end = time.monotonic() + _left(until)
    while waiting:
        heard = answers.poll(max(0.0, end - time.monotonic()) * 1000)
        if not heard:
            return
        for number, _ in heard:
            drop = waiting[number]
            if drop.hear():
                answers.unregister(number)
                del waiting[number]
                if drop.hung_up:
                    ask(drop)
                    end = time.monotonic() + _left(until)


def _host_and_port(edge: Cache) -> tuple[str, int]:
    host, _, port = edge.address.rpartition(":")
    return host.strip("[]"), int(port)


def _left(until: float) -> float:
    """All edges together have PATIENCE, however many are silent; each at least a moment, to be heard at all."""
    return max(0.1, until - time.monotonic())
