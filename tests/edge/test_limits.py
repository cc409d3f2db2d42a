"""Limits of an edge for each client: requests by time, requests in progress, and unfinished bodies."""

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from werkzeug import Request, Response

from testkit.fake_app import FakeApp, fake_app, plain, refused_by_edge, storable
from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import wait_until
from velikiy.http.edge_config import MAX_BATCHES
from velikiy.keys import tokens

LIMIT = 200
WINDOW = 3600

ROW = "/rows/1"


@pytest.fixture(scope="module")
def limited() -> Iterator[FakeApp]:
    """An edge with three workers for clients. Clients have the addresses that a trusted proxy names."""
    limits: Any = {"RATE_REQUESTS": str(LIMIT), "RATE_WINDOW": str(WINDOW)}
    with fake_app(TRUSTED_PROXIES="127.0.0.1", EDGE_WORKERS="3", EDGE_TTL="60", **limits) as app:
        yield app


_numbers = count(1)


@pytest.fixture
def client() -> str:
    """An address that no other test uses."""
    return f"198.51.100.{next(_numbers)}"


def get(app: FakeApp, client: str, path: str = ROW) -> requests.Response:
    return requests.get(app.edge + path, headers={"X-Forwarded-For": client}, timeout=10)


def send_many(app: FakeApp, client: str, number: int) -> Counter[int]:
    """Send requests over several connections, and count the statuses."""

    def send(count: int) -> Counter[int]:
        with requests.Session() as session:
            session.headers["X-Forwarded-For"] = client
            return Counter(session.get(app.edge + ROW, timeout=10).status_code for _ in range(count))

    with ThreadPoolExecutor(10) as threads:
        return sum(threads.map(send, [number // 10] * 10), Counter())


def test_limit_is_exact_across_the_workers(limited: FakeApp, client: str) -> None:
    assert send_many(limited, client, LIMIT + 100) == {200: LIMIT, 429: 100}


def test_request_above_the_limit_is_a_problem_that_says_when_to_retry(limited: FakeApp, client: str) -> None:
    send_many(limited, client, LIMIT)
    refused = send_request(limited.edge, "GET", ROW, b"X-Forwarded-For: %b\r\n" % client.encode())
    check_raw_problem(refused, 429)
    assert refused.json["type"] == "/problems/too-many-requests"
    assert WINDOW - 60 < int(refused.headers["retry-after"]) <= WINDOW
    assert refused.headers["ratelimit-policy"] == f'"client";q={LIMIT};w={WINDOW}'
    assert refused.headers["ratelimit"] == f'"client";r=0;t={refused.headers["retry-after"]}'


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ROW), ("GET", "/rows?q=a"), ("PUT", ROW), ("POST", "/rows/batch"), ("OPTIONS", ROW), ("GET", "/.other")],
)
def test_each_kind_of_request_counts(limited: FakeApp, client: str, method: str, path: str) -> None:
    send_many(limited, client, LIMIT - 10)
    headers = {"X-Forwarded-For": client}
    responses = [requests.request(method, limited.edge + path, headers=headers, timeout=10) for _ in range(11)]
    assert [response.status_code == 429 for response in responses] == [*[False] * 10, True]
    left = [int(re.fullmatch(r'"client";r=(\d+);t=\d+', response.headers["RateLimit"])[1]) for response in responses]  # type: ignore[index]
    assert left == [*range(9, -1, -1), 0]


def test_hit_counts_and_shows_what_is_left(limited: FakeApp, client: str) -> None:
    get(limited, client)
    hit = get(limited, client)
    assert hit.headers["X-Cache-Status"] == "HIT"
    assert hit.headers["RateLimit"].startswith(f'"client";r={LIMIT - 2};t=')


def test_other_clients_are_served_while_one_is_refused(limited: FakeApp, client: str) -> None:
    send_many(limited, client, LIMIT + 10)
    assert get(limited, client).status_code == 429
    assert get(limited, "203.0.113.1").status_code == 200


