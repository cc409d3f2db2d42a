"""Reads from an edge, from Redis, and from PostgreSQL."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from bench import pgbench
from bench.measure import Line, Ratio, Result, compare, compare_rates
from bench.peers.running import Peer
from bench.rows.base import (
    ACTIVE_USERS,
    Bench,
    add_latencies,
    compare_with,
    cycling,
    edge_hits,
    pinned,
    present,
    split_cores,
)
from bench.wrk import LoadResult
from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, wait_until

HIT_GROUPS = ("edge", "supervisor")
"""Groups of processes that work at an edge hit: the supervisor writes the edge's log."""


def hit(bench: Bench) -> Result:
    """Read one user again and again from the first cache. Servers and load generator have half of the cores each."""
    peers = bench.peers
    servers, _load = split_cores()
    compared = present([peers.velikiy, peers.proxy_cache, peers.limit, peers.varnish, peers.haproxy])
    subjects = [
        replace(edge_hits(peer), roots={group: pids for group, pids in peer.roots.items() if group in HIT_GROUPS})
        for peer in compared
    ]
    with pinned(compared, servers):
        samples = bench.alternate(*subjects)
        cpu = compare(samples, "velikiy", "Varnish", lambda sample: sample.per_cpu_second)
        lines = [
            compare_rates("edge hit", "velikiy / proxy_cache", samples, "velikiy", "proxy_cache", 1.1),
            compare_with("edge hit", samples, "velikiy", peers.haproxy, 1.3),
            compare_rates("edge hit", "velikiy / return 200", samples, "velikiy", "return 200", 0.85),
            Line("edge hit", "velikiy / Varnish, per CPU second", cpu, 1.5),
        ]
        caches = [subject for subject in subjects if subject.name != peers.limit.name]
        return add_latencies(bench, Result(lines, samples), "edge hit", caches)


def metrics(bench: Bench) -> Result:
    """Read one user again and again from an edge with metrics and from an edge without."""
    app = urlsplit(bench.peers.stack.app).netloc
    servers, _load = split_cores()
    with ExitStack() as context:
        peers = []
        for name, setting in (("with metrics", "on"), ("without metrics", "off")):
            url, data = context.enter_context(running_edge(app, ROOT / "edge", METRICS=setting))
            wait_until(lambda url=url: has_cache_lease(url))  # type: ignore[misc]
            peers.append(Peer(name, url, {"edge": [int((Path(data) / "nginx.pid").read_text())]}))
        with pinned(peers, servers):
            samples = bench.alternate(*(edge_hits(peer) for peer in peers))
    return Result(
        [compare_rates("metrics", "edge hits with / without", samples, "with metrics", "without metrics", 0.97)],
        samples,
    )


def redis_hit(bench: Bench) -> Result:
    """Read users one after the other. Redis has all of them and no edge has any: when a user is read again, the 5 s for
    which edges cache are over."""
    peers = bench.peers
    bench.show("filling Redis")
    peers.fill_redis(ACTIVE_USERS)
    shares: list[float] = []
    velikiy = cycling(bench, peers.velikiy, "ids", ACTIVE_USERS)

    def run_counted(seconds: int) -> LoadResult:
        before = peers.redis_reads()
        load = velikiy.run(seconds)
        shares.append((peers.redis_reads() - before) / load.requests)
        return load

    others: dict[Peer, float | None] = {
        peers.cache_aside: 5,
        peers.flask_caching: None,
        peers.fastapi: None,
        peers.fastify: 1.0,
        peers.go: None,
    }
    subjects = [
        replace(velikiy, run=run_counted),
        *(cycling(bench, peer, "ids", ACTIVE_USERS) for peer in present([*others])),
    ]
    samples = bench.alternate(*subjects)
    lines = [compare_with("Redis hit", samples, "velikiy", peer, target) for peer, target in others.items()]
    lines.append(Line("Redis hit", "reads that reach Redis", Ratio.of(shares[1:]), unit="of the reads"))
    return add_latencies(bench, Result(lines, samples), "Redis hit", subjects)


def miss(bench: Bench) -> Result:
    """Read each user once, while no cache has any. The load goes to the ports of the apps: each app reads Redis, then
    PostgreSQL, and fills Redis."""
    peers = bench.peers
    peers.empty_redis()
    others: dict[Peer, float | None] = {
        peers.fastapi: 2.0,
        peers.flask_caching: None,
        peers.cache_aside_app: 1.5,
        peers.fastify: 0.7,
        peers.go: None,
    }
    alone = [cycling(bench, peer, "ids", bench.users) for peer in (peers.velikiy_app, *present([*others]))]
    samples = bench.alternate(
        *alone,
        *(cycling(bench, peer, "ids", bench.users) for peer in (peers.velikiy, peers.cache_aside)),
        pgbench.subject(peers, "select", bench.users),
        warmup=bench.second_warmup,
    )
    app = peers.velikiy_app.name
    lines = []
    for peer, target in others.items():
        what = f"velikiy / {peer.name.removesuffix(', app alone')}, apps alone"
        lines.append(compare_with("full miss", samples, app, peer, target, what))
    lines += [
        compare_rates("full miss", "velikiy / cache-aside, through edges", samples, "velikiy", "cache-aside", 1.5),
        compare_rates("full miss", "velikiy through an edge / app alone", samples, "velikiy", app),
        compare_rates("full miss", "velikiy, app alone / pgbench SELECT", samples, app, "pgbench select"),
    ]
    return add_latencies(bench, Result(lines, samples), "full miss", alone)
