"""gunicorn's worker with threads, which take what comes from the sockets themselves.

gthread's main thread waits for all connections, hands each request to a thread, and each connection back: two changes
of thread, a future and a condition for each, which took a sixth of the CPU time of a miss. Here the threads wait at one
epoll. For each request that comes the kernel wakes one of them, and of its connection nothing more is heard until it is
asked for again (EPOLLONESHOT, epoll_ctl(2)).

No class of requests can take all threads. Writes wait for row locks, so at most three quarters of the threads carry out
writes; further writes queue without a thread. Leases of edges and health checks have a thread of their own that serves
them while all others are busy: without it, a row that somebody has locked would cost every edge its cache.
"""

import select
import selectors
import socket
import threading
import time
from collections import deque
from typing import Any

from gunicorn import glogging
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

from velikiy.kernel_timeouts import Socket

FIRST = select.EPOLLIN | select.EPOLLONESHOT
AT_ONCE = select.EPOLLOUT | select.EPOLLONESHOT
"""For a connection whose next request was read ahead, and makes no socket readable."""

READS = (b"GET ", b"HEAD ", b"OPTIONS ")
LEASES = b"POST /.lease/"
RESERVED = (LEASES, b"GET /livez", b"GET /readyz", b"GET /health")
"""How the requests begin that are answered also while all other threads are busy."""

DEADLINE = b"\r\nWrite-Deadline: "
"""The header field that every edge sends with a write, and no other client."""

LOOK_S = 0.1
"""Seconds that such a request waits at most. Each look while all threads are busy costs some microseconds for each
connection that waits."""


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """With a `logconfig_dict` gunicorn takes an access log for wanted, and makes a line of each request for nobody."""

    access_log_enabled = False


class Client(Socket):
    """It always blocks, and an answer's header leaves together with the beginning of its body."""

    HELD = 64 * 1024
    """Bytes."""

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(accepted)
        self._held = b""

    def setblocking(self, flag: bool, /) -> None:
        """gthread says so up to four times for each request."""

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self._held += data
        if len(self._held) > self.HELD:
            self.flush()

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.flush()  # before the rest of a body that nobody reads: its sender may wait for the answer
        return super().recv(size, flags)

    def sendfile(self, *arguments: Any, **options: Any) -> int:
        self.flush()
        return super().sendfile(*arguments, **options)

    def shutdown(self, how: int, /) -> None:
        self.flush()
        super().shutdown(how)

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held:
            super().sendall(held)


