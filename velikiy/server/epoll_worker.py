"""A gunicorn worker whose threads take requests from the sockets themselves.

Gains: a sixth of the CPU time of a miss. In gunicorn's own worker (gthread) the main thread waits for all connections,
passes each request to a thread and takes the connection back: two changes of thread, a future and a condition for each
request.
Relies on: parts of gunicorn's gthread (`TConn`, `handle`, `method_queue`, `wait_for_and_dispatch_events`) and
EPOLLONESHOT (epoll_ctl(2)).
Remove when: gunicorn's own threads wait for requests, limit writes and serve reserved requests. The setting
APP_WORKER_CLASS=gthread runs the app with gunicorn's own worker.

All threads wait at one epoll. The kernel wakes one thread for each request, and reports nothing more about that
connection until the thread registers it again.

No class of requests can take all threads, nor all connections to PostgreSQL, of which there is one for each thread.
Writes wait for row locks, so at most five eighths of the threads carry out writes, of one row one thread less; further
writes queue without a thread, and are refused once the writes before them wait for another session. Searches and
batches take a hundred times as long as other requests, so at most a quarter of the threads carries them out; a few more
queue, and the others are refused at once. Cache leases and health checks have a reserved thread, which serves them
while all other threads are busy: without it, a locked row would cost every edge its cache.
"""

import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn

from velikiy.hang_ups import has_event, is_hung_up
from velikiy.kernel_timeouts import Socket
from velikiy.server.abandoned_writes import DEADLINE_HEADER
from velikiy.server.shares import COSTLY, Admission, Share, WriteShare, costly_threads
from velikiy.server.stopping import StoppingWorker

READABLE_ONCE = select.EPOLLIN | select.EPOLLONESHOT

WRITABLE_ONCE = select.EPOLLOUT | select.EPOLLONESHOT
"""Reported at once. For a connection whose next request is read already, so that its socket may not become readable."""

READS = (b"GET ", b"HEAD ", b"OPTIONS ")
LEASES = b"POST /.lease/"
RESERVED = (LEASES, b"GET /livez", b"GET /readyz", b"GET /health")
"""The beginnings of the requests that the reserved thread serves."""

COSTLY_QUEUE_FACTOR = 8
"""Costly requests that may queue, for each thread that carries them out."""

MAX_COSTLY_WAIT_S = 1.0
"""A costly request that has queued for longer is refused: the edge waits DATABASE_TIMEOUT and 3 s for a response."""

DEADLINE = f"\r\n{DEADLINE_HEADER}: ".encode()

REFUSAL_INTERVAL_S = 0.25
"""Seconds between two looks at the queue of writes, while there is one."""

RESERVED_INTERVAL_S = 0.1
"""The longest wait of a reserved request. Each look while all threads are busy costs some microseconds for each
connection that waits."""


class ClientSocket(Socket):
    """A socket that always blocks, and that sends the header of a response together with the beginning of its body."""

    MAX_BUFFERED_BYTES = 64 * 1024

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(accepted)
        self._buffered = b""
        self.refused_as = ""
        """Why the present request is refused: "busy", because its share of the threads is; "locked", because another
        session has locked the row; empty if it is not (velikiy/http/middleware.py:refuse_beyond_the_share)."""

    def setblocking(self, flag: bool, /) -> None:
        """Do nothing. gthread changes the mode up to four times for each request."""

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self._buffered += data
        if len(self._buffered) > self.MAX_BUFFERED_BYTES:
            self.flush()

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.flush()  # a client may wait for the response before it sends the rest of a body that the app does not read
        return super().recv(size, flags)

    def sendfile(self, *arguments: Any, **options: Any) -> int:
        self.flush()
        return super().sendfile(*arguments, **options)

    def shutdown(self, how: int, /) -> None:
        self.flush()
        super().shutdown(how)

    def flush(self) -> None:
        buffered, self._buffered = self._buffered, b""
        if buffered:
            super().sendall(buffered)


