"""Reads and writes together, and latencies at rates below the capacity."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from bench import wrk
from bench.measure import Line, Ratio, Result, Subject, measure
from bench.peers.running import LONG_EDGE_TTL, Peer
from bench.rows.base import (
    ACTIVE_USERS,
    MIX,
    Bench,
    add_latencies,
    closed_loop,
    compare_with,
    pinned,
    present,
    split_cores,
)
from bench.wrk import RequestKind

LOADS_PERCENT = (50, 80)
"""Rates of the open loop, in per cent of the capacity of each subject."""


def mix(bench: Bench) -> Result:
    """Send 95 reads to 5 writes, over 100,000 users by Zipf's law. Redis has all of them when the row begins."""
    peers = bench.peers
    fill_redis(bench)
    row = "mix 95/5"
    may_be_stale: dict[Peer, float | None] = {
        peers.cache_aside: 1.0,
        peers.flask_caching: 1.0,
        peers.fastapi: 1.0,
        peers.fastify: 1.0,
        peers.go: None,
        peers.varnish: 1.0,
        peers.proxy_cache: 1.0,
    }
    consistent = (peers.velikiy, peers.cache_aside_uncached)
    subjects = [closed_loop(peer, MIX) for peer in (*consistent, *present([*may_be_stale]))]
    samples = bench.alternate(*subjects, warmup=bench.second_warmup)
    lines = [compare_with(row, samples, "velikiy", peers.cache_aside_uncached, 5)]
    for peer, target in may_be_stale.items():
        lines.append(compare_with(row, samples, "velikiy", peer, target, f"velikiy / {peer.name} (may be stale)"))
    return add_latencies(bench, Result(lines, samples), row, subjects)


def long_mix(bench: Bench) -> Result:
    """Send the mix while edges use entries for an hour, to an edge that has read each user once. An hour of such a load
    leaves it so; the peers have all users in Redis as well."""
    peers = bench.peers
    fill_redis(bench)
    row = f"mix, EDGE_TTL={LONG_EDGE_TTL}"
    others: dict[Peer, float | None] = {peers.fastapi: None, peers.fastify: None, peers.go: 1.2}
    bench.show("changing EDGE_TTL")
    with peers.long_edge_ttl():
        bench.show("filling the edge")
        read = 0
        while read < ACTIVE_USERS:
            read += wrk.closed_loop(peers.velikiy.url, ("ids", 1, ACTIVE_USERS, read), 2).requests
        subjects = [closed_loop(peer, MIX) for peer in (peers.velikiy, *present([*others]))]
        samples = bench.alternate(*subjects, warmup=bench.second_warmup)
        lines = [
            compare_with(row, samples, "velikiy", peer, target, f"velikiy / {peer.name} (may be stale)")
            for peer, target in others.items()
        ]
        return add_latencies(bench, Result(lines, samples), row, subjects)


def fill_redis(bench: Bench) -> None:
    if "redis" not in bench.results:  # that row fills it
        bench.show("filling Redis")
        bench.peers.fill_redis(ACTIVE_USERS)


@dataclass(frozen=True)
class Scene:
    row: str
    """The row whose closed loop measures the capacity of each peer."""

    peers: list[Peer]
    kind: Callable[[Bench, Peer], RequestKind]


def one_user(_: Bench, __: Peer) -> RequestKind:
    return ("one", "/users/2")


def next_ids(bench: Bench, peer: Peer) -> RequestKind:
    return ("ids", 1, ACTIVE_USERS, bench.offset(f"ids {ACTIVE_USERS} {peer.name}"))


def mixed(_: Bench, __: Peer) -> RequestKind:
    return MIX


def latency(bench: Bench) -> Result:
    """Run the open loop at 50 and 80 % of the capacity that each subject reached in the closed loop.

    `return 200` at the rate of velikiy shows what the load generator itself adds.
    """
    peers = bench.peers
    scenes = {
        "edge hit": Scene("hit", [peers.velikiy, peers.proxy_cache, peers.varnish], one_user),
        "Redis hit": Scene("redis", [peers.velikiy, peers.cache_aside, peers.fastapi], next_ids),
        "mix 95/5": Scene("mix", [peers.velikiy, peers.cache_aside_uncached, peers.cache_aside, peers.fastapi], mixed),
    }
    lines = []
    entries = []
    for name, scene in scenes.items():
        if scene.row not in bench.results:
            continue
        closed = bench.results[scene.row].samples
        for share in LOADS_PERCENT:
            for peer, capacity_of in [*((peer, peer) for peer in scene.peers), (peers.limit, peers.velikiy)]:
                rate = share / 100 * statistics.median(sample.rate for sample in closed[capacity_of.name])
                bench.show(f"{name}, {share} %: {peer.name}")
                sample = measure(open_loop(bench, scene, peer, rate), 1 if bench.quick else 6)
                what = "return 200 at velikiy's rate" if peer is peers.limit else peer.name
                entries.append({"scene": name, "peer": what, "share": share, "rate": round(rate), **sample.as_json()})
                if share == LOADS_PERCENT[-1]:
                    lines.append(
                        Line(f"at {share} %", f"{name}: p99 of {what}", Ratio.of([sample.load.p99]), unit="ms")
                    )
    return Result(lines, more={"open": entries})


def open_loop(bench: Bench, scene: Scene, peer: Peer, rate: float) -> Subject:
    kind = one_user(bench, peer) if peer is bench.peers.limit else scene.kind(bench, peer)
    servers, load_cores = split_cores()

    def run(seconds: int) -> wrk.LoadResult:
        with ExitStack() as context:
            is_split = scene.row == "hit"  # as in the closed loop
            if is_split:
                context.enter_context(pinned([peer], servers))
            cores = load_cores if is_split else None
            result = wrk.open_loop(peer.url, kind, seconds, rate=rate, warmup=1, cores=cores)
        bench.advance(f"ids {ACTIVE_USERS} {peer.name}", result.requests)
        return result

    return Subject(peer.name, run, peer.roots)
