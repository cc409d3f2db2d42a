"""The cost of each additional edge, and the time that a start takes."""

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from bench import wrk
from bench.measure import Line, Ratio, Result, Sample, Subject, measure
from bench.processes import Processes
from bench.rows.base import Bench
from testkit.failpoints import has_cache_lease, running_edge
from testkit.stack import run, wait_until

APP_GROUPS = ("app", "postgres", "redis", "relay")
"""The groups of processes that a write keeps busy on the app's machines, if the edges have machines of their own."""

EDGE_GROUPS = ("edge", "supervisor")

COUNTS = [1, 2, 4, 8, 16, 32, 64]
WRITERS = (1, 16)
"""Connections that write at the same time. Writers that contend share the drops (velikiy/coherence/group_commit.py)."""


def edges(bench: Bench) -> Result:
    """Measure the cost of a write for each additional edge, as the slope of a line through one round of each number of
    edges.

    The number grows first and then falls: a drift of the machine tilts the lines of both directions in opposite ways.
    Renewals of cache leases cost time and no write, so the CPU time of an idle stack is measured as well, and is not
    counted for writes.
    """
    counts = [1, 4] if bench.quick else COUNTS
    seconds = 1 if bench.quick else 2
    found: dict[int, dict[int, list[Sample]]] = {writers: defaultdict(list) for writers in WRITERS}
    idle: dict[int, list[dict[str, float]]] = defaultdict(list)
    bench.peers.up("--edges", "1", "--apps", "1")
    with ExitStack() as context:
        farm = Farm(bench, context)
        for count in counts if bench.quick else [*counts, *reversed(counts)]:
            bench.show(f"{count} edges")
            farm.resize(count)
            idle[count].append(idle_cpu(farm.roots(), 2 * seconds))
            for writers in WRITERS:
                subject = writing(bench, f"{count} edges", writers, farm.roots())
                subject.run(1)
                for _ in range(3):
                    found[writers][count].append(without_idle(measure(subject, seconds), idle[count][-1]))
    lines = [*slopes(found[1]), *idle_slopes(idle)]
    # If each edge has its own machine, all writes share the app's machines.
    for writers, samples in found.items():
        for count in (counts[0], counts[-1]):
            rates = [1000 / cpu_ms(sample, *APP_GROUPS) for sample in samples[count]]
            what = f"{count} edge{'s' if count > 1 else ''}, {writers} writer{'s' if writers > 1 else ''}"
            lines.append(Line("edges", f"writes per core of the app's machines, {what}", Ratio.of(rates), unit="/s"))
    return Result(
        lines,
        {f"edges: {count}": samples for count, samples in found[1].items()},
        more={"edges": split(found[1]), "edges_shared": split(found[WRITERS[-1]])},
    )


class Farm:
    """The stack with its one edge, and further edges beside it: `./run` starts at most 16."""

    def __init__(self, bench: Bench, context: ExitStack) -> None:
        self.stack = bench.peers.stack
        self.context = context
        self.stack_roots = bench.peers.stack_roots()
        self._more: list[tuple[ExitStack, str, int]] = []

    def resize(self, count: int) -> None:
        while len(self._more) + 1 > count:
            running, url, _ = self._more.pop()
            running.close()
            # Until the relay forgets the edge, each write would try to reach it.
            self.stack.forget_edges(f"address LIKE '%%:{_control_port(url)}'")
        while len(self._more) + 1 < count:
            running = self.context.enter_context(ExitStack())
            url, data = running.enter_context(running_edge(urlsplit(self.stack.app).netloc, EDGE_MEMORY="4"))
            self._more.append((running, url, int((Path(data) / "nginx.pid").read_text())))
        wait_until(lambda: all(map(has_cache_lease, [self.stack.edge, *(url for _, url, _ in self._more)])))
        wait_until(lambda: self.registered() == count, what=f"{count} edges are registered")

    def registered(self) -> int:
        [(count,)] = self.stack.sql("SELECT count(*) FROM caches WHERE kind = 'edge' AND NOT excluded")
        return int(count)

    def roots(self) -> dict[str, list[int]]:
        own = [pid for _, _, pid in self._more]
        return {**self.stack_roots, "edge": [*self.stack_roots["edge"], *own]}


def _control_port(url: str) -> int:
    return (urlsplit(url).port or 0) + 1


def idle_cpu(roots: dict[str, list[int]], seconds: int) -> dict[str, float]:
    """Return the CPU seconds of each group in one second without a request."""
    processes = Processes(roots)
    before, began = processes.cpu(), time.monotonic()
    time.sleep(seconds)
    after, took = processes.cpu(), time.monotonic() - began
    return {group: (after[group] - before[group]) / took for group in after}


def without_idle(sample: Sample, idle: dict[str, float]) -> Sample:
    cpu = {group: max(0.0, used - idle.get(group, 0.0) * sample.load.seconds) for group, used in sample.cpu.items()}
    return replace(sample, cpu=cpu)


def slopes(samples: dict[int, list[Sample]]) -> list[Line]:
    metrics = {
        "latency of a write": lambda sample: sample.load.p50,
        "CPU of the app's machines": lambda sample: cpu_ms(sample, *APP_GROUPS),
        "CPU of all edges": lambda sample: cpu_ms(sample, *EDGE_GROUPS),
    }
    rounds = list(zip(*samples.values(), strict=True))
    return [
        Line(
            "edges",
            f"{what}, per additional edge",
            Ratio.of([slope([*zip(samples, map(metric, measured), strict=True)]) for measured in rounds]),
            unit="ms",
        )
        for what, metric in metrics.items()
    ]


def idle_slopes(idle: dict[int, list[dict[str, float]]]) -> list[Line]:
    """Return the CPU time that the renewals of one more edge cost in a second."""

    def busy(measured: dict[str, float]) -> float:
        return 1000 * sum(measured.get(group, 0.0) for group in APP_GROUPS)

    rounds = list(zip(*idle.values(), strict=True))
    costs = [slope([*zip(idle, map(busy, measured), strict=True)]) for measured in rounds]
    return [Line("edges", "CPU of the app's machines in a second without writes, per edge", Ratio.of(costs), unit="ms")]


def split(samples: dict[int, list[Sample]]) -> dict[str, dict[str, object]]:
    """Return the median latency, and the CPU time of a write at each group, by the number of edges."""
    groups = list(next(iter(samples.values()))[0].cpu)
    return {
        str(count): {
            "p50": round(statistics.median(sample.load.p50 for sample in measured), 3),
            "rate": round(statistics.median(sample.rate for sample in measured), 1),
            "cpu_ms": {it: round(statistics.median(cpu_ms(sample, it) for sample in measured), 3) for it in groups},
        }
        for count, measured in samples.items()
    }


def cpu_ms(sample: Sample, *groups: str) -> float:
    """Return the CPU time of one write."""
    return 1000 * sum(sample.cpu.get(group, 0.0) for group in groups) / sample.load.requests


def slope(points: list[tuple[int, float]]) -> float:
    """Return the slope of the line that fits these points best."""
    middle = statistics.fmean(x for x, _ in points)
    around = sum((x - middle) ** 2 for x, _ in points)
    return sum((x - middle) * y for x, y in points) / around


def writing(bench: Bench, name: str, writers: int, roots: dict[str, list[int]]) -> Subject:
    url = bench.peers.stack.edge

    def run_load(seconds: int) -> wrk.LoadResult:
        return wrk.closed_loop(url, ("put", 1, bench.users, 0), seconds, connections=writers, threads=1)

    return Subject(name, run_load, roots)


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
