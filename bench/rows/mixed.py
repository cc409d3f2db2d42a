"""Reads and writes together; and how long answers take at rates below the highest."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from bench import wrk
from bench.measure import Contestant, Line, Ratio, Result, line, measured
from bench.peers.running import Peer
from bench.rows.base import MANY, MIX, Bench, at, halves, pinned
from bench.wrk import Maker

SHARES = (50, 80)
"""Per cent of what each one carries."""


def mix(bench: Bench) -> Result:
    """95 reads to 5 writes, over 100,000 users by Zipf's law; all of them are in Redis when it begins."""
    peers = bench.peers
    if "redis" not in bench.results:
        bench.say("filling Redis")
        peers.fill_redis(MANY)
    names = (peers.velikiy, peers.classic_correct, peers.classic, peers.flask_caching, peers.fastapi)
    samples = bench.alternate(*(at(peer, MIX) for peer in (*names, peers.varnish, peers.stock)))
    lines = [line("mix 95/5", "to the classic made correct", samples, "velikiy", peers.classic_correct.name, 5)]
    for peer in (*names[2:], peers.varnish, peers.stock):
        lines.append(line("mix 95/5", f"to {peer.name}, which may be stale", samples, "velikiy", peer.name, 1.0))
    return Result(lines, samples)


@dataclass(frozen=True)
class Scene:
    row: str
    """Whose closed loop says what each one carries."""

    peers: list[Peer]
    maker: Callable[[Bench, Peer], Maker]


def one(_: Bench, __: Peer) -> Maker:
    return ("one", "/users/2")


def next_ids(bench: Bench, peer: Peer) -> Maker:
    return ("ids", 1, MANY, bench.offset(f"ids {MANY} {peer.name}"))


def mixed(_: Bench, __: Peer) -> Maker:
    return MIX


def latency(bench: Bench) -> Result:
    """The open loop, at 50 and 80 % of what each one carried in the closed loop; and, for what the load generator
    itself adds, `return 200` at the same rate as ours."""
    peers = bench.peers
    scenes = {
        "edge hit": Scene("hit", [peers.velikiy, peers.stock, peers.varnish], one),
        "Redis hit": Scene("redis", [peers.velikiy, peers.classic, peers.fastapi], next_ids),
        "mix 95/5": Scene("mix", [peers.velikiy, peers.classic_correct, peers.classic, peers.fastapi], mixed),
    }
    if bench.quick:  # no target is for latencies, and this one takes ten seconds of five minutes
        del scenes["Redis hit"]
    lines = []
    kept = []
    for name, scene in scenes.items():
        if scene.row not in bench.results:
            continue
        closed = bench.results[scene.row].samples
        for share in SHARES[-1:] if bench.quick else SHARES:
            for peer, of in [*((peer, peer) for peer in scene.peers), (peers.limit, peers.velikiy)]:
                rate = share / 100 * statistics.median(sample.rate for sample in closed[of.name])
                bench.say(f"{name}, {share} %: {peer.name}")
                found = measured(steady(bench, scene, peer, rate), 1 if bench.quick else 6)
                what = "return 200 at our rate" if peer is peers.limit else peer.name
                kept.append({"scene": name, "peer": what, "share": share, "rate": round(rate), **found.kept()})
                if share == SHARES[-1]:
                    lines.append(
                        Line(f"at {share} %", f"{name}: p99 of {what}", Ratio.of([found.answered.p99]), unit="ms")
                    )
    return Result(lines, more={"open": kept})


def steady(bench: Bench, scene: Scene, peer: Peer, rate: float) -> Contestant:
    maker = ("one", "/users/2") if peer is bench.peers.limit else scene.maker(bench, peer)
    servers, load = halves()

    def run_load(seconds: int) -> wrk.Answered:
        with ExitStack() as context:
            apart = scene.row == "hit"  # as in the closed loop
            if apart:
                context.enter_context(pinned([peer], servers))
            answered = wrk.open_loop(peer.url, maker, seconds, rate=rate, warmup=1, cores=load if apart else None)
        bench.asked(f"ids {MANY} {peer.name}", answered.requests)
        return answered

    return Contestant(peer.name, run_load, peer.roots)
