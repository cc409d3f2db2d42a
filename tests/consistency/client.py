"""A small HTTP client with one persistent connection.

http.client costs three times as much CPU per request, which the load would take from the servers under test.
"""

import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit


class NotSent(Exception):
    """No connection was established, so the request certainly had no effect."""


class NoResponse(Exception):
    """No complete response arrived."""


class Response(NamedTuple):
    status: int
    head: bytes
    body: bytes

    def header(self, name: bytes) -> str:
        found = re.search(rb"\r\n" + name + rb": *([^\r]*)", self.head, re.IGNORECASE)
        return found[1].decode() if found else ""


def problem_of(response: Response | None) -> str:
    """Return the kind of problem in a response that reports an error, such as `unavailable`, else an empty string."""
    if response is None or response.status < 400:
        return ""
    found = re.search(rb'"type": ?"[^"]*?([^"/]+)"', response.body)
    return found[1].decode() if found else ""


class Client:
    """One connection, opened on demand and closed after any error."""

    def __init__(self, url: str, timeout: float) -> None:
        address = urlsplit(url)
        self.address = (address.hostname or "127.0.0.1", address.port or 80)
        self.host = address.netloc.encode()
        self.timeout = timeout
        self._socket: socket.socket | None = None

    def request(self, method: bytes, target: bytes, body: bytes = b"") -> Response:
        """Send a request and return the response.

        Raises:
            NotSent
            NoResponse: The outcome of a write is unknown.
        """
        connection = self._connected()
        try:
            lines = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method, target, self.host)
            if body:
                lines += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
            connection.sendall(lines + b"\r\n" + body)
            response = self._receive(connection)
        except (OSError, ValueError) as error:
            self.close()
            raise NoResponse(str(error)) from error
        if b"onnection: close" in response.head:
            self.close()
        return response

    def _connected(self) -> socket.socket:
        if self._socket is None:
            try:
                self._socket = socket.create_connection(self.address, timeout=self.timeout)
            except OSError as error:
                raise NotSent(str(error)) from error
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _receive(self, connection: socket.socket) -> Response:
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += _receive_some(connection)
        head, body = received[:end], received[end + 4 :]
        status = int(head[9:12])
        length = re.search(rb"\r\nContent-Length: *(\d+)", head, re.IGNORECASE)
        while not (body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length[1])):
            body += _receive_some(connection)
        return Response(status, head, body if length else _join_chunks(body))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _join_chunks(chunks: bytes) -> bytes:
    """Decode the chunked transfer coding (RFC 9112, 7.1)."""
    body = b""
    while size := int(chunks[: (end := chunks.index(b"\r\n"))], 16):
        body += chunks[end + 2 : end + 2 + size]
        chunks = chunks[end + 2 + size + 2 :]
    return body


def _receive_some(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise ConnectionResetError("the connection was closed in the middle of a response")
    return data