def test_clients_with_ipv6_count_by_their_network(limited: FakeApp) -> None:
    send_many(limited, "2001:db8:1:2::3", LIMIT)
    assert get(limited, "2001:db8:1:2:ffff::4").status_code == 429
    assert get(limited, "2001:db8:1:3::3").status_code == 200


def test_ipv4_addresses_in_ipv6_are_clients_of_their_own(limited: FakeApp, client: str) -> None:
    send_many(limited, client, LIMIT)
    assert get(limited, f"::ffff:{client}").status_code == 429
    assert get(limited, "::ffff:203.0.113.2").status_code == 200


def test_made_up_address_of_a_client_does_not_count() -> None:
    with fake_app(RATE_REQUESTS=str(LIMIT), RATE_WINDOW=str(WINDOW)) as app:
        send_many(app, "203.0.113.1", LIMIT)
        assert get(app, "203.0.113.2").status_code == 429


def test_client_is_served_again_in_the_next_window(client: str) -> None:
    with fake_app(TRUSTED_PROXIES="127.0.0.1", RATE_REQUESTS="50", RATE_WINDOW="1") as app:
        wait_until(lambda: get(app, client).status_code == 429, every=0)
        wait_until(lambda: get(app, client).status_code == 200, within=5)


def test_loopback_clients_have_no_limits_by_default() -> None:
    with fake_app() as app:
        response = get(app, "127.0.0.1")
        assert "RateLimit" not in response.headers
        assert "RateLimit-Policy" not in response.headers


def test_published_edge_limits_by_default_and_zero_switches_that_off() -> None:
    with fake_app(BIND="0.0.0.0", AUTH="off") as app:
        assert get(app, "127.0.0.1").headers["RateLimit-Policy"] == '"client";q=500;w=1'
    with fake_app(BIND="0.0.0.0", AUTH="off", RATE_REQUESTS="0", RATE_CONNECTIONS="0") as app:
        assert "RateLimit-Policy" not in get(app, "127.0.0.1").headers


class Keys:
    """The API keys that a fake app knows."""

    def __init__(self, number: int) -> None:
        self.tokens = [tokens.new() for _ in range(number)]
        self.checks = 0
        self._paths = {f"/.keys/{tokens.digest(token)}" for token in self.tokens}

    def respond(self, request: Request) -> Response:
        if not request.path.startswith("/.keys/"):
            return storable(request)
        self.checks += 1
        if request.path not in self._paths:
            return plain(request, 404)
        return storable(request, body=b"write never 7 client")


@contextmanager
def keyed(auth: str, number: int = 2) -> Iterator[tuple[FakeApp, Keys]]:
    keys = Keys(number)
    limits: Any = {"RATE_REQUESTS": str(LIMIT), "RATE_WINDOW": str(WINDOW)}
    with fake_app(AUTH=auth, TRUSTED_PROXIES="127.0.0.1", EDGE_WORKERS="3", EDGE_TTL="60", **limits) as app:
        app.respond = keys.respond
        yield app, keys


@pytest.fixture(scope="module")
def all_keyed() -> Iterator[tuple[FakeApp, Keys]]:
    with keyed("all", 6) as started:
        yield started


