"""Check that neither speed depends on the number of users, nor memory on time."""

import base64
import http.client
import time
from urllib.parse import urlsplit

import orjson

from bench import wrk
from bench.measure import Line, Ratio, Result
from bench.peers.running import Peers
from bench.processes import Processes
from bench.rows.base import ACTIVE_USERS, MIX, Bench, send


def growth(bench: Bench) -> Result:
    """Measure the same load with few users and with many. This row fills the table.

    Alternating rounds are impossible here: minutes lie between the two sizes, in which the machine may become twice as
    fast or half as fast. So each round also measures `return 200`, and its figures count in units of that.
    """
    peers = bench.peers
    sizes = [1000, bench.users] if bench.quick else [3, 1000, bench.users]
    found: dict[int, dict[str, list[float]]] = {}
    for size in sizes:
        bench.show(f"filling the table up to {size:,} users")
        peers.seed(size)
        found[size] = measure_growth(bench, size)
    lines = []
    # A table of 3 users has no page of 100.
    for what, name, small in (("edge hits", "hit", sizes[0]), ("PUTs", "put", sizes[0]), ("first page", "page", 1000)):
        for size in [it for it in sizes if it > small]:
            ratios = [
                a / b
                for a, b in zip(
                    relative_to_limit(found[size], name), relative_to_limit(found[small], name), strict=True
                )
            ]
            lines.append(Line("growth", f"{what}, {size:,} users / {small:,} users", Ratio.of(ratios), 0.9))
    deep = [a / b for a, b in zip(found[bench.users]["deep"], found[bench.users]["page"], strict=True)]
    lines.append(Line("growth", f"last page / first page, {bench.users:,} users", Ratio.of(deep), 0.9))
    return Result(lines, more={"rates": {str(size): values for size, values in found.items()}})


def relative_to_limit(rates: dict[str, list[float]], name: str) -> list[float]:
    return [rate / limit for rate, limit in zip(rates[name], rates["limit"], strict=True)]


def measure_growth(bench: Bench, size: int) -> dict[str, list[float]]:
    """Return rates per second, round by round: hits, PUTs, the first page and the last page of the list, and the
    limit."""
    peers = bench.peers
    rounds, seconds, count = (2, 1, 20) if bench.quick else (5, 3, 40)
    rates: dict[str, list[float]] = {"hit": [], "limit": [], "put": [], "page": [], "deep": []}
    wrk.closed_loop(peers.velikiy.url, ("put", 1, size, 0), 1)
    for number in range(rounds):
        bench.show(f"{size:,} users, round {number + 1} of {rounds}")
        rates["limit"].append(wrk.closed_loop(peers.limit.url, ("one", "/users/2"), seconds).rate)
        rates["hit"].append(wrk.closed_loop(peers.velikiy.url, ("one", "/users/2"), seconds).rate)
        rates["put"].append(wrk.closed_loop(peers.velikiy.url, ("put", 1, size, number * 7919), seconds).rate)
        rates["page"].append(pages(peers, "", count))
        rates["deep"].append(pages(peers, last_cursor(peers, size), count))
    return rates


def pages(peers: Peers, cursor: str, count: int) -> float:
    """Return the pages per second that PostgreSQL delivers: a write before each read invalidates both caches."""
    connection = http.client.HTTPConnection(urlsplit(peers.stack.app).netloc)
    spent = 0.0
    for number in range(count):
        send(connection, "PUT", "/users/1", {"name": f"Page {number}"})
        began = time.perf_counter()
        send(connection, "GET", f"/users?{cursor}limit=100")
        spent += time.perf_counter() - began
    connection.close()
    return count / spent


def last_cursor(peers: Peers, size: int) -> str:
    """Return the cursor of the last page of 100. It names the end of the page before; a client would have to follow all
    pages to get it."""
    position = ["id", str(size - 100), size - 100]
    return f"cursor={base64.urlsafe_b64encode(orjson.dumps(position)).rstrip(b'=').decode()}&" if size > 200 else ""


def memory(bench: Bench) -> Result:
    """Run the mix for minutes and check that memory does not grow.

    All users are read once before. The mix would take half an hour to reach the rarest users, and meanwhile caches of a
    fixed size would still be filling.
    """
    peer = bench.peers.velikiy
    processes = Processes(peer.roots)
    bench.peers.fill_redis(ACTIVE_USERS)
    requests = 0
    while requests < ACTIVE_USERS:
        requests += wrk.closed_loop(peer.url, ("ids", 1, ACTIVE_USERS, requests), 2).requests
    until = time.monotonic() + bench.minutes * 60
    samples: list[dict[str, float]] = []
    while time.monotonic() < until or len(samples) < 3:
        seconds = max(2, min(10, round(bench.minutes * 60 / 6)))
        wrk.closed_loop(peer.url, MIX, seconds)
        # Without mapped files: their share (PSS) grows when another program that maps them ends.
        samples.append(processes.memory("Pss_Anon", "Pss_Shmem"))
        bench.show(f"{max(0, until - time.monotonic()):.0f} s left")
    lines = []
    for group in ("edge", "app", "redis"):
        # In the first half some objects are allocated for the first time; from then on the size has to stay.
        half = samples[len(samples) // 2 :]
        ratio = half[-1][group] / half[0][group]
        lines.append(
            Line("memory", f"{group}, end / middle of {bench.minutes:g} min", Ratio.of([ratio]), 1.05, at_most=True)
        )
    return Result(lines, more={"memory": samples})
