"""What stands between two servers: it passes bytes on, and does to them what a test wants, when they come by."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Hook = Callable[["Link", bytes], bytes]
"""Gets what came, and returns what is to be passed on; meanwhile nothing passes on this connection."""


def passes(link: "Link", said: bytes) -> bytes:
    return said


class Cut(Exception):
    """The connection is to end here."""


class Link:
    """A connection that goes through."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server

    def hang_up(self) -> None:
        """On the client alone: what it has said is still on its way to the server."""
        _end(self.client)

    def cut(self) -> None:
        _end(self.client)
        _end(self.server)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # which wakes who reads there; to close would not


class Between:
    def __init__(self, server: tuple[str, int]) -> None:
        self.question: Hook = passes
        self.reply: Hook = passes
        self.questions: list[bytes] = []
        self.links: list[Link] = []
        self._server = server
        self.port = 0
        self.accept()

    def accept(self) -> None:
        """At the same port as before."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """New connections, and the end of all old ones."""
        _end(self._listener)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        while self.links:
            self.links.pop().cut()

    def let_be(self) -> None:
        self.question = self.reply = passes

    def _take(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                link = Link(client, socket.create_connection(self._server))
                self.links.append(link)
                for pump in (self._ask, self._answer):
                    threading.Thread(target=pump, args=(link,), daemon=True).start()

    def _ask(self, link: Link) -> None:
        with contextlib.suppress(OSError, Cut):
            while said := link.client.recv(2**20):
                self.questions.append(said)
                link.server.sendall(self.question(link, said))
        link.cut()

    def _answer(self, link: Link) -> None:
        with contextlib.suppress(OSError, Cut):
            while said := link.server.recv(2**20):
                link.client.sendall(self.reply(link, said))
        link.cut()


@contextmanager
def between(server: tuple[str, int]) -> Iterator[Between]:
    one = Between(server)
    try:
        yield one
    finally:
        one.let_be()
        one.refuse()


def once(then: Callable[[], object]) -> Hook:
    """This is done when the first comes by; it waits meanwhile, and those after it pass."""
    waiting = threading.Lock()

    def first(link: Link, said: bytes) -> bytes:
        if waiting.acquire(blocking=False):
            then()
        return said

    return first


class Lost:
    """A hook for questions: of the first one the client hears no more, and it arrives when it is `late`."""

    def __init__(self) -> None:
        self.late = threading.Event()
        self.said: list[bytes] = []

    def __call__(self, link: Link, said: bytes) -> bytes:
        if not self.said:
            self.said.append(said)
            link.hang_up()
            self.late.wait(9)
        return said
