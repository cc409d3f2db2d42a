"""The edge chooses the requests that are traced, and reports its spans."""

import os
import re

import pytest
import requests

from testkit.collector import collecting
from testkit.fake_app import FakeApp, fake_app, refused_by_edge
from testkit.inside import control_listener
from testkit.metrics import Scrape
from testkit.stack import wait_until

PARENT = "b7ad6b7169203331"
LEASE = "2400 - rows:row"
NOBODY = "http://127.0.0.1:9"


def fresh_trace() -> str:
    return os.urandom(16).hex()


def sent_to_the_app(app: FakeApp, path: str, traceparent: str | None) -> str:
    """Send a request with this Traceparent, and return the one that the app receives."""
    requests.get(app.edge + path, headers={"traceparent": traceparent} if traceparent else {}, timeout=5)
    return app.received[-1].headers.get("traceparent", "")


def test_client_cannot_ask_for_a_trace() -> None:
    trace = fresh_trace()
    with fake_app(TRACES_URL=NOBODY, TRACES_RATIO="0") as app:
        assert sent_to_the_app(app, "/rows/1", f"00-{trace}-{PARENT}-01") == f"00-{trace}-{PARENT}-00"
        assert sent_to_the_app(app, "/rows/2", None) == ""
        assert sent_to_the_app(app, "/rows/3", "alice@example.com") == "?"


def test_trusted_proxy_asks_for_a_trace() -> None:
    asked, declined = fresh_trace(), fresh_trace()
    with collecting() as collector:
        with fake_app(LEASE, TRACES_URL=collector.url, TRACES_RATIO="0", TRUSTED_PROXIES="127.0.0.1") as app:
            own = sent_to_the_app(app, "/rows/1", f"00-{asked}-{PARENT}-01")
            assert re.fullmatch(f"00-{asked}-[0-9a-f]{{16}}-01", own)
            assert sent_to_the_app(app, "/rows/2", f"00-{declined}-{PARENT}-00") == f"00-{declined}-{PARENT}-00"
            wait_until(lambda: collector.trace(asked))
        [span] = collector.trace(asked)
        assert (span.id, span.parent, span.name) == (own[36:52], PARENT, "GET /rows/{id}")
        assert not collector.trace(declined)


def test_share_of_the_requests_is_traced_and_each_has_ids_of_its_own() -> None:
    with collecting() as collector, fake_app(TRACES_URL=collector.url, TRACES_RATIO="0.5", EDGE_WORKERS="2") as app:
        with requests.Session() as client:
            for _ in range(200):
                client.get(f"{app.edge}/rows/1", timeout=5)
        traced = [line.headers["traceparent"] for line in app.received if "traceparent" in line.headers]
        wait_until(lambda: collector.spans)
        wait_until(lambda: len(collector.spans) + lost(app) >= 60)
        assert len({span.trace for span in collector.spans}) == len(collector.spans)
        assert len({span.id for span in collector.spans}) == len(collector.spans)
        assert len(collector.spans) <= 140
        assert {parent[3:35] for parent in traced} <= {span.trace for span in collector.spans}


def lost(app: FakeApp) -> float:
    return Scrape(f"{control_listener(app.edge)}/metrics").value("velikiy_edge_lost_spans_total")


def test_collector_that_is_away_costs_spans_and_no_request() -> None:
    with fake_app(TRACES_URL=NOBODY, TRACES_RATIO="1") as app:
        for _ in range(3):
            assert requests.get(f"{app.edge}/rows/1", timeout=5).status_code == 200
        wait_until(lambda: lost(app) == 3)


def test_without_a_collector_the_header_of_a_client_stays_as_it_is() -> None:
    trace = fresh_trace()
    with fake_app() as app:
        assert sent_to_the_app(app, "/rows/1", f"00-{trace}-{PARENT}-01") == f"00-{trace}-{PARENT}-01"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("TRACES_URL", "https://127.0.0.1:4318"),
        ("TRACES_URL", "127.0.0.1:4318"),
        ("TRACES_URL", "http://collector:4318/v1/traces"),
        ("TRACES_URL", "http://collector;:4318"),
        ("TRACES_RATIO", "2"),
        ("TRACES_RATIO", "1%"),
    ],
)
def test_edge_refuses_a_setting_of_traces_that_it_cannot_use(setting: str, value: str) -> None:
    message = refused_by_edge(**{"TRACES_URL": NOBODY, setting: value})
    assert f"edge: {setting}='{value}' is not allowed" in message
