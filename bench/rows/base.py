"""The context of a run, and the kinds of load that the rows share."""

import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil

from bench import wrk
from bench.measure import Result, Sample, Subject, alternate
from bench.peers.running import Peer, Peers
from bench.processes import Processes
from bench.wrk import LoadResult, RequestKind

ACTIVE_USERS = 100_000
"""Users that the reads and writes of a row are spread over."""

ZIPF_EXPONENT = 0.99

WRITE_SHARE = 0.05

MIX: RequestKind = ("mix", 1, ACTIVE_USERS, ZIPF_EXPONENT, WRITE_SHARE)

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
        """Seconds of warm-up for subjects that an earlier row has loaded."""
        return 0 if self.quick else 1

    def offset(self, name: str) -> int:
        """Return the first offset that this load has not used yet."""
        return self._offsets.get(name, 0)

    def advance(self, name: str, requests: int) -> None:
        self._offsets[name] = self.offset(name) + requests + MAX_UNCOUNTED


def closed_loop(peer: Peer, kind: RequestKind, *, connections: int = 64, name: str = "") -> Subject:
    def run(seconds: int) -> LoadResult:
        return wrk.closed_loop(peer.url, kind, seconds, connections=connections)

    return Subject(name or peer.name, run, peer.roots)


def edge_hits(peer: Peer) -> Subject:
    """Read one user from the first cache. The load generator has its own cores; the caller pins the servers."""
    _servers, load = split_cores()

    def run(seconds: int) -> LoadResult:
        return wrk.closed_loop(peer.url, ("one", "/users/2"), seconds, threads=len(load), cores=load)

    return Subject(peer.name, run, peer.roots)


def cycling(bench: Bench, peer: Peer, kind: str, count: int) -> Subject:
    """Send requests for `count` users one after the other, in a circle.

    Each round continues where the last one ended, so no user is requested twice as long as there are enough users.
    """
    name = f"{kind} {count} {peer.name}"

    def run(seconds: int) -> LoadResult:
        result = wrk.closed_loop(peer.url, (kind, 1, count, bench.offset(name)), seconds)
        bench.advance(name, result.requests)
        return result

    return Subject(peer.name, run, peer.roots)


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
                process.cpu_affinity(own)


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
