"""Drop paths at the edges: send a request to the control listener of each (edge/lua/control.lua).

Gains: http.client takes longer for a drop than the edge does, and cannot wait for several edges at once.
Relies on: kept connections, and replies without a body.
Remove when: a library sends requests to several servers in parallel without a thread or an event loop for each.
"""

import http.client
import select
import socket
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import quote

import structlog

from velikiy import metrics, names, traces
from velikiy.coherence.entry import CachePath
from velikiy.coherence.membership import Cache
from velikiy.coherence.timing import DROP_TIMEOUT_S
from velikiy.signatures import HEADER, Signer

log = structlog.get_logger()

MAX_DROP_BYTES = 60_000
"""Bytes of paths in one drop. A longer list does not fit into an edge's buffer (client_body_buffer_size 64k), so a drop
of everything is sent instead."""

MAX_REPLY_BYTES = 4096
"""Bytes of a reply to a drop; an edge sends fewer."""


class EdgeTier:
    """The edges, as a writer reaches them. Threads share the kept connections; an edge has several if several writers
    work at the same time."""

    def __init__(self, secret: str) -> None:
        self.signer = Signer(secret)
        self._idle: defaultdict[str, deque[socket.socket]] = defaultdict(deque)

    def drop(
        self, edges: Sequence[Cache], paths: Sequence[CachePath] | None, times: dict[Cache, float] | None = None
    ) -> list[Cache]:
        """Drop these paths, or every path for None, at each of these edges, and return the edges that did not answer.
        Add to `times` the seconds that each of the others took.

        The requests are sent in parallel. An edge on our own loopback that refuses the connection is down, and starts
        again without entries.
        """
        self._close_all_but(edges)
        began = time.monotonic()
        until = began + DROP_TIMEOUT_S
        body = "*" if paths is None else "\n".join(path.path for path in paths)
        body = body if len(body) <= MAX_DROP_BYTES else "*"
        # Kept connections first: connecting to an edge that is cut off may take up the whole timeout.
        drops = sorted(
            (_Drop(edge, body, self._kept(edge), self.signer) for edge in edges), key=lambda drop: not drop.kept
        )
        with traces.span("drop at the edges", lambda: {"velikiy.edges": len(drops)}):
            _drop_all(drops, until)
        silent = []
        for drop in drops:
            if not drop.done:
                log.warning("edge.unavailable", cache=drop.edge.name, address=drop.edge.address, cause=drop.cause)
                metrics.UNACKNOWLEDGED.labels("edge", drop.cause).inc()
                drop.close()
                # Its other kept connections may lead to the same worker, which may be stopped.
                self._close_idle(drop.edge.address)
                silent.append(drop.edge)
            elif drop.socket is not None:
                self._idle[drop.edge.address].append(drop.socket)
                if times is not None:
                    times[drop.edge] = drop.done_at - began
        return silent

    def reaches(self, edge: Cache) -> bool:
        """Return whether this edge answers at this address now. Only then may a later refusal at this address count as
        the end of the edge."""
        drop = _Drop(edge, "*", self._kept(edge), self.signer)
        _drop_all([drop], time.monotonic() + DROP_TIMEOUT_S)
        reached = drop.socket is not None and drop.done
        drop.close()
        return reached

    def show(self, edge: Cache, uri: str) -> dict[str, str] | None:
        """Return what the edge holds of this address (edge/lua/control.lua), for people; None without an answer."""
        connection = http.client.HTTPConnection(*_host_and_port(edge), timeout=DROP_TIMEOUT_S)
        target = f"/show?uri={quote(uri, safe='')}"
        signed, mac = self.signer.sign_request("GET", target)
        try:
            connection.request("GET", target, headers={HEADER: signed})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status != 200 or response.getheader(HEADER) != self.signer.response_mac(mac, 200, text):
            return None
        return dict(line.split(" ", 1) for line in text.splitlines())

    def exchange(self, edge: Cache, body: str, timeout: float) -> str | None:
        """Send the edge what the page Live shows, and return the account of the edge (edge/lua/live.lua); None without
        an answer."""
        connection = http.client.HTTPConnection(*_host_and_port(edge), timeout=timeout)
        signed, mac = self.signer.sign_request("POST", "/live", edge=edge.instance_id, body=body)
        try:
            connection.request("POST", "/live", body.encode(), {HEADER: signed, "X-Edge": edge.instance_id})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException, UnicodeError):
            return None
        finally:
            connection.close()
        if response.status != 200 or response.getheader(HEADER) != self.signer.response_mac(mac, 200, text):
            return None
        return text

    def _close_all_but(self, edges: Sequence[Cache]) -> None:
        """Close the connections to edges that are no longer registered."""
        for address in set(self._idle).difference(edge.address for edge in edges):
            self._close_idle(address)

    def _close_idle(self, address: str) -> None:
        idle = self._idle.pop(address, None)
        with suppress(IndexError):
            while idle:  # not `for`: another thread may be returning a connection
                idle.pop().close()

    def _kept(self, edge: Cache) -> socket.socket | None:
        try:
            return self._idle[edge.address].pop()
        except IndexError:
            return None


