"""Requests as these very bytes: a library would mend what a test means to be broken."""

import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson


class Told(NamedTuple):
    status: int
    headers: dict[str, str]
    """By their names in small letters."""

    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class Nothing(Exception):
    """The connection was closed without an answer."""


def ask(
    base: str, method: str, target: str | bytes, headers: bytes = b"", body: bytes = b"", *, length: int | None = None
) -> Told:
    """`headers`: whole lines, each with its end; `length`: what is said of the body's, where that is not true, and then
    our side of the connection is closed. A body without one of them is said to be as long as it is."""
    target = target.encode() if isinstance(target, str) else target
    said = b"" if b"transfer-encoding" in headers.lower() else b"Content-Length: %d\r\n" % (length or len(body))
    if not body and length is None and method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        said = b""
    head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b%b\r\n" % (
        method.encode(),
        target,
        said,
        headers,
    )
    return told(raw(base, head + body, half=length is not None))


def raw(base: str, request: bytes, *, half: bool = False) -> bytes:
    """What comes back; `half`: our side is closed after the last byte."""
    address = urlsplit(base)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        if half:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def told(answer: bytes) -> Told:
    """Raises: Nothing"""
    if not answer:
        raise Nothing
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _joined(body)
    return Told(int(first.split(" ")[1]), headers, body)


def _joined(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        chunks = rest[length + 2 :] if length else b""
    return body


def check(answer: Told, status: int, field: str | None = None) -> None:
    """It is a problem of this status, and says which field it is about."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json", answer
    members = answer.json
    assert members["status"] == status
    assert members["type"].startswith("/problems/")
    assert members["title"]
    assert members["detail"]
    assert members["request_id"] == answer.headers["x-request-id"]
    if field:
        fields = [error["field"] for error in members.get("errors", [])]
        assert field in fields, (field, members)
        assert all(error["detail"] for error in members["errors"])
