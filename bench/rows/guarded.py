"""Hits with API keys, and hits beside a crowd that would take everything."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bench import wrk
from bench.measure import Line, Ratio, Result, Subject, compare, compare_rates
from bench.peers.running import Peer, roots_of
from bench.rows.base import Bench, edge_hits, pinned, split_cores
from bench.wrk import LoadResult
from testkit.stack import ROOT, run, running

SLOW_CONNECTIONS = 500
SEARCHING_CLIENTS = 64

CALM, CROWDED = "calm", "crowded"


def keys(bench: Bench) -> Result:
    """Read one user again and again with an API key, and without keys from another stack with as many edges."""
    servers, load = split_cores()
    off = edge_hits(bench.peers.velikiy)
    with running("--edges", "2", "--apps", "1", AUTH="all", ALLOWED_HOSTS="bench") as stack:
        created = run("velikiy", "--data", str(stack.data), "keys", "create", "bench", "--scope", "read")
        assert created.returncode == 0, created.stderr
        token, peer = created.stdout.strip(), Peer("AUTH=all", stack.edge, roots_of(stack))

        def run_keyed(seconds: int) -> LoadResult:
            kind = ("one_keyed", "/users/2", token)
            return wrk.closed_loop(peer.url, kind, seconds, threads=len(load), cores=load)

        subjects = [replace(off, name="AUTH=off"), Subject("AUTH=all", run_keyed, peer.roots)]
        with pinned([bench.peers.velikiy, peer], servers):
            samples = bench.alternate(*subjects)
    assert not sum(each.load.failed for each in samples["AUTH=all"]), "requests with a key failed"
    return Result([compare_rates("keys", "hit, AUTH=all / AUTH=off", samples, "AUTH=all", "AUTH=off", 0.9)], samples)


def crowd(bench: Bench) -> Result:
    """Read one user over four connections, in calm and while strangers hold slow connections and search."""
    peer = bench.peers.velikiy

    def hits(seconds: int) -> LoadResult:
        return wrk.closed_loop(peer.url, ("one", "/users/2"), seconds, connections=4, threads=1)

    def hits_in_crowd(seconds: int) -> LoadResult:
        with crowded(peer.url):
            return hits(seconds)

    samples = bench.alternate(Subject(CALM, hits, peer.roots), Subject(CROWDED, hits_in_crowd, peer.roots))
    failed = Ratio.of([each.load.failed / each.load.requests for each in samples[CROWDED]])
    p50 = compare(samples, CROWDED, CALM, lambda sample: sample.load.p50)
    p99 = compare(samples, CROWDED, CALM, lambda sample: sample.load.p99)
    others = f"{SLOW_CONNECTIONS} slow connections and {SEARCHING_CLIENTS} searching clients"
    return Result(
        [
            Line("crowd", f"p50 of a hit beside {others} / in calm", p50, 2, at_most=True),
            Line("crowd", f"p99 of a hit beside {others} / in calm", p99, 2, at_most=True),
            Line("crowd", "hits beside them that failed", failed, 0, at_most=True, unit="of the hits"),
        ],
        samples,
    )


@contextmanager
def crowded(url: str) -> Iterator[None]:
    """Run bench/crowd.py, once all of its connections are open and its first searches are answered."""
    command = [sys.executable, "-m", "bench.crowd", url, str(SLOW_CONNECTIONS), str(SEARCHING_CLIENTS)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the crowd did not come"
            time.sleep(1)
            yield
            assert process.poll() is None, "the crowd has left"
        finally:
            process.kill()
