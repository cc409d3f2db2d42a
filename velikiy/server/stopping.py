"""Stop a worker so that no request is lost.

SIGTERM stops the instance. For LEAVING_S the worker serves as before, but reports to the edges that it leaves
(`velikiy/http/health.py:livez`), so that they choose another instance. Then it accepts what is left in the listener's
queue, closes the listener, and finishes its requests. A closed listener refuses connections at once; a listener that
stays open without a process that accepts would reset them all at the end.

SIGWINCH ends a worker whose successor accepts from the same listener (`velikiy/server/handover.py`). The worker accepts
nothing more, and the queue waits for the successor.

Relies on: `handle_exit`, `handle_winch`, `set_accept_enabled` and `sockets` of gunicorn's workers.
"""

import select
import threading
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from velikiy.hang_ups import has_event

LEAVING_S = 2.5
"""The edges check each instance once a second (edge/lua/balancer.lua), and wait up to half a second for the answer."""


class StoppingWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own worker, which stops as described above."""

    is_replaced = False
    """True if a successor accepts from the same listener."""

    def handle_exit(self, signal_number: int, frame: Any) -> None:
        # An import inside the function: with --reload, the app has imported its modules again.
        from velikiy import leaving

        leaving.begin()
        timer = threading.Timer(LEAVING_S, super().handle_exit, (signal_number, frame))
        timer.daemon = True
        timer.start()

    def handle_winch(self, signal_number: int, frame: Any) -> None:
        self.is_replaced = True
        super().handle_exit(signal_number, frame)

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if enabled or self.alive:
            return
        for listener in self.sockets:
            while not self.is_replaced and has_event(listener, select.POLLIN):
                self.accept(listener)
            listener.close()
