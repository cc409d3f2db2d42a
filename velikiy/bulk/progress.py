"""What people see meanwhile."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

import click


def say(text: str) -> None:
    """To the person: stdout is for data. Where the terminal is gone, the command ends as well without it."""
    with suppress(OSError):
        click.echo(text, err=True)


@contextmanager
def shown(what: str, whole: int | None, *, beside: IO[bytes] | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if stderr is one, and what comes `beside` does not go to one too. It is told how far it
    is, in the unit of the whole, and rows up to there."""
    if not sys.stderr.isatty() or (beside and beside.isatty()):
        yield lambda done, rows: None
        return
    from rich import progress
    from rich.console import Console

    columns = ("{task.description}", progress.BarColumn(), "{task.fields[rows]:,} rows, {task.fields[rate]:,.0f}/s,")
    bar = progress.Progress(*columns, progress.TimeRemainingColumn(), "left", console=Console(stderr=True))
    task = bar.add_task(what, total=whole, rows=0, rate=0.0)
    began: list[float] = []

    def report(done: int, rows: int) -> None:
        began[:] = began or [time.monotonic(), rows]  # an import that goes on has rows from before
        seconds = time.monotonic() - began[0]
        bar.update(task, completed=done, rows=rows, rate=(rows - began[1]) / seconds if seconds else 0.0)

    bar.start()
    try:
        yield report
    finally:
        with suppress(OSError):  # the terminal may be what has ended
            bar.stop()
