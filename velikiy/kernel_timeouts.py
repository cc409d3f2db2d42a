"""Sockets whose timeout the kernel keeps.

Gains: seven system calls of a miss and fourteen of a write. For a timeout of its own, Python calls poll(2) before each
send and each recv, and ioctl(2) at each change of the timeout. Each system call gives the interpreter to another
thread, and waits until the interpreter is free again.
Relies on: Linux' SO_RCVTIMEO (socket(7)), and the methods of a socket that gunicorn and redis-py call.
Remove when: Python keeps a timeout without further system calls, or its threads need no common interpreter lock.
"""

import socket
import struct
from contextlib import suppress
from typing import Any


class Socket(socket.socket):
    """A socket that blocks for ever as Python sees it. A call that receives gets its timeout from the kernel."""

    def __init__(self, other: socket.socket) -> None:
        """Take over the connection of the other socket, which cannot be used afterwards."""
        timeout = other.gettimeout()
        super().__init__(other.family, other.type, other.proto, other.detach())
        super().setblocking(True)
        self._timeout = timeout
        self._kernel_timeout: float | None = None

    def gettimeout(self) -> float | None:
        return self._timeout

    def settimeout(self, value: float | None, /) -> None:
        self._timeout = value

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self._set_kernel_timeout()
        try:
            return super().recv(size, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        self._set_kernel_timeout()
        try:
            return super().recv_into(buffer, size, flags)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        sent = 0
        with suppress(BlockingIOError):
            sent = super().send(data, flags | socket.MSG_DONTWAIT)
        if sent < len(data):
            # This is rare. The kernel's timeout (SO_SNDTIMEO) would restart with each part that is sent; Python's
            # timeout covers the whole call.
            super().settimeout(self._timeout)
            try:
                super().sendall(memoryview(data)[sent:], flags)
            finally:
                super().setblocking(True)

    def _set_kernel_timeout(self) -> None:
        """Pass a changed timeout to the kernel. Only calls that receive do so: gunicorn changes the timeout several
        times without waiting."""
        if self._kernel_timeout != self._timeout:
            # The kernel takes 0 for "for ever".
            seconds = 0.0 if self._timeout is None else max(self._timeout, 1e-6)
            self.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            )
            self._kernel_timeout = self._timeout
