"""Does anything change with the number of users, or with time?"""

import base64
import http.client
import time
from urllib.parse import urlsplit

import orjson

from bench import wrk
from bench.measure import Line, Ratio, Result
from bench.peers.running import Peers
from bench.processes import Processes
from bench.rows.base import MANY, MIX, Bench, ask


def growth(bench: Bench) -> Result:
    """The same with a few users and with many; this row fills the table.

    In turn is not possible here: what is compared lies minutes apart, in which the machine may become half as fast or
    twice. So each round also asks for `return 200`, and what it had counts in units of that."""
    peers = bench.peers
    sizes = [1000, bench.users] if bench.quick else [3, 1000, bench.users]
    found: dict[int, dict[str, list[float]]] = {}
    for size in sizes:
        bench.say(f"filling the table up to {size:,} users")
        peers.seed(size)
        found[size] = measure_growth(bench, size)
    lines = []
    # A table of 3 users has no page of 100.
    for what, name, small in (("edge hit", "hit", sizes[0]), ("PUT", "put", sizes[0]), ("first page", "page", 1000)):
        for size in [it for it in sizes if it > small]:
            ratios = [a / b for a, b in zip(of_limit(found[size], name), of_limit(found[small], name), strict=True)]
            lines.append(Line("growth", f"{what}: {size:,} users to {small:,}", Ratio.of(ratios), 0.9))
    deep = [a / b for a, b in zip(found[bench.users]["deep"], found[bench.users]["page"], strict=True)]
    lines.append(Line("growth", f"of {bench.users:,} users the last page to the first", Ratio.of(deep), 0.9))
    return Result(lines, more={"rates": {str(size): values for size, values in found.items()}})


def of_limit(rates: dict[str, list[float]], name: str) -> list[float]:
    return [rate / limit for rate, limit in zip(rates[name], rates["limit"], strict=True)]


def measure_growth(bench: Bench, size: int) -> dict[str, list[float]]:
    """Per second, each of some rounds: hits, PUTs, pages at the beginning and at the end of the list; the limit."""
    peers = bench.peers
    rounds, seconds, count = (2, 1, 20) if bench.quick else (5, 3, 40)
    rates: dict[str, list[float]] = {"hit": [], "limit": [], "put": [], "page": [], "deep": []}
    wrk.closed(peers.velikiy.url, ("put", 1, size, 0), 1)
    for number in range(rounds):
        bench.say(f"{size:,} users, round {number + 1} of {rounds}")
        rates["limit"].append(wrk.closed(peers.limit.url, ("one", "/users/2"), seconds).rate)
        rates["hit"].append(wrk.closed(peers.velikiy.url, ("one", "/users/2"), seconds).rate)
        rates["put"].append(wrk.closed(peers.velikiy.url, ("put", 1, size, number * 7919), seconds).rate)
        rates["page"].append(pages(peers, "", count))
        rates["deep"].append(pages(peers, last_cursor(peers, size), count))
    return rates


def pages(peers: Peers, cursor: str, count: int) -> float:
    """Per second; past both caches, by a write before each."""
    connection = http.client.HTTPConnection(urlsplit(peers.ours.app).netloc)
    spent = 0.0
    for number in range(count):
        ask(connection, "PUT", "/users/1", {"name": f"Page {number}"})
        began = time.perf_counter()
        ask(connection, "GET", f"/users?{cursor}limit=100")
        spent += time.perf_counter() - began
    connection.close()
    return count / spent


def last_cursor(peers: Peers, size: int) -> str:
    """Of the last page of 100. A cursor says where the page before ended; a client would have to walk there."""
    place = ["id", str(size - 100), size - 100]
    return f"cursor={base64.urlsafe_b64encode(orjson.dumps(place)).rstrip(b'=').decode()}&" if size > 200 else ""


def memory(bench: Bench) -> Result:
    """The mix, for long: does anything grow? All users are asked for once before: of the rarest it would take the mix
    half an hour, in which caches that have a size are still being filled."""
    peer = bench.peers.velikiy
    processes = Processes(peer.roots)
    bench.peers.fill_redis(MANY)
    asked = 0
    while asked < MANY:
        asked += wrk.closed(peer.url, ("ids", 1, MANY, asked), 2).requests
    until = time.monotonic() + bench.minutes * 60
    kept: list[dict[str, float]] = []
    while time.monotonic() < until or len(kept) < 3:
        seconds = max(2, min(10, round(bench.minutes * 60 / 6)))
        wrk.closed(peer.url, MIX, seconds)
        # Without files: those it shares with whatever else runs on the machine, and has more of them when that ends.
        kept.append(processes.memory("Pss_Anon", "Pss_Shmem"))
        bench.say(f"{max(0, until - time.monotonic()):.0f} s left")
    lines = []
    for group in ("edge", "app", "redis"):
        # In the first part there is still something to be made for the first time; what comes then has to stay.
        half = kept[len(kept) // 2 :]
        ratio = half[-1][group] / half[0][group]
        lines.append(
            Line("memory", f"{group}: end to middle of {bench.minutes:g} min", Ratio.of([ratio]), 1.05, at_most=True)
        )
    return Result(lines, more={"memory": kept})
