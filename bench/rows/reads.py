"""Reads: out of an edge, out of Redis, out of PostgreSQL."""

from bench import pgbench, wrk
from bench.measure import Contestant, Line, Ratio, Result, compared, line
from bench.rows.base import MANY, Bench, halves, moving, pinned
from bench.wrk import Answered

HIT = ("edge", "supervisor")
"""What has work to do at a hit: our edge's log goes through the supervisor."""


def hit(bench: Bench) -> Result:
    """One user, again and again, out of the first cache. The servers have one core, the load generator the other."""
    peers = bench.peers
    servers, load = halves()
    contestants = []
    everybody = [peers.velikiy, peers.stock, peers.limit, peers.varnish]
    for peer in everybody:

        def run_load(seconds: int, url: str = peer.url) -> Answered:
            return wrk.closed(url, ("one", "/users/2"), seconds, threads=len(load), cores=load)

        contestants.append(Contestant(peer.name, run_load, {n: r for n, r in peer.roots.items() if n in HIT}))
    with pinned(everybody, servers):
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


def redis_hit(bench: Bench) -> Result:
    """Users one after the other, all of them in Redis, none of them at an edge: by the time that one is asked for
    again, the edges' 5 seconds are over."""
    peers = bench.peers
    bench.say("filling Redis")
    peers.fill_redis(MANY)
    shares: list[float] = []
    ours = moving(bench, peers.velikiy, "ids", MANY)

    def counted(seconds: int) -> Answered:
        before = peers.asked_of_redis()
        answered = ours.load(seconds)
        shares.append((peers.asked_of_redis() - before) / answered.requests)
        return answered

    others = (peers.classic, peers.flask_caching, peers.fastapi)
    samples = bench.alternate(
        Contestant(ours.name, counted, ours.roots), *(moving(bench, peer, "ids", MANY) for peer in others)
    )
    return Result(
        [
            line("Redis hit", "to the classic", samples, "velikiy", "classic", 5),
            line("Redis hit", "to Flask-Caching", samples, "velikiy", "Flask-Caching"),
            line("Redis hit", "to FastAPI", samples, "velikiy", "FastAPI"),
            Line("Redis hit", "asked of Redis, and not found at the edge", Ratio.of(shares[1:]), unit="of the reads"),
        ],
        samples,
    )


def miss(bench: Bench) -> Result:
    """Each user once, and nobody has them but PostgreSQL. The apps are asked at their own ports: each asks its Redis,
    then PostgreSQL, and puts into Redis what it got."""
    peers = bench.peers
    peers.forget()
    alone = (peers.velikiy_app, peers.fastapi, peers.flask_caching, peers.classic_app)
    through = (peers.velikiy, peers.classic)
    samples = bench.alternate(
        *(moving(bench, peer, "ids", bench.users) for peer in (*alone, *through)),
        pgbench.contestant(peers, "select", bench.users),
        warmup=bench.warmup_again,
    )
    ours = peers.velikiy_app.name
    return Result(
        [
            line("full miss", "to FastAPI, apps alone", samples, ours, "FastAPI", 1.0),
            line("full miss", "to Flask-Caching, apps alone", samples, ours, "Flask-Caching"),
            line("full miss", "to the classic, apps alone", samples, ours, peers.classic_app.name, 1.5),
            line("full miss", "to the classic, both through an edge", samples, "velikiy", "classic", 1.5),
            line("full miss", "through the edge, to the app alone", samples, "velikiy", ours),
            line("full miss", "to pgbench's SELECT, app alone", samples, ours, "pgbench select"),
        ],
        samples,
    )
