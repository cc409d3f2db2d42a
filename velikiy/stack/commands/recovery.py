"""`./run base-backup` and `recover`: a cluster as it was at a moment."""

from datetime import datetime
from pathlib import Path

import click

from velikiy.settings import StackSettings, load
from velikiy.stack import Refusal, reaper, recovery
from velikiy.stack.commands.folder import changing_stack, data_option, unprivileged_plan
from velikiy.stack.messages import command
from velikiy.stack.supervisor import Supervisor


@click.command("base-backup")
@click.option(
    "--keep", type=click.IntRange(min=1), metavar="N", help="Delete all but the newest N, and the log before."
)
@data_option
def base_backup(keep: int | None, data: Path | None) -> None:
    """Copy the cluster into the folder WAL_ARCHIVE, while it runs. Needed once, and then each week or so."""
    plan = unprivileged_plan(data)
    if Supervisor(plan).pid() is None:
        raise Refusal(f"The stack is not running. Start it with {command('up', home=plan.home)}")
    recovery.make_base(plan, keep)


@click.command()
@click.option("--to", "until", metavar="TIME", help="Such as '2026-11-28 14:59:00+00:00'. Default: the last change.")
@data_option
def recover(until: str | None, data: Path | None) -> None:
    """Replace the cluster of a stopped stack by its state at a time, from the folder WAL_ARCHIVE."""
    moment = None
    if until:
        try:
            moment = datetime.fromisoformat(until)
        except ValueError:
            raise Refusal(f"--to '{until}' is no time. Write '2026-11-28 14:59:00+00:00'.") from None
        if moment.tzinfo is None:
            raise Refusal(f"--to '{until}' has no time zone. Add +00:00 for UTC.")
    plan = unprivileged_plan(data)
    if archive := load(StackSettings, None).wal_archive:
        plan.wal_archive = str(archive)
    with changing_stack(plan.home):
        # Without its supervisor, or after a recovery was killed, PostgreSQL may still run.
        if Supervisor(plan).pid() is not None or reaper.leftovers(plan.home):
            raise Refusal(f"The stack is running. Stop it first with {command('down', home=plan.home)}")
        recovery.recover(plan, moment)
