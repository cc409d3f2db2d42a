"""Traces: what a request did in this app, reported to a collector of OpenTelemetry.

The edge chooses the requests that are traced, and says so in the header Traceparent (edge/lua/traces.lua). For all
other requests nothing is recorded. Without TRACES_URL not even the library is imported: it would take 15 MB.

A span carries names, statements without their values, and numbers. It carries no value of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

QUEUE = 512
"""Spans that wait for the next report. Further ones are lost."""

INTERVAL_MS = 1000
TIMEOUT_S = 2.0

_tracer: Tracer | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def start(url: str) -> None:
    """Begin to report spans to the collector at this URL, in the background. Call it after fork: threads do not
    survive a fork."""
    global _tracer
    if not url:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    provider = TracerProvider(ParentBased(ALWAYS_OFF), Resource.create({"service.name": "velikiy-app"}))
    exporter = OTLPSpanExporter(f"{url}/v1/traces", timeout=TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, QUEUE, INTERVAL_MS, QUEUE))
    _tracer = provider.get_tracer("velikiy")


class Request:
    """The span of a request. Until `end`, the spans of this thread are below it."""

    def __init__(self, span: Span) -> None:
        from opentelemetry import context, trace

        self._span = span
        self._token = context.attach(trace.set_span_in_context(span))

    def end(self, method: str, route: str, status: int, *, tier: str, request_id: str) -> None:
        from opentelemetry import context
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "velikiy.tier": tier,
                "velikiy.request_id": request_id,
            }
        )
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
        context.detach(self._token)


def begin_request(traceparent: str | None) -> Request | None:
    """Begin the span of a request; None if the edge has not chosen it.

    Args:
        traceparent: The header of the request (https://www.w3.org/TR/trace-context/).
    """
    if _tracer is None or not traceparent:
        return None
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    edge = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    span = _tracer.start_span("request", edge, SpanKind.SERVER)
    return Request(span) if span.is_recording() else None


Attributes = Mapping[str, str | int]
"""Names as in https://opentelemetry.io/docs/specs/semconv/ where it has one."""


def span(name: str, attributes: Callable[[], Attributes]) -> AbstractContextManager[None]:
    """Trace the block as a part of this thread's request, if that is traced."""
    return _NOTHING if _tracer is None else _traced(_tracer, name, attributes)


@contextmanager
def _traced(tracer: Tracer, name: str, attributes: Callable[[], Attributes]) -> Iterator[None]:
    from opentelemetry import trace

    if not trace.get_current_span().is_recording():
        yield
        return
    # The message of an exception may quote a row, so the span gets no more than its name.
    with tracer.start_as_current_span(
        name,
        kind=trace.SpanKind.CLIENT,
        attributes=attributes(),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except BaseException as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
