"""A small HTTP client on a kept connection.

The tool that watches must leave the machine to what it watches: http.client costs a request three times as much.
"""

import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit


class NotSent(Exception):
    """Nobody listens there: whatever was to be done was certainly not done."""


class Broken(Exception):
    """No answer, or none that can be read."""


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes

    def header(self, name: bytes) -> str:
        found = re.search(rb"\r\n" + name + rb": *([^\r]*)", self.head, re.IGNORECASE)
        return found[1].decode() if found else ""


class Client:
    """One connection, opened when it is needed, and closed after anything unexpected."""

    def __init__(self, url: str, patience: float) -> None:
        address = urlsplit(url)
        self.address = (address.hostname or "127.0.0.1", address.port or 80)
        self.host = address.netloc.encode()
        self.patience = patience
        self._socket: socket.socket | None = None

    def request(self, method: bytes, target: bytes, body: bytes = b"") -> Answer:
        """
        Raises:
            NotSent
            Broken: of a write the outcome is unknown.
        """
        connection = self._connected()
        try:
            lines = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method, target, self.host)
            if body:
                lines += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
            connection.sendall(lines + b"\r\n" + body)
            answer = self._answer(connection)
        except (OSError, ValueError) as error:
            self.close()
            raise Broken(str(error)) from error
        if b"onnection: close" in answer.head:
            self.close()
        return answer

    def _connected(self) -> socket.socket:
        if self._socket is None:
            try:
                self._socket = socket.create_connection(self.address, timeout=self.patience)
            except OSError as error:
                raise NotSent(str(error)) from error
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _answer(self, connection: socket.socket) -> Answer:
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += _some(connection)
        head, body = received[:end], received[end + 4 :]
        status = int(head[9:12])
        length = re.search(rb"\r\nContent-Length: *(\d+)", head, re.IGNORECASE)
        while not (body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length[1])):
            body += _some(connection)
        return Answer(status, head, body if length else _joined(body))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _joined(chunks: bytes) -> bytes:
    """RFC 9112, 7.1."""
    body = b""
    while size := int(chunks[: (end := chunks.index(b"\r\n"))], 16):
        body += chunks[end + 2 : end + 2 + size]
        chunks = chunks[end + 2 + size + 2 :]
    return body


def _some(connection: socket.socket) -> bytes:
    some = connection.recv(65_536)
    if not some:
        raise ConnectionResetError("closed in the middle")
    return some
