"""Shares of the threads of a process: no class of requests, and no locked row, can take all of them, nor all
connections to PostgreSQL, of which there is one for each thread.

Writes wait for row locks, so at most five eighths of the threads carry out writes, and at most two write one row;
further writes queue without a thread, and are refused once the writes before them wait for another session. Searches
and batches take a hundred times as long as other requests, so at most a quarter of the threads carries them out; a few
more queue, and the others are refused at once. Both worker classes pass each request through `Shares`.
"""

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from velikiy.server.connections import already_read, is_abandoned, receive_beginning

READS = (b"GET ", b"HEAD ", b"OPTIONS ")
LEASES = b"POST /.lease/"
RESERVED = (LEASES, b"GET /livez", b"GET /readyz", b"GET /health")
"""The beginnings of cache leases and health checks, for which each worker keeps a thread."""

COSTLY = re.compile(
    rb"(GET|HEAD) (?!/console/downloads/)[^ ?]*\?[^ ]*(q|%71)="
    rb"|POST /[^ /?]*/batch[ ?]|POST /console/import[/ ?]|GET /console/tiers[ ?]"
)
"""The beginnings of searches, counts with a search, batches, pieces of an import, and looks at every tier. A download
may take hours, and has a limit of its own (velikiy/console/exports.py)."""


COSTLY_QUEUE_FACTOR = 8
"""Costly requests that may queue, for each thread that carries them out."""

MAX_COSTLY_WAIT_S = 1.0
"""A costly request that has queued for longer is refused: the edge waits DATABASE_TIMEOUT and 3 s for a response."""

REFUSAL_INTERVAL_S = 0.25
"""Seconds between two looks at the queue of writes, while there is one."""


class Admission(Enum):
    """The way of a connection whose request belongs to a share."""

    ADMITTED = auto()
    QUEUED = auto()
    REFUSED = auto()


class Share:
    """Admits a limited number of connections. The others queue without a thread, in the order in which they came."""

    def __init__(self, size: int, max_queued: float = math.inf, max_wait_s: float = math.inf) -> None:
        """
        Args:
            size: Connections that are admitted at the same time.
            max_queued: Connections that may queue. Further connections are refused.
            max_wait_s: A connection that has queued for longer is refused when its turn comes.
        """
        self._free = size
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._queued: deque[tuple[Any, float]] = deque()
        self._lock = threading.Lock()

    @property
    def queued(self) -> int:
        return len(self._queued)

    def enter(self, connection: Any, beginning: bytes = b"") -> Admission:
        """Admit the connection, queue it until `leave` returns it, or refuse it. The requests of this share are alike,
        however they begin."""
        with self._lock:
            if self._free:
                self._free -= 1
                return Admission.ADMITTED
            if len(self._queued) >= self._max_queued:
                return Admission.REFUSED
            self._queued.append((connection, time.monotonic()))
            return Admission.QUEUED

    def leave(self) -> tuple[Any | None, Admission]:
        """Return the next connection, and whether it is admitted instead or refused. Return no connection if none
        queues."""
        with self._lock:
            if not self._queued:
                self._free += 1
                return None, Admission.ADMITTED
            connection, since = self._queued.popleft()
            is_late = time.monotonic() - since > self._max_wait_s
            return connection, Admission.REFUSED if is_late else Admission.ADMITTED


LINE = re.compile(rb"(\S+) (\S+) ")

NEW_ROWS = b"POST "
"""The beginning of the path of new rows, which wait for each other only if they have a unique value in common."""

SIZE_OF_ROW = 2
"""Writes of one row that are admitted at the same time: one has the row, the other prepares and takes it over at once.
More would only wait for each other in PostgreSQL, and their waits would look like those for another session."""


