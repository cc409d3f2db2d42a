"""Writes, and reads that follow them."""

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from bench import pgbench
from bench.measure import Contestant, Line, Ratio, Result, Sample, compared, line, measured
from bench.rows.base import MANY, Bench, ask, at, moving

HOT = 7
READERS = 256
WRITES = 20
"""Per second."""

REPORTED = 11
"""Seconds after which PostgreSQL's processes have told what they did: an idle one does so after ten."""


def put(bench: Bench) -> Result:
    """Users one after the other, each of them changed; ours with two edges that have to be told."""
    peers = bench.peers
    apps = (peers.velikiy, peers.uncached, peers.classic, peers.fastapi, peers.flask_caching)
    samples = bench.alternate(
        *(moving(bench, peer, "put", bench.users) for peer in apps),
        pgbench.contestant(peers, "update", bench.users),
        warmup=bench.warmup_again,
    )
    return Result(
        [
            line("PUT, 2 edges", "to no caches at all", samples, "velikiy", peers.uncached.name, 0.8),
            line("PUT, 2 edges", "to the classic", samples, "velikiy", "classic", 4),
            line("PUT, 2 edges", "to FastAPI", samples, "velikiy", "FastAPI"),
            line("PUT, 2 edges", "to Flask-Caching", samples, "velikiy", "Flask-Caching"),
            line("PUT, 2 edges", "to pgbench's UPDATE", samples, "velikiy", "pgbench update"),
        ],
        samples,
    )


def after_write(bench: Bench) -> Result:
    """A user is changed through one edge and then read through the other: who answers that?"""
    first, second = (http.client.HTTPConnection(urlsplit(edge).netloc) for edge in bench.peers.ours.edges[:2])
    shares = []
    tiers: dict[str, int] = {}
    for _ in range(bench.rounds):
        by_redis = 0
        for number in range(100):
            user = 1 + number % MANY
            ask(first, "PUT", f"/users/{user}", {"name": f"After {time.monotonic_ns()}"})
            status = ask(second, "GET", f"/users/{user}").getheader("Cache-Status", "")
            tier = status.partition(", nginx")[0]
            tier = "redis; hit" if tier.startswith("redis; hit") else tier
            tiers[tier] = tiers.get(tier, 0) + 1
            by_redis += tier == "redis; hit"
        shares.append(by_redis / 100)
    first.close()
    second.close()
    share = Line("read after write", "answered by Redis", Ratio.of(shares), 0.99, unit="of the reads")
    return Result([share], more={"tiers": tiers})


def hot(bench: Bench) -> Result:
    """256 readers of one user, with and without somebody who changes it 20 times a second."""
    peer = bench.peers.velikiy
    calm = at(peer, ("one", f"/users/{HOT}"), connections=READERS, name="nobody writes")
    busy = Contestant("20 writes/s", calm.load, calm.roots)
    samples: dict[str, list[Sample]] = {calm.name: [], busy.name: []}
    calm.load(1)
    reads, counted = reads_per_write(bench, busy)
    for number in range(bench.rounds):
        bench.say(f"round {number + 1} of {bench.rounds}")
        samples[calm.name].append(measured(calm, bench.seconds))
        with writing(bench.peers.ours.edges[-1], HOT, WRITES):
            samples[busy.name].append(measured(busy, bench.seconds))
    p99 = compared(samples, busy.name, calm.name, lambda sample: sample.answered.p99)
    return Result(
        [
            line("hot key", "reads with 20 writes/s to without", samples, busy.name, calm.name, 0.7),
            Line("hot key", "p99 with 20 writes/s to without", p99, 5, at_most=True),
            Line("hot key", "reads of PostgreSQL for each write", reads, 3, at_most=True, unit=""),
        ],
        samples,
        more={"scans": counted},
    )


def reads_per_write(bench: Bench, busy: Contestant) -> tuple[Ratio, dict[str, float]]:
    """How often PostgreSQL looks the row up for readers, for each write.

    Counted are scans of the table `users` and of its indexes, by whoever (pg_stat_user_tables). A write scans too, to
    find what it changes; nothing else does, at least not here, where the relay and the leases have other tables. So the
    writer is first counted alone, and that much is taken off for each of its writes when there are readers.
    """
    if "hit" not in bench.results:  # nothing has been asked of PostgreSQL while that row ran
        bench.say("waiting for PostgreSQL's counters")
        time.sleep(REPORTED)
    before = looked_up(bench)
    seconds = bench.seconds * 2
    with writing(bench.peers.ours.edges[-1], HOT, WRITES) as alone:
        time.sleep(seconds)
    bench.say("waiting for PostgreSQL's counters: a writer alone")
    time.sleep(REPORTED)
    between = looked_up(bench)
    with writing(bench.peers.ours.edges[-1], HOT, WRITES) as written:
        requests = busy.load(seconds).requests
    bench.say("waiting for PostgreSQL's counters: a writer and readers")
    time.sleep(REPORTED)
    after = looked_up(bench)
    own = (between - before) / len(alone)
    reads = (after - between) / len(written) - own
    counted = {"writes": len(written), "reads": requests, "scans": after - between, "scans_of_a_write_alone": own}
    return Ratio.of([max(0.0, reads)]), counted


def looked_up(bench: Bench) -> int:
    ((scans,),) = bench.peers.ours.sql("SELECT seq_scan + idx_scan FROM pg_stat_user_tables WHERE relname = 'users'")
    return int(scans)


@contextlib.contextmanager
def writing(edge: str, user: int, rate: float) -> Iterator[list[float]]:
    """A writer in the background; the milliseconds of each of its writes."""
    ended = threading.Event()
    took: list[float] = []

    def write() -> None:
        connection = http.client.HTTPConnection(urlsplit(edge).netloc)
        began = time.monotonic()
        for number in itertools.count():
            if ended.wait(max(0.0, began + number / rate - time.monotonic())):
                return
            sent = time.monotonic()
            ask(connection, "PUT", f"/users/{user}", {"name": f"Hot {number}"})
            took.append((time.monotonic() - sent) * 1000)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()
