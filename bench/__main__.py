"""How fast it is, beside other designs on the same machine: `./run bench`.

./run bench --quick              the whole table within 5 minutes
./run bench                      and the report: bench/results/, docs/benchmarks.md
./run bench --report FILE        the document again, from such a file
./run bench --only hit,redis     prints, and writes no report
./run bench --only memory --minutes 30
./run bench --beside DIR         this checkout against another one, in one run
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from bench import document, report
from bench.beside import beside
from bench.peers.running import peers
from bench.rows import PICTURES, ROWS, Bench


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run bench", description="Compare the speed of the service with other designs on the same machine."
    )
    parser.add_argument(
        "--quick", action="store_true", help="use fewer users and shorter rounds, and write no report (under 5 minutes)"
    )
    parser.add_argument("--only", default="", metavar="ROW,...", help=f"measure only these rows: {','.join(ROWS)}")
    parser.add_argument("--minutes", type=float, default=None, help="length of the row memory (1.5; quick: 0.1)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="regenerate docs/benchmarks.md from these results")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="compare only with another checkout")
    parser.add_argument("--json", action="store_true", help="print all results, raw samples included, for programs")
    given = parser.parse_args()
    everything = [name for name in ROWS if not (given.quick and name == PICTURES)]
    given.rows = [name for name in given.only.split(",") if name] or everything
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    if given.report and not given.report.is_file():
        parser.error(f"there is no file {given.report}")
    if given.beside and not (given.beside / "run").is_file():
        parser.error(f"{given.beside} is not a checkout of this project")
    if given.minutes is None:
        given.minutes = 0.1 if given.quick else 1.5
    return given


class Progress:
    """What is being done, on one line of a terminal; in a pipe a line for each row, when it begins."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        self.row = ""
        self.began = time.monotonic()

    def begin(self, row: str) -> None:
        self.row = row
        if not self.shown:
            print(f"{time.monotonic() - self.began:4.0f} s  {row}", file=sys.stderr, flush=True)

    def __call__(self, what: str) -> None:
        if self.shown:
            width = shutil.get_terminal_size().columns - 1
            text = f"{time.monotonic() - self.began:4.0f} s  {self.row}: {what}"[:width]
            print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main() -> int:
    given = arguments()
    if given.report:
        document.write(json.loads(given.report.read_text()), given.report.name)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # in the background as well: nothing is left running
        signal.signal(number, signal.default_int_handler)
    progress = Progress()
    progress.begin("start")
    progress("starting our stack with two edges")
    began = time.monotonic()
    if not given.json:
        print(report.head(), flush=True)
    try:
        with peers() as running:
            users = 100_000 if given.quick or given.beside else 1_000_000
            bench = Bench(running, progress, quick=given.quick, users=users, minutes=given.minutes)
            if given.beside:
                for result in beside(bench, given.beside.resolve()):
                    progress.clear()
                    report.show(result)
                return 0
            if "growth" not in given.rows:
                progress(f"filling the table with {users:,} users")
                running.seed(users)
            for name in [name for name in ROWS if name in given.rows]:
                progress.begin(name)
                row_began = time.monotonic()
                bench.results[name] = ROWS[name](bench)
                bench.results[name].more["took"] = round(time.monotonic() - row_began, 1)
                progress.clear()
                if not given.json:
                    report.show(bench.results[name])
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    took = time.monotonic() - began
    kept = report.kept(bench.results, given, took)
    if given.json:
        print(json.dumps(kept, indent=1))
    else:
        print(report.summary(bench.results, took))
    if not (given.quick or given.only):
        path = report.save(kept)
        document.write(kept, path.name)
        written = [str(it.relative_to(report.ROOT)) for it in (path, document.DOCUMENT)]
        print(f"written: {', '.join(written)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
