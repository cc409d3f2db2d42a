"""Sockets whose timeout the kernel keeps."""

import socket
import struct
from contextlib import suppress
from typing import Any


class Socket(socket.socket):
    """To Python it blocks for ever; who waits to receive has his timeout from the kernel (SO_RCVTIMEO, socket(7)).

    For a timeout of its own Python asks poll(2) before each send and each recv, and changes a socket's mode (ioctl(2))
    with each change of the timeout. Each system call gives the interpreter to another thread, and waits until it
    comes back.
    """

    def __init__(self, other: socket.socket) -> None:
        """Takes its place: `other` is of no use afterwards."""
        timeout = other.gettimeout()
        super().__init__(other.family, other.type, other.proto, other.detach())
        super().setblocking(True)
        self._timeout = timeout
        self._told: float | None = None

    def gettimeout(self) -> float | None:
        return self._timeout

    def settimeout(self, value: float | None, /) -> None:
        self._timeout = value

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self._tell()
        try:
            return super().recv(size, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        self._tell()
        try:
            return super().recv_into(buffer, size, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        sent = 0
        with suppress(BlockingIOError):
            sent = super().send(data, flags | socket.MSG_DONTWAIT)
        if sent < len(data):
            # Rarely. The kernel's timeout (SO_SNDTIMEO) would begin anew with each part that goes; Python's is of all.
            super().settimeout(self._timeout)
            try:
                super().sendall(memoryview(data)[sent:], flags)
            finally:
                super().setblocking(True)

    def _tell(self) -> None:
        """Not before somebody waits: gunicorn sets the timeout several times where nobody does."""
        if self._told != self._timeout:
            # In the kernel 0 is for ever.
            seconds = 0.0 if self._timeout is None else max(self._timeout, 1e-6)
            self.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            )
            self._told = self._timeout
