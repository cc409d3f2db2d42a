"""`velikiy relay`: the process that invalidates after SQL from outside."""

from pathlib import Path

import click

from velikiy import logs
from velikiy.settings import Settings, load


@click.command()
@click.option("--heartbeat", type=click.Path(path_type=Path), help="File to touch while PostgreSQL answers.")
def relay(heartbeat: Path | None) -> None:
    """Invalidate the caches after SQL writes that bypass the app. Runs until it is stopped."""
    from velikiy.relay.listener import connect

    settings = load(Settings)
    logs.configure(settings.log_level)
    connect(settings).run(heartbeat)
