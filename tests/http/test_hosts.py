"""A web page that points its own name at the service (DNS rebinding) reads and writes nothing, cached or not."""

from collections.abc import Iterator

import pytest
import requests

from testkit.fake_app import fake_app, refused_by_edge
from testkit.raw_http import RawResponse, check_raw_problem, parse_response, send_bytes
from testkit.stack import Stack, free_ports, refused, running
from velikiy.http.browsers import allowed_hosts


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running("--apps", "1", ALLOWED_HOSTS="users.example, .below.example") as stack:
        yield stack


def request(base_url: str, host: str, method: str = "GET", target: str = "/users/1") -> RawResponse:
    lines = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    return parse_response(send_bytes(base_url, f"{lines}Content-Length: 0\r\n\r\n".encode("latin-1")))


def is_misdirected(response: RawResponse) -> bool:
    if response.status != 421:
        return False
    check_raw_problem(response, 421)
    assert response.json["type"] == "/problems/misdirected-request"
    assert "ALLOWED_HOSTS" in response.json["detail"]
    return True


OWN = ["localhost", "LocalHost:8080", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80"]
ALLOWED = ["users.example", "Users.Example:8443", "below.example", "a.below.example", "a.b.below.example"]
FOREIGN = [
    *["evil.example", "evil.example:80", "a.users.example", "users.example.evil.example", "xbelow.example"],
    *["localhost.evil.example", "127.0.0.1.nip.io", "192.0.2.1", "[2001:db8::1]", "2130706433", "app", "\xe4.example"],
]


@pytest.mark.parametrize("host", [*OWN, *ALLOWED])
def test_service_answers_under_its_own_names_and_those_of_the_setting(base_url: str, host: str) -> None:
    assert request(base_url, host).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_service_answers_under_no_other_name(base_url: str, host: str) -> None:
    assert is_misdirected(request(base_url, host))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *[
            ("GET", "/users"),
            ("GET", "/users?q=a"),
            ("GET", "/users?foo=1"),
            ("HEAD", "/users/1"),
            ("OPTIONS", "/users"),
        ],
        *[("POST", "/users"), ("POST", "/users/batch"), ("PUT", "/users/1"), ("DELETE", "/users/999999999")],
        *[("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/readyz"), ("GET", "/problems/"), ("GET", "/nothing")],
    ],
)
def test_no_request_is_answered_under_another_name(base_url: str, method: str, target: str) -> None:
    response = request(base_url, "evil.example", method, target)
    assert response.status == 421
    assert method == "HEAD" or is_misdirected(response)


def test_cached_response_is_refused_under_another_name_and_stays_cached(stack: Stack) -> None:
    for target in ("/users/1", "/users", "/users/999999999"):
        for _ in range(2):
            response = requests.get(stack.edge + target, timeout=5)
        assert response.headers["X-Cache-Status"] == "HIT"
        assert is_misdirected(request(stack.edge, "evil.example", target=target))
        assert requests.get(stack.edge + target, timeout=5).headers["X-Cache-Status"] == "HIT"


def test_request_line_with_another_name_is_refused(stack: Stack) -> None:
    assert is_misdirected(request(stack.edge, "localhost", target="http://evil.example/users/1"))


def test_client_that_sends_no_name_is_served(base_url: str) -> None:
    """Health checks send HTTP/1.0 without Host; browsers always send it."""
    assert send_bytes(base_url, b"GET /users/1 HTTP/1.0\r\n\r\n").split(b" ")[1] == b"200"


def test_service_on_all_addresses_answers_under_every_name_unless_names_are_set() -> None:
    with running("--bind", "0.0.0.0", "--apps", "1", AUTH="off") as stack:
        for base_url in (stack.edge, stack.app):
            assert request(base_url, "users.example").status == 200
    # Load balancers check an address, and a page cannot rebind one.
    with running("--bind", "0.0.0.0", "--apps", "1", AUTH="off", ALLOWED_HOSTS="users.example") as stack:
        for base_url in (stack.edge, stack.app):
            for host in ("users.example", "localhost", "192.0.2.1"):
                assert request(base_url, host).status == 200
            assert is_misdirected(request(base_url, "evil.example"))


@pytest.mark.parametrize(
    ("bind", "names", "host", "allowed"),
    [
        ("127.0.0.1", "", "evil.example", False),
        ("127.0.0.1", "*", "evil.example", True),
        ("127.0.0.2", "", "127.0.0.2", True),
        ("127.0.0.2", "", "127.0.0.3", False),
        ("::1", "", "[::1]:80", True),
        ("::1", "", "evil.example", False),
        ("[::1]", "", "evil.example", False),
        ("localhost", "", "evil.example", False),
        ("192.0.2.1", "", "evil.example", True),
        ("192.0.2.1", "users.example", "192.0.2.1", True),
        ("192.0.2.1", "users.example", "192.0.2.2", False),
        ("192.0.2.1", "users.example", "evil.example", False),
        ("0.0.0.0", "users.example", "192.0.2.1", True),
        ("::", "users.example", "[2001:db8::1]", True),
        ("::", "users.example", "evil.example", False),
    ],
)
def test_edge_and_app_have_the_same_rule(bind: str, names: str, host: str, allowed: bool) -> None:
    hosts = allowed_hosts(bind, names)
    assert (hosts is None or hosts.allow(host)) == allowed
    with fake_app(AUTH="off", BIND=bind, ALLOWED_HOSTS=names) as app:
        assert (request(app.edge, host).status == 200) == allowed


@pytest.mark.parametrize("value", ["http://users.example", "users.example:80", "a b/c", "*.users.example", "user's"])
def test_bad_name_is_refused_at_the_start_by_the_launcher_and_by_the_edge(value: str) -> None:
    assert f"ALLOWED_HOSTS={value!r} is not allowed" in refused("up", "--port", str(free_ports(1)), ALLOWED_HOSTS=value)
    output = refused_by_edge(ALLOWED_HOSTS=value)
    assert "ALLOWED_HOSTS=" in output
    assert "is not allowed" in output
