"""A proxy between two servers, which passes bytes on, and changes or withholds them where a test wants it."""

import contextlib
import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RECEIVE_BYTES = 2**20

Hook = Callable[["ProxiedConnection", bytes], bytes]
"""Receives the bytes that arrived and returns the bytes to pass on. While it runs, nothing passes in this direction of
the connection."""


def pass_on(connection: "ProxiedConnection", data: bytes) -> bytes:
    return data


class CloseConnection(Exception):
    """Raised by a hook to close the connection."""


_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_inherited() -> None:
    """Close the sockets in a forked process. As long as it has them, no close in this process ends a connection."""
    for inherited in list(_sockets):
        inherited.close()


os.register_at_fork(after_in_child=_close_inherited)


class ProxiedConnection:
    """A connection of a client and the connection to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        _sockets.update((client, server))
        self.is_half_open = False

    def close_client(self) -> None:
        """Close only the client's side: the bytes that the client has sent still reach the server."""
        _close(self.client)

    def close(self) -> None:
        _close(self.client)
        _close(self.server)

    def reset(self) -> None:
        """Close both sides with RST, as a host does that does not know the connection."""
        self.is_half_open = True  # the threads that read must not close it before, without RST
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                side.shutdown(socket.SHUT_RD)  # wakes the thread that is reading there, and sends nothing
                side.close()

    def lose_server(self) -> None:
        """Close the server's side. The client does not notice: its bytes vanish, and it gets no answer."""
        self.is_half_open = True
        _close(self.server)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that is reading there; close() would not


class TcpProxy:
    def __init__(
        self, server: tuple[str, int] | str, address: str = "127.0.0.1", port: int = 0, *, record: bool = True
    ) -> None:
        """
        Args:
            server: Where new connections lead to: a host and a port, or the path of a Unix socket.
            address: Where to listen, and the source of the connections to a server at a port.
            port: The port there, or 0 for any.
            record: Keep what clients send in `requests`.
        """
        self.on_request: Hook = pass_on
        self.on_reply: Hook = pass_on
        self.requests: list[bytes] = []
        self.connections: list[ProxiedConnection] = []
        """The connections that are open."""
        self.accepted = 0
        """How many connections clients have opened."""
        self.server = server
        self.address, self.port = address, port
        self._record = record
        self.listen()

    def listen(self) -> None:
        """Listen, again at the same port if there was one."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.address, self.port))
        self._listener.listen(100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections, and close all that are open."""
        _close(self._listener)
        self._listener.close()
        self.close_connections()

    def close_connections(self) -> None:
        while self.connections:
            self.connections.pop().close()

    def reset_connections(self) -> None:
        while self.connections:
            self.connections.pop().reset()

    def reset_hooks(self) -> None:
        self.on_request = self.on_reply = pass_on

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            connection = ProxiedConnection(client, connection_to(self.server, self.address))
        except OSError:
            client.close()
            return
        self.connections.append(connection)
        self.accepted += 1
        threading.Thread(target=self._pump_replies, args=(connection,), daemon=True).start()
        self._pump_requests(connection)

    def _pump_requests(self, connection: ProxiedConnection) -> None:
        with contextlib.suppress(OSError, CloseConnection):
            while data := connection.client.recv(RECEIVE_BYTES):
                if self._record:
                    self.requests.append(data)
                connection.server.sendall(self.on_request(connection, data))
        self._end(connection)

    def _pump_replies(self, connection: ProxiedConnection) -> None:
        with contextlib.suppress(OSError, CloseConnection):
            while data := connection.server.recv(RECEIVE_BYTES):
                connection.client.sendall(self.on_reply(connection, data))
        self._end(connection)

    def _end(self, connection: ProxiedConnection) -> None:
        if not connection.is_half_open:
            connection.close()
            with contextlib.suppress(ValueError):
                self.connections.remove(connection)


def connection_to(server: tuple[str, int] | str, own_address: str = "") -> socket.socket:
    if isinstance(server, tuple):
        return socket.create_connection(server, source_address=(own_address, 0) if own_address else None)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    return connection


@contextmanager
def tcp_proxy(
    server: tuple[str, int] | str, address: str = "127.0.0.1", port: int = 0, *, record: bool = True
) -> Iterator[TcpProxy]:
    proxy = TcpProxy(server, address, port, record=record)
    try:
        yield proxy
    finally:
        proxy.reset_hooks()
        proxy.refuse()


def on_first(action: Callable[[], object]) -> Hook:
    """Return a hook that runs the action when the first bytes arrive and then passes them on. Later bytes pass."""
    has_run = threading.Lock()

    def run_once(connection: ProxiedConnection, data: bytes) -> bytes:
        if has_run.acquire(blocking=False):
            action()
        return data

    return run_once


class DelayedRequest:
    """A hook for requests: the client's side of the first request is closed, and the request reaches the server only
    when the test sets `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.received: list[bytes] = []

    def __call__(self, connection: ProxiedConnection, data: bytes) -> bytes:
        if not self.received:
            self.received.append(data)
            connection.close_client()
            self.release.wait(9)
        return data
