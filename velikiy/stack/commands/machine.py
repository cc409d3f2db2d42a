"""`./run install-service`, `uninstall-service` and `uninstall`: what a stack leaves on its machine."""

from pathlib import Path

import click

from velikiy.settings import StackSettings, load
from velikiy.stack import service, uninstall
from velikiy.stack.commands.folder import data_option, home_of
from velikiy.stack.commands.lifecycle import prepare


@click.command("install-service")
@data_option
def install_service(data: Path | None) -> None:
    """Let systemd start the stack, now and at each boot."""
    service.require_systemd("install")
    home, wanted = home_of(data), load(StackSettings, None)
    prepare(home, wanted)
    service.install(home, wanted.wal_archive)


@click.command("uninstall-service")
def uninstall_service() -> None:
    """Stop the service and remove its units. The data stays."""
    service.uninstall()


@click.command("uninstall")
@data_option
@click.option("--yes", is_flag=True, help="Do not ask. The data stays, unless --delete-data is given too.")
@click.option("--delete-data", is_flag=True, help="Also delete the data folder, with every row in it.")
def uninstall_all(data: Path | None, yes: bool, delete_data: bool) -> None:
    """Show what ./run has left on this machine, and remove it after a question."""
    uninstall.uninstall(home_of(data), yes=yes, delete_data=delete_data)


@click.command("prepare-service", hidden=True)
@data_option
def prepare_service(data: Path | None) -> None:
    """Write the second half of the start of the service. Its unit runs this command."""
    home = home_of(data)
    prepare(home, load(StackSettings, None))
    service.prepare(home)
