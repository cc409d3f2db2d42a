"""An edge in front of an app that responds as a test wants, and records the requests: for what Nginx does by itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from werkzeug import Request, Response
from werkzeug.serving import make_server

from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, wait_until


def cacheable(request: Request, status: int = 200, body: bytes = b'{"id":7}', **headers: str) -> Response:
    """Return a response that passed the gate, so the edge may store it."""
    return uncacheable(request, status, body, Cache_Status="redis; hit", **headers)


def uncacheable(request: Request, status: int = 200, body: bytes = b"{}", **headers: str) -> Response:
    """Return a response that the edge must not store. A header is spelled as a keyword."""
    media_type = "application/json" if status < 400 else "application/problem+json"
    response = Response(body, status, content_type=media_type)
    response.headers["X-Request-Id"] = request.headers.get("X-Request-Id", "")
    response.headers["Cache-Control"] = "private, no-cache"
    for name, value in headers.items():
        response.headers[name.replace("_", "-")] = value
    return response


@dataclass
class FakeApp:
    edge: str = ""
    data: Path = Path()
    """The folder of the edge."""
    respond: Callable[[Request], Response] = cacheable
    grants_leases: bool = True
    lease: str = "2400"
    received: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Each request: its line, its headers by their names in lower case, its body."""

    def __call__(self, request: Request) -> Response:
        if request.path.startswith("/.lease/"):
            return Response(self.lease, 200 if self.grants_leases else 503)
        headers = {name.lower(): value for name, value in request.headers.items() if value}
        self.received.append((f"{request.method} {request.environ['REQUEST_URI']}", headers, request.get_data()))
        return self.respond(request)

    def log(self) -> str:
        return (self.data / "log").read_text()


@contextmanager
def fake_app(lease: str = "2400", home: Path = ROOT / "edge", **settings: str) -> Iterator[FakeApp]:
    """Start the app and its edge. `home`: the code of the edge; `settings`: the environment of the edge."""
    app = FakeApp(lease=lease)
    server = make_server("127.0.0.1", 0, Request.application(app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with running_edge(f"127.0.0.1:{server.port}", home, **settings) as (app.edge, data):
            app.data = Path(data)
            wait_until(lambda: has_cache_lease(app.edge))
            yield app
    finally:
        server.shutdown()
        thread.join()
