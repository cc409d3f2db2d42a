"""`./run status` and `./run logs`."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from velikiy.stack import Refusal, log_lines, log_view, reaper
from velikiy.stack.commands.folder import data_option, process_names, processes, unprivileged_home
from velikiy.stack.messages import command
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import Supervisor

NOT_RUNNING = 3
"""The exit code of `status` for a stopped stack, as in the Linux Standard Base."""

SOMETHING_IS_WRONG = 1

WATCH_S = 2.0


@click.command()
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--watch", is_flag=True, help="Show the state again every two seconds, until Ctrl-C.")
def status(data: Path | None, as_json: bool, watch: bool) -> None:
    """Show the state of the stack, and what to do about whatever is wrong. Exits with 0 if it is ready, with 1 if
    something is wrong, and with 3 if it does not run."""
    home = unprivileged_home(data)
    code = _show_status(home, as_json, clear=False)
    while watch:
        time.sleep(WATCH_S)
        code = _show_status(home, as_json, clear=not as_json and sys.stdout.isatty())
    sys.exit(code)


def _show_status(home: Path, as_json: bool, *, clear: bool) -> int:
    """Print the state, and return the exit code."""
    from velikiy.stack import status_report  # an import at the top would delay each command
    from velikiy.stack.status import look

    plan = Plan.load(home)
    # The processes of the service are in the mount namespace of its sandbox, where `leftovers` does not look.
    is_running = plan is not None and bool(reaper.leftovers(home) or Supervisor(plan).pid() is not None)
    found = look(plan) if plan and is_running else None
    if as_json:
        state = status_report.as_json(found) if found else status_report.stopped(home)
        output = json.dumps(state, indent=None if clear else 2)
    elif found:
        output = "\n".join(status_report.text(found))
    else:
        output = f"not running (data: {home}); start it with {command('up', home=home)}"
    click.echo(f"\033[H\033[2J{output}" if clear else output)
    if not found:
        return NOT_RUNNING
    return 0 if found.ready else SOMETHING_IS_WRONG


class Moment(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no argument here
    """`10m` for ten minutes ago, or a moment in ISO 8601."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else log_view.moment(str(value))
        except (ValueError, OverflowError):
            self.fail(f"'{value}' is neither a span such as 30s, 10m, 2h or 1d nor a moment such as {EXAMPLE_MOMENT}.")


EXAMPLE_MOMENT = "2026-07-01T14:30:00Z"


@click.command()
@click.argument("name", required=False, default="", shell_complete=processes)
@click.option("--follow", "-f", is_flag=True, help="Keep printing new lines.")
@click.option(
    "--lines",
    "-n",
    metavar="N",
    type=click.IntRange(min=0),
    help="Number of lines, the latest. Default: 50, or all with --since or --request.",
)
@click.option(
    "--level",
    type=click.Choice(log_lines.LEVELS, case_sensitive=False),
    default="debug",
    help="Show only lines of this level and above.",
)
@click.option("--since", type=Moment(), help=f"Show only lines since then: 30s, 10m, 2h, 1d, or {EXAMPLE_MOMENT}.")
@click.option("--request", metavar="ID", default="", help="Show only lines about the request with this X-Request-Id.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, for programs.")
@data_option
def logs(
    name: str,
    follow: bool,
    lines: int | None,
    level: str,
    since: float | None,
    request: str,
    as_json: bool,
    data: Path | None,
) -> None:
    """Show the logs of all processes, or of the processes whose names start with NAME (edge, app1, postgres, ...),
    merged by time. Rotated files are searched too.

    With "-" as NAME, show lines of the standard input, such as those of `docker compose logs`.
    """
    if name == "-":
        with _until_the_reader_leaves():
            log_view.show_stream(sys.stdin.buffer, log_view.Choice("", level.lower(), since, request), as_json)
        return
    home = unprivileged_home(data)
    plan = Plan.load(home)
    names = process_names(plan) if plan else []
    if plan is None or not any(known.startswith(name) for known in names):
        raise Refusal(
            f"There is no log of '{name}'. Choose from: {', '.join(names)}."
            if names
            else f"There are no logs yet. Start the stack with {command('up', home=home)}"
        )
    if lines is None and since is None and not request:
        lines = 50
    choice = log_view.Choice(name, level.lower(), since, request)
    with _until_the_reader_leaves():
        log_view.show(plan.logs, choice, last=lines, as_json=as_json, follow=follow)


@contextlib.contextmanager
def _until_the_reader_leaves() -> Iterator[None]:
    """End quietly if the reader of the output ends (`| head`), or at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it ends