class Queue:
    """Admits so many connections at a time; the others wait without a thread, in the order in which they came."""

    def __init__(self, size: int) -> None:
        self._places = size
        self._waiting: deque[Any] = deque()
        self._lock = threading.Lock()

    def enter(self, connection: Any) -> bool:
        """Return whether the connection has a place now; otherwise it waits until `leave` returns it."""
        with self._lock:
            if self._places:
                self._places -= 1
                return True
            self._waiting.append(connection)
            return False

    def leave(self) -> Any | None:
        """Return the next connection, which takes over the place, or None: the place is free."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._places += 1
            return None


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """The main thread accepts, tells the master that it lives, and closes what has been idle for too long."""

    def run(self) -> None:
        self._arrivals = select.epoll()
        self._open: set[Any] = set()
        # By file descriptor, those that wait for a request. Whoever takes a connection out has it for himself.
        self._idle: dict[int, Any] = {}
        self.keepalived_conns = self._idle  # gthread keeps no more than max_keepalived of them
        self._free: deque[None] = deque()
        """An element for each thread that waits for a request, the reserved one aside."""
        self._all_busy = threading.Event()
        self._writes = Queue(max(1, self.cfg.threads * 3 // 4))
        # Daemons: whoever still answers when the time to stop is over, is not waited for.
        for number in range(self.cfg.threads):
            threading.Thread(target=self._serve, name=f"request-{number}", daemon=True).start()
        threading.Thread(target=self._serve_reserved, name="reserved", daemon=True).start()
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        while self.alive and self.is_parent_alive():
            self.notify()
            self.set_accept_enabled(len(self._open) < self.worker_connections)
            self.wait_for_and_dispatch_events(1.0)
            self._close_idle(time.monotonic())
        self._stop()

    def accept(self, listener: Any) -> None:
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was faster, or the client has gone
            return
        connection = TConn(self.cfg, Client(client), address, listener.getsockname())
        connection.data_ready = True  # when a thread gets it
        self._open.add(connection)
        self._wait_for(connection, self._arrivals.register)

    def _wait_for(self, connection: Any, ask: Any) -> None:
        number = connection.sock.fileno()
        connection.set_timeout()
        self._idle[number] = connection  # first: from the next line on, a thread may have it
        ask(number, AT_ONCE if _read_ahead(connection) else FIRST)

    def _serve(self) -> None:
        while True:
            self._free.append(None)
            arrived = self._arrivals.poll(maxevents=1)
            self._free.pop()
            if not self._free and not self._all_busy.is_set():
                self._all_busy.set()
            for number, _ in arrived:
                connection = self._idle.pop(number, None)
                if connection is not None:
                    self._answer(connection)

    def _serve_reserved(self) -> None:
        """Serve leases and health checks while all other threads are busy, and leave the rest to them."""
        while True:
            self._all_busy.wait()
            time.sleep(LOOK_S)
            self._all_busy.clear()
            if self._free:
                continue
            self._all_busy.set()  # it still holds
            reserved = []
            for number, _ in self._arrivals.poll(0):
                connection = self._idle.pop(number, None)
                if connection is None:
                    continue
                if _peek(connection).startswith(RESERVED):
                    reserved.append(connection)
                else:
                    self._wait_for(connection, self._arrivals.modify)
            for connection in reserved:  # after the others are available to all threads again
                self._answer(connection)

    def _answer(self, connection: Any) -> None:
        """Answer the request that has arrived. A write may have to wait for the end of another one; the thread that
        carries that one out takes it over."""
        try:
            is_write = not _receive(connection).startswith((*READS, LEASES))
        except OSError:  # who asked has gone
            self._give_up(connection)
            return
        if not is_write:
            self._handle(connection)
        elif self._writes.enter(connection):
            while connection is not None:
                if _is_abandoned(connection):
                    self.log.info("write.abandoned")
                    self._give_up(connection)
                else:
                    self._handle(connection)
                connection = self._writes.leave()

    def _handle(self, connection: Any) -> None:
        try:
            if self.handle(connection) is True:
                connection.sock.flush()
                self._wait_for(connection, self._arrivals.modify)
                return
            connection.close(graceful=connection.sock.fileno() >= 0)  # gunicorn closes it when an answer breaks off
            self._open.discard(connection)
        except OSError:  # who asked has gone
            self._give_up(connection)
        except BaseException:  # SystemExit too, which gunicorn passes on: it is no reason to be a thread less
            self.log.exception("A connection is given up")
            self._give_up(connection)

    def _give_up(self, connection: Any) -> None:
        connection.close()
        self._open.discard(connection)

    def _close_idle(self, due: float) -> None:
        """Those who have waited for `keepalive` seconds by then."""
        for number, connection in list(self._idle.items()):
            if connection.timeout > due or self._idle.pop(number, None) is None:
                continue
            if _comes(connection):
                # No thread had time for it yet; one that was told meanwhile has not found it, so it is told again.
                self._wait_for(connection, self._arrivals.modify)
            else:
                self._give_up(connection)

    def _stop(self) -> None:
        """What has begun or has come is answered, and so is what comes to a connection that is idle for no longer than
        STOP_KEEPALIVE_LINGER: with "Connection: close"."""
        self.set_accept_enabled(False)
        began = time.monotonic()
        while self._open and time.monotonic() - began < self.cfg.graceful_timeout:
            self.notify()
            self.wait_for_and_dispatch_events(0.1)
            self._close_idle(time.monotonic() + self.cfg.keepalive - STOP_KEEPALIVE_LINGER)
        for listener in self.sockets:
            listener.close()


def _receive(connection: Any) -> bytes:
    """Return how the next request begins, as far as it has arrived. Its parser gets that too.

    Raises:
        OSError
    """
    connection.init()
    ahead = _read_ahead(connection)
    if not ahead:
        ahead = connection.sock.recv(8192)  # as much as the parser would ask for
        connection.parser.unreader.unread(ahead)
    return bytes(ahead)


def _read_ahead(connection: Any) -> bytes:
    return bytes(connection.parser.unreader.buf.getvalue()) if connection.parser else b""


def _peek(connection: Any) -> bytes:
    """Return how the next request begins, and leave it where it is."""
    try:
        return _read_ahead(connection) or bytes(connection.sock.recv(16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:  # the thread that answers finds out why
        return b""


def _is_abandoned(connection: Any) -> bool:
    """Return whether an edge has closed the connection while its write was waiting: the client has hung up, and may
    have written again through another app. An edge never closes only its sending side; other clients do."""
    if DEADLINE not in _read_ahead(connection):
        return False
    return _reports(connection, select.POLLRDHUP)


def _comes(connection: Any) -> bool:
    return bool(_read_ahead(connection)) or _reports(connection, select.POLLIN)


def _reports(connection: Any, event: int) -> bool:
    """Return whether the kernel reports the event now; it always reports POLLHUP and POLLERR too."""
    poll = select.poll()
    poll.register(connection.sock, event)
    return bool(poll.poll(0))
