"""Produce the next item in a thread while the current item is in use."""

import atexit
import gc
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

JOIN_TIMEOUT_S = 1
"""Seconds that the end of the process waits for the thread."""


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items. A thread produces them, at most one ahead of the item in the queue."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(1)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                ready.put(item)
                if stopped.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    # A daemon, because after an interruption the thread may still be reading from a pipe that stays silent.
    producer = threading.Thread(target=produce, daemon=True)

    def stop() -> None:
        """Let the thread finish its item, within JOIN_TIMEOUT_S.

        Python stops a daemon thread at any instruction, and the process crashes if the thread is in Rust code (jiter,
        pydantic) at that moment. A thread that only reads can be stopped safely, so the wait has a limit.
        """
        stopped.set()
        with suppress(queue.Empty):
            ready.get_nowait()
        producer.join(JOIN_TIMEOUT_S)

    # Modules stay for good. Otherwise the garbage collector examines them again and again, for a fifth of the time.
    gc.freeze()
    producer.start()
    atexit.register(stop)
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
    atexit.unregister(stop)
