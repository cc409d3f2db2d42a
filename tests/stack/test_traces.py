"""Traces: one from the edge to SQL, for a sample of the requests."""

from collections.abc import Iterator

import pytest
import requests

from testkit.collector import Collector, Span, collecting
from testkit.stack import Stack, running, wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Stack]:
    with running("--apps", "1", TRACES_URL=collector.url, TRACES_RATIO="1", REDIS_TTL="60") as stack:
        yield stack


def spans_of(collector: Collector, response: requests.Response, services: set[str]) -> list[Span]:
    """Return the trace of the request, once these services have reported."""
    request_id = response.headers["X-Request-Id"]
    wait_until(lambda: {span.service for span in collector.of_request(request_id)} == services)
    return collector.of_request(request_id)


def test_write_is_one_trace_from_the_edge_to_sql(traced: Stack, collector: Collector) -> None:
    created = requests.post(f"{traced.edge}/users", json={"name": "T", "email": "traced@example.com"}, timeout=5)
    assert created.status_code == 201
    spans = spans_of(collector, created, {"velikiy-edge", "velikiy-app"})
    by_id = {span.id: span for span in spans}
    [root] = [span for span in spans if span.parent not in by_id]
    assert (root.service, root.name, root.parent) == ("velikiy-edge", "POST /users", "")
    assert root.attributes["http.response.status_code"] == "201"
    [app] = [span for span in spans if span.parent == root.id]
    assert (app.service, app.name) == ("velikiy-app", "POST /users")
    below = [span for span in spans if span.parent == app.id]
    statements = "".join(span.attributes.get("db.query.text", "") for span in below if span.name == "PostgreSQL")
    assert 'INSERT INTO "users"' in statements
    assert statements.endswith("COMMIT")
    assert {"PostgreSQL", "Redis", "drop at the edges"} == {span.name for span in below}
    for span in spans:
        assert span.ended >= span.began
        if span.parent in by_id and by_id[span.parent].service == span.service:
            assert by_id[span.parent].began <= span.began <= span.ended <= by_id[span.parent].ended
    assert "traced@example.com" not in str(spans)


def test_hit_is_a_span_of_the_edge_alone(traced: Stack, collector: Collector) -> None:
    requests.get(f"{traced.edge}/users/2", timeout=5)
    hit = requests.get(f"{traced.edge}/users/2", timeout=5)
    assert hit.headers["X-Cache-Status"] == "HIT"
    [span] = spans_of(collector, hit, {"velikiy-edge"})
    assert (span.name, span.attributes["velikiy.cache"]) == ("GET /users/{id}", "HIT")


def test_trace_of_a_client_goes_on_with_its_id(traced: Stack, collector: Collector) -> None:
    response = requests.get(f"{traced.edge}/users/3", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}, timeout=5)
    spans = spans_of(collector, response, {"velikiy-edge", "velikiy-app"})
    assert {span.trace for span in spans} == {TRACE}
    assert [span.parent for span in spans if span.service == "velikiy-edge"] == [PARENT]


def test_failed_request_is_an_error_without_values_of_the_row(traced: Stack, collector: Collector) -> None:
    taken = requests.post(f"{traced.edge}/users", json={"name": "T", "email": "alice@example.com"}, timeout=5)
    assert taken.status_code == 409
    spans = spans_of(collector, taken, {"velikiy-edge", "velikiy-app"})
    assert "UniqueViolation" in [span.status.get("message") for span in spans]
    assert "alice@example.com" not in str(spans)
