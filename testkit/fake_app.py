"""An edge in front of an app whose responses a test chooses, for what Nginx does by itself."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from werkzeug import Request, Response
from werkzeug.serving import make_server

from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import EDGE_SECRET, ROOT, clean_environment, folder, free_ports, wait_until
from velikiy.signatures import HEADER, Signer


def storable(request: Request, status: int = 200, body: bytes = b'{"id":7}', **headers: str) -> Response:
    """Return a response that the edge may store: it has passed the gate, so it has a Cache-Status."""
    return plain(request, status, body, Cache_Status="redis; hit", **headers)


def plain(request: Request, status: int = 200, body: bytes = b"{}", **headers: str) -> Response:
    """Return a response that the edge must not store. A header is spelled as a keyword."""
    kind = "application/json" if status < 400 else "application/problem+json"
    response = Response(body, status, content_type=kind)
    response.headers["X-Request-Id"] = request.headers.get("X-Request-Id", "")
    response.headers["Cache-Control"] = "private, no-cache"
    for name, value in headers.items():
        response.headers[name.replace("_", "-")] = value
    return response


class ReceivedRequest(NamedTuple):
    line: str
    """Method and target."""

    headers: dict[str, str]
    """Values by header name, in lower case."""

    body: bytes


@dataclass
class FakeApp:
    edge: str = ""
    """The address of the edge."""

    data: Path = Path()
    """The edge's folder."""

    respond: Callable[[Request], Response] = storable
    grants_leases: bool = True
    lease: str = "2400"
    """The body of each cache lease (velikiy/http/edge_leases.py)."""

    received: list[ReceivedRequest] = field(default_factory=list)
    """Requests of clients, in order."""

    def __call__(self, request: Request) -> Response:
        if request.path.startswith("/.lease/"):
            return self._lease(request)
        headers = {name.lower(): value for name, value in request.headers.items() if value}
        line = f"{request.method} {request.environ['REQUEST_URI']}"
        self.received.append(ReceivedRequest(line, headers, request.get_data()))
        return self.respond(request)

    def _lease(self, request: Request) -> Response:
        signer = Signer(EDGE_SECRET)
        mac = signer.request_mac(request.headers[HEADER], "POST", request.path, body=request.get_data(as_text=True))
        assert mac
        status = 200 if self.grants_leases else 503
        return Response(self.lease, status, {HEADER: signer.response_mac(mac, status, self.lease)})

    def log(self) -> str:
        """Return the log of the edge."""
        return (self.data / "log").read_text()


@contextmanager
def fake_app(lease: str = "2400", home: Path = ROOT / "edge", instances: int = 1, **settings: str) -> Iterator[FakeApp]:
    """Run a fake app and an edge with these settings in front of it.

    Args:
        lease: The body of each cache lease.
        home: The edge's code.
        instances: The ports at which the app listens. The edge takes each for an app of its own.
    """
    app = FakeApp(lease=lease)
    servers = [make_server("127.0.0.1", 0, Request.application(app), threaded=True) for _ in range(instances)]
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        addresses = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        with running_edge(addresses, home, **settings) as (app.edge, data):
            app.data = Path(data)
            wait_until(lambda: has_cache_lease(app.edge))
            yield app
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()


def refused_by_edge(**settings: str) -> str:
    """Return the message with which an edge refuses to start with these settings."""
    with folder() as data:
        ports = free_ports(2)
        listen = {"EDGE_LISTEN": f"127.0.0.1:{ports}", "EDGE_CONTROL": f"127.0.0.1:{ports + 1}"}
        started = subprocess.run(
            [str(ROOT / "edge/start")],
            env=clean_environment(EDGE_DATA=str(data), EDGE_APPS="127.0.0.1:1", **listen, **settings),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert started.returncode != 0
        return started.stderr
