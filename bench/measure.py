"""Measure subjects in alternating rounds (A B C A B C ...) and compare them within each round.

The machine's other work then slows down all subjects alike.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bench.processes import Processes
from bench.wrk import LoadResult

MIN_CPU_S = 0.2
"""Seconds of CPU time below which the share of a worker is unknown: the kernel counts in ticks of 10 ms."""


class Ratio(NamedTuple):
    """The median of the rounds, with the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Sample:
    """The measurement of one subject in one round."""

    load: LoadResult
    cpu: dict[str, float]
    """Seconds by group of processes; the load generator is the group `load`."""

    memory: dict[str, float]
    """Megabytes at the end of the round, by group of processes."""

    busiest: float | None = None
    """The share of the busiest worker in the CPU time of all app workers; 0.5 if two workers share the load evenly."""

    @property
    def rate(self) -> float:
        return self.load.rate

    @property
    def server_cpu(self) -> float:
        return sum(seconds for group, seconds in self.cpu.items() if group != "load")

    @property
    def per_cpu_second(self) -> float:
        """Requests per second of CPU time, without the CPU time of the load generator."""
        return self.load.requests / max(self.server_cpu, 0.01)

    def as_json(self) -> dict[str, Any]:
        shown = {name: round(value, 4) for name, value in asdict(self.load).items() if name != "cpu"}
        cpu = {group: round(seconds, 2) for group, seconds in self.cpu.items()}
        busiest = None if self.busiest is None else round(self.busiest, 2)
        return {
            **shown,
            "busiest": busiest,
            "cpu": cpu,
            "memory": {group: round(size, 1) for group, size in self.memory.items()},
        }


@dataclass(frozen=True)
class Subject:
    """A design under load."""

    name: str
    run: Callable[[int], LoadResult]
    """Send load for this many seconds."""

    roots: dict[str, list[int]]
    """Root processes by group (`bench/processes.py:Processes`)."""

    run_at: Callable[[int, float], LoadResult] | None = None
    """Send load for this many seconds at this rate, in an open loop."""


@dataclass
class Line:
    """One line of the table."""

    row: str
    what: str
    ratio: Ratio | None
    """None if it was not measured."""

    target: float | None = None
    at_most: bool = False
    unit: str = "x"
    by_cpu: Ratio | None = None
    """The same ratio by requests per second of CPU time, which other work on the machine disturbs less."""

    skipped: str = ""
    """Why it was not measured."""

    @property
    def met(self) -> bool | None:
        """None without a target or a ratio."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target


@dataclass
class Result:
    """The lines of one row, and the samples that they are computed from."""

    lines: list[Line] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "lines": [
                {**asdict(line), "ratio": line.ratio and [round(n, 4) for n in line.ratio], "met": line.met}
                for line in self.lines
            ],
            "samples": {name: [sample.as_json() for sample in samples] for name, samples in self.samples.items()},
            **self.more,
        }


def measure(subject: Subject, seconds: int) -> Sample:
    processes = Processes(subject.roots)
    before, worker_cpu = processes.cpu(), processes.workers("app")
    load = subject.run(seconds)
    after = processes.cpu()
    cpu = {group: after[group] - before[group] for group in after}
    spent = [until - worker_cpu.get(pid, 0.0) for pid, until in processes.workers("app").items()]
    busiest = max(spent) / sum(spent) if sum(spent) >= MIN_CPU_S else None
    return Sample(load, {**cpu, "load": load.cpu}, processes.memory(), busiest)


def alternate(
    subjects: Sequence[Subject], *, rounds: int, seconds: int, warmup: int, show: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Warm up each subject once, then measure them in alternating rounds.

    Args:
        show: Displays progress.
    """
    samples: dict[str, list[Sample]] = {subject.name: [] for subject in subjects}
    for subject in subjects:
        show(f"warm-up: {subject.name}")
        if warmup:
            subject.run(warmup)
    for number in range(rounds):
        for subject in subjects:
            show(f"round {number + 1} of {rounds}: {subject.name}")
            samples[subject.name].append(measure(subject, seconds))
    return samples


def compare(
    samples: dict[str, list[Sample]], of: str, to: str, by: Callable[[Sample], float] = lambda sample: sample.rate
) -> Ratio:
    """Divide the value of subject `of` by that of subject `to`, round by round."""
    return Ratio.of([by(a) / max(by(b), 1e-9) for a, b in zip(samples[of], samples[to], strict=True)])


def compare_rates(
    row: str, what: str, samples: dict[str, list[Sample]], of: str, to: str, target: float | None = None
) -> Line:
    """Return the line of the table that compares the rates of two subjects."""
    by_cpu = compare(samples, of, to, lambda sample: sample.per_cpu_second)
    return Line(row, what, compare(samples, of, to), target, by_cpu=by_cpu)