class WriteShare:
    """Admits a limited number of writes, and fewer of one path. The others queue without a thread, in the order in
    which they came.

    A write may wait for a row that another session has locked. Meanwhile further writes of that row are refused; if
    every admitted write waits, every write is refused. Otherwise that session would hold all threads and the whole
    queue. Afterwards one write at a time tries the row, until one gets through.
    """

    def __init__(self, size: int, is_long: Callable[[int], bool], take_long_wait: Callable[[], bool]) -> None:
        """
        Args:
            size: Writes that are admitted at the same time.
            is_long: Returns whether a thread has waited for a statement for long (velikiy/statement_waits.py).
            take_long_wait: Returns whether a statement of this thread took long since the last call.
        """
        self._size = size
        self._size_of_new_rows = max(1, size - 1)
        self._is_long, self._was_long = is_long, take_long_wait
        self._admitted: dict[int, bytes] = {}
        """The path of each write that is admitted, by the number of its thread."""
        self._queued: deque[tuple[Any, bytes]] = deque()
        self._locked: set[bytes] = set()
        """The paths whose last write has waited for long."""
        self._lock = threading.Lock()

    @property
    def queued(self) -> int:
        return len(self._queued)

    def enter(self, connection: Any, beginning: bytes) -> Admission:
        """Admit the connection to this thread, or queue it until `leave` or `refused` returns it."""
        path = _path_of(beginning)
        with self._lock:
            if len(self._admitted) < self._size and self._has_room(path):
                self._was_long()  # forget the waits of earlier requests
                self._admitted[threading.get_ident()] = path
                return Admission.ADMITTED
            self._queued.append((connection, path))
            return Admission.QUEUED

    def leave(self) -> tuple[Any | None, Admission]:
        """Note that the write of this thread has ended. Return the next connection, which is admitted to this thread,
        or None if no queued write may begin."""
        waited = self._was_long()
        with self._lock:
            path = self._admitted.pop(threading.get_ident())
            if not waited:
                self._locked.discard(path)
            elif not path.startswith(NEW_ROWS):
                if len(self._locked) >= MAX_LOCKED_PATHS:
                    self._locked.clear()
                self._locked.add(path)
            for number, (connection, queued_path) in enumerate(self._queued):
                if self._has_room(queued_path):
                    del self._queued[number]
                    self._admitted[threading.get_ident()] = queued_path
                    return connection, Admission.ADMITTED
        return None, Admission.ADMITTED

    def refused(self) -> list[Any]:
        """Remove the connections that would wait for a locked row from the queue, and return them. Not in `enter`:
        clients that try again at once would be refused some thousand times each second, and take the CPU from other
        requests."""
        with self._lock:
            refusals = {path: self._must_refuse(path) for path in {path for _, path in self._queued}}
            refused = [connection for connection, path in self._queued if refusals[path]]
            if refused:
                self._queued = deque(it for it in self._queued if not refusals[it[1]])
        return refused

    def _has_room(self, path: bytes) -> bool:
        return self._count(path) < (1 if path in self._locked else self._size_of(path))

    def _size_of(self, path: bytes) -> int:
        return self._size_of_new_rows if path.startswith(NEW_ROWS) else min(SIZE_OF_ROW, self._size_of_new_rows)

    def _count(self, path: bytes) -> int:
        return sum(it == path for it in self._admitted.values())

    def _must_refuse(self, path: bytes) -> bool:
        waiting = [it for thread, it in self._admitted.items() if self._is_long(thread)]
        if len(waiting) == self._size:
            return True
        if path.startswith(NEW_ROWS):
            return waiting.count(path) >= self._size_of_new_rows
        return path in waiting or (path in self._locked and self._count(path) > 0)


MAX_LOCKED_PATHS = 1000
"""Paths that a process remembers."""


def _path_of(beginning: bytes) -> bytes:
    """Return the path that a request writes. All new rows of a resource have one path."""
    line = LINE.match(beginning)
    if not line:
        return b""
    method, path = line.groups()
    return NEW_ROWS + path if method == b"POST" else bytes(path)


class Shares:
    """Passes each request of a process to a thread that may carry it out."""

    def __init__(
        self, threads: int, handle: Callable[[Any, str], None], discard: Callable[[Any], None], log: Any
    ) -> None:
        """
        Args:
            threads: The threads that serve requests.
            handle: Serves the request of a connection, or refuses it for a reason: "busy", because its share of the
                threads is; "locked", because another session has locked the row; empty for no refusal
                (velikiy/http/middleware.py:refuse_beyond_the_share).
            discard: Closes a connection without a response.
            log: The log of gunicorn.
        """
        # Imports inside the function: with --reload, the app has imported its modules again.
        from velikiy import metrics, statement_waits

        self._handle, self._discard, self._log, self._metrics = handle, discard, log, metrics
        self._writes = WriteShare(max(1, threads * 5 // 8), statement_waits.is_long, statement_waits.take_long_wait)
        self._has_queued_writes = threading.Event()
        costly = max(1, threads // 4)
        self._costly = Share(costly, costly * COSTLY_QUEUE_FACTOR, MAX_COSTLY_WAIT_S)
        threading.Thread(target=self._refuse_locked, name="refusals", daemon=True).start()
        metrics.watch(self._sample)

    def _sample(self) -> None:
        self._metrics.APP_QUEUED.labels("writes").set(self._writes.queued)
        self._metrics.APP_QUEUED.labels("costly").set(self._costly.queued)

    def serve(self, connection: Any) -> None:
        """Serve the request that has arrived, on this thread. If it has to queue for its share, the thread of another
        request of that share serves it afterwards."""
        try:
            beginning = receive_beginning(connection)
        except OSError:  # the client has hung up
            self._discard(connection)
            return
        except Exception:
            self._log.exception("request.unreadable")
            self._discard(connection)
            return
        share = self._share_of(beginning)
        if share is None:
            self._carry_out(connection)
            return
        refused_as = "locked" if share is self._writes else "busy"
        admission = share.enter(connection, beginning)
        if admission is Admission.REFUSED:
            self._handle(connection, refused_as)
        elif admission is Admission.QUEUED and share is self._writes:
            self._has_queued_writes.set()
        elif admission is Admission.ADMITTED:
            while connection is not None:
                self._carry_out(connection, refused_as if admission is Admission.REFUSED else "")
                connection, admission = share.leave()

    def _carry_out(self, connection: Any, refused_as: str = "") -> None:
        """Serve the request, unless its edge has given it up."""
        if not is_abandoned(connection):
            self._handle(connection, refused_as)
            return
        if not already_read(connection).startswith(READS):
            self._log.info("write.abandoned")
        self._discard(connection)

    def _share_of(self, beginning: bytes) -> Share | WriteShare | None:
        """Return the share of the threads that carries out this request, None for all threads."""
        if not beginning or beginning.startswith(RESERVED):  # whatever follows: its thread serves no queue
            return None
        if COSTLY.match(beginning):
            return self._costly
        return None if beginning.startswith(READS) else self._writes

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
                self._handle(connection, "locked")
