"""A collector of OpenTelemetry: receives spans as OTLP over HTTP, in JSON and in protobuf, and keeps them."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    service: str
    trace: str
    id: str
    parent: str
    """Empty for the first span of a trace."""

    name: str
    attributes: dict[str, str]
    began: int
    """Nanoseconds, as `ended`."""

    ended: int
    status: dict[str, Any]


class Collector:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []

    def trace(self, trace: str) -> list[Span]:
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.began)

    def of_request(self, request_id: str) -> list[Span]:
        """Return the spans of the trace to which the request with this X-Request-Id belongs."""
        traces = {span.trace for span in self.spans if span.attributes.get("velikiy.request_id") == request_id}
        return self.trace(traces.pop()) if traces else []


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            is_json = self.headers["Content-Type"] == "application/json"
            collector.spans += _of_json(json.loads(body)) if is_json else _of_protobuf(body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _of_json(message: dict[str, Any]) -> Iterator[Span]:
    for resource in message["resourceSpans"]:
        service = _attributes(resource["resource"])["service.name"]
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                yield Span(
                    service,
                    span["traceId"],
                    span["spanId"],
                    span.get("parentSpanId", ""),
                    span["name"],
                    _attributes(span),
                    int(span["startTimeUnixNano"]),
                    int(span["endTimeUnixNano"]),
                    span.get("status", {}),
                )


def _of_protobuf(body: bytes) -> Iterator[Span]:
    for span in _of_json(MessageToDict(ExportTraceServiceRequest.FromString(body))):
        # Protobuf's own JSON has bytes in base64.
        trace, own, parent = (base64.b64decode(it).hex() for it in (span.trace, span.id, span.parent))
        yield span._replace(trace=trace, id=own, parent=parent)


def _attributes(holder: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: str(next(iter(each["value"].values()))) for each in holder.get("attributes", [])}
