"""A name server (DNS over UDP) that answers as a test wants.

with name_server("198.18.0.254", {"redis.chaos": ["198.18.0.2"]}) as names:
    names.is_silent = True
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PORT = 53

A, AAAA = 1, 28
RESPONSE, NO_SUCH_NAME = 0x8180, 0x8183
TTL_S = 1

SHORTEST_QUERY = 16
"""Bytes of a header and of a question without a name."""


@dataclass
class NameServer:
    addresses: dict[str, list[str]]
    """The addresses of each name, IPv4 and IPv6."""

    is_silent: bool = False
    knows_nothing: bool = False
    delay_s: float = 0.0
    _socket: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def serve(self) -> None:
        with suppress(OSError):  # the socket was closed
            while True:
                query, client = self._socket.recvfrom(512)
                if len(query) > SHORTEST_QUERY and not self.is_silent:
                    threading.Thread(target=self._answer, args=(query, client), daemon=True).start()

    def _answer(self, query: bytes, client: tuple[str, int]) -> None:
        time.sleep(self.delay_s)
        labels, end = [], 12
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode())
            end += 1 + length
        (kind,) = struct.unpack_from("!H", query, end + 1)
        known = [] if self.knows_nothing else self.addresses.get(".".join(labels).lower(), [])
        family = {A: socket.AF_INET, AAAA: socket.AF_INET6}.get(kind)
        found = [socket.inet_pton(family, it) for it in known if (":" in it) == (kind == AAAA)] if family else []
        answers = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, TTL_S, len(it)) + it for it in found)
        head = struct.pack("!HHHHH", RESPONSE if known else NO_SUCH_NAME, 1, len(found), 0, 0)
        with suppress(OSError):
            self._socket.sendto(query[:2] + head + query[12 : end + 5] + answers, client)

    def reset(self) -> None:
        self.is_silent, self.knows_nothing, self.delay_s = False, False, 0.0


@contextmanager
def name_server(address: str, addresses: dict[str, list[str]]) -> Iterator[NameServer]:
    server = NameServer(addresses)
    with server._socket as listener:
        listener.bind((address, PORT))
        threading.Thread(target=server.serve, daemon=True).start()
        yield server
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
