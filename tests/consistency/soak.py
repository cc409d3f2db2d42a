"""A long run of random reads and writes against a stack, judged as it goes.

    python -m tests.consistency.soak --minutes 30 --seed 7 --edges 2 --faults kill,stop-edge
    python -m tests.consistency.soak --minutes 1 --url http://127.0.0.1:8080 http://127.0.0.1:8081
    python -m tests.consistency.soak --minutes 1 --peer classic
    python -m tests.consistency.soak --check FILE
    python -m tests.consistency.soak --planted

Exit code 1 where there was a wrong read; then what led to it is in a file, and the fourth form judges it again. The
fifth plants bugs into copies of the code (tests/consistency/planted.py), and fails where one is not found.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path

from bench.classic.stack import classic
from testkit.stack import Stack, running
from tests.consistency.checker import Checker, Verdict, check
from tests.consistency.faults import KINDS, Faults
from tests.consistency.history import FOREVER, Operation, load, save
from tests.consistency.load import Load, Running

WINDOW = 50_000
"""Operations. This many and those of the window before are kept in memory, to be saved if something is wrong."""

LAG = 1_000_000_000
"""Nanoseconds. Judged is what lies so far back: which write took which number is best known before."""

PEERS = {"classic": classic}
"""Other designs behind the same API, for comparison."""

SAVED = 3
"""Files at most: the first wrong reads tell more than the ten thousandth."""


class Soak:
    """A load, judged as it runs."""

    def __init__(self, load: Load, *, grace: float = 1.0, across: bool = False, folder: Path | None = None) -> None:
        self.checker = Checker(grace=grace, across=across)
        self.load = load
        self.folder = folder
        self.saved: list[Path] = []
        self.began = 0.0
        self.seconds = 0.0
        self._windows: list[list[Operation]] = [[]]
        self._wrong_saved = 0

    @property
    def verdict(self) -> Verdict:
        return self.checker.verdict

    def run(self, seconds: float, *, faults: Faults | None = None, every: float = 5.0) -> Generator[str, None, None]:
        """A line of progress now and then. The load begins when the first is asked for."""
        running = Running(self.load, self._take, lambda complete: self.checker.advance(complete - LAG))
        try:
            running.start()
            self.began = time.monotonic()
            if faults:
                faults.start()
            reads = 0
            while (left := self.began + seconds - time.monotonic()) > 0:
                began = time.monotonic()
                running.pump(min(every, left))
                self._rotate()
                pace = (self.verdict.reads - reads) / (time.monotonic() - began)
                reads = self.verdict.reads
                self.seconds = time.monotonic() - self.began
                yield progress(self.seconds, self.verdict, pace)
            if faults:
                faults.end()
            running.stop()
            self.checker.advance(FOREVER)
        finally:
            if faults:
                faults.end()
            running.end()
            self._save()

    def _take(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            self.checker.add(operation)
            self._windows[-1].append(operation)

    def _rotate(self) -> None:
        if len(self._windows[-1]) < WINDOW:
            return
        self._save()
        carried = [*self.checker.carry(), *self.checker.waiting()]
        self._windows = [self._windows[-1], carried]

    def _save(self) -> None:
        if self.folder is None or self.verdict.wrong == self._wrong_saved or len(self.saved) >= SAVED:
            return
        self._wrong_saved = self.verdict.wrong
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"seed{self.load.seed}-{len(self.saved) + 1}.ndjson.gz"
        # The last window begins with what it carried over from the one before; both together need it once.
        save({id(operation): operation for window in self._windows for operation in window}.values(), file)
        self.saved.append(file)


def progress(seconds: float, verdict: Verdict, pace: float) -> str:
    writes = sum(verdict.writes.values())
    return (
        f"{seconds:6.0f} s  {verdict.reads:9,} reads {pace:6,.0f}/s  {verdict.stale} stale  {verdict.backwards} backwards  "
        f"{verdict.impossible} impossible  {verdict.mixed} mixed  |  {writes:,} writes ({verdict.writes['unknown']} unknown)"
        f"  |  {_shares(verdict.tiers)}"
    )


def _shares(tiers: Counter[str]) -> str:
    total = sum(tiers.values()) or 1
    return "  ".join(f"{tier or '-'} {100 * n / total:.0f} %" for tier, n in tiers.most_common())


def summary(soak: Soak, faults: Faults | None) -> str:
    verdict = soak.verdict
    lines = [
        f"{verdict.reads:,} reads judged in {soak.seconds:.0f} s, {verdict.reads / max(soak.seconds, 1):,.0f}/s; "
        f"{verdict.lists:,} of them lists",
        f"{verdict.stale} stale, {verdict.backwards} backwards, {verdict.impossible} impossible, {verdict.mixed} mixed",
        f"not judged: {verdict.marked} marked STALE, {verdict.unsettled} just written past the app, "
        f"{verdict.unanswered} without an answer",
        "writes: " + ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(verdict.writes.items())),
        f"answered by: {_shares(verdict.tiers)}",
    ]
    if faults:
        done = Counter(what for _, what in faults.done)
        lines.append("faults: " + (", ".join(f"{n} x {what}" for what, n in sorted(done.items())) or "none"))
    lines += [f"  {example}" for example in verdict.examples]
    lines += [f"saved: {file} (judge it again: --check {file})" for file in soak.saved]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run soak", description="Send random reads and writes, and check each response for consistency."
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="length of the run (1)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000, help="seed of the load and the faults")
    parser.add_argument("--edges", type=int, default=2, help="number of edges (2)")
    parser.add_argument("--writers", type=int, default=2, help="number of writers (2)")
    parser.add_argument("--readers", type=int, default=4, help="number of readers (4)")
    parser.add_argument("--users", type=int, default=8, help="number of users that exist at a time")
    parser.add_argument("--lists", type=float, default=0.1, help="share of the reads that are lists (0.1)")
    parser.add_argument("--shared", action="store_true", help="let several writers write to the same user")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that a writer pauses after each write (0)")
    parser.add_argument("--faults", default="", help="faults to inject, from " + ",".join(KINDS))
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two faults (2)")
    parser.add_argument(
        "--grace", type=float, default=1.0, help="seconds until a write that bypasses the app must be visible (1)"
    )
    parser.add_argument("--across", action="store_true", help="check /users and /users/<id> as if they were one path")
    parser.add_argument("--url", nargs="+", metavar="EDGE", help="use a running stack")
    parser.add_argument("--peer", choices=PEERS, help="check another design instead of ours, for comparison")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "velikiy-soak", help="folder for histories"
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check a saved history again")
    parser.add_argument("--planted", nargs="*", metavar="NAME", help="check that planted bugs are found: these, or all")
    given = parser.parse_args()
    given.faults = {fault for fault in given.faults.split(",") if fault}
    if unknown := given.faults - set(KINDS):
        parser.error(f"there is no fault {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    if given.url and given.faults:
        parser.error("--faults needs a stack of its own: omit --url")
    if given.peer and given.faults:
        parser.error("--faults needs our own stack, because faults address its processes by name: omit --peer")
    if given.peer and given.url:
        parser.error("--peer starts a stack and --url names a running stack: omit one of the two")
    return given


def main() -> int:
    given = arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # in the background as well: nothing is left running
        signal.signal(number, signal.default_int_handler)
    if given.check:
        verdict = check(load(given.check), grace=given.grace, across=given.across)
        print(verdict)
        return min(1, verdict.wrong)
    if given.planted is not None:
        from tests.consistency import planted  # which imports this module

        return planted.hunt(given.planted, given.seed, given.out)
    wanted = Load(
        edges=tuple(given.url or ()),
        seed=given.seed,
        writers=given.writers,
        readers=given.readers,
        users=given.users,
        shared=given.shared,
        lists=given.lists,
        pace=given.pace,
    )
    with contextlib.ExitStack() as context:
        stack: Stack | None = None
        if given.peer:
            wanted = replace(wanted, edges=tuple(context.enter_context(PEERS[given.peer](given.edges))), plain=True)
        elif not given.url:
            stack = context.enter_context(running("--edges", str(given.edges)))
            database = stack.postgres if "sql" in given.faults else ""
            wanted = replace(wanted, edges=tuple(stack.edges), database=database)
        faults = Faults(stack, given.faults, given.seed, every=given.every) if stack and given.faults else None
        print(f"seed {given.seed}, {' '.join(wanted.edges)}", flush=True)
        soak = Soak(wanted, grace=given.grace, across=given.across, folder=given.out)
        for line in soak.run(given.minutes * 60, faults=faults):
            print(line, flush=True)
        print(summary(soak, faults))
    return min(1, soak.verdict.wrong)


if __name__ == "__main__":
    sys.exit(main())
