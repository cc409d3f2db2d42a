"""Rounds in turn (A B C A B C ...), so that whatever else the machine does meets all alike; ratios within a round."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bench.processes import Processes
from bench.wrk import Answered

ENOUGH = 0.2
"""Seconds of CPU; of less, clock ticks of 10 ms say little about how it was shared."""


class Ratio(NamedTuple):
    """The median of the rounds, and the spread: the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Sample:
    """What came of one contestant in one round."""

    answered: Answered
    cpu: dict[str, float]
    """Seconds, by group of processes; the load generator's is `load`."""

    memory: dict[str, float]
    """Megabytes, at the end."""

    busiest: float | None = None
    """What the app's busiest worker had of the CPU time of all: of two that share the load, a half."""

    @property
    def rate(self) -> float:
        return self.answered.rate

    @property
    def server_cpu(self) -> float:
        return sum(seconds for group, seconds in self.cpu.items() if group != "load")

    @property
    def per_cpu_second(self) -> float:
        """Requests for each second of CPU that everything but the load generator used."""
        return self.answered.requests / max(self.server_cpu, 0.01)

    def kept(self) -> dict[str, Any]:
        shown = {name: round(value, 4) for name, value in asdict(self.answered).items() if name != "cpu"}
        cpu = {group: round(seconds, 2) for group, seconds in self.cpu.items()}
        busiest = None if self.busiest is None else round(self.busiest, 2)
        return {
            **shown,
            "busiest": busiest,
            "cpu": cpu,
            "memory": {group: round(size, 1) for group, size in self.memory.items()},
        }


@dataclass(frozen=True)
class Contestant:
    name: str
    load: Callable[[int], Answered]
    """For so many seconds."""

    roots: dict[str, list[int]]


@dataclass
class Line:
    """One line of the table."""

    row: str
    what: str
    ratio: Ratio
    target: float | None = None
    at_most: bool = False
    unit: str = "x"
    by_cpu: Ratio | None = None
    """The same by requests for each second of CPU: what is left of a ratio where others work on the machine too."""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target


@dataclass
class Result:
    """Of one row: its lines, and what they were computed from."""

    lines: list[Line] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def kept(self) -> dict[str, Any]:
        return {
            "lines": [
                {**asdict(line), "ratio": [round(n, 4) for n in line.ratio], "met": line.met} for line in self.lines
            ],
            "samples": {name: [sample.kept() for sample in samples] for name, samples in self.samples.items()},
            **self.more,
        }


def measured(contestant: Contestant, seconds: int) -> Sample:
    processes = Processes(contestant.roots)
    before, of_workers = processes.cpu(), processes.workers("app")
    answered = contestant.load(seconds)
    after = processes.cpu()
    cpu = {group: after[group] - before[group] for group in after}
    spent = [until - of_workers.get(pid, 0.0) for pid, until in processes.workers("app").items()]
    busiest = max(spent) / sum(spent) if sum(spent) >= ENOUGH else None
    return Sample(answered, {**cpu, "load": answered.cpu}, processes.memory(), busiest)


def alternate(
    contestants: Sequence[Contestant], *, rounds: int, seconds: int, warmup: int, say: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Each of them once for the warm-up, and then in turn."""
    samples: dict[str, list[Sample]] = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        say(f"warm-up: {contestant.name}")
        if warmup:
            contestant.load(warmup)
    for number in range(rounds):
        for contestant in contestants:
            say(f"round {number + 1} of {rounds}: {contestant.name}")
            samples[contestant.name].append(measured(contestant, seconds))
    return samples


def compared(
    samples: dict[str, list[Sample]], of: str, to: str, by: Callable[[Sample], float] = lambda sample: sample.rate
) -> Ratio:
    return Ratio.of([by(a) / max(by(b), 1e-9) for a, b in zip(samples[of], samples[to], strict=True)])


def line(row: str, what: str, samples: dict[str, list[Sample]], of: str, to: str, target: float | None = None) -> Line:
    by_cpu = compared(samples, of, to, lambda sample: sample.per_cpu_second)
    return Line(row, what, compared(samples, of, to), target, by_cpu=by_cpu)
