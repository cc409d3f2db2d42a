"""One run of chaos: for each kind of service, faults one after another under a load that is judged meanwhile."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.chaos.director import Broken, Director
from tests.chaos.fault import Fault
from tests.chaos.probes import PROBED, Figures, Meter, What, workers
from tests.chaos.result import Result
from tests.chaos.service import Kind, Missing
from tests.consistency.history import OUTSIDE
from tests.consistency.load import Load
from tests.consistency.soak import Soak

Say = Callable[[str], None]

PUMP_S = 0.25


@dataclass
class Options:
    seconds: float
    seed: int
    faults: dict[str, Fault]
    singles: bool = True
    pairs: bool = True
    readers: int = 2
    writers: int = 2
    folder: Path | None = None
    shuffle: bool = True
    """False: in the order of the table."""


@dataclass
class Outcome:
    """The result of a whole run."""

    reads: int = 0
    lists: int = 0
    wrong_reads: int = 0
    lost_writes: int = 0
    writes: int = 0
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    not_reached: dict[str, str] = field(default_factory=dict)
    """The reason, by the name of each fault that did not run."""

    examples: list[str] = field(default_factory=list)
    histories: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Errors of the run itself."""

    @property
    def failed(self) -> bool:
        return bool(
            self.wrong_reads or self.lost_writes or self.errors or any(result.failures for result in self.results)
        )


class Chaos:
    def __init__(self, options: Options, say: Say) -> None:
        self.options, self.say = options, say
        self.outcome = Outcome()
        self._began = time.monotonic()
        self._deadline = self._began + options.seconds
        self._random = random.Random(f"{options.seed} order")

    def run(self) -> Outcome:
        """Play all faults, singly and in pairs, until the time is over."""
        try:
            self._run()
        finally:  # also after Ctrl-C
            self.outcome.seconds = time.monotonic() - self._began
        return self.outcome

    def _run(self) -> None:
        missing: set[str] = set()
        for round_number in count():
            is_single = round_number % 2 == 0 if self.options.singles and self.options.pairs else self.options.singles
            if self._left() <= 0 or (not self.options.pairs and round_number):
                break
            plan = self._singles() if is_single else self._pairs()
            plan = [(kind, scenarios) for kind, scenarios in plan if kind.name not in missing]
            if not plan:
                break
            for kind, scenarios in plan:
                if reason := self._play_all(kind, scenarios):
                    missing.add(kind.name)
                    self.outcome.not_reached |= {fault.name: reason for it in scenarios for fault in it}
        done = {name for result in self.outcome.results for name in result.faults if len(result.faults) == 1}
        if self.options.singles:
            for name in self.options.faults.keys() - done - self.outcome.not_reached.keys():
                self.outcome.not_reached[name] = "the time was over"

    def _play_all(self, kind: Kind, scenarios: list[tuple[Fault, ...]]) -> str:
        """Play the scenarios, in a new service after one that did not come back. Return why this kind of service cannot
        be had, else an empty string."""
        while scenarios and self._left() > 0:
            planned = len(scenarios)
            try:
                self._play(kind, scenarios)
            except Missing as reason:
                return str(reason)
            if len(scenarios) == planned and self._left() > 0:  # it did not even become calm
                return self.outcome.errors[-1] if self.outcome.errors else "it did not become calm"
        return ""

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _kinds(self) -> list[Kind]:
        """Return the kinds of service, the one with the most faults first."""
        kinds = {fault.kind.name: fault.kind for fault in self.options.faults.values()}
        return sorted(kinds.values(), key=lambda kind: -len(self._of(kind)))

    def _of(self, kind: Kind) -> list[Fault]:
        return [fault for fault in self.options.faults.values() if fault.kind.name == kind.name]

    def _singles(self) -> list[tuple[Kind, list[tuple[Fault, ...]]]]:
        return [(kind, [(fault,) for fault in self._shuffled(self._of(kind))]) for kind in self._kinds()]

    def _pairs(self) -> list[tuple[Kind, list[tuple[Fault, ...]]]]:
        """Return as many pairs as there are faults."""
        plan = []
        for kind in self._kinds():
            firsts = self._shuffled([fault for fault in self._of(kind) if fault.pairs])
            if len(firsts) > 1:
                pairs = [(it, self._random.choice([other for other in firsts if other is not it])) for it in firsts]
                plan.append((kind, list[tuple[Fault, ...]](pairs)))
        return plan

    def _shuffled(self, faults: list[Fault]) -> list[Fault]:
        return self._random.sample(faults, len(faults)) if self.options.shuffle else faults

    def _play(self, kind: Kind, scenarios: list[tuple[Fault, ...]]) -> None:
        """Start a service and play the scenarios, which are taken off the list."""

        def next_ones() -> Iterator[tuple[Fault, ...]]:
            while scenarios:
                yield scenarios.pop(0)

        with contextlib.ExitStack() as running:
            try:
                service = running.enter_context(kind.start())
            except AssertionError as error:
                self.outcome.errors.append(f"{kind.name}: {error}")
                raise Missing(f"{kind.name} did not start") from error
            load = Load(
                tuple(service.edges),
                seed=self.options.seed,
                readers=self.options.readers,
                writers=self.options.writers,
            )
            self.say(f"{kind.name}: {' '.join(service.edges)}, {len(scenarios)} to play, {self._left():.0f} s left")
            meter = Meter()
            soak = Soak(
                load,
                folder=self.options.folder,
                more=workers(len(service.edges), service.connect),
                watch=meter.watch,
            )
            seed = f"{self.options.seed} faults {len(self.outcome.results)}"
            director = Director(service, next_ones(), self._deadline, seed)
            judge = Judge(soak, meter, director, self.options.faults.__getitem__, self.say)
            try:
                with contextlib.closing(soak.run(self.options.seconds + 600, faults=director, every=PUMP_S)) as lines:
                    for _ in lines:
                        judge.complete()
            finally:
                judge.complete(everything=True)
                self._add(soak, judge)
                self.outcome.not_reached |= director.missing
            if director.error and not isinstance(director.error, Broken):
                self.outcome.errors.append(f"{type(director.error).__name__} {director.error}")
                if not isinstance(director.error, AssertionError):
                    raise director.error

    def _add(self, soak: Soak, judge: "Judge") -> None:
        outcome, verdict = self.outcome, soak.verdict
        outcome.reads += verdict.reads
        outcome.lists += verdict.lists
        outcome.writes += verdict.writes["ok"]
        lost = sum(operation.edge == OUTSIDE for _, operation in verdict.found)
        outcome.lost_writes += lost
        outcome.wrong_reads += verdict.wrong - lost
        outcome.results += judge.completed
        outcome.examples += verdict.examples
        outcome.histories += [str(file) for file in soak.saved]


