"""`./run velikiy`, `psql` and `redis`: programs that get the addresses of the stack, and the other arguments."""

import os
import shlex
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from velikiy.command_line import python_command
from velikiy.stack import Refusal, completion, consoles, local_http, privileges
from velikiy.stack.commands.folder import data_option, home_of, no_stack, plan_of
from velikiy.stack.messages import command, program
from velikiy.stack.plan import Plan
from velikiy.stack.programs import authentication

PASS_ON: dict[str, Any] = {
    "ignore_unknown_options": True,
    "help_option_names": [],
    "allow_interspersed_args": False,
}
"""The settings of a command whose arguments belong to another program. `--data` stands in front of them."""


class VelikiyCommand(click.Command):
    """Completes what `velikiy` would complete."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from velikiy import cli  # an import at the top would delay each command

        return completion.complete(cli.velikiy, list(ctx.params["arguments"]), incomplete)


@click.command(cls=VelikiyCommand, context_settings=PASS_ON, add_help_option=False)
@data_option
@click.argument(
    "arguments",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=lambda context, _, incomplete: context.command.shell_complete(context, incomplete),
)
def velikiy(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Run the project's commands with the settings of the stack: cache, keys, users, ..."""
    home = home_of(data)
    plan = Plan.load(home)
    if plan is not None:
        os.environ.setdefault("SECRETS_DIR", str(plan.secrets_folder))
        os.environ.update(authentication(plan))
    elif data and not os.environ.keys() & {"DATABASE_URL", "SECRETS_DIR"}:  # with which it needs no stack
        raise no_stack(home)
    option = "" if home == privileges.default_home() else f" --data {shlex.quote(str(home))}"
    os.environ["VELIKIY_COMMAND"] = f"{program()} velikiy{option}"  # for messages that contain a command
    python = python_command("velikiy", *arguments)
    os.execvp(python[0], python)  # noqa: S606


@click.command(context_settings=PASS_ON)
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open psql in the database of the stack.

    It connects as the role that owns the tables. ARGUMENTS go to psql, stdin and the exit code are those of psql. The
    help of psql: ./run psql -- --help.
    """
    plan = plan_of(home_of(data))
    _require(plan, "PostgreSQL", plan.sockets / ".s.PGSQL.5432" if plan.own_postgres else None)
    consoles.psql(plan.secret("migration_database_url"), arguments)


@click.command(context_settings=PASS_ON)
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def redis(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open redis-cli at the Redis of the stack.

    ARGUMENTS go to redis-cli, stdin and the exit code are those of redis-cli. The help of redis-cli:
    ./run redis -- --help.
    """
    plan = plan_of(home_of(data))
    _require(plan, "Redis", plan.redis_socket if plan.own_redis else None)
    consoles.redis_cli(plan.secret("redis_url"), arguments)


def _require(plan: Plan, name: str, socket: Path | None) -> None:
    """Check that the stack's own server runs; None stands for a server of the user's own.

    Raises:
        Refusal
    """
    if socket and not local_http.accepts(socket):
        raise Refusal(
            f"The {name} of the stack in {plan.home} does not run. {command('status', home=plan.home)} says why, and"
            f" {command('up', '--detach', home=plan.home)} starts a stack that was stopped."
        )
