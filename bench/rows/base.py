"""What the rows have in common."""

import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil

from bench import wrk
from bench.measure import Contestant, Result, Sample, alternate
from bench.peers.running import Peer, Peers
from bench.processes import Processes
from bench.wrk import Answered, Maker

MANY = 100_000
"""Users that reads and writes are spread over."""

ZIPF = 0.99

MIX: Maker = ("mix", 1, MANY, ZIPF, 0.05)

Say = Callable[[str], None]


@dataclass
class Bench:
    peers: Peers
    say: Say
    quick: bool
    users: int
    """In the table, once it is full."""

    minutes: float
    """Of the long run."""

    results: dict[str, Result] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def seconds(self) -> int:
        """Of one round. At three, no circle of MANY users comes round before an edge's five seconds are over, up to
        20,000 reads/s; what was read of Redis is counted besides (bench/rows/reads.py)."""
        return 1 if self.quick else 3

    def alternate(self, *contestants: Contestant, warmup: int = 1) -> dict[str, list[Sample]]:
        return alternate(contestants, rounds=self.rounds, seconds=self.seconds, warmup=warmup, say=self.say)

    @property
    def warmup_again(self) -> int:
        """Seconds, for those who were asked in the rows before."""
        return 0 if self.quick else 1

    def offset(self, name: str) -> int:
        """The first id that this contestant has not asked for yet."""
        return self._asked.get(name, 0)

    def asked(self, name: str, requests: int) -> None:
        # And those that were on their way at the end, which nobody counts.
        self._asked[name] = self.offset(name) + requests + 200


def at(peer: Peer, maker: Maker, *, connections: int = 64, name: str = "") -> Contestant:
    def load(seconds: int) -> Answered:
        return wrk.closed(peer.url, maker, seconds, connections=connections)

    return Contestant(name or peer.name, load, peer.roots)


def moving(bench: Bench, peer: Peer, kind: str, count: int) -> Contestant:
    """Over so many users in a circle; each round goes on where the last one ended, so that none is asked for twice as
    far as there are enough."""
    name = f"{kind} {count} {peer.name}"

    def load(seconds: int) -> Answered:
        answered = wrk.closed(peer.url, (kind, 1, count, bench.offset(name)), seconds)
        bench.asked(name, answered.requests)
        return answered

    return Contestant(peer.name, load, peer.roots)


def halves() -> tuple[list[int], list[int]]:
    """Cores for servers, and for the load generator: so a server is what is measured where it answers faster than wrk
    asks."""
    cores = sorted(psutil.Process().cpu_affinity())
    half = max(1, len(cores) // 2)
    return cores[:half], cores[half:] or cores


@contextlib.contextmanager
def pinned(peers: list[Peer], cores: list[int]) -> Iterator[None]:
    before: list[tuple[psutil.Process, list[int]]] = []
    try:
        for peer in peers:
            before += Processes(peer.roots).pin(cores).items()
        yield
    finally:
        for process, own in reversed(before):  # peers have processes in common
            with contextlib.suppress(psutil.Error):
                process.cpu_affinity(own)


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
