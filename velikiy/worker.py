"""gunicorn's worker with threads, whose threads stay for a moment with the connection that they have answered.

gthread hands each request from its main thread to another one and each connection back again, which under load takes
as long as the request itself: two changes of thread, each with a wait for the interpreter's lock. The clients are
edges, which use the connection again that was free last: what comes next often comes on it, and at once.
"""

import select
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

STAY = 1
"""Milliseconds. A thread that stays is kept from others for so long, and so only while none of them wait for one."""


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    def handle(self, conn: Any) -> Any:
        kept = super().handle(conn)
        while kept is True and self.alive and self.tpool._work_queue.empty() and _comes(conn):
            kept = super().handle(conn)
        return kept


def _comes(conn: Any) -> bool:
    """Whether the next request is on its way. What has been read ahead with a body gunicorn looks at itself."""
    if conn.parser.unreader.buf.getvalue():
        return False
    waiting = select.poll()
    waiting.register(conn.sock, select.POLLIN)
    return bool(waiting.poll(STAY))
