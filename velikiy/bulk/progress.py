"""Messages and progress for the operator, on stderr: stdout is for data."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

import click


def print_message(text: str) -> None:
    """Print a line to stderr. If the terminal is gone, the command goes on without the message."""
    with suppress(OSError):
        click.echo(text, err=True)


@contextmanager
def progress_bar(
    title: str, total: int | None, *, output: IO[bytes] | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar if stderr is a terminal, unless `output` is a terminal, too, which the bar would disturb.

    Yields:
        A function for progress. Its arguments: the amount done, in the unit of `total`, and the number of rows done.
    """
    if not sys.stderr.isatty() or (output and output.isatty()):
        yield lambda done, rows: None
        return
    from rich import progress
    from rich.console import Console

    columns = ("{task.description}", progress.BarColumn(), "{task.fields[rows]:,} rows, {task.fields[rate]:,.0f}/s,")
    bar = progress.Progress(*columns, progress.TimeRemainingColumn(), "left", console=Console(stderr=True))
    task = bar.add_task(title, total=total, rows=0, rate=0.0)
    first_report: list[float] = []

    def report(done: int, rows: int) -> None:
        # The rate counts from the first report: an import that continues starts with rows of an earlier run.
        first_report[:] = first_report or [time.monotonic(), rows]
        started_at, first_rows = first_report
        seconds = time.monotonic() - started_at
        bar.update(task, completed=done, rows=rows, rate=(rows - first_rows) / seconds if seconds else 0.0)

    bar.start()
    try:
        yield report
    finally:
        with suppress(OSError):  # the terminal may be gone
            bar.stop()


@contextmanager
def activity(text: Callable[[], str]) -> Iterator[None]:
    """Show a text that changes while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(get_renderable=lambda: Text(text()), console=Console(stderr=True), transient=True):
        yield