class Judge:
    """Completes results: once all requests of a fault's time are judged, their figures are known."""

    def __init__(self, soak: Soak, meter: Meter, director: Director, fault: Callable[[str], Fault], say: Say) -> None:
        self.completed: list[Result] = []
        self._soak, self._meter, self._director, self._fault, self._say = soak, meter, director, fault, say
        self._calm_from = time.monotonic_ns()
        self._calm: list[dict[What, float]] = []
        """The slowest requests before each of the last faults."""

        self._reads = 0

    def complete(self, *, everything: bool = False) -> None:
        results = self._director.results
        while len(self.completed) < len(results) and (
            everything or results[len(self.completed)].until < self._soak.complete
        ):
            result = results[len(self.completed)]
            self._fill_in(result)
            self._calm_from = result.until
            self.completed.append(result)
            self._say(line(result, len(self.completed)))

    def _fill_in(self, result: Result) -> None:
        faults = [self._fault(name) for name in result.faults]
        victims = {victim for fault in faults for victim in fault.victims}
        recovered = result.end + int((result.recovery_s or 0) * 1e9)
        figures = self._meter.figures(result.begin, recovered, victims, since=self._calm_from)
        result.reads, result.writes = round(figures.reads, 4), round(figures.writes, 4)
        result.hit_s, result.miss_s, result.write_s = map(figures.seconds, PROBED)
        result.errors = figures.errors
        result.judged = self._soak.verdict.reads - self._reads
        self._reads = self._soak.verdict.reads
        for _, operation in self._soak.verdict.found:
            if self._calm_from <= operation.invoke < result.until:
                if operation.edge == OUTSIDE:
                    result.lost_writes += 1
                else:
                    result.wrong_reads += 1
        if result.wrong_reads:
            result.failures.append(f"{result.wrong_reads} wrong reads")
        if result.lost_writes:
            result.failures.append("an acknowledged write was lost")
        self._calm = [*self._calm[-9:], self._meter.slowest_s(self._calm_from, result.begin)]
        if len(faults) == 1 and result.recovery_s is not None:
            result.failures += self._exceeded(faults[0], result, figures)

    def _exceeded(self, fault: Fault, result: Result, figures: Figures) -> list[str]:
        limits = fault.limits
        found = [
            f"availability of {what}: {100 * value:.1f} %, at least {100 * least:g} % were expected"
            for what, value, least in (("reads", result.reads, limits.reads), ("writes", result.writes, limits.writes))
            if value < least
        ]
        for what, limit in zip(PROBED, (limits.hit_s, limits.miss_s, limits.write_s), strict=True):
            if figures.seconds(what) > limit + max(it[what] for it in self._calm):
                slowest = figures.slowest[what]
                found.append(
                    f"slowest {what}: {figures.seconds(what):.2f} s ({slowest.edge}, {slowest.status or 'no response'},"
                    f" sent {(slowest.invoke - result.begin) / 1e9:.2f} s after the beginning), at most {limit:g} s were expected"
                )
        if result.recovery_s is not None and result.recovery_s > limits.recovery_s:
            found.append(f"recovery: {result.recovery_s:.1f} s, at most {limits.recovery_s:g} s were expected")
        return found


def line(result: Result, number: int) -> str:
    """Return the line of progress about one fault."""
    status = f"named {result.named} after {result.named_s:.1f} s" if result.named else "not named"
    recovery = "never" if result.recovery_s is None else f"{result.recovery_s:.1f} s"
    errors = ", ".join(f"{n} x {error}" for error, n in sorted(result.errors.items()))
    text = (
        f"{number:4} {result.name:<40} {result.judged:6} reads, {result.wrong_reads} wrong, {result.lost_writes} lost"
        f" | reads {100 * result.reads:5.1f} %, writes {100 * result.writes:5.1f} %"
        f" | slowest {result.hit_s:.2f} {result.miss_s:.2f} {result.write_s:.2f} s | recovered {recovery} | {status}"
    )
    more = [f" | {it}" for it in (errors, *result.notes) if it]
    return "\n".join([text + "".join(more), *(f"       FAILED: {it}" for it in result.failures)])