class _Drop:
    """One drop at one edge, in a minimal form of HTTP."""

    SUCCESS = b"HTTP/1.1 204 "

    def __init__(self, edge: Cache, body: str, kept: socket.socket | None, signer: Signer) -> None:
        self.edge = edge
        signed, mac = signer.sign_request("POST", "/drop", edge=edge.instance_id, body=body)
        self.request = (
            f"POST /drop HTTP/1.1\r\nHost: {edge.address}\r\nX-Edge: {edge.instance_id}\r\n{HEADER}: {signed}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self.acknowledgement = f"\r\n{HEADER}: {signer.response_mac(mac, 204)}\r\n".encode()
        self.socket = kept
        self.kept = kept is not None
        self.head = b""
        self.done = False
        """The edge has dropped the paths, or is down."""
        self.done_at = time.monotonic()

    def send(self, until: float) -> None:
        """Send the request. Without a socket afterwards, no reply will come."""
        self.head, self.done = b"", False
        try:
            if self.socket is None:
                self.kept = False
                self.socket = names.connect(*_host_and_port(self.edge), _left(until))
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.socket.setblocking(False)
            sent = self.socket.send(self.request)
            if sent < len(self.request):
                self.socket.settimeout(_left(until))
                self.socket.sendall(self.request[sent:])
                self.socket.setblocking(False)
        except ConnectionRefusedError:
            self.close()
            self.done = self.edge.is_on_our_loopback
        except (OSError, UnicodeError):  # the second: the host is malformed, such as a..b
            self.close()

    def receive(self) -> bool:
        """Receive a part of the reply. Return whether the reply is complete."""
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
        # The reply that means success has no body. The beginning of any other reply suffices.
        if self.head.startswith(self.SUCCESS):
            if self.head.endswith(b"\r\n\r\n"):
                # Another program may listen on the port of an edge that has crashed. Only an edge can sign.
                self.done, self.done_at = self.acknowledgement in self.head, time.monotonic()
                return True
            return len(self.head) > MAX_REPLY_BYTES
        return not self.SUCCESS.startswith(self.head)

    @property
    def cause(self) -> str:
        """Why the drop is not done, for the log."""
        if self.head.startswith(b"HTTP/1.1 401 "):
            return "the edge has another EDGE_SECRET"
        if self.head.startswith(self.SUCCESS):
            return "the response is not signed: another program listens there"
        return "no acknowledgement"

    @property
    def hung_up(self) -> bool:
        """True if the edge has closed a kept connection. A new connection shows which edge is there now. A path may be
        dropped twice."""
        return self.kept and self.socket is None

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def _drop_all(drops: Sequence[_Drop], until: float) -> None:
    """Send every request, and wait until each reply is complete or the time is over."""
    replies = select.poll()
    waiting: dict[int, _Drop] = {}

    def send(drop: _Drop) -> None:
        drop.send(until)
        if drop.socket is not None:
            waiting[drop.socket.fileno()] = drop
            replies.register(drop.socket, select.POLLIN)

    for drop in drops:
        send(drop)
    for drop in drops:
        if drop.hung_up:
            send(drop)
    end = time.monotonic() + _left(until)
    while waiting:
        readable = replies.poll(max(0.0, end - time.monotonic()) * 1000)
        if not readable:
            return
        for descriptor, _ in readable:
            drop = waiting[descriptor]
            if drop.receive():
                replies.unregister(descriptor)
                del waiting[descriptor]
                if drop.hung_up:
                    send(drop)
                    end = time.monotonic() + _left(until)


def _host_and_port(edge: Cache) -> tuple[str, int]:
    host, _, port = edge.address.rpartition(":")
    return host.strip("[]"), int(port)


def _left(until: float) -> float:
    """Return the seconds that are left of DROP_TIMEOUT_S, which all edges share. The minimum is for an edge that
    answers at once after others have used up the time."""
    return max(0.1, until - time.monotonic())