def send_with_key(app: FakeApp, token: str, clients: list[str], number: int, method: str = "GET") -> Counter[int]:
    """Send requests from these addresses in turn, each over connections of its own, and count the statuses."""

    def send(thread: int) -> Counter[int]:
        with requests.Session() as session:
            session.headers["Authorization"] = f"Bearer {token}"
            session.headers["X-Forwarded-For"] = clients[thread % len(clients)]
            url = app.edge + ROW
            return Counter(session.request(method, url, json={}, timeout=10).status_code for _ in range(number // 10))

    with ThreadPoolExecutor(10) as threads:
        return sum(threads.map(send, range(10)), Counter())


def test_key_has_one_limit_whatever_its_address_is_and_leaves_the_address_alone(
    all_keyed: tuple[FakeApp, Keys],
) -> None:
    app, keys = all_keyed
    addresses = ["192.0.2.1", "192.0.2.2"]
    assert send_with_key(app, keys.tokens[0], addresses, LIMIT + 100) == {200: LIMIT, 429: 100}
    assert send_with_key(app, keys.tokens[1], addresses, LIMIT + 100) == {200: LIMIT, 429: 100}
    assert send_with_key(app, keys.tokens[2], addresses, LIMIT + 100, "PUT") == {200: LIMIT, 429: 100}
    assert get(app, addresses[0]).headers["RateLimit"].startswith(f'"client";r={LIMIT - 1};')


def test_made_up_keys_count_for_the_address_and_not_for_the_keys_at_it(all_keyed: tuple[FakeApp, Keys]) -> None:
    app, keys = all_keyed
    assert send_with_key(app, keys.tokens[3], ["192.0.2.3"], 10) == {200: 10}
    checks = keys.checks
    for method in ("GET", "OPTIONS"):
        assert send_with_key(app, tokens.new(), ["192.0.2.3"], LIMIT // 2, method)[429] == 0
    assert send_with_key(app, tokens.new(), ["192.0.2.3"], LIMIT) == {429: LIMIT}
    assert get(app, "192.0.2.3").status_code == 429
    assert send_with_key(app, keys.tokens[3], ["192.0.2.3"], LIMIT - 10) == {200: LIMIT - 10}
    assert keys.checks <= checks + LIMIT  # strangers do not make an edge check without end


def test_key_that_is_not_in_memory_is_checked_although_its_address_is_used_up(
    all_keyed: tuple[FakeApp, Keys],
) -> None:
    app, keys = all_keyed
    send_many(app, "192.0.2.4", LIMIT + 10)
    assert get(app, "192.0.2.4").status_code == 429
    assert send_with_key(app, keys.tokens[4], ["192.0.2.4"], 10) == {200: 10}


def test_refused_key_is_a_problem_that_says_when_to_retry(all_keyed: tuple[FakeApp, Keys]) -> None:
    app, keys = all_keyed
    header = b"Authorization: Bearer %b\r\nX-Forwarded-For: 192.0.2.5\r\n" % keys.tokens[5].encode()
    assert send_with_key(app, keys.tokens[5], ["192.0.2.5"], LIMIT) == {200: LIMIT}
    for method, path in (("GET", ROW), ("PUT", ROW), ("GET", "/rows?q=a"), ("GET", "/readyz"), ("POST", "/rows/batch")):
        refused = send_request(app.edge, method, path, header)
        check_raw_problem(refused, 429)
        assert WINDOW - 60 < int(refused.headers["retry-after"]) <= WINDOW
        assert refused.headers["ratelimit"] == f'"client";r=0;t={refused.headers["retry-after"]}'


def test_keys_have_limits_of_their_own_while_only_writes_need_them() -> None:
    with keyed("writes") as (app, keys):
        clients = ["192.0.2.1"]
        assert send_with_key(app, keys.tokens[0], clients, LIMIT, "PUT") == {200: LIMIT}
        assert send_with_key(app, keys.tokens[0], clients, 10) == {429: 10}
        assert send_with_key(app, keys.tokens[1], clients, LIMIT + 10) == {200: LIMIT, 429: 10}
        assert send_many(app, clients[0], LIMIT + 10) == {200: LIMIT, 429: 10}


@pytest.mark.parametrize("name", ["RATE_REQUESTS", "RATE_WINDOW", "RATE_CONNECTIONS"])
@pytest.mark.parametrize("value", ["-1", "many", "1.5", "1;", "100000"])
def test_bad_limit_is_refused_by_name(name: str, value: str) -> None:
    assert f"{name}='{value}' is not allowed" in refused_by_edge(**{name: value})


@contextmanager
def unfinished(app: FakeApp, number: int, path: str, client: str, sent: int = 1) -> Iterator[list[socket.socket]]:
    """Send the beginning of so many bodies, each over a connection of its own."""
    address = urlsplit(app.edge)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {client}\r\n"
        "Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n"
    )
    with ExitStack() as stack:
        clients = []
        for _ in range(number):
            connection = stack.enter_context(socket.create_connection((address.hostname or "", address.port or 80), 10))
            connection.sendall(head.encode() + b" " * sent)
            clients.append(connection)
        yield clients


def post(app: FakeApp, client: str, path: str) -> int:
    return requests.post(app.edge + path, json={}, headers={"X-Forwarded-For": client}, timeout=10).status_code


def test_requests_in_progress_are_limited_for_each_client_and_hits_are_not(client: str) -> None:
    going_on, released = Event(), Event()

    def respond(request: Request) -> Response:
        if request.path == "/slow":
            going_on.set()
            released.wait(20)
        return storable(request)

    with fake_app(TRUSTED_PROXIES="127.0.0.1", RATE_CONNECTIONS="2", EDGE_TTL="60") as app:
        app.respond = respond
        assert get(app, client).status_code == 200
        with ThreadPoolExecutor() as threads, unfinished(app, 1, "/rows", client):
            slow = threads.submit(get, app, client, "/slow")
            assert going_on.wait(20)
            wait_until(lambda: get(app, client, "/rows/2").status_code == 429)
            refused = send_request(app.edge, "POST", "/rows", b"X-Forwarded-For: %b\r\n" % client.encode(), b"{}")
            check_raw_problem(refused, 429)
            assert refused.headers["retry-after"] == "1"
            assert get(app, client).headers["X-Cache-Status"] == "HIT"
            assert get(app, "203.0.113.3", "/rows/2").status_code == 200
            released.set()
            assert slow.result().status_code == 200
        wait_until(lambda: get(app, client, "/rows/3").status_code == 200)


def half_request(app: FakeApp, source: str) -> socket.socket:
    address = urlsplit(app.edge)
    client = socket.create_connection((address.hostname or "", address.port or 80), 10, source_address=(source, 0))
    client.sendall(b"GET /rows/1 HTTP/1.1\r\nHost: localhost\r\nX-Half: ")
    return client


def is_ended(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_open_connections_of_one_client_are_limited_also_without_a_request() -> None:
    with fake_app(RATE_CONNECTIONS="2") as app, ExitStack() as stack:
        crowd = [stack.enter_context(half_request(app, "127.0.0.2")) for _ in range(60)]
        other = stack.enter_context(half_request(app, "127.0.0.3"))
        began = time.monotonic()
        wait_until(lambda: sum(map(is_ended, crowd)) == 40, within=8)  # sooner than the header has to arrive
        assert time.monotonic() - began < 8
        assert not is_ended(other)
        assert get(app, "127.0.0.1").status_code == 200


def test_unfinished_batches_are_limited_and_do_not_stop_other_writes(client: str) -> None:
    with fake_app(TRUSTED_PROXIES="127.0.0.1") as app:
        with unfinished(app, MAX_BATCHES, "/rows/batch", client):
            wait_until(lambda: post(app, "203.0.113.4", "/rows/batch") == 429)
            refused = send_request(app.edge, "POST", "/rows/batch", body=b" " * 2_000_000)
            check_raw_problem(refused, 429)
            assert refused.headers["retry-after"] == "1"
            assert post(app, "203.0.113.4", "/rows") == 200
        wait_until(lambda: post(app, "203.0.113.4", "/rows/batch") == 200)


def test_unfinished_batches_of_one_client_leave_room_for_others(client: str) -> None:
    with (
        fake_app(TRUSTED_PROXIES="127.0.0.1", RATE_CONNECTIONS="100") as app,
        unfinished(app, MAX_BATCHES, "/rows/batch", client),
    ):
        wait_until(lambda: post(app, client, "/rows/batch") == 429)
        assert post(app, "203.0.113.5", "/rows/batch") == 200
