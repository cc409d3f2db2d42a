"""The cost of each additional edge, and the time that a start takes."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

from bench import wrk
from bench.measure import Line, Ratio, Result, Sample, Subject, measure
from bench.peers.running import REDIS_TTL
from bench.rows.base import Bench
from testkit.stack import run

APP_GROUPS = ("app", "postgres", "redis", "relay")
"""The groups of processes that a write keeps busy on the app's machines, if the edges have machines of their own."""


def edges(bench: Bench) -> Result:
    """Measure the cost of a write for each additional edge, as the slope of a line through one round of each number of
    edges.

    The stack restarts with each number, first upwards and then downwards: a drift of the machine tilts the lines of
    both directions in opposite ways.
    """
    counts = [1, 4] if bench.quick else [1, 2, 4, 8]
    found: dict[int, list[Sample]] = defaultdict(list)
    for count in counts if bench.quick else [*counts, *reversed(counts)]:
        bench.show(f"{count} edges")
        restart(bench, count)
        writer = one_writer(bench, f"{count} edges")
        writer.run(1)
        for _ in range(3):
            found[count].append(measure(writer, 1 if bench.quick else 2))
    metrics: dict[str, Callable[[Sample], float]] = {
        "latency of a write": lambda sample: sample.load.p50,
        "CPU of the app's machines": lambda sample: cpu_ms(sample, *APP_GROUPS),
        "CPU of all edges": lambda sample: cpu_ms(sample, "edge", "supervisor"),
    }
    lines = []
    rounds = list(zip(*found.values(), strict=True))
    for what, metric in metrics.items():
        costs = [slope([*zip(found, map(metric, samples), strict=True)]) for samples in rounds]
        lines.append(Line("edges", f"{what}, per additional edge", Ratio.of(costs), unit="ms"))
    # If each edge has its own machine, all writes share the app's machines.
    for count in (counts[0], counts[-1]):
        rates = [1000 / cpu_ms(sample, *APP_GROUPS) for sample in found[count]]
        edges_of = f"{count} edge{'s' if count > 1 else ''}"
        lines.append(Line("edges", f"writes per core of the app's machines, {edges_of}", Ratio.of(rates), unit="/s"))
    groups = list(found[counts[0]][0].cpu)
    split = {
        str(count): {
            "p50": round(statistics.median(sample.load.p50 for sample in samples), 3),
            "cpu_ms": {it: round(statistics.median(cpu_ms(sample, it) for sample in samples), 3) for it in groups},
        }
        for count, samples in found.items()
    }
    return Result(lines, {f"edges: {count}": samples for count, samples in found.items()}, more={"edges": split})


def restart(bench: Bench, count: int) -> None:
    stack = bench.peers.stack
    options = ("--edges", str(count), "--apps", "1", "--data", str(stack.data))
    started = run("up", "--detach", *options, REDIS_TTL=str(REDIS_TTL))
    assert started.returncode == 0, started.stderr
    stack.refresh()


def cpu_ms(sample: Sample, *groups: str) -> float:
    """Return the CPU time of one write."""
    return 1000 * sum(sample.cpu.get(group, 0.0) for group in groups) / sample.load.requests


def slope(points: list[tuple[int, float]]) -> float:
    """Return the slope of the line that fits these points best."""
    middle = statistics.fmean(x for x, _ in points)
    around = sum((x - middle) ** 2 for x, _ in points)
    return sum((x - middle) * y for x, y in points) / around


def one_writer(bench: Bench, name: str) -> Subject:
    url = bench.peers.stack.edge

    def run_load(seconds: int) -> wrk.LoadResult:
        return wrk.closed_loop(url, ("put", 1, bench.users, 0), seconds, connections=1, threads=1)

    return Subject(name, run_load, bench.peers.stack_roots())


def start(bench: Bench) -> Result:
    """Measure `./run up` with a new database, on a machine that has all packages and environments."""
    seconds = []
    for number in range(1 if bench.quick else 3):
        bench.show(f"start {number + 1}")
        data = bench.peers.directory / f"start{number}"
        try:
            began = time.monotonic()
            started = run("up", "--detach", "--data", str(data), "--port", "31000")
            seconds.append(time.monotonic() - began)
            assert started.returncode == 0, started.stderr
        finally:
            run("down", "--wipe", "--data", str(data))
    return Result([Line("./run up", "with a new database", Ratio.of(seconds), 5, at_most=True, unit="s")])
