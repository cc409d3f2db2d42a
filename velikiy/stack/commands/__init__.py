"""The commands of `./run`. Help, completion and docs/command-line.md are made from these definitions."""

import errno
import os
import socket
import sys
from pathlib import Path

import click

from velikiy import __version__, command_line
from velikiy.command_line import CommandGroup
from velikiy.settings import BadSetting, read_env_file
from velikiy.stack import Refusal, completion, development, privileges
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.commands import clients, lifecycle, machine, recovery, watching
from velikiy.stack.commands.folder import DataFolder, place_data
from velikiy.stack.messages import as_owner_of, program, report


class Commands(CommandGroup):
    """The commands in the order of their definition, and those for development apart."""

    def sections(self) -> dict[str, list[str]]:
        for_development = [command.name or "" for command in development.COMMANDS]
        others = [name for name in self.commands if name not in for_development]
        return {"Commands": others, "Development": for_development}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections().values() for name in names]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Settings: .env.example. Exit codes, completion for bash and all options: docs/command-line.md.",
)
@click.option("--data", metavar="DIR", type=DataFolder(), help="Folder of the stack, before or after the command.")
@click.version_option(__version__, prog_name="Velikiy Flask", message="%(prog)s %(version)s")
def run(data: Path | None) -> None:
    """Velikiy Flask: a users service with caches in Redis and in Nginx.

    "./run COMMAND --help" describes a command. The first "./run up" installs the packages that are missing.
    """


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash"]))
def completion_(shell: str) -> None:
    """Print the completion of ./run for bash.

    Load it with "source <(./run completion bash)", or write it to
    ~/.local/share/bash-completion/completions/run.
    """
    click.echo(completion.script(str(CHECKOUT / "run")), nl=False)


@click.command(hidden=True, context_settings=clients.PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def complete(words: tuple[str, ...]) -> None:
    """Print what may follow the WORDS, for the completion."""
    for line in completion.completions(run, list(words)):
        click.echo(line)


for shown in (
    *(lifecycle.up, lifecycle.restart, lifecycle.rollback, lifecycle.down),
    *(machine.install_service, machine.uninstall_service, machine.uninstall_all, machine.prepare_service),
    *(watching.status, watching.logs),
    *(clients.velikiy, clients.psql, clients.redis),
    *(recovery.base_backup, recovery.recover),
    *(completion_, complete),
    *development.COMMANDS,
):
    run.add_command(shown)


def main() -> int:
    """Run the command that was typed, and return the exit code of `./run`."""
    socket.setdefaulttimeout(10)  # a supervisord that hangs must not block the launcher
    try:
        _prepare_environment()
    except BadSetting as error:
        report(f"./run: {error}")
        return 1
    return command_line.main(run, program(), "./run", place_data(sys.argv[1:]), _sentence)


def _sentence(error: Exception) -> str | None:
    if isinstance(error, Refusal | BadSetting):
        return str(error)
    return _advice(error) if isinstance(error, OSError) else None


def _prepare_environment() -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # a person's settings for psql must not reach the stack's servers
    if not privileges.is_reexecuted():  # the account of the second execution may not be able to read .env
        for name, value in read_env_file(CHECKOUT / ".env").items():
            os.environ.setdefault(name, value)


def _advice(error: OSError) -> str | None:
    """Return a sentence about an error that its reader can repair, or None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{place}. Free some space and start again; the data is untouched."
    if error.errno == errno.EBADF:
        return "stdout is closed."
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} is closed to this user. {as_owner_of(error.filename)}, or choose another --data."
    if error.errno == errno.EROFS:
        return f"{error.filename} is on a disk that can only be read. Choose another folder with --data."
    return f"{error.filename}: {error.strerror}. Choose another folder with --data." if error.filename else None
