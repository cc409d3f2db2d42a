"""What each edge more costs; and how soon all of it is ready."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

from bench import wrk
from bench.measure import Contestant, Line, Ratio, Result, Sample, measured
from bench.peers.running import REDIS_TTL
from bench.rows.base import Bench
from testkit.stack import run

APP = ("app", "postgres", "redis", "relay")
"""What a write keeps busy where the edges are on machines of their own."""


def edges(bench: Bench) -> Result:
    """What each edge more costs a write, by a line through one round of each number of edges. The stack is started anew
    with each, and a second time on the way back: what the machine does meanwhile tilts those lines the other way."""
    counts = [1, 4] if bench.quick else [1, 2, 4, 8]
    found: dict[int, list[Sample]] = defaultdict(list)
    for count in counts if bench.quick else [*counts, *reversed(counts)]:
        bench.say(f"{count} edges")
        restart(bench, count)
        alone = one_writer(bench, f"{count} edges")
        alone.load(1)
        for _ in range(3):
            found[count].append(measured(alone, 1 if bench.quick else 2))
    everything: dict[str, Callable[[Sample], float]] = {
        "latency of a write": lambda sample: sample.answered.p50,
        "CPU of the app's machines": lambda sample: cpu(sample, *APP),
        "CPU of all edges": lambda sample: cpu(sample, "edge", "supervisor"),
    }
    lines = []
    rounds = list(zip(*found.values(), strict=True))
    for what, of in everything.items():
        costs = [slope([*zip(found, map(of, samples), strict=True)]) for samples in rounds]
        lines.append(Line("edges", f"{what}, for each edge more", Ratio.of(costs), unit="ms"))
    # Where each edge has its own machine, these are the ones that writes share.
    for count in (counts[0], counts[-1]):
        rates = [1000 / cpu(sample, *APP) for sample in found[count]]
        lines.append(Line("edges", f"writes per core, edges elsewhere: {count}", Ratio.of(rates), unit="/s"))
    groups = list(found[counts[0]][0].cpu)
    split = {
        str(count): {
            "p50": round(statistics.median(sample.answered.p50 for sample in samples), 3),
            "cpu_ms": {it: round(statistics.median(cpu(sample, it) for sample in samples), 3) for it in groups},
        }
        for count, samples in found.items()
    }
    return Result(lines, {f"edges: {count}": samples for count, samples in found.items()}, more={"edges": split})


def restart(bench: Bench, count: int) -> None:
    ours = bench.peers.ours
    options = ("--edges", str(count), "--apps", "1", "--data", str(ours.data))
    started = run("up", "--detach", *options, REDIS_TTL=str(REDIS_TTL))
    assert started.returncode == 0, started.stderr
    ours.refresh()


def cpu(sample: Sample, *groups: str) -> float:
    """Milliseconds for each write."""
    return 1000 * sum(sample.cpu.get(group, 0.0) for group in groups) / sample.answered.requests


def slope(points: list[tuple[int, float]]) -> float:
    """Of the line that fits best."""
    middle = statistics.fmean(x for x, _ in points)
    around = sum((x - middle) ** 2 for x, _ in points)
    return sum((x - middle) * y for x, y in points) / around


def one_writer(bench: Bench, name: str) -> Contestant:
    url = bench.peers.ours.edge

    def load(seconds: int) -> wrk.Answered:
        return wrk.closed(url, ("put", 1, bench.users, 0), seconds, connections=1, threads=1)

    return Contestant(name, load, bench.peers.roots_of_ours())


def start(bench: Bench) -> Result:
    """`./run up` in the data folder that is there, on a machine that has all it needs."""
    seconds = []
    for number in range(1 if bench.quick else 3):
        bench.say(f"start {number + 1}")
        data = bench.peers.place / f"start{number}"
        try:
            began = time.monotonic()
            started = run("up", "--detach", "--data", str(data), "--port", "31000")
            seconds.append(time.monotonic() - began)
            assert started.returncode == 0, started.stderr
        finally:
            run("down", "--wipe", "--data", str(data))
    return Result([Line("./run up", "with a new database", Ratio.of(seconds), 5, at_most=True, unit="s")])
