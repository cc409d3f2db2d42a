"""`velikiy relay`: the process that invalidates after SQL from outside."""

import signal
from pathlib import Path

import click

from velikiy import logs
from velikiy.cli.errors import os_sentence
from velikiy.settings import BadSetting, Settings, load


@click.command()
@click.option("--heartbeat", type=click.Path(path_type=Path), help="File to touch while PostgreSQL answers.")
def relay(heartbeat: Path | None) -> None:
    """Invalidate the caches after SQL writes that bypass the app. Runs until it is stopped."""
    logs.configure_service("info")  # for the lines before the level is known
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # click would print "Aborted!"
    from velikiy import metrics
    from velikiy.relay.listener import connect

    try:
        settings = load(Settings)
    except BadSetting as bad:
        logs.cannot_start(bad)
    logs.configure_service(settings.log_level)
    metrics.serve()
    try:
        connect(settings).run(heartbeat)
    except OSError as error:  # the heartbeat file
        logs.cannot_start(os_sentence(error))
