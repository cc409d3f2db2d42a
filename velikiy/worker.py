"""gunicorn's worker with threads, which take what comes from the sockets themselves.

gthread's main thread waits for all connections, hands each request to a thread, and each connection back: two changes
of thread, a future and a condition for each, which took a sixth of the CPU time of a miss. Here the threads wait at one
epoll. For each request that comes the kernel wakes one of them, and of its connection nothing more is heard until it is
asked for again (EPOLLONESHOT, epoll_ctl(2)).
"""

import select
import selectors
import socket
import threading
import time
from typing import Any

from gunicorn import glogging
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

from velikiy.sockets import Socket

FIRST = select.EPOLLIN | select.EPOLLONESHOT


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


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """The main thread accepts, tells the master that it lives, and closes what has been idle for too long."""

    def run(self) -> None:
        self._arrivals = select.epoll()
        self._open: set[Any] = set()
        # By file descriptor, those that wait for a request. Whoever takes a connection out has it for himself.
        self._idle: dict[int, Any] = {}
        self.keepalived_conns = self._idle  # gthread keeps no more than max_keepalived of them
        for number in range(self.cfg.threads):
            # Daemons: whoever still answers when the time to stop is over, is not waited for.
            threading.Thread(target=self._serve, name=f"request-{number}", daemon=True).start()
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
        ask(number, FIRST)

    def _serve(self) -> None:
        while True:
            for number, _ in self._arrivals.poll(maxevents=1):
                connection = self._idle.pop(number, None)
                if connection is not None:
                    self._answer(connection)

    def _answer(self, connection: Any) -> None:
        try:
            while self.handle(connection) is True:
                connection.sock.flush()
                # What was read ahead with a body makes no socket readable.
                if not connection.parser.unreader.buf.getvalue():
                    self._wait_for(connection, self._arrivals.modify)
                    return
            connection.close(graceful=connection.sock.fileno() >= 0)  # gunicorn closes it when an answer breaks off
        except OSError:  # who asked has gone
            connection.close()
        except BaseException:  # SystemExit too, which gunicorn passes on: it is no reason to be a thread less
            self.log.exception("A connection is given up")
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
                connection.close()
                self._open.discard(connection)

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


def _comes(connection: Any) -> bool:
    waiting = select.poll()
    waiting.register(connection.sock, select.POLLIN)
    return bool(waiting.poll(0))
