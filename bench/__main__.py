"""`./run bench`: compare the speed of the service with other designs on the same machine.

./run bench --quick              compare with the other designs within 5 minutes
./run bench                      measure, and write bench/results/ and docs/benchmarks.md
./run bench --report FILE        regenerate the document from a file of results
./run bench --scaling FILE       regenerate docs/scaling.md from a file of results
./run bench --only hit,redis     measure these rows, and write no report
./run bench --only memory --minutes 30
./run bench --beside DIR         compare this checkout with another one in one run
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from bench import document, report, scaling
from bench.beside import beside
from bench.peers.running import peers
from bench.rows import ONLY_FOR_REPORT, ROWS, Bench


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run bench", description="Compare the speed of the service with other designs on the same machine."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compare with the other designs only, with fewer users and shorter rounds, and write no report",
    )
    parser.add_argument("--only", default="", metavar="ROW,...", help=f"measure only these rows: {', '.join(ROWS)}")
    parser.add_argument(
        "--minutes", type=float, default=None, help="length of the row memory (default: 1.5, with --quick 0.1)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="regenerate docs/benchmarks.md from FILE and measure nothing"
    )
    parser.add_argument(
        "--scaling", type=Path, metavar="FILE", help="regenerate docs/scaling.md from FILE and measure nothing"
    )
    parser.add_argument("--beside", type=Path, metavar="DIR", help="compare this checkout only with the one in DIR")
    parser.add_argument("--json", action="store_true", help="print all results, raw samples included, for programs")
    options = parser.parse_args()
    everything = [name for name in ROWS if not (options.quick and name in ONLY_FOR_REPORT)]
    options.rows = [name for name in options.only.split(",") if name] or everything
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    for file in (options.report, options.scaling):
        if file and not file.is_file():
            parser.error(f"there is no file {file}")
    if options.beside and not (options.beside / "run").is_file():
        parser.error(f"{options.beside} is not a checkout of this project")
    if options.minutes is None:
        options.minutes = 0.1 if options.quick else 1.5
    return options


class Progress:
    """Show the current step: on one line of a terminal, elsewhere as a line for each row when it begins."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        self.row = ""
        self.began = time.monotonic()

    def begin(self, row: str) -> None:
        self.row = row
        if not self.shown:
            print(f"{time.monotonic() - self.began:4.0f} s  {row}", file=sys.stderr, flush=True)

    def __call__(self, step: str) -> None:
        if self.shown:
            width = shutil.get_terminal_size().columns - 1
            text = f"{time.monotonic() - self.began:4.0f} s  {self.row}: {step}"[:width]
            print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main() -> int:
    options = arguments()
    if options.report:
        document.write(json.loads(options.report.read_text()), options.report.name)
        return 0
    if options.scaling:
        scaling.write(json.loads(options.scaling.read_text()))
        return 0
    # SIGINT too: a shell starts background jobs with SIGINT ignored. In any case the servers of the run must end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    progress = Progress()
    progress.begin("start")
    progress("starting velikiy with two edges")
    began = time.monotonic()
    if not options.json:
        print(report.head(), flush=True)
    try:
        with peers() as running:
            users = 100_000 if options.quick or options.beside else 1_000_000
            bench = Bench(running, progress, quick=options.quick, users=users, minutes=options.minutes)
            if options.beside:
                for result in beside(bench, options.beside.resolve()):
                    progress.clear()
                    report.show(result)
                return 0
            if "growth" not in options.rows:
                progress(f"filling the table with {users:,} users")
                running.seed(users)
            for name in [name for name in ROWS if name in options.rows]:
                progress.begin(name)
                row_began = time.monotonic()
                bench.results[name] = ROWS[name](bench)
                bench.results[name].more["took"] = round(time.monotonic() - row_began, 1)
                progress.clear()
                if not options.json:
                    report.show(bench.results[name])
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    took = time.monotonic() - began
    results = report.as_json(bench.results, options, took)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(report.summary(bench.results, took))
    if not (options.quick or options.only):
        path = report.save(results)
        document.write(results, path.name)
        written = [str(it.relative_to(report.ROOT)) for it in (path, document.DOCUMENT)]
        print(f"written: {', '.join(written)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
