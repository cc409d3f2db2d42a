"""This checkout beside another one, `./run bench --beside DIR`: a change that is not about speed is measured in one run
with the commit before it, in rounds that alternate."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench import wrk
from bench.measure import Contestant, Result, alternate, line
from bench.peers.running import Peer, Peers, peers
from bench.rows.base import MANY, MIX, Bench, at, halves, moving, pinned
from bench.wrk import Answered

TARGET = 0.95
"""A row below this has become slower."""

ROUNDS = 15
"""More than a row of the table has: the difference that is looked for is small."""

SECONDS = 1

THIS, OTHER = "this checkout", "the other"


def hit(_: Bench, peer: Peer) -> Contestant:
    servers, load = halves()

    def run_load(seconds: int) -> Answered:
        with pinned([peer], servers):
            return wrk.closed(peer.url, ("one", "/users/2"), seconds, threads=len(load), cores=load)

    return Contestant(peer.name, run_load, peer.roots)


ROWS: dict[str, Callable[[Bench, Peer], Contestant]] = {
    "edge hit": hit,
    "first page": lambda _, peer: at(peer, ("one", "/users?limit=20")),
    "Redis hit": lambda bench, peer: moving(bench, peer, "ids", MANY),
    "mix 95/5": lambda _, peer: at(peer, MIX),
    "full miss, app alone": lambda bench, peer: moving(bench, peer, "ids", bench.users),
    "full miss": lambda bench, peer: moving(bench, peer, "ids", bench.users),
    "PUT, 2 edges": lambda bench, peer: moving(bench, peer, "put", bench.users),
}
"""In the order in which they run: the first ones need Redis filled, the misses need it empty."""


def beside(bench: Bench, root: Path) -> Iterator[Result]:
    """Yield the result of each row."""
    with peers(root=root) as other:
        both = {THIS: bench.peers, OTHER: other}
        for name, of in both.items():
            bench.say(f"filling the table of {name} with {bench.users:,} users")
            of.seed(bench.users)
            of.fill_redis(MANY)
        for row, load in ROWS.items():
            if "miss" in row:
                for of in both.values():
                    of.forget()
            contestants = [load(bench, replace(_asked(row, of), name=name)) for name, of in both.items()]
            samples = alternate(contestants, rounds=ROUNDS, seconds=SECONDS, warmup=1, say=bench.say)
            yield Result([line(row, "to the other checkout", samples, THIS, OTHER, TARGET)], samples)


def _asked(row: str, of: Peers) -> Peer:
    return of.velikiy_app if "alone" in row else of.velikiy
