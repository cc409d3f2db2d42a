"""Sockets whose timeout the kernel keeps."""

import socket
import struct
from typing import Any


class Socket(socket.socket):
    """To Python it blocks for ever; a timeout is the kernel's (SO_RCVTIMEO, SO_SNDTIMEO: socket(7)).

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
        self._tell()
        try:
            super().sendall(data, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def _tell(self) -> None:
        """Late: gunicorn changes it several times where nothing is waited for."""
        if self._told != self._timeout:
            # In the kernel 0 is for ever.
            seconds = 0.0 if self._timeout is None else max(self._timeout, 1e-6)
            value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.setsockopt(socket.SOL_SOCKET, option, value)
            self._told = self._timeout
