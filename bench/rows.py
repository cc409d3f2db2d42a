"""The rows of the table: who is compared at what, and what has to come of it."""

import base64
import contextlib
import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import orjson
import psutil

from bench import pgbench, wrk
from bench.measure import Contestant, Line, Ratio, Result, Sample, alternate, compared, line, measured
from bench.peers.running import REDIS_TTL, Peer, Peers
from bench.processes import Processes
from bench.wrk import Maker
from tests.running import run

MANY = 100_000
"""Users that reads and writes are spread over."""

ZIPF = 0.99

Say = Callable[[str], None]


@dataclass
class Bench:
    """What the rows have in common."""

    peers: Peers
    say: Say
    quick: bool
    users: int
    """In the table, once it is full."""

    minutes: float
    """Of the long run."""

    results: dict[str, Result] = field(default_factory=dict)
    _next: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _read: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def seconds(self) -> int:
        return 2 if self.quick else 6

    def alternate(self, *contestants: Contestant, warmup: int = 1) -> dict[str, list[Sample]]:
        return alternate(contestants, rounds=self.rounds, seconds=self.seconds, warmup=warmup, say=self.say)

    def goes_on(self, name: str, requests: int) -> int:
        """The first id that this contestant has not asked for yet; and from now on that many later."""
        at = self._read.get(name, 0)
        self._read[name] = at + requests
        return at


def at(peer: Peer, maker: Maker, *, connections: int = 64, name: str = "") -> Contestant:
    def load(seconds: int) -> wrk.Answered:
        return wrk.closed(peer.url, maker, seconds, connections=connections)

    return Contestant(name or peer.name, load, peer.roots)


def moving(bench: Bench, peer: Peer, kind: str) -> Contestant:
    """Each round goes on where the last one ended: no id twice, as far as there are enough."""

    def load(seconds: int) -> wrk.Answered:
        offset = bench.goes_on(f"{kind} {peer.name}", 0)
        answered = wrk.closed(peer.url, (kind, 1, bench.users, offset), seconds)
        bench.goes_on(f"{kind} {peer.name}", answered.requests + 200)
        return answered

    return Contestant(peer.name, load, peer.roots)


# ---- rows ----


