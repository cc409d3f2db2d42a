"""Connections of gunicorn's workers (`TConn`): the beginning of the next request, and whether an edge waits for it."""

import select
import socket
from typing import Any

from velikiy.hang_ups import has_event, is_hung_up

OF_EDGES = (b"\r\nWrite-Deadline: ", b"\r\nEdge-Read: ")
"""Header fields that no other client sends: an edge sends the first with every write, the second with every read that
may be cached."""


def receive_beginning(connection: Any) -> bytes:
    """Return the beginning of the next request, as far as it has arrived. The parser of the connection gets it too.

    Raises:
        OSError: The connection is broken.
    """
    connection.init()
    received = already_read(connection)
    if not received:
        received = connection.sock.recv(8192)  # the size that the parser would use
        connection.parser.unreader.unread(received)
    return bytes(received)


def already_read(connection: Any) -> bytes:
    """Return the bytes of the next request that the parser has read already."""
    return bytes(connection.parser.unreader.buf.getvalue()) if connection.parser else b""


def peek(connection: Any) -> bytes:
    """Return the beginning of the next request without taking it from the socket."""
    try:
        return already_read(connection) or bytes(connection.sock.recv(16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:  # the thread that serves the connection notices the error
        return b""


def has_request(connection: Any) -> bool:
    return bool(already_read(connection)) or has_event(connection.sock, select.POLLIN)


def is_abandoned(connection: Any) -> bool:
    """Return whether an edge has closed the connection while its request was waiting: the client of a write has hung
    up, or the edge has sent the read to another app.

    The client may have sent the write again through another app, so the first write must not be carried out later.
    Under overload an app would carry out each read that was given up. Only edges are treated so: an edge never closes
    only its sending side, but other clients may do that and wait for the response.
    """
    received = already_read(connection)
    return any(field in received for field in OF_EDGES) and is_hung_up(connection.sock)
