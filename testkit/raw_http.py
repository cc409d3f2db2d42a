"""HTTP requests as exact bytes: a library would repair what a test breaks on purpose."""

import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

TIMEOUT_S = 20


class RawResponse(NamedTuple):
    status: int
    headers: dict[str, str]
    """Values by header name, in lower case."""

    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class NoResponse(Exception):
    """The server closed the connection without a response."""


def send_request(
    base: str, method: str, target: str | bytes, headers: bytes = b"", body: bytes = b"", *, length: int | None = None
) -> RawResponse:
    """Send one request on a connection of its own and return the response.

    Args:
        headers: whole lines, each with its end
        length: a false Content-Length; the client then closes its side of the connection after the body. Without it the
            Content-Length is right, and absent where the body is chunked.

    Raises:
        NoResponse
    """
    target = target.encode() if isinstance(target, str) else target
    framing = b"" if b"transfer-encoding" in headers.lower() else b"Content-Length: %d\r\n" % (length or len(body))
    if not body and length is None and method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        framing = b""
    head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b%b\r\n" % (
        method.encode(),
        target,
        framing,
        headers,
    )
    return parse_response(send_bytes(base, head + body, half_close=length is not None))


def send_bytes(base: str, request: bytes, *, half_close: bool = False) -> bytes:
    """Send these bytes and return all bytes of the response. `half_close`: close the client's side after the last
    byte."""
    address = urlsplit(base)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        response = b""
        while piece := connection.recv(65536):
            response += piece
    return response


def parse_response(data: bytes) -> RawResponse:
    """
    Raises:
        NoResponse
    """
    if not data:
        raise NoResponse
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _join_chunks(body)
    return RawResponse(int(first.split(" ")[1]), headers, body)


def _join_chunks(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        chunks = rest[length + 2 :] if length else b""
    return body


def check_raw_problem(response: RawResponse, status: int, field: str | None = None) -> None:
    """Assert that the response is a problem of this status, and that it names this field."""
    assert response.status == status, response
    assert response.headers["content-type"] == "application/problem+json", response
    members = response.json
    assert members["status"] == status
    assert members["type"].startswith("/problems/")
    assert members["title"]
    assert members["detail"]
    assert members["request_id"] == response.headers["x-request-id"]
    if field:
        fields = [error["field"] for error in members.get("errors", [])]
        assert field in fields, (field, members)
        assert all(error["detail"] for error in members["errors"])
