"""Run random reads and writes against a stack for a long time, and judge every read meanwhile.

    python -m tests.consistency.soak --minutes 30 --seed 7 --edges 2 --sql
    python -m tests.consistency.soak --minutes 1 --url http://127.0.0.1:8080 http://127.0.0.1:8081
    python -m tests.consistency.soak --minutes 1 --peer cache-aside
    python -m tests.consistency.soak --check FILE
    python -m tests.consistency.soak --mutants

`./run chaos` injects faults under the same load. The exit code is 1 after a wrong read. The history that led to it is
then in a file, which --check judges again.
--mutants runs copies of the code with one bug each (tests/consistency/mutants.py), and fails if a bug is not found.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bench.cache_aside.stack import cache_aside
from testkit.stack import running
from tests.consistency.checker import Checker, Verdict, check
from tests.consistency.history import FOREVER, Operation, load, save
from tests.consistency.load import Load, Running

WINDOW_OPERATIONS = 50_000
"""Operations of a window. This window and the one before it stay in memory, to be saved after a wrong read."""

JUDGING_LAG_NS = 1_000_000_000
"""Only operations this old are judged: by then the versions of most writes are known from reads."""

PEERS = {"cache-aside": cache_aside}
"""Other designs behind the same API, for comparison."""

MAX_SAVED_FILES = 3
"""Histories to save: the first wrong reads explain more than the ten thousandth."""


Watch = Callable[[Operation], Operation | None]


def everything(operation: Operation) -> Operation | None:
    return operation


class Injector(Protocol):
    """Injects faults during a soak."""

    over: threading.Event
    """Set when no further fault will come, so that the soak may end."""

    def start(self) -> None: ...

    def end(self) -> None:
        """Inject no more faults, and undo the present ones."""


class Soak:
    """A load that is judged while it runs."""

    def __init__(
        self,
        load: Load,
        *,
        grace: float = 1.0,
        across: bool = False,
        folder: Path | None = None,
        more: Sequence[Any] = (),
        watch: Watch = everything,
    ) -> None:
        """
        Args:
            grace: Seconds after which a write that bypasses the app must be visible.
            across: Judge `/users` and `/users/<id>` as if they were one path.
            folder: Where histories of wrong reads are saved.
            more: Further workers of the load (load.py:Running.more).
            watch: Receives each operation, and returns what the checker shall judge.
        """
        self.checker = Checker(grace=grace, across=across)
        self.load = load
        self.folder = folder
        self.complete = 0
        """The time (monotonic ns) up to which all operations are judged."""
        self._more, self._watch = more, watch
        self.saved: list[Path] = []
        self.began = 0.0
        self.seconds = 0.0
        self._windows: list[list[Operation]] = [[]]
        self._wrong_saved = 0

    @property
    def verdict(self) -> Verdict:
        return self.checker.verdict

    def run(self, seconds: float, *, faults: Injector | None = None, every: float = 5.0) -> Generator[str, None, None]:
        """Yield a line of progress every few seconds, until the time is over or all faults were injected. The load
        starts with the first line."""
        running = Running(self.load, self._take, lambda complete: self._judge(complete - JUDGING_LAG_NS), self._more)
        try:
            running.start()
            self.began = time.monotonic()
            if faults:
                faults.start()
            reads = 0
            while (left := self.began + seconds - time.monotonic()) > 0 and not (faults and faults.over.is_set()):
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
            self._judge(FOREVER)
        finally:
            if faults:
                faults.end()
            running.end()
            self._save()

    def _judge(self, until: int) -> None:
        self.checker.advance(until)
        self.complete = until

    def _take(self, operations: Iterable[Operation]) -> None:
        for received in operations:
            operation = self._watch(received)
            if operation is None:
                continue
            self.checker.add(operation)
            self._windows[-1].append(operation)

    def _rotate(self) -> None:
        if len(self._windows[-1]) < WINDOW_OPERATIONS:
            return
        self._save()
        carried = [*self.checker.carry(), *self.checker.waiting()]
        self._windows = [self._windows[-1], carried]

    def _save(self) -> None:
        if self.folder is None or self.verdict.wrong == self._wrong_saved or len(self.saved) >= MAX_SAVED_FILES:
            return
        self._wrong_saved = self.verdict.wrong
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"seed{self.load.seed}-{len(self.saved) + 1}.ndjson.gz"
        # The last window begins with operations of the window before; each of them is saved once.
        operations = {id(operation): operation for window in self._windows for operation in window}.values()
        # A read that is not judged yet may show a write that was not recorded yet: in the file it would look impossible.
        save((it for it in operations if it.kind not in ("read", "list") or it.returned <= self.checker.now), file)
        self.saved.append(file)


def progress(seconds: float, verdict: Verdict, pace: float) -> str:
    writes = sum(verdict.writes.values())
    return (
        f"{seconds:6.0f} s  {verdict.reads:9,} reads {pace:6,.0f}/s  {verdict.counts('  ')}"
        f"  |  {writes:,} writes ({verdict.writes['unknown']} unknown)  |  {_shares(verdict.tiers)}"
    )


def _shares(tiers: Counter[str]) -> str:
    total = sum(tiers.values()) or 1
    return "  ".join(f"{tier or '-'} {100 * n / total:.0f} %" for tier, n in tiers.most_common())


def summary(soak: Soak) -> str:
    verdict = soak.verdict
    rate = verdict.reads / max(soak.seconds, 1)
    lines = [
        f"reads:         {verdict.reads:,} judged in {soak.seconds:.0f} s ({rate:,.0f}/s), {verdict.lists:,} of them lists",
        f"not judged:    {verdict.marked} marked STALE, {verdict.unsettled} within the grace of a write that bypassed the app,"
        f" {verdict.unanswered} without a response",
        "writes:        " + ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(verdict.writes.items())),
        f"cache status:  {_shares(verdict.tiers)}",
    ]
    lines.append(f"wrong reads:   {verdict.wrong:,} ({verdict.counts(', ')})")
    lines += [f"  {example}" for example in verdict.examples]
    lines += [f"history saved: {file} (judge it again: ./run soak --check {file})" for file in soak.saved]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run soak",
        description="Send random reads and writes, and check each response for consistency.",
        epilog="The exit code is 0 without a wrong read, 1 after a wrong read, 2 for wrong arguments, 130 after Ctrl-C.",
    )
    group = parser.add_argument_group("load")
    group.add_argument("--minutes", type=float, default=1.0, metavar="N", help="length of the run (default: 1)")
    group.add_argument("--seed", type=int, default=time.time_ns() % 100_000, help="seed of the load (default: random)")
    group.add_argument("--writers", type=int, default=2, metavar="N", help="number of writers (default: 2)")
    group.add_argument("--readers", type=int, default=4, metavar="N", help="number of readers (default: 4)")
    group.add_argument("--users", type=int, default=8, metavar="N", help="users that exist at a time (default: 8)")
    group.add_argument(
        "--lists", type=float, default=0.1, metavar="SHARE", help="share of the reads that are lists (default: 0.1)"
    )
    group.add_argument("--shared", action="store_true", help="let several writers write to the same user")
    group.add_argument(
        "--pace",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds that a writer pauses after each write (default: 0)",
    )
    group.add_argument("--sql", action="store_true", help="also write by SQL that bypasses the app")
    group = parser.add_argument_group("target (default: a new stack)")
    group.add_argument("--edges", type=int, default=2, metavar="N", help="number of edges to start (default: 2)")
    group.add_argument("--url", nargs="+", metavar="EDGE", help="test a running stack through these edges")
    group.add_argument("--peer", choices=PEERS, help="test another design instead, for comparison")
    group.add_argument("--check", type=Path, metavar="FILE", help="judge a saved history again, and exit")
    group.add_argument(
        "--mutants",
        nargs="*",
        metavar="NAME",
        help="test copies of the code with one bug each, and fail if a bug is not found (default: all mutants)",
    )
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--grace",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds after which a write that bypasses the app must be visible (default: 1)",
    )
    group.add_argument("--across", action="store_true", help="judge /users and /users/<id> as if they were one path")
    group.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "velikiy-soak",
        metavar="DIR",
        help="folder for the histories of wrong reads (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.sql and (options.url or options.peer):
        parser.error("--sql needs a stack of its own: omit --url and --peer")
    if options.peer and options.url:
        parser.error("--peer starts a stack and --url names a running stack: omit one of the two")
    if options.check and not options.check.is_file():
        parser.error(f"there is no file {options.check}")
    return options


def main() -> int:
    options = arguments()
    # SIGINT too: a shell starts background jobs with SIGINT ignored. In any case the servers of the run must end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        if options.check:
            verdict = check(load(options.check), grace=options.grace, across=options.across)
            print(verdict)
            return 1 if verdict.wrong else 0
        if options.mutants is not None:
            from tests.consistency.mutants import hunt  # that module imports this module

            return hunt(options.mutants, options.seed, options.out)
        return run(options)
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Run the load, print the summary, and return the exit code."""
    wanted = Load(
        edges=tuple(options.url or ()),
        seed=options.seed,
        writers=options.writers,
        readers=options.readers,
        users=options.users,
        shared=options.shared,
        lists=options.lists,
        pace=options.pace,
    )
    with contextlib.ExitStack() as context:
        if options.peer:
            edges = context.enter_context(PEERS[options.peer](options.edges))
            wanted = replace(wanted, edges=tuple(edges), plain=True)
        elif not options.url:
            stack = context.enter_context(running("--edges", str(options.edges)))
            database = stack.postgres if options.sql else ""
            wanted = replace(wanted, edges=tuple(stack.edges), database=database)
        print(f"seed {options.seed}, edges {' '.join(wanted.edges)}", flush=True)
        soak = Soak(wanted, grace=options.grace, across=options.across, folder=options.out)
        for line in soak.run(options.minutes * 60):
            print(line, flush=True)
        print(summary(soak))
    return 1 if soak.verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
