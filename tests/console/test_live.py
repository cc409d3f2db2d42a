"""The page Live and its stream, on two edges that require keys."""

import json
import re
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import expect

from testkit.browser import Visit, serious_findings
from testkit.outages import refusing
from testkit.stack import Stack, status_of, wait_until
from tests.console.live import DROPS, DROPS_P50, NGINX, NGINX_P50, OUTSIDE, WRITE, events
from velikiy.relay.live import SAMPLE_S, _quantile

Keyed = tuple[Stack, str]
Open = Callable[..., Visit]

READS, WRITES = 400, 8

SLOW_MS = 30_000
"""A state passes the janitor, a round of the relay, its next round, and the stream: some 6 seconds, and more on a busy
machine."""


@pytest.fixture(scope="module")
def traffic(keyed_edges: Keyed) -> Iterator[str]:
    """Reads through both edges, writes, and a change by SQL. Yield the path of the row."""
    stack, key = keyed_edges
    client = requests.Session()
    client.headers["Authorization"] = f"Bearer {key}"
    row = {"name": "Live", "email": "live@example.com"}
    path = client.post(f"{stack.edge}/users", json=row).headers["Location"]
    next(iter(events(stack.edge, key)))  # what was counted before the first sample does not count
    wait_until(lambda: next(iter(events(stack.edge, key)))["samples"], what="a first sample")
    for n in range(READS):
        assert client.get(f"{stack.edges[n % 2]}{path}").status_code == 200
    for n in range(WRITES):
        assert client.put(f"{stack.edge}{path}", json={**row, "name": f"Live {n}"}).status_code < 300
    stack.sql("UPDATE users SET name = 'by SQL' WHERE email = 'live@example.com'")
    yield path
    client.delete(f"{stack.edge}{path}")


class TestStream:
    def test_adds_up_both_edges_writes_drops_and_sql_from_outside(self, keyed_edges: Keyed, traffic: str) -> None:
        stack, key = keyed_edges
        total, p50s, drops = [0.0] * 22, [], []
        for event in events(stack.edges[1], key):
            for sample in event["samples"]:
                total = [so_far + (value or 0) * SAMPLE_S for so_far, value in zip(total, sample, strict=True)]
                p50s += [sample[NGINX_P50]] if sample[NGINX_P50] else []
                drops += [sample[DROPS_P50]] if sample[DROPS_P50] else []
            if total[NGINX] >= READS * 0.9 and total[WRITE] >= WRITES and total[OUTSIDE] >= 1:
                break
        assert total[NGINX] <= READS + 20
        assert total[WRITE] == pytest.approx(WRITES, abs=3)  # rates have one decimal
        assert total[DROPS] >= WRITES
        assert p50s
        assert drops
        assert max(p50s) < 100

    def test_shows_the_past_to_a_new_page_and_what_is_new_to_a_page_that_returns(
        self, keyed_edges: Keyed, traffic: str
    ) -> None:
        stack, key = keyed_edges
        first = next(iter(events(stack.edge, key)))
        assert len(first["samples"]) >= 2
        again = next(iter(events(stack.edge, key, last=first["id"])))
        assert len(again["samples"]) <= 2

    def test_names_every_part_with_state_and_memory(self, keyed_edges: Keyed, traffic: str) -> None:
        stack, key = keyed_edges
        state = wait_until(lambda: next(iter(events(stack.edge, key)))["state"])
        kinds = [part["kind"] for part in state["parts"]]
        assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == {
            "app": 1,
            "edge": 2,
            "postgres": 1,
            "redis": 1,
            "relay": 1,
        }
        for part in state["parts"]:
            assert part["answers"], part
            assert part["kind"] == "postgres" or part["memory"] > 1_000_000, part
        assert all(part["lease_ms"] > 0 for part in state["parts"] if part["kind"] == "edge")

    def test_needs_a_key(self, keyed_edges: Keyed) -> None:
        stack, _ = keyed_edges
        for path in ("/console/live", "/console/edges", "/console/through/01234567/users/1"):
            assert status_of(f"{stack.edge}{path}") == 401


class TestPage:
    def test_draws_the_traffic_and_the_parts_without_a_complaint(
        self, keyed_edges: Keyed, traffic: str, open_with_key: Open
    ) -> None:
        stack, key = keyed_edges
        visit = open_with_key(f"{stack.edge}/#/live", key)
        page = visit.page
        expect(page.get_by_text("Live", exact=True).nth(1)).to_be_visible()
        expect(page.locator("tr[data-kind=edge]")).to_have_count(2)
        expect(page.locator(".chart-area.series-nginx")).to_have_attribute("d", re.compile("^M.*L.*Z"))
        page.get_by_text("As a table").first.click()
        expect(page.locator(".chart-rows td").first).to_be_visible()
        assert serious_findings(page) == []
        assert visit.complaints == []
        assert visit.hosts == {stack.edge.partition("//")[2]}

    def test_fits_a_phone_in_russian(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/live", key, locale="ru-RU", viewport={"width": 360, "height": 740}).page
        expect(page.get_by_text("Доля попаданий").first).to_be_visible()
        expect(page.locator("tr[data-kind=redis]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def test_says_what_is_wrong_in_the_sentences_of_status(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/live", key).page
        expect(page.get_by_text("Nothing is wrong.")).to_be_visible(timeout=SLOW_MS)
        with refusing(stack, "redis"):
            sentence = wait_until(lambda: _finding(stack, "redis."))
            expect(page.locator(".live-finding-wrong").get_by_text(sentence)).to_be_visible(timeout=SLOW_MS)
            expect(page.locator("tr[data-kind=redis]")).to_contain_text("does not answer", timeout=SLOW_MS)
        with refusing(stack, "edge2"):
            silent = page.locator(".live-finding-wrong").get_by_text("has not renewed its cache lease", exact=False)
            expect(silent).to_be_visible(timeout=SLOW_MS)
            expect(page.locator("tr[data-kind=edge][data-state=silent]")).to_be_visible(timeout=SLOW_MS)
        expect(page.get_by_text("Nothing is wrong.")).to_be_visible(timeout=SLOW_MS)

    def test_says_that_the_stream_broke_and_reads_on_by_itself(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/live", key).page
        expect(page.locator(".live-pulse-on")).to_be_visible(timeout=SLOW_MS)
        with refusing(stack, "edge1"):
            expect(page.get_by_text("The stream broke", exact=False)).to_be_visible(timeout=SLOW_MS)
        expect(page.locator(".live-pulse-on")).to_be_visible(timeout=SLOW_MS)


def test_quantiles_are_interpolated_as_prometheus_does() -> None:
    counts = [0.0, 0.0, 10.0] + [0.0] * 10
    assert _quantile(counts, 0.5) == 3.75
    assert _quantile([0.0] * 13, 0.5) is None
    assert _quantile([0.0] * 12 + [1.0], 0.99) == 5000


def _finding(stack: Stack, prefix: str) -> str:
    answer = json.loads(requests.get(f"{stack.edges[0]}/readyz", timeout=5).text)
    return next((it["what"] for it in answer.get("findings", []) if it["name"].startswith(prefix)), "")
