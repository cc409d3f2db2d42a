"""The threads of this process that wait for a statement of PostgreSQL, and since when.

A statement takes milliseconds, unless it waits for a lock or PostgreSQL hangs. The worker looks at these waits before
it gives a thread to another request of the same row (velikiy/server/shares.py).
"""

import threading
import time

LONG_WAIT_S = 0.5
"""Writers of a row that many clients write queue in PostgreSQL, each for some milliseconds. A wait of so long shows
that something else keeps the row."""

_since: dict[int, float] = {}
"""The moment at which each waiting thread has sent its statement, by the number of the thread."""

_slow: set[int] = set()
"""The threads whose statement took long, since they were last compared."""


def begin() -> None:
    _since[threading.get_ident()] = time.monotonic()


def end() -> None:
    thread = threading.get_ident()
    if time.monotonic() - _since.pop(thread) >= LONG_WAIT_S:
        _slow.add(thread)


def is_long(thread: int) -> bool:
    """Return whether this thread has waited for long, and still waits."""
    since = _since.get(thread)
    return since is not None and time.monotonic() - since >= LONG_WAIT_S


def take_long_wait() -> bool:
    """Return whether a statement of this thread took long since the last call."""
    thread = threading.get_ident()
    if thread not in _slow:
        return False
    _slow.discard(thread)
    return True
