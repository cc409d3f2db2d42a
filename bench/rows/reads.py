"""Reads from an edge, from Redis, and from PostgreSQL."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from bench import pgbench
from bench.measure import Line, Ratio, Result, Subject, compare, compare_rates
from bench.peers.running import Peer
from bench.rows.base import ACTIVE_USERS, Bench, cycling, edge_hits, pinned, split_cores
from bench.wrk import LoadResult
from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import ROOT, wait_until

HIT_GROUPS = ("edge", "supervisor")
"""Groups of processes that work at an edge hit: the supervisor writes the edge's log."""


def hit(bench: Bench) -> Result:
    """Read one user again and again from the first cache. Servers and load generator have half of the cores each."""
    peers = bench.peers
    servers, _load = split_cores()
    compared = [peers.velikiy, peers.proxy_cache, peers.limit, peers.varnish]
    subjects = [
        replace(edge_hits(peer), roots={group: pids for group, pids in peer.roots.items() if group in HIT_GROUPS})
        for peer in compared
    ]
    with pinned(compared, servers):
        samples = bench.alternate(*subjects)
    cpu = compare(samples, "velikiy", "Varnish", lambda sample: sample.per_cpu_second)
    return Result(
        [
            compare_rates("edge hit", "velikiy / proxy_cache", samples, "velikiy", "proxy_cache", 1.1),
            compare_rates("edge hit", "velikiy / return 200", samples, "velikiy", "return 200", 0.65),
            Line("edge hit", "velikiy / Varnish, per CPU second", cpu, 1.5),
        ],
        samples,
    )


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

    others = (peers.cache_aside, peers.flask_caching, peers.fastapi)
    samples = bench.alternate(
        Subject(velikiy.name, run_counted, velikiy.roots),
        *(cycling(bench, peer, "ids", ACTIVE_USERS) for peer in others),
    )
    return Result(
        [
            compare_rates("Redis hit", "velikiy / cache-aside", samples, "velikiy", "cache-aside", 5),
            compare_rates("Redis hit", "velikiy / Flask-Caching", samples, "velikiy", "Flask-Caching"),
            compare_rates("Redis hit", "velikiy / FastAPI", samples, "velikiy", "FastAPI"),
            Line("Redis hit", "reads that reach Redis", Ratio.of(shares[1:]), unit="of the reads"),
        ],
        samples,
    )


def miss(bench: Bench) -> Result:
    """Read each user once, while no cache has any. The load goes to the ports of the apps: each app reads Redis, then
    PostgreSQL, and fills Redis."""
    peers = bench.peers
    peers.empty_redis()
    alone = (peers.velikiy_app, peers.fastapi, peers.flask_caching, peers.cache_aside_app)
    through_edge = (peers.velikiy, peers.cache_aside)
    samples = bench.alternate(
        *(cycling(bench, peer, "ids", bench.users) for peer in (*alone, *through_edge)),
        pgbench.subject(peers, "select", bench.users),
        warmup=bench.second_warmup,
    )
    app = peers.velikiy_app.name
    cache_aside_app = peers.cache_aside_app.name
    return Result(
        [
            compare_rates("full miss", "velikiy / FastAPI, apps alone", samples, app, "FastAPI", 1.0),
            compare_rates("full miss", "velikiy / Flask-Caching, apps alone", samples, app, "Flask-Caching"),
            compare_rates("full miss", "velikiy / cache-aside, apps alone", samples, app, cache_aside_app, 1.5),
            compare_rates("full miss", "velikiy / cache-aside, through edges", samples, "velikiy", "cache-aside", 1.5),
            compare_rates("full miss", "velikiy through an edge / app alone", samples, "velikiy", app),
            compare_rates("full miss", "velikiy, app alone / pgbench SELECT", samples, app, "pgbench select"),
        ],
        samples,
    )
