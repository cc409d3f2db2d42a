"""The page Prove it: the experiment through two edges, with and without keys."""

import hashlib
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import requests
from playwright.sync_api import Page, expect

from testkit.browser import Visit, serious_findings
from testkit.stack import Stack, wait_until

Keyed = tuple[Stack, str]
Open = Callable[..., Visit]

SECONDS = 5


def experiments(stack: Stack) -> list[int]:
    """Return the ids of the rows that experiments have made and not deleted."""
    return [row_id for (row_id,) in stack.sql("SELECT id FROM users WHERE email LIKE %s", "prove-it-%")]


def number_in(page: Page, card: str) -> int:
    return int(re.sub(r"\D", "", page.locator(f"#prove-{card} .prove-number").inner_text()))


def perform(page: Page) -> None:
    page.get_by_role("button", name="Write and read").click()
    expect(page.get_by_role("button", name="Run it again")).to_be_visible(timeout=(SECONDS + 10) * 1000)


class TestExperiment:
    def test_shows_no_stale_answer_of_this_service_and_those_of_the_usual_design(
        self, keyed_edges: Keyed, open_with_key: Open
    ) -> None:
        stack, key = keyed_edges
        ask = partial(
            requests.get, f"{stack.edge}/console/edges", headers={"Authorization": f"Bearer {key}"}, timeout=5
        )
        wait_until(lambda: len(ask().json()["edges"]) == 2)  # the relay has reached both edges
        visit = open_with_key(f"{stack.edge}/#/prove?seconds={SECONDS}", key)
        page = visit.page
        expect(page.get_by_text("Reads go through 2 edges.")).to_be_visible()
        perform(page)
        assert number_in(page, "velikiy") == 0
        assert number_in(page, "aside") > 10
        assert number_in(page, "writes") >= 3
        expect(page.locator("#prove-verdict")).to_contain_text("reads were current")
        expect(page.locator("#prove-verdict")).not_to_contain_text("no answer")
        assert page.locator(".prove-write").count() > 4
        page.get_by_text("The numbers, by edge").click()
        rows = page.locator(".prove-table tbody tr").all_inner_texts()
        assert len(rows) == 2
        for row in rows:  # through each edge, mostly out of the memory of the edge
            reads, nginx = (int(number) for number in re.findall(r"\t([\d,]+)", row)[:2])
            assert reads > 15
            assert nginx > reads / 2
        assert experiments(stack) == []
        assert serious_findings(page) == []
        assert visit.complaints == []
        assert visit.hosts == {stack.edge.partition("//")[2]}

    def test_needs_no_key_where_the_service_needs_none(self, stack: Stack, open_console: Open) -> None:
        wait_until(lambda: len(requests.get(f"{stack.edge}/console/edges", timeout=5).json()["edges"]) == 2)
        page = open_console(f"{stack.edge}/#/prove?seconds=3").page
        perform(page)
        assert number_in(page, "velikiy") == 0
        assert experiments(stack) == []

    def test_deletes_its_row_when_the_page_is_closed_midway(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/prove?seconds=60", key).page
        page.get_by_role("button", name="Write and read").click()
        expect(page.locator(".prove-frame .prove-read").first).to_be_visible()
        page.close()
        wait_until(lambda: not experiments(stack), within=10)

    def test_deletes_the_row_of_an_earlier_page_that_never_learned_its_id(
        self, keyed_edges: Keyed, open_with_key: Open
    ) -> None:
        stack, key = keyed_edges
        row = {"name": "Prove it, version 1", "email": "prove-it-0123456789ab@example.com"}
        headers = {"Authorization": f"Bearer {key}"}
        assert requests.post(f"{stack.edge}/users", json=row, headers=headers, timeout=5).status_code == 201
        page = open_with_key(f"{stack.edge}/#/users", key).page
        page.evaluate("email => localStorage.setItem('prove-it', email)", row["email"])
        page.goto(f"{stack.edge}/#/prove")
        wait_until(lambda: not experiments(stack))

    def test_says_why_it_cannot_begin(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/prove", key).page
        page.route(
            "**/users", lambda route: route.fulfill(status=503, content_type="application/problem+json", body="{}")
        )
        page.get_by_role("button", name="Write and read").click()
        expect(page.get_by_text("The service cannot answer right now", exact=False)).to_be_visible()

    def test_fits_a_phone(self, keyed_edges: Keyed, open_with_key: Open) -> None:
        stack, key = keyed_edges
        page = open_with_key(f"{stack.edge}/#/prove", key, locale="ru-RU", viewport={"width": 360, "height": 740}).page
        expect(page.get_by_role("button", name="Писать и читать")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


class TestThroughAnotherEdge:
    @pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE"])
    def test_the_edge_answers_reads_only(self, stack: Stack, method: str) -> None:
        for path in ("/console/live", "/console/edges", "/console/through/01234567/users/1"):
            assert requests.request(method, f"{stack.edge}{path}", timeout=5).status_code in (204, 404, 405)

    @pytest.mark.parametrize(
        ("address", "status"),
        [
            ("01234567/users/1", 404),  # no such edge
            ("127.0.0.1:80/users/1", 404),
            ("{edge}/users", 404),  # one row only
            ("{edge}/users/1?limit=1", 404),
            ("{edge}/.keys/abc", 404),
            ("{edge}/metrics/1", 404),
        ],
    )
    def test_passes_on_reads_of_rows_to_registered_edges_only(self, stack: Stack, address: str, status: int) -> None:
        edge = requests.get(f"{stack.edge}/console/edges", timeout=5).json()["edges"][1]["id"]
        answer = requests.get(f"{stack.edge}/console/through/{address.format(edge=edge)}", timeout=5)
        assert answer.status_code == status

    def test_reads_as_the_other_edge_does(self, stack: Stack, new_user: dict[str, str]) -> None:
        known = requests.get(f"{stack.edge}/console/edges", timeout=5).json()
        other = next(it["id"] for it in known["edges"] if it["id"] != known["this"])
        through = f"{stack.edge}/console/through/{other}/users/{new_user['id']}"
        requests.get(through, timeout=5)
        answer = requests.get(through, timeout=5)
        assert answer.headers["X-Cache-Status"] == "HIT"
        assert answer.json()["email"] == new_user["email"]
        direct = requests.get(f"{stack.edges[1]}/users/{new_user['id']}", timeout=5)
        assert direct.headers["X-Cache-Status"] == "HIT"
        assert direct.headers["ETag"] == answer.headers["ETag"]

    def test_sends_no_key_to_a_program_on_the_port_of_an_edge_that_has_ended(self, keyed_edges: Keyed) -> None:
        stack, key = keyed_edges
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port, received = stranger.getsockname()[1], []

            def listen() -> None:
                with suppress(OSError):
                    while True:
                        connection, _ = stranger.accept()
                        with connection:
                            received.append(connection.recv(65536))
                            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

            threading.Thread(target=listen, daemon=True).start()
            name = f"gone/1@127.0.0.1:{port}"
            add = "INSERT INTO caches (name, kind, address, epoch, excluded) VALUES (%s, 'edge', %s, '1', true)"
            stack.sql(add, name, name.partition("@")[2])
            digest = hashlib.sha256(b"gone/1").hexdigest()[:8]
            through = f"{stack.edge}/console/through/{digest}/users/1"
            get = partial(requests.get, through, headers={"Authorization": f"Bearer {key}"}, timeout=5)
            wait_until(lambda: get().status_code == 502, within=20)
            stack.sql("DELETE FROM caches WHERE name = %s", name)
            stranger.shutdown(socket.SHUT_RDWR)
        asked = [request for request in received if request.startswith(b"GET /through")]
        assert asked
        assert not any(key.encode() in request for request in received)
