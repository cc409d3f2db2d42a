"""gunicorn's own worker, with the same shares of the threads as `velikiy/server/epoll_worker.py`.

gunicorn's main thread passes each request to a thread. A thread whose request has to queue for its share
(`velikiy/server/shares.py`) leaves it and takes another request. Cache leases and health checks have a thread of their
own.

Relies on: parts of gunicorn's gthread (`TConn`, `handle`, `enqueue_req`, `finish_request`, `keepalived_conns`).
"""

import selectors
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from gunicorn.workers.gthread import TConn

from velikiy.server.connections import peek
from velikiy.server.shares import RESERVED, Shares
from velikiy.server.stopping import StoppingWorker


class ClientSocket(socket.socket):
    """A socket that knows why its present request is refused."""

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(fileno=accepted.detach())
        self.refused_as = ""
        """As velikiy/server/epoll_worker.py:ClientSocket."""


class Worker(StoppingWorker):
    def run(self) -> None:
        self._reserved = ThreadPoolExecutor(1, "reserved")
        self._shares = Shares(self.cfg.threads, self._handle, self._discard, self.log)
        super().run()
        self._reserved.shutdown(wait=False)

    def accept(self, listener: Any) -> None:
        """Accept a connection, which then waits for its request like a kept connection. gunicorn gives it to a thread
        that waits."""
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was faster, or the client has hung up
            return
        self.nr_conns += 1
        connection = TConn(self.cfg, ClientSocket(client), address, listener.getsockname())
        connection.data_ready = True  # a thread gets the connection only when it is readable
        connection.set_timeout()
        self.keepalived_conns.append(connection)
        readable = partial(self.on_client_socket_readable, connection)
        self.poller.register(connection.sock, selectors.EVENT_READ, readable)

    def enqueue_req(self, conn: Any) -> None:
        threads = self._reserved if peek(conn).startswith(RESERVED) else self.tpool
        threads.submit(self._shares.serve, conn)

    # ---- the threads ----

    def _handle(self, connection: Any, refused_as: str) -> None:
        connection.sock.refused_as = refused_as
        try:
            keeps = self.handle(connection)
        except BaseException:  # also SystemExit, which gunicorn passes on: it must not end the worker
            self.log.exception("A connection is discarded")
            keeps = False
        self._finish(connection, keeps)

    def _discard(self, connection: Any) -> None:
        self._finish(connection, False)

    def _finish(self, connection: Any, keeps: bool) -> None:
        result: Future[bool] = Future()
        result.set_result(keeps)
        self.method_queue.defer(self.finish_request, connection, result)
