"""The context of a run, and the kinds of load that the rows share."""

import contextlib
import http.client
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import psutil

from bench import wrk
from bench.measure import Line, Result, Sample, Subject, alternate, compare, compare_rates
from bench.peers.running import Peer, Peers
from bench.processes import Processes, set_cores
from bench.wrk import LoadResult, RequestKind

ACTIVE_USERS = 100_000
"""Users that the reads and writes of a row are spread over."""

ZIPF_EXPONENT = 0.99

WRITE_SHARE = 0.05

MIX: RequestKind = ("mix", 1, ACTIVE_USERS, ZIPF_EXPONENT, WRITE_SHARE)

SAME_RATE_PERCENT = 80
"""The rate at which the latencies of all subjects are compared, in per cent of velikiy's capacity."""

CANNOT_CARRY = "cannot carry this rate"

MAX_UNCOUNTED = 200
"""Requests that are in flight when a load ends, which wrk does not count."""


@dataclass
class Bench:
    peers: Peers
    show: Callable[[str], None]
    """Displays progress."""

    quick: bool
    users: int
    """Users in the table, once it is full."""

    minutes: float
    """Length of the row `memory`."""

    results: dict[str, Result] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def seconds(self) -> int:
        """The length of one round.

        In 3 s no subject reads all ACTIVE_USERS before the 5 s for which an edge caches are over, up to 20,000 reads/s.
        The row also counts the reads that reach Redis (bench/rows/reads.py).
        """
        return 1 if self.quick else 3

    def alternate(self, *subjects: Subject, warmup: int = 1) -> dict[str, list[Sample]]:
        return alternate(subjects, rounds=self.rounds, seconds=self.seconds, warmup=warmup, show=self.show)

    @property
    def second_warmup(self) -> int:
        """Seconds of warm-up for subjects that the row `mix` has loaded, if it ran."""
        return 0 if self.quick and "mix" in self.results else 1

    def offset(self, name: str) -> int:
        """Return the first offset that this load has not used yet."""
        return self._offsets.get(name, 0)

    def advance(self, name: str, requests: int) -> None:
        self._offsets[name] = self.offset(name) + requests + MAX_UNCOUNTED


def closed_loop(peer: Peer, kind: RequestKind, *, connections: int = 64, name: str = "") -> Subject:
    def run(seconds: int) -> LoadResult:
        return wrk.closed_loop(peer.url, kind, seconds, connections=connections)

    def run_at(seconds: int, rate: float) -> LoadResult:
        return wrk.open_loop(peer.url, kind, seconds, rate=rate, warmup=1, connections=connections)

    return Subject(name or peer.name, run, peer.roots, run_at)


def edge_hits(peer: Peer) -> Subject:
    """Read one user from the first cache. The load generator has its own cores; the caller pins the servers."""
    _servers, load = split_cores()

    def run(seconds: int) -> LoadResult:
        return wrk.closed_loop(peer.url, ("one", "/users/2"), seconds, threads=len(load), cores=load)

    def run_at(seconds: int, rate: float) -> LoadResult:
        return wrk.open_loop(peer.url, ("one", "/users/2"), seconds, rate=rate, warmup=1, cores=load)

    return Subject(peer.name, run, peer.roots, run_at)


def cycling(bench: Bench, peer: Peer, kind: str, count: int) -> Subject:
    """Send requests for `count` users one after the other, in a circle.

    Each round continues where the last one ended, so no user is requested twice as long as there are enough users.
    """
    name = f"{kind} {count} {peer.name}"

    def run(seconds: int) -> LoadResult:
        result = wrk.closed_loop(peer.url, (kind, 1, count, bench.offset(name)), seconds)
        bench.advance(name, result.requests)
        return result

    def run_at(seconds: int, rate: float) -> LoadResult:
        result = wrk.open_loop(peer.url, (kind, 1, count, bench.offset(name)), seconds, rate=rate, warmup=1)
        bench.advance(name, result.requests)
        return result

    return Subject(peer.name, run, peer.roots, run_at)


def present(peers: Sequence[Peer]) -> list[Peer]:
    """Return the peers that run on this machine."""
    return [peer for peer in peers if not peer.missing]


def compare_with(
    row: str, samples: dict[str, list[Sample]], ours: str, peer: Peer, target: float | None = None, what: str = ""
) -> Line:
    """Return the line that compares the rate of one of our subjects with that of a peer, which may be missing."""
    what = what or f"velikiy / {peer.name}"
    if peer.missing:
        return Line(row, what, None, target, skipped=f"skipped: {peer.missing}")
    return compare_rates(row, what, samples, ours, peer.name, target)


def add_latencies(bench: Bench, result: Result, row: str, subjects: Sequence[Subject]) -> Result:
    """Run the open loop against all subjects at 80 % of the capacity of the first, and compare their p99 with its p99.

    Args:
        result: The closed loop of the subjects, which shows their capacities. The latencies become a part of it.
    """
    capacities = {
        subject.name: statistics.median(sample.rate for sample in result.samples[subject.name])
        for subject in subjects
        if subject.run_at
    }
    ours, *others = capacities
    rate = SAME_RATE_PERCENT / 100 * capacities[ours]
    able = sorted((name for name in others if capacities[name] >= rate), key=lambda name: -capacities[name])
    if bench.quick:
        able = able[:1]
    measured = alternate(
        [at_rate(subject, rate) for subject in subjects if subject.name in (ours, *able)],
        rounds=1 if bench.quick else 3,
        seconds=1 if bench.quick else 4,
        warmup=0,  # the open loop has its own
        show=lambda step: bench.show(f"{SAME_RATE_PERCENT} %, {step}"),
    )
    for name in others:
        what = f"p99 at {SAME_RATE_PERCENT} % load, velikiy / {name}"
        if name in able:
            ratio = compare(measured, ours, name, lambda sample: sample.load.p99)
            result.lines.append(Line(row, what, ratio, 1.0, at_most=True))
        elif capacities[name] < rate:
            result.lines.append(Line(row, what, None, 1.0, at_most=True, skipped=CANNOT_CARRY))
    result.more["same_rate"] = {name: [sample.as_json() for sample in found] for name, found in measured.items()}
    return result


def at_rate(subject: Subject, rate: float) -> Subject:
    run_at = subject.run_at
    assert run_at
    return replace(subject, run=lambda seconds: run_at(seconds, rate))


def split_cores() -> tuple[list[int], list[int]]:
    """Return cores for the servers, and other cores for the load generator.

    Apart from each other, the server is the bottleneck even if it responds faster than wrk sends.
    """
    cores = sorted(psutil.Process().cpu_affinity())
    half = max(1, len(cores) // 2)
    return cores[:half], cores[half:] or cores


@contextlib.contextmanager
def pinned(peers: list[Peer], cores: list[int]) -> Iterator[None]:
    """Keep the processes of these peers on these cores."""
    before: list[tuple[psutil.Process, list[int]]] = []
    try:
        for peer in peers:
            before += Processes(peer.roots).pin(cores).items()
        yield
    finally:
        for process, own in reversed(before):  # reversed, because peers share processes
            with contextlib.suppress(psutil.Error):
                set_cores(process, own)


def send(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> http.client.HTTPResponse:
    """Send a request that must succeed, and read the response to its end."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    response.read()
    assert response.status == 200, f"{method} {path}: {response.status}"
    return response
