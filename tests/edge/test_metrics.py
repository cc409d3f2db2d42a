"""The metrics of one edge, at its control listener."""

import pytest
import requests
from werkzeug import Request, Response

from testkit.fake_app import FakeApp, fake_app, plain, refused_by_edge, storable
from testkit.inside import control_listener
from testkit.metrics import Scrape
from testkit.stack import status_of, wait_until

LEASE = "2400 - users:user"
REQUESTS = "velikiy_edge_requests_total"
DURATION = "velikiy_edge_request_duration_seconds"


def metrics(app: FakeApp) -> Scrape:
    return Scrape(f"{control_listener(app.edge)}/metrics")


def get(app: FakeApp, path: str, times: int = 1) -> None:
    for _ in range(times):
        requests.get(app.edge + path, timeout=5)


def respond(request: Request) -> Response:
    if request.method != "GET":
        return plain(request, 201)
    if request.path.startswith("/users/5"):
        return plain(request, 503)
    return plain(request, 404) if "nobody" in request.path else storable(request)


def test_requests_are_counted_by_route_status_cache_and_tier() -> None:
    with fake_app(LEASE) as app:
        app.respond = respond
        get(app, "/users/7", times=4)
        get(app, "/users?limit=2", times=3)
        get(app, "/users/count", times=2)
        get(app, "/users/50")
        get(app, "/nobody/here@example.com")
        requests.post(f"{app.edge}/users", json={}, timeout=5)
        requests.post(f"{app.edge}/users/batch", json={}, timeout=5)
        requests.get(f"{app.edge}/users/7", headers={"Host": "stranger.example"}, timeout=5)

        def expected() -> bool:
            now = metrics(app)
            return (
                now.value(REQUESTS, route="/users/{id}", cache="hit", tier="edge", method="GET", code="200") == 3
                and now.value(REQUESTS, route="/users/{id}", cache="miss", tier="redis", code="200") == 1
                and now.value(REQUESTS, route="/users", cache="hit") == 2
                and now.value(REQUESTS, route="/users/count", cache="hit") == 1
                and now.value(REQUESTS, route="/users/{id}", code="503", tier="app") == 1
                and now.value(REQUESTS, route="/users/{id}", code="421", tier="edge") == 1
                and now.value(REQUESTS, route="(other)", code="404") == 1
                and now.value(REQUESTS, route="/users", method="POST", code="201", tier="app") == 1
                and now.value(REQUESTS, route="/users/batch", method="POST", code="201", tier="app") == 1
                and now.value(DURATION + "_count", route="/users/{id}", tier="edge") == 4
                and now.value(DURATION + "_count") == now.value(REQUESTS)
                and now.value(DURATION + "_bucket", le="+Inf") == now.value(DURATION + "_count")
            )

        wait_until(expected, within=10, what=str(metrics(app).samples))


def test_lease_memory_and_evictions_are_reported() -> None:
    with fake_app(LEASE, EDGE_MEMORY="4") as app:
        now = metrics(app)
        assert now.value("velikiy_edge_lease_held") == 1
        assert 0 < now.value("velikiy_edge_lease_seconds") <= 2.4
        assert now.value("velikiy_edge_memory_bytes", store="small") == 2 * 1024 * 1024
        app.respond = lambda request: storable(request, body=b'{"text":"%s"}' % (b"x" * 60_000))
        for number in range(1, 40):
            get(app, f"/users/{number}")
        wait_until(lambda: metrics(app).value("velikiy_edge_evictions_total", store="large") > 0, within=10)


def test_edge_without_metrics_counts_nothing_and_does_not_report() -> None:
    with fake_app(LEASE, METRICS="off") as app:
        get(app, "/users/7", times=3)
        assert status_of(f"{control_listener(app.edge)}/metrics") == 404


@pytest.mark.parametrize("path", ["/metrics", "/.metrics"])
def test_listener_for_clients_does_not_report(path: str) -> None:
    with fake_app(LEASE) as app:
        app.respond = lambda request: plain(request, 404)
        assert status_of(app.edge + path) == 404


def test_setting_of_another_kind_is_refused() -> None:
    assert "it must be on or off" in refused_by_edge(METRICS="perhaps")
