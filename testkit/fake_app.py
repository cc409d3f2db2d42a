"""An edge before an app that answers what a test tells it to, and keeps what it heard: for what Nginx does by itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as File

from werkzeug import Request, Response
from werkzeug.serving import make_server

from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, wait_until


def fenced(request: Request, status: int = 200, body: bytes = b'{"id":7}', **headers: str) -> Response:
    """An answer that may be stored."""
    return plain(request, status, body, Cache_Status="redis; hit", **headers)


def plain(request: Request, status: int = 200, body: bytes = b"{}", **headers: str) -> Response:
    """One that may not; a header is spelled as a keyword."""
    kind = "application/json" if status < 400 else "application/problem+json"
    answer = Response(body, status, content_type=kind)
    answer.headers["X-Request-Id"] = request.headers.get("X-Request-Id", "")
    answer.headers["Cache-Control"] = "private, no-cache"
    for name, value in headers.items():
        answer.headers[name.replace("_", "-")] = value
    return answer


@dataclass
class Told:
    edge: str = ""
    data: File = File()
    """The edge's folder."""
    answer: Callable[[Request], Response] = fenced
    leasing: bool = True
    lease: str = "2400"
    heard: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Requests: the line, headers in lower case, the body."""

    def __call__(self, request: Request) -> Response:
        if request.path.startswith("/.lease/"):
            return Response(self.lease, 200 if self.leasing else 503)
        headers = {name.lower(): value for name, value in request.headers.items() if value}
        self.heard.append((f"{request.method} {request.environ['REQUEST_URI']}", headers, request.get_data()))
        return self.answer(request)

    def log(self) -> str:
        return (self.data / "log").read_text()


@contextmanager
def told_app(lease: str = "2400", **settings: str) -> Iterator[Told]:
    """`settings`: of the edge."""
    told = Told(lease=lease)
    server = make_server("127.0.0.1", 0, Request.application(told), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with running_edge(f"127.0.0.1:{server.port}", ROOT / "edge", **settings) as (told.edge, data):
            told.data = File(data)
            wait_until(lambda: has_cache_lease(told.edge))
            yield told
    finally:
        server.shutdown()
        thread.join()
