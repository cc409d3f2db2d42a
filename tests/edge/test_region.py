"""Another region: an exact edge there costs each write a round trip, and a cache of bounded age (deploy/region) none."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from string import Template
from urllib.parse import urlsplit

import requests

from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, Stack, folder, free_ports, wait_until
from testkit.tcp_proxy import ProxiedConnection, tcp_proxy

BOUND_S = 1
ROUND_TRIP_S = 0.1


@contextmanager
def region(home: str) -> Iterator[str]:
    """Run the cache of a region in front of this address; yield its own."""
    port = free_ports(1)
    with folder() as data:
        data.chmod(0o777)  # the workers of root's Nginx are another user
        template = (ROOT / "deploy/region/nginx.conf").read_text()
        file = data / "nginx.conf"
        file.write_text(
            Template(template).safe_substitute(LISTEN=f"127.0.0.1:{port}", ORIGIN=home, BOUND=BOUND_S, DATA=data)
        )
        nginx = subprocess.Popen(["/usr/sbin/nginx", "-e", "stderr", "-p", data, "-c", file])
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: status_of(f"{url}/livez") == 200)
            yield url
        finally:
            nginx.terminate()
            nginx.wait(10)


def status_of(url: str) -> int:
    try:
        return requests.get(url, timeout=5).status_code
    except requests.RequestException:
        return 0


def test_region_states_its_bound_and_keeps_it(stack: Stack, new_user: dict[str, str]) -> None:
    at_home = f"{stack.edge}/users/{new_user['id']}"
    with tcp_proxy(("127.0.0.1", urlsplit(stack.edge).port or 0)) as line, region(f"127.0.0.1:{line.port}") as far:
        there = f"{far}/users/{new_user['id']}"
        requests.get(there, timeout=5)
        cached = requests.get(there, timeout=5)
        assert cached.headers["X-Cache-Status"] == "HIT"
        assert cached.headers["Consistency"] == f"bounded; seconds={BOUND_S}"
        assert cached.headers["ETag"] == requests.get(at_home, timeout=5).headers["ETag"]

        # A write waits for no region, and the region shows it within its bound and the second that Nginx rounds to.
        began = time.monotonic()
        assert requests.put(at_home, json={"name": "At home"}, timeout=5).status_code == 200
        assert time.monotonic() - began < 1
        wait_until(lambda: requests.get(there, timeout=5).json()["name"] == "At home", within=BOUND_S + 1.5)

        # A write through the region is carried out at home once, and is seen there at once.
        written = requests.put(there, json={"name": "From afar"}, timeout=5)
        assert (written.status_code, written.headers["Consistency"]) == (200, f"bounded; seconds={BOUND_S}")
        assert requests.get(at_home, timeout=5).json()["name"] == "From afar"

        # An answer to a key is not stored.
        for _ in range(2):
            keyed = requests.get(there, headers={"Authorization": "Bearer x"}, timeout=5)
            assert keyed.headers.get("X-Cache-Status") != "HIT"

        # Cut off from home, the region answers no older than its bound, and then not at all.
        requests.get(there, timeout=5)
        line.refuse()
        wait_until(lambda: status_of(there) in (502, 504), within=BOUND_S + 1.5)


def test_exact_edge_in_another_region_costs_each_write_a_round_trip(stack: Stack, new_user: dict[str, str]) -> None:
    def delay(_: ProxiedConnection, data: bytes) -> bytes:
        time.sleep(ROUND_TRIP_S)
        return data

    with tcp_proxy(("127.0.0.2", 0)) as line:
        line.server, line.on_reply = ("127.0.0.2", line.port), delay
        settings = {"EDGE_CONTROL": f"127.0.0.2:{line.port}", "EDGE_ADDRESS": "127.0.0.1"}
        with running_edge(urlsplit(stack.app).netloc, ROOT / "edge", **settings) as (edge, _):
            wait_until(lambda: has_cache_lease(edge))
            user = f"{edge}/users/{new_user['id']}"
            for number in range(5):
                wait_until(lambda: requests.get(user, timeout=5).headers["X-Cache-Status"] == "HIT")
                began = time.monotonic()
                assert requests.put(new_user["url"], json={"name": f"{number}"}, timeout=5).status_code == 200
                assert time.monotonic() - began >= ROUND_TRIP_S
                assert requests.get(user, timeout=5).json()["name"] == f"{number}"
            [(fenced,)] = stack.sql("SELECT fenced_at FROM caches WHERE address = %s", f"127.0.0.1:{line.port}")
            assert fenced is None  # the writes have waited for the round trip, and not for an exclusion
