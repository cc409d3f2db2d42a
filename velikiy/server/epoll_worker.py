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

Cache leases and health checks have a reserved thread, which serves them while all other threads are busy: without it, a
locked row would cost every edge its cache. `velikiy/server/shares.py` bounds the threads of writes and of searches.
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

from velikiy.kernel_timeouts import Socket
from velikiy.server.connections import already_read, has_request, peek
from velikiy.server.shares import RESERVED, Shares
from velikiy.server.stopping import StoppingWorker

READABLE_ONCE = select.EPOLLIN | select.EPOLLONESHOT

WRITABLE_ONCE = select.EPOLLOUT | select.EPOLLONESHOT
"""Reported at once. For a connection whose next request is read already, so that its socket may not become readable."""

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
        """Why the present request is refused (velikiy/server/shares.py:Shares)."""

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
        self._shares = Shares(self.cfg.threads, self._handle, self._discard, self.log)
        # Daemons: the process does not wait for threads that still serve a request when the time to stop is over.
        for number in range(self.cfg.threads):
            threading.Thread(target=self._serve, name=f"request-{number}", daemon=True).start()
        threading.Thread(target=self._serve_reserved, name="reserved", daemon=True).start()
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
        register(descriptor, WRITABLE_ONCE if already_read(connection) else READABLE_ONCE)

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
                    self._shares.serve(connection)

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
                if peek(connection).startswith(RESERVED):
                    reserved.append(connection)
                else:
                    self._await_request(connection, self._epoll.modify)
            for connection in reserved:  # after the other connections are available to all threads again
                self._shares.serve(connection)

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
            if has_request(connection):
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
