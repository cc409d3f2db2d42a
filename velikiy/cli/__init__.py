"""`velikiy`: the project's own commands. `./run velikiy ...` runs them in its environment."""

import sys

import click

from velikiy import __version__, command_line
from velikiy.cli.backup import backup, restore
from velikiy.cli.cache import cache
from velikiy.cli.capacity import capacity
from velikiy.cli.doctor import doctor
from velikiy.cli.errors import os_sentence, program, setting_sentence
from velikiy.cli.keys import keys
from velikiy.cli.migrate import migrate
from velikiy.cli.relay import relay
from velikiy.cli.resources import resource_commands
from velikiy.cli.secrets import secrets
from velikiy.resources.base import registry
from velikiy.settings import BadSetting


@click.group(cls=command_line.CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="velikiy", message="%(prog)s %(version)s")
def velikiy() -> None:
    """Operate a Velikiy Flask installation."""


for command in (migrate, relay, cache, capacity, doctor, keys, secrets, backup, restore):
    velikiy.add_command(command)

for resource in registry().values():
    if resource.name in velikiy.commands:
        raise ValueError(f"{resource.name}: this name is taken by a command of velikiy")
    velikiy.add_command(resource_commands(resource))


def main() -> int:
    """Run the command that was typed, and return the exit code."""
    return command_line.main(velikiy, program(), "velikiy", sys.argv[1:], _sentence)


def _sentence(error: Exception) -> str | None:
    if isinstance(error, BadSetting):
        return setting_sentence(error)
    return os_sentence(error) if isinstance(error, OSError) else None
