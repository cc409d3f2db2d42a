"""Compare this checkout with another checkout: `./run bench --beside DIR`.

A change that is not about speed is measured against the commit before it, in one run with alternating rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.measure import Result, Subject, alternate, compare_rates
from bench.peers.running import Peer, Peers, peers
from bench.rows.base import ACTIVE_USERS, MIX, Bench, closed_loop, cycling, edge_hits, pinned, split_cores
from bench.wrk import LoadResult

TARGET = 0.95
"""A row below this ratio has become slower."""

ROUNDS = 15
"""More rounds than a row of the table has, because the difference is small."""

ROUND_S = 1

THIS, OTHER = "this checkout", "the other checkout"


def hit(_: Bench, peer: Peer) -> Subject:
    subject = edge_hits(peer)
    servers, _load = split_cores()

    def run(seconds: int) -> LoadResult:
        with pinned([peer], servers):
            return subject.run(seconds)

    return replace(subject, run=run)


ROWS: dict[str, Callable[[Bench, Peer], Subject]] = {
    "edge hit": hit,
    "first page": lambda _, peer: closed_loop(peer, ("one", "/users?limit=20")),
    "Redis hit": lambda bench, peer: cycling(bench, peer, "ids", ACTIVE_USERS),
    "mix 95/5": lambda _, peer: closed_loop(peer, MIX),
    "full miss, app alone": lambda bench, peer: cycling(bench, peer, "ids", bench.users),
    "full miss": lambda bench, peer: cycling(bench, peer, "ids", bench.users),
    "PUT, 2 edges": lambda bench, peer: cycling(bench, peer, "put", bench.users),
}
"""In the order in which they run: the first rows need a filled Redis, the misses need an empty one."""


def beside(bench: Bench, root: Path) -> Iterator[Result]:
    """Yield the result of each row. `root` is the other checkout."""
    with peers(root=root) as other:
        both = {THIS: bench.peers, OTHER: other}
        for name, side in both.items():
            bench.show(f"filling the table of {name} with {bench.users:,} users")
            side.seed(bench.users)
            side.fill_redis(ACTIVE_USERS)
        for row, make_subject in ROWS.items():
            if "miss" in row:
                for side in both.values():
                    side.empty_redis()
            subjects = [make_subject(bench, replace(_peer(row, side), name=name)) for name, side in both.items()]
            samples = alternate(subjects, rounds=ROUNDS, seconds=ROUND_S, warmup=1, show=bench.show)
            yield Result([compare_rates(row, f"{THIS} / {OTHER}", samples, THIS, OTHER, TARGET)], samples)


def _peer(row: str, side: Peers) -> Peer:
    return side.velikiy_app if "alone" in row else side.velikiy
