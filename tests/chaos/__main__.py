"""Let one party misbehave after another, and judge what the others notice.

./run chaos --minutes 5 --seed 1
./run chaos --only stop-redis kill-relay
./run chaos --minutes 30 --json run1.json
./run chaos --report run1.json run2.json
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from testkit.stack import ROOT
from tests.chaos import report
from tests.chaos.run import Chaos, Options
from tests.chaos.table import faults


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run chaos",
        description="Inject faults into a stack under load, one after another, and judge every read.",
        epilog="The exit code is 0 if no read was wrong, no acknowledged write was lost, status named each fault that it"
        " has to name, and no limit was exceeded; else 1. It is 2 for wrong arguments and 130 after Ctrl-C.",
    )
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="length of the run (default: 5)")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 100_000, help="seed of the order and of the load (default: random)"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NAME", help="only these faults; a part of a name ends with *"
    )
    parser.add_argument("--pairs", action="store_true", help="only pairs of faults (default: singly, then pairs)")
    parser.add_argument("--singly", action="store_true", help="each fault once, and no pairs")
    parser.add_argument("--list", action="store_true", help="show all faults, and exit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="add up files of --json, and exit")
    parser.add_argument(
        "--write", action="store_true", help="with --report: write the tables of docs/reliability.md instead"
    )
    parser.add_argument("--readers", type=int, default=2, metavar="N", help="number of readers (default: 2)")
    parser.add_argument("--writers", type=int, default=2, metavar="N", help="number of writers (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "velikiy-chaos",
        metavar="DIR",
        help="folder for the histories of wrong reads (default: %(default)s)",
    )
    options = parser.parse_args()
    options.faults = faults()
    if options.only:
        chosen = {name for name in options.faults for only in options.only if _fits(name, only)}
        if unknown := [only for only in options.only if not any(_fits(name, only) for name in options.faults)]:
            parser.error(f"there is no fault {', '.join(unknown)}; ./run chaos --list shows all")
        options.faults = {name: fault for name, fault in options.faults.items() if name in chosen}
    if options.pairs and options.singly:
        parser.error("--pairs and --singly exclude each other")
    if missing := [file for file in options.report or [] if not file.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    return options


def _fits(name: str, only: str) -> bool:
    return name.startswith(only[:-1]) if only.endswith("*") else name == only


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    options = arguments()
    # SIGINT too: a shell starts background jobs with SIGINT ignored. In any case the servers of the run must end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if options.list:
        for fault in options.faults.values():
            print(f"{fault.name:<40} {fault.what}")
        return 0
    if options.report:
        text = report.markdown(report.load(options.report), options.faults)
        text += "\n\n" + "\n".join(report.described(options.faults.values()))
        if options.write:
            report.write(ROOT / "docs" / "reliability.md", text)
        else:
            print(text)
        return 0
    say(f"seed {options.seed}, {len(options.faults)} faults, {options.minutes:g} minutes")
    chaos = Chaos(
        Options(
            options.minutes * 60,
            options.seed,
            options.faults,
            singles=not options.pairs,
            pairs=not options.singly,
            readers=options.readers,
            writers=options.writers,
            folder=options.out,
        ),
        say,
    )
    interrupted = False
    try:
        outcome = chaos.run()
    except KeyboardInterrupt:
        interrupted, outcome = True, chaos.outcome
    except Exception as error:  # what was found until then counts
        traceback.print_exc()
        outcome = chaos.outcome
        outcome.errors.append(f"{type(error).__name__} {error}")
    if options.json:
        members = report.as_json(outcome, seed=options.seed, minutes=options.minutes)
        options.json.write_text(json.dumps(members, indent=1) + "\n")
    for text in report.summary(outcome):
        say(text)
    if interrupted:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
