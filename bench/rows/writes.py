"""Writes, and the reads that follow them."""

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from bench import pgbench
from bench.measure import Line, Ratio, Result, Sample, Subject, compare, compare_rates, measure
from bench.peers.running import Peer
from bench.rows.base import (
    ACTIVE_USERS,
    Bench,
    add_latencies,
    closed_loop,
    compare_with,
    cycling,
    present,
    send,
)

HOT_USER = 7
HOT_CONNECTIONS = 256
WRITES_PER_S = 20

STATISTICS_DELAY_S = 11
"""Seconds until the statistics of PostgreSQL are complete: an idle backend reports after ten seconds."""


def put(bench: Bench) -> Result:
    """Change users one after the other. velikiy has two edges to invalidate."""
    peers = bench.peers
    others: dict[Peer, float | None] = {
        peers.uncached: 0.9,
        peers.cache_aside: 4,
        peers.fastapi: 1.0,
        peers.flask_caching: None,
        peers.fastify: None,
        peers.go: None,
    }
    subjects = [cycling(bench, peer, "put", bench.users) for peer in (peers.velikiy, *present([*others]))]
    samples = bench.alternate(
        *subjects,
        pgbench.subject(peers, "update", bench.users),
        warmup=bench.second_warmup,
    )
    lines = [compare_with("PUT, 2 edges", samples, "velikiy", peer, target) for peer, target in others.items()]
    lines.append(compare_rates("PUT, 2 edges", "velikiy / pgbench UPDATE", samples, "velikiy", "pgbench update"))
    return add_latencies(bench, Result(lines, samples), "PUT, 2 edges", subjects)


def after_write(bench: Bench) -> Result:
    """Change a user through one edge, read it through the other, and count which tier has the entry."""
    first, second = (http.client.HTTPConnection(urlsplit(edge).netloc) for edge in bench.peers.stack.edges[:2])
    shares = []
    tiers: dict[str, int] = {}
    for _ in range(bench.rounds):
        by_redis = 0
        for number in range(100):
            user = 1 + number % ACTIVE_USERS
            send(first, "PUT", f"/users/{user}", {"name": f"After {time.monotonic_ns()}"})
            status = send(second, "GET", f"/users/{user}").getheader("Cache-Status", "")
            tier = status.partition(", nginx")[0]
            tier = "redis; hit" if tier.startswith("redis; hit") else tier
            tiers[tier] = tiers.get(tier, 0) + 1
            by_redis += tier == "redis; hit"
        shares.append(by_redis / 100)
    first.close()
    second.close()
    share = Line("read after write", "reads answered by Redis", Ratio.of(shares), 0.99, unit="of the reads")
    return Result([share], more={"tiers": tiers})


def hot(bench: Bench) -> Result:
    """Read one user on 256 connections, with and without a client that changes the user 20 times a second."""
    peer = bench.peers.velikiy
    calm = closed_loop(peer, ("one", f"/users/{HOT_USER}"), connections=HOT_CONNECTIONS, name="no writes")
    busy = Subject("20 writes/s", calm.run, calm.roots)
    samples: dict[str, list[Sample]] = {calm.name: [], busy.name: []}
    calm.run(1)
    counted = None if bench.quick else reads_per_write(bench, busy)  # waits for half a minute
    for number in range(bench.rounds):
        bench.show(f"round {number + 1} of {bench.rounds}")
        samples[calm.name].append(measure(calm, bench.seconds))
        with writing(bench.peers.stack.edges[-1], HOT_USER, WRITES_PER_S):
            samples[busy.name].append(measure(busy, bench.seconds))
    p99 = compare(samples, busy.name, calm.name, lambda sample: sample.load.p99)
    result = Result(
        [
            compare_rates("hot key", "reads with 20 writes/s / without writes", samples, busy.name, calm.name, 0.7),
            Line("hot key", "p99 with 20 writes/s / without writes", p99, 5, at_most=True),
        ],
        samples,
    )
    if counted:
        reads, result.more["scans"] = counted
        result.lines.append(Line("hot key", "PostgreSQL reads per write", reads, 3, at_most=True, unit=""))
    return result


def reads_per_write(bench: Bench, busy: Subject) -> tuple[Ratio, dict[str, float]]:
    """Return how often PostgreSQL looks the row up for readers, per write.

    The counter is that of all scans of the table `users` and its indexes (pg_stat_user_tables). A write scans, too, to
    find the row that it changes; nothing else does, because the relay and the leases use other tables. So the scans of
    a writer without readers are counted first, and subtracted for each write of the run with readers.
    """
    if "hit" not in bench.results:  # the row `hit` sends nothing to PostgreSQL while it runs
        bench.show("waiting for PostgreSQL's counters")
        time.sleep(STATISTICS_DELAY_S)
    before = table_scans(bench)
    seconds = bench.seconds * 2
    with writing(bench.peers.stack.edges[-1], HOT_USER, WRITES_PER_S) as alone:
        time.sleep(seconds)
    bench.show("waiting for PostgreSQL's counters: a writer alone")
    time.sleep(STATISTICS_DELAY_S)
    between = table_scans(bench)
    with writing(bench.peers.stack.edges[-1], HOT_USER, WRITES_PER_S) as written:
        requests = busy.run(seconds).requests
    bench.show("waiting for PostgreSQL's counters: a writer and readers")
    time.sleep(STATISTICS_DELAY_S)
    after = table_scans(bench)
    own = (between - before) / len(alone)
    reads = (after - between) / len(written) - own
    counted = {"writes": len(written), "reads": requests, "scans": after - between, "scans_of_a_write_alone": own}
    return Ratio.of([max(0.0, reads)]), counted


def table_scans(bench: Bench) -> int:
    ((scans,),) = bench.peers.stack.sql("SELECT seq_scan + idx_scan FROM pg_stat_user_tables WHERE relname = 'users'")
    return int(scans)


@contextlib.contextmanager
def writing(edge: str, user: int, rate: float) -> Iterator[list[float]]:
    """Run a writer in the background. Yield the list of its latencies in milliseconds, which grows meanwhile."""
    ended = threading.Event()
    latencies: list[float] = []

    def write() -> None:
        connection = http.client.HTTPConnection(urlsplit(edge).netloc)
        began = time.monotonic()
        for number in itertools.count():
            if ended.wait(max(0.0, began + number / rate - time.monotonic())):
                return
            sent = time.monotonic()
            send(connection, "PUT", f"/users/{user}", {"name": f"Hot {number}"})
            latencies.append((time.monotonic() - sent) * 1000)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield latencies
    finally:
        ended.set()
        thread.join()
