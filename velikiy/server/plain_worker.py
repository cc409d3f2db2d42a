"""gunicorn's own worker, with a share of the threads for costly requests.

A thread already has the request when its share is known, so no request queues without a thread, as in
`velikiy/server/epoll_worker.py`: a costly request beyond the share is refused at once.
"""

from collections.abc import Callable, Iterable
from typing import Any

from velikiy.server.shares import COSTLY, Admission, Share, costly_threads
from velikiy.server.stopping import StoppingWorker

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Worker(StoppingWorker):
    wsgi: App

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi = limited(self.wsgi, Share(costly_threads(self.cfg.threads), max_queued=0))


def limited(app: App, costly: Share) -> App:
    """Return the app with the mark by which it refuses a costly request
    (velikiy/http/middleware.py:refuse_beyond_the_share)."""

    def respond(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not COSTLY.match(f"{environ['REQUEST_METHOD']} {environ['RAW_URI']} ".encode("latin-1")):
            return app(environ, start_response)
        if costly.enter(None) is Admission.REFUSED:
            environ["velikiy.refused_as"] = "busy"
            return app(environ, start_response)
        try:
            return app(environ, start_response)  # the response is complete then
        finally:
            costly.leave()

    return respond