def hit(bench: Bench) -> Result:
    """One user, again and again, out of the first cache. The servers have one core, the load generator the other: so
    the server is what is measured, and not how fast wrk is."""
    peers = bench.peers
    cores = sorted(psutil.Process().cpu_affinity())
    servers, load = cores[: max(1, len(cores) // 2)], cores[len(cores) // 2 :]
    contestants = []
    for peer in (peers.velikiy, peers.stock, peers.limit, peers.varnish):

        def run_load(seconds: int, url: str = peer.url) -> wrk.Answered:
            return wrk.closed(url, ("one", "/users/2"), seconds, threads=len(load), cores=load)

        contestants.append(Contestant(peer.name, run_load, {n: r for n, r in peer.roots.items() if n in HIT}))
    with pinned([peers.velikiy, peers.stock, peers.limit, peers.varnish], servers, cores):
        samples = bench.alternate(*contestants)
    cpu = compared(samples, "velikiy", "Varnish", lambda sample: sample.per_cpu_second)
    return Result(
        [
            line("edge hit", "to proxy_cache", samples, "velikiy", "proxy_cache", 1.1),
            line("edge hit", "to return 200", samples, "velikiy", "return 200", 0.65),
            Line("edge hit", "to Varnish, per CPU second", cpu, 1.5),
        ],
        samples,
    )


HIT = ("edge", "supervisor")
"""What has work to do at a hit: our edge's log goes through the supervisor."""


@contextlib.contextmanager
def pinned(peers: list[Peer], cores: list[int], all_cores: list[int]) -> Iterator[None]:
    try:
        for peer in peers:
            Processes(peer.roots).pin(cores)
        yield
    finally:
        for peer in peers:
            Processes(peer.roots).pin(all_cores)


def redis_hit(bench: Bench) -> Result:
    """Users one after the other, all of them in Redis, none of them at an edge: by the time that one is asked for
    again, the edges' 5 seconds are over."""
    peers = bench.peers
    peers.fill_redis(MANY)
    names = (peers.velikiy, peers.classic, peers.flask_caching, peers.fastapi)
    samples = bench.alternate(*(spread(bench, peer) for peer in names))
    return Result(
        [
            line("Redis hit", "to the classic", samples, "velikiy", "classic", 5),
            line("Redis hit", "to Flask-Caching", samples, "velikiy", "Flask-Caching"),
            line("Redis hit", "to FastAPI", samples, "velikiy", "FastAPI"),
        ],
        samples,
    )


def spread(bench: Bench, peer: Peer) -> Contestant:
    def load(seconds: int) -> wrk.Answered:
        offset = bench.goes_on(f"spread {peer.name}", 0)
        answered = wrk.closed(peer.url, ("ids", 1, MANY, offset), seconds)
        bench.goes_on(f"spread {peer.name}", answered.requests + 200)
        return answered

    return Contestant(peer.name, load, peer.roots)


def miss(bench: Bench) -> Result:
    """Each user once, and nobody has them but PostgreSQL."""
    peers = bench.peers
    peers.forget()
    alone = (peers.velikiy_app, peers.fastapi, peers.classic_app)
    samples = bench.alternate(
        *(moving(bench, peer, "ids") for peer in (*alone, peers.velikiy, peers.classic)),
        pgbench.contestant(peers, "select", bench.users),
    )
    app = "velikiy, app alone"
    return Result(
        [
            line("full miss", "to FastAPI, apps alone", samples, app, "FastAPI", 1.0),
            line("full miss", "to the classic, apps alone", samples, app, "classic, app alone", 1.5),
            line("full miss", "to the classic, through the edge", samples, "velikiy", "classic"),
            line("full miss", "to pgbench's SELECT, app alone", samples, app, "pgbench select"),
        ],
        samples,
    )


def put(bench: Bench) -> Result:
    """Users one after the other, each of them changed; ours with two edges that have to be told."""
    peers = bench.peers
    apps = (peers.velikiy, peers.uncached, peers.classic, peers.fastapi, peers.flask_caching)
    samples = bench.alternate(
        *(moving(bench, peer, "put") for peer in apps), pgbench.contestant(peers, "update", bench.users)
    )
    return Result(
        [
            line("PUT, 2 edges", "to no caches at all", samples, "velikiy", "velikiy without caches", 0.8),
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


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> http.client.HTTPResponse:
    """Whose body has been read."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, f"{method} {path}: {answer.status}"
    return answer


HOT = 7
READERS = 256
WRITES = 20


def hot(bench: Bench) -> Result:
    """256 readers of one user, with and without somebody who changes it 20 times a second."""
    peer = bench.peers.velikiy
    calm = at(peer, ("one", f"/users/{HOT}"), connections=READERS, name="nobody writes")
    busy = Contestant("20 writes/s", calm.load, calm.roots)
    samples: dict[str, list[Sample]] = {calm.name: [], busy.name: []}
    calm.load(1)
    for number in range(bench.rounds):
        bench.say(f"round {number + 1} of {bench.rounds}")
        samples[calm.name].append(measured(calm, bench.seconds))
        with writing(bench.peers.ours.edges[-1], HOT, WRITES):
            samples[busy.name].append(measured(busy, bench.seconds))
    reads = reads_per_write(bench, busy)
    p99 = compared(samples, busy.name, calm.name, lambda sample: sample.answered.p99)
    return Result(
        [
            line("hot key", "reads with 20 writes/s to without", samples, busy.name, calm.name, 0.7),
            Line("hot key", "p99 with 20 writes/s to without", p99, 5, at_most=True),
            Line("hot key", "reads of PostgreSQL for each write", reads, 3, at_most=True, unit=""),
        ],
        samples,
    )


def reads_per_write(bench: Bench, busy: Contestant) -> Ratio:
    """Rows that PostgreSQL has looked up by their id, less those that it looked up to change them.

    Its processes report what they did after ten idle seconds at the latest, so these are waited for, twice.
    """
    ours = bench.peers.ours

    def looked_up() -> int:
        time.sleep(11)
        ((scans, updates),) = ours.sql(
            "SELECT seq_scan + idx_scan, n_tup_upd FROM pg_stat_user_tables WHERE relname = 'users'"
        )
        return int(scans) - int(updates)

    bench.say("waiting for PostgreSQL's counters")
    before = looked_up()
    with writing(ours.edges[-1], HOT, WRITES) as written:
        busy.load(bench.seconds * 2)
    bench.say("waiting for PostgreSQL's counters")
    return Ratio.of([(looked_up() - before) / max(1, len(written))])


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


def mix(bench: Bench) -> Result:
    """95 reads to 5 writes, over 100,000 users by Zipf's law; all of them are in Redis when it begins."""
    peers = bench.peers
    peers.fill_redis(MANY)
    names = (peers.velikiy, peers.classic_correct, peers.classic, peers.flask_caching, peers.fastapi)
    maker: Maker = ("mix", 1, MANY, ZIPF, 0.05)
    samples = bench.alternate(*(at(peer, maker) for peer in (*names, peers.varnish, peers.stock)), warmup=2)
    lines = [line("mix 95/5", "to the classic made correct", samples, "velikiy", peers.classic_correct.name, 5)]
    for peer in (*names[2:], peers.varnish, peers.stock):
        lines.append(line("mix 95/5", f"to {peer.name}, which may be stale", samples, "velikiy", peer.name, 1.0))
    return Result(lines, samples)


def growth(bench: Bench) -> Result:
    """The same with a few users and with many; this row fills the table."""
    peers = bench.peers
    sizes = [3, 1000, bench.users]
    found: dict[int, dict[str, list[float]]] = {}
    for size in sizes:
        bench.say(f"filling the table up to {size:,} users")
        peers.seed(size)
        found[size] = measure_growth(bench, size)
    lines = []
    # A table of 3 users has no page of 100.
    for what, name, small in (("edge hit", "hit", 3), ("PUT", "put", 3), ("first page of 100", "page", 1000)):
        for size in [it for it in sizes if it > small]:
            ratios = [a / b for a, b in zip(found[size][name], found[small][name], strict=True)]
            lines.append(Line("growth", f"{what}: {size:,} users to {small:,}", Ratio.of(ratios), 0.9))
    deep = [a / b for a, b in zip(found[bench.users]["deep"], found[bench.users]["page"], strict=True)]
    lines.append(Line("growth", f"of {bench.users:,} users the last page to the first", Ratio.of(deep), 0.9))
    return Result(lines, more={"rates": {str(size): values for size, values in found.items()}})


def measure_growth(bench: Bench, size: int) -> dict[str, list[float]]:
    """Per second, each of some rounds: hits, PUTs, pages at the beginning and at the end of the list."""
    peers = bench.peers
    seconds = 1 if bench.quick else 3
    rates: dict[str, list[float]] = {"hit": [], "put": [], "page": [], "deep": []}
    wrk.closed(peers.velikiy.url, ("put", 1, size, 0), 1)
    for number in range(3):
        bench.say(f"{size:,} users, round {number + 1} of 3")
        rates["hit"].append(wrk.closed(peers.velikiy.url, ("one", "/users/2"), seconds).rate)
        rates["put"].append(wrk.closed(peers.velikiy.url, ("put", 1, size, number * 7919), seconds).rate)
        rates["page"].append(pages(peers, "", 40))
        rates["deep"].append(pages(peers, last_cursor(peers, size), 40))
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


def edges(bench: Bench) -> Result:
    """What each edge more costs a write. The stack is started anew with 1, 2, 4, 8."""
    ours = bench.peers.ours
    counts = [1, 2, 4] if bench.quick else [1, 2, 4, 8]
    found: dict[int, tuple[float, dict[str, float]]] = {}
    for count in counts:
        bench.say(f"{count} edges")
        options = ("--edges", str(count), "--apps", "1", "--data", str(ours.data))
        started = run("up", "--detach", *options, REDIS_TTL=str(REDIS_TTL))
        assert started.returncode == 0, started.stderr
        ours.refresh()
        alone = one_writer(bench, f"{count} edges")
        alone.load(1)
        samples = [measured(alone, bench.seconds) for _ in range(bench.rounds)]
        requests = sum(sample.answered.requests for sample in samples)
        cpu = {
            group: 1000 * sum(sample.cpu[group] for sample in samples) / requests
            for group in samples[0].cpu
            if group != "load"
        }
        found[count] = (statistics.median(sample.answered.p50 for sample in samples), cpu)
    few, many = counts[0], counts[-1]
    more = many - few
    latency = (found[many][0] - found[few][0]) / more
    at_edges = (found[many][1]["edge"] - found[few][1]["edge"]) / more
    at_app = sum(found[many][1][group] - found[few][1][group] for group in ("app", "postgres")) / more
    return Result(
        [
            Line("edges", "latency of a write for each edge more", Ratio.of([latency]), unit="ms"),
            Line("edges", "CPU of edges for each edge more", Ratio.of([at_edges]), unit="ms"),
            Line("edges", "CPU of app and PostgreSQL for each edge more", Ratio.of([at_app]), unit="ms"),
        ],
        more={"edges": {str(n): {"p50": p50, "cpu_ms": cpu} for n, (p50, cpu) in found.items()}},
    )


def one_writer(bench: Bench, name: str) -> Contestant:
    url = bench.peers.ours.edge

    def load(seconds: int) -> wrk.Answered:
        return wrk.closed(url, ("put", 1, bench.users, 0), seconds, connections=1, threads=1)

    return Contestant(name, load, bench.peers.roots_of_ours())


def start(bench: Bench) -> Result:
    """`./run up` in the data folder that is there, on a machine that has all it needs."""
    seconds = []
    for number in range(2 if bench.quick else 3):
        bench.say(f"start {number + 1}")
        data = bench.peers.place / f"start{number}"
        try:
            began = time.monotonic()
            started = run("up", "--detach", "--data", str(data), "--port", "31000")
            seconds.append(time.monotonic() - began)
            assert started.returncode == 0, started.stderr
        finally:
            run("down", "--wipe", "--data", str(data))
    return Result([Line("./run up", "with a new database", Ratio.of(seconds), 5, at_most=True, unit="s")])


def memory(bench: Bench) -> Result:
    """The mix, for long: does anything grow?"""
    peer = bench.peers.velikiy
    processes = Processes(peer.roots)
    until = time.monotonic() + bench.minutes * 60
    kept: list[dict[str, float]] = []
    while time.monotonic() < until or len(kept) < 3:
        seconds = max(2, min(10, round(bench.minutes * 60 / 6)))
        wrk.closed(peer.url, ("mix", 1, MANY, ZIPF, 0.05), seconds)
        kept.append(processes.memory())
        bench.say(f"{max(0, until - time.monotonic()):.0f} s left")
    lines = []
    for group in ("edge", "app", "redis"):
        # The first part fills the caches, which have a size; what comes then has to stay.
        half = kept[len(kept) // 2 :]
        ratio = half[-1][group] / half[0][group]
        lines.append(
            Line("memory", f"{group}: end to middle of {bench.minutes:g} min", Ratio.of([ratio]), 1.05, at_most=True)
        )
    return Result(lines, more={"memory": kept})


ROWS: dict[str, Callable[[Bench], Result]] = {
    "growth": growth,
    "hit": hit,
    "redis": redis_hit,
    "miss": miss,
    "put": put,
    "after-write": after_write,
    "hot": hot,
    "mix": mix,
    "memory": memory,
    "edges": edges,
    "up": start,
}
"""In the order in which they run: the first fills the table, and the last but one starts the stack anew."""