class Worker(StoppingWorker):
    """The main thread accepts connections, reports to the master, and closes connections that were idle for too long.
    The other threads serve requests."""

    def run(self) -> None:
        self._epoll = select.epoll()
        self._connections: set[Any] = set()
        self._idle: dict[int, Any] = {}
        """The connections that wait for a request, by file descriptor. The thread that removes a connection owns it."""
        self.keepalived_conns = self._idle  # gthread keeps no more than max_keepalived connections
        self._waiting_threads: deque[None] = deque()
        """An element for each thread that waits for a request. The reserved thread does not count."""
        self._all_busy = threading.Event()
        waits = _waits()
        self._writes = WriteShare(max(1, self.cfg.threads * 5 // 8), waits.is_long, waits.was_long)
        self._has_queued_writes = threading.Event()
        costly = costly_threads(self.cfg.threads)
        self._costly = Share(costly, costly * COSTLY_QUEUE_FACTOR, MAX_COSTLY_WAIT_S)
        # Daemons: the process does not wait for threads that still serve a request when the time to stop is over.
        for number in range(self.cfg.threads):
            threading.Thread(target=self._serve, name=f"request-{number}", daemon=True).start()
        threading.Thread(target=self._serve_reserved, name="reserved", daemon=True).start()
        threading.Thread(target=self._refuse_locked, name="refusals", daemon=True).start()
        _metrics().watch(self._sample)
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        while self.alive and self.is_parent_alive():
            self.notify()
            self.set_accept_enabled(len(self._connections) < self.worker_connections)
            self.wait_for_and_dispatch_events(1.0)
            self._close_idle(time.monotonic())
        self._stop()

    def _sample(self) -> None:
        metrics, idle = _metrics(), len(self._waiting_threads)
        metrics.APP_THREADS.labels("idle").set(idle)
        metrics.APP_THREADS.labels("busy").set(self.cfg.threads - idle)
        metrics.APP_QUEUED.labels("writes").set(self._writes.queued)
        metrics.APP_QUEUED.labels("costly").set(self._costly.queued)

    def accept(self, listener: Any) -> None:
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was faster, or the client has hung up
            return
        connection = TConn(self.cfg, ClientSocket(client), address, listener.getsockname())
        connection.data_ready = True  # a thread gets the connection only when it is readable
        self._connections.add(connection)
        self._await_request(connection, self._epoll.register)

    def _await_request(self, connection: Any, register: Callable[[int, int], None]) -> None:
        descriptor = connection.sock.fileno()
        connection.set_timeout()
        self._idle[descriptor] = connection  # before the next line, after which a thread may take the connection
        register(descriptor, WRITABLE_ONCE if _read_ahead(connection) else READABLE_ONCE)

    # ---- the threads ----

    def _serve(self) -> None:
        while True:
            self._waiting_threads.append(None)
            events = self._epoll.poll(maxevents=1)
            self._waiting_threads.pop()
            if not self._waiting_threads and not self._all_busy.is_set():
                self._all_busy.set()
            for descriptor, _ in events:
                connection = self._idle.pop(descriptor, None)
                if connection is not None:
                    self._serve_request(connection)

    def _serve_reserved(self) -> None:
        """Serve leases and health checks while all other threads are busy. Leave other requests to those threads."""
        while True:
            self._all_busy.wait()
            time.sleep(RESERVED_INTERVAL_S)
            self._all_busy.clear()
            if self._waiting_threads:
                continue
            self._all_busy.set()  # all threads are still busy
            reserved = []
            for descriptor, _ in self._epoll.poll(0):
                connection = self._idle.pop(descriptor, None)
                if connection is None:
                    continue
                if _peek(connection).startswith(RESERVED):
                    reserved.append(connection)
                else:
                    self._await_request(connection, self._epoll.modify)
            for connection in reserved:  # after the other connections are available to all threads again
                self._serve_request(connection)

    def _refuse_locked(self) -> None:
        """Refuse queued writes that would wait for another session."""
        while True:
            self._has_queued_writes.wait()
            time.sleep(REFUSAL_INTERVAL_S)
            if not self._writes.queued:
                self._has_queued_writes.clear()
                if self._writes.queued:  # queued just before
                    self._has_queued_writes.set()
            for connection in self._writes.refused():
                self._handle(connection, refused_as="locked")

    def _serve_request(self, connection: Any) -> None:
        """Serve the request that has arrived. If it has to queue for its share, the thread of another request of that
        share serves it afterwards."""
        try:
            beginning = _receive_beginning(connection)
        except OSError:  # the client has hung up
            self._discard(connection)
            return
        share = self._share_of(beginning)
        if share is None:
            self._handle(connection)
            return
        refused_as = "locked" if share is self._writes else "busy"
        admission = share.enter(connection, beginning)
        if admission is Admission.REFUSED:
            self._handle(connection, refused_as)
        elif admission is Admission.QUEUED and share is self._writes:
            self._has_queued_writes.set()
        elif admission is Admission.ADMITTED:
            while connection is not None:
                if _is_abandoned(connection):
                    self.log.info("write.abandoned")
                    self._discard(connection)
                else:
                    self._handle(connection, refused_as if admission is Admission.REFUSED else "")
                connection, admission = share.leave()

    def _share_of(self, beginning: bytes) -> Share | WriteShare | None:
        """Return the share of the threads that carries out this request, None for all threads."""
        if COSTLY.match(beginning):
            return self._costly
        return None if beginning.startswith((*READS, LEASES)) else self._writes

    def _handle(self, connection: Any, refused_as: str = "") -> None:
        connection.sock.refused_as = refused_as
        try:
            if self.handle(connection) is True:
                connection.sock.flush()
                self._await_request(connection, self._epoll.modify)
                return
            # gunicorn has closed the socket if it could not finish the response.
            connection.close(graceful=connection.sock.fileno() >= 0)
            self._connections.discard(connection)
        except OSError:  # the client has hung up
            self._discard(connection)
        except BaseException:  # also SystemExit, which gunicorn passes on: it must not end the thread
            self.log.exception("A connection is discarded")
            self._discard(connection)

    def _discard(self, connection: Any) -> None:
        connection.close()
        self._connections.discard(connection)

    # ---- the main thread ----

    def _close_idle(self, due: float) -> None:
        """Close the connections that will have waited for `keepalive` seconds at the time `due`."""
        for descriptor, connection in list(self._idle.items()):
            if connection.timeout > due or self._idle.pop(descriptor, None) is None:
                continue
            if _has_request(connection):
                # No thread had time for the request. A thread that was woken meanwhile did not find the connection, so
                # register it again.
                self._await_request(connection, self._epoll.modify)
            else:
                self._discard(connection)

    def _stop(self) -> None:
        """Serve the requests that have begun or arrived, and the requests that arrive while a connection has been idle
        for no longer than STOP_KEEPALIVE_LINGER. The responses contain "Connection: close".

        A worker with a successor has time: it leaves it to the clients to close idle connections, so that no request
        meets a connection that is just being closed.
        """
        self.set_accept_enabled(False)
        began = time.monotonic()
        while self._connections:
            has_time = self.is_replaced and self.is_parent_alive()
            if time.monotonic() - began > self.cfg.graceful_timeout + (self.cfg.keepalive if has_time else 0):
                break
            self.notify()
            self.wait_for_and_dispatch_events(0.1)
            self._close_idle(time.monotonic() + (0 if has_time else self.cfg.keepalive - STOP_KEEPALIVE_LINGER))


def _metrics() -> Any:
    # An import inside the function: with --reload, the app has imported its modules again.
    from velikiy import metrics

    return metrics


def _waits() -> Any:
    # As above.
    from velikiy import statement_waits

    return statement_waits


def _receive_beginning(connection: Any) -> bytes:
    """Return the beginning of the next request, as far as it has arrived. The parser of the connection gets it too.

    Raises:
        OSError: The connection is broken.
    """
    connection.init()
    received = _read_ahead(connection)
    if not received:
        received = connection.sock.recv(8192)  # the size that the parser would use
        connection.parser.unreader.unread(received)
    return bytes(received)


def _read_ahead(connection: Any) -> bytes:
    """Return the bytes of the next request that the parser has read already."""
    return bytes(connection.parser.unreader.buf.getvalue()) if connection.parser else b""


def _peek(connection: Any) -> bytes:
    """Return the beginning of the next request without taking it from the socket."""
    try:
        return _read_ahead(connection) or bytes(connection.sock.recv(16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:  # the thread that serves the connection notices the error
        return b""


def _is_abandoned(connection: Any) -> bool:
    """Return whether an edge has closed the connection while its write was waiting in the queue."""
    return DEADLINE in _read_ahead(connection) and is_hung_up(connection.sock)


def _has_request(connection: Any) -> bool:
    return bool(_read_ahead(connection)) or has_event(connection.sock, select.POLLIN)
