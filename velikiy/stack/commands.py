"""Define the commands of `./run`. Help, completion and docs/command-line.md are made from these definitions."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from velikiy import __version__, command_line
from velikiy.command_line import CommandGroup, python_command
from velikiy.findings import configuration
from velikiy.settings import BadSetting, FolderSettings, ServiceSettings, StackSettings, auth_mode, load, read_env_file
from velikiy.stack import (
    Refusal,
    change,
    completion,
    consoles,
    development,
    log_files,
    log_lines,
    log_view,
    preflight,
    privileges,
    reaper,
    recovery,
    service,
    service_watch,
    uninstall,
)
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.messages import as_owner_of, command, program, report, step
from velikiy.stack.plan import DATA_FOLDER_ENTRIES, Plan
from velikiy.stack.programs import authentication
from velikiy.stack.start import display_url, start
from velikiy.stack.supervisor import Supervisor

NOT_RUNNING = 3
"""The exit code of `status` for a stopped stack, as in the Linux Standard Base."""

SOMETHING_IS_WRONG = 1

WATCH_S = 2.0


class DataFolder(click.Path):
    """The type of `--data`."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # An unset variable of a script must not select the working folder.
        return Path(value) if str(value).strip() else self.fail("the folder has no name", param, ctx)


data_option = click.option("--data", metavar="DIR", type=DataFolder(), help="Folder of the stack.")


def place_data(arguments: Sequence[str]) -> list[str]:
    """Put `--data` directly behind the command, where each command expects it: it may be written anywhere.

    The last folder wins. Arguments after `--` belong to another program.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words, rest = iter(arguments[:end]), arguments[end:]
    option, others = list[str](), list[str]()
    for word in words:
        if word == "--data":
            option = [word, *itertools.islice(words, 1)]
        elif word.startswith("--data="):
            option = [word]
        else:
            others.append(word)
    return [*others[:1], *option, *others[1:], *rest]


def processes(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the stack's processes, to complete an argument."""
    try:
        plan = Plan.load(_home(context.params.get("data")))
        return [name for name in _process_names(plan) if name.startswith(incomplete)] if plan else []
    except (Refusal, BadSetting, OSError):
        return []


def _process_names(plan: Plan) -> list[str]:
    return [name.replace(log_files.SUPERVISOR, "supervisor") for name in log_files.names(plan.logs)]


def _number(setting: str) -> click.IntRange:
    """Return the type of an option with the range of the setting of this name."""
    bounds = {type(rule).__name__: rule for rule in StackSettings.model_fields[setting].metadata}
    return click.IntRange(bounds["Ge"].ge, bounds["Le"].le)


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


@run.command()
@click.option("--detach", "-d", is_flag=True, help="Return when the stack is ready, instead of showing the logs.")
@click.option(
    "--port",
    metavar="N",
    type=_number("port"),
    help="Port of the first edge; the other edges use the next ports. Default: 80 if possible, else 8080.",
)
@click.option("--edges", metavar="N", type=_number("edges"), help="Number of Nginx edges. Default: 1.")
@click.option("--apps", metavar="N", type=_number("apps"), help="Number of app instances. Default: 2.")
@click.option(
    "--bind", metavar="ADDRESS", help="Address that the edges listen on. Default: 127.0.0.1 (this machine only)."
)
@click.option(
    "--tls-self-signed/--no-tls-self-signed",
    default=None,
    help="Serve https with a certificate that signs itself, to try TLS.",
)
@click.option(
    "--monitoring/--no-monitoring", default=None, help="Also start Prometheus, with the alerts of deploy/prometheus."
)
@click.option("--defaults", is_flag=True, help="Forget the options of earlier commands, which are kept otherwise.")
@click.option("--reload", is_flag=True, help="Restart the app when its code changes. This option is not kept.")
@data_option
def up(
    detach: bool,
    port: int | None,
    edges: int | None,
    apps: int | None,
    bind: str | None,
    tls_self_signed: bool | None,
    monitoring: bool | None,
    defaults: bool,
    reload: bool,
    data: Path | None,
) -> None:
    """Start the stack, print its addresses and show the logs. Ctrl-C stops the stack.

    Missing packages are installed first. A stack that runs already gets the new code and settings.
    """
    given = {"port": port, "edges": edges, "apps": apps, "bind": bind}
    wanted = load(StackSettings, None, **{name: value for name, value in given.items() if value is not None})
    home = _home(data)
    if not privileges.is_reexecuted():
        for found in configuration.unknown_in(CHECKOUT / ".env"):
            report(f"warning: {found.sentence}")
        _prepare(home, wanted)
        service.start_if_installed(home)
        privileges.reexec_unprivileged(home, live=reload)

    # Each signal raises KeyboardInterrupt, so that an interrupted start stops the programs that it has started.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or by & in a script
            signal.signal(number, _interrupt)
    began = time.time()
    runs_as_service = service.is_main_process() and not detach
    try:
        with _exclusive(home):
            if runs_as_service:
                service.take_over(home)
            flags = {"tls_self_signed": tls_self_signed, "monitoring": monitoring}
            started = start(home, given | flags, reload=reload, forget_options=defaults)
    except KeyboardInterrupt as interruption:
        plan = Plan.load(home)
        is_running = plan is not None and Supervisor(plan).pid() is not None
        report("\ninterrupted" if is_running else "\ninterrupted; nothing is left running")
        sys.exit(128 + (interruption.args or [signal.SIGINT])[0])
    if detach or not started:
        return
    _stay_with(started, began, runs_as_service)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _prepare(home: Path, wanted: StackSettings) -> None:
    """Do what the person who starts the stack does, and not the services' account.

    Raises:
        Refusal: The stack cannot start. Nothing was created.
    """
    services = load(ServiceSettings, None)  # refuse a bad value before anything is created
    auth_mode(services.auth, wanted.bind)
    preflight.check_data_folder(home)
    preflight.check_free_space(home)
    preflight.check_address(wanted.bind)
    preflight.check_open_files()
    privileges.make_home(home)


def _stay_with(plan: Plan, began: float, runs_as_service: bool) -> None:
    """Stay until Ctrl-C here, or until `./run down` elsewhere. Show the lines of the logs since the start, or look
    after the service."""
    supervisor = Supervisor(plan)
    started_pid = supervisor.pid()
    rounds = itertools.count(1)

    def is_over() -> bool:
        # The logs are read five times a second; every three seconds is enough for supervisord.
        return next(rounds) % 15 == 0 and supervisor.pid() != started_pid

    try:
        if runs_as_service:
            service_watch.watch(plan, is_over)
        else:
            report("Ctrl-C stops the stack. Logs:")
            log_view.follow_from(plan.logs, began, is_over)
        if supervisor.pid() is None and supervisor.socket.exists():  # `./run down` removes the socket
            if runs_as_service:
                supervisor.stop()  # in order, before systemd kills what is left and starts the service again
            raise Refusal(f"supervisord has ended or hangs. Start the stack again with {command('up', home=plan.home)}")
        report("\nthe stack was stopped by another command")
    except (KeyboardInterrupt, BrokenPipeError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not interrupt the stop
            signal.signal(number, signal.SIG_IGN)
        with _exclusive(plan.home), step("\nstopping"):
            if supervisor.pid() == started_pid:
                supervisor.stop()


@run.command()
@click.argument("name", required=False, shell_complete=processes)
@data_option
def restart(name: str | None, data: Path | None) -> None:
    """Restart the programs of the stack one after the other, or those of NAME (app, edge1, postgres, ...).

    No request fails, except while PostgreSQL restarts. PostgreSQL and Redis are restarted only by their names.
    """
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    with _of_a_stack(home):
        change.restart(home, name)


@run.command()
@data_option
def rollback(data: Path | None) -> None:
    """Go back to the code and the settings that ran before the last `up`. The command once more returns to the newer
    version."""
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    with _of_a_stack(home):
        plan = change.roll_back(home)
    report(f"The version before runs: {display_url(plan.edge_urls[0])}")
    again = " or ".join(command(word, home=home) for word in ("up", "rollback"))
    report(f"To change to the newer version again: {again}")


@run.command()
@data_option
@click.option("--wipe", is_flag=True, help="Also delete the data folder, with every row in it.")
def down(data: Path | None, wipe: bool) -> None:
    """Stop the stack and keep its data."""
    home = _home(data)
    if not privileges.is_reexecuted():
        if not any((home / name).exists() for name in ("stack.json", "run")):
            report(f"There is no stack in {home}.")
            return
        service.stop_if_installed(home)
        privileges.reexec_unprivileged(home, wait=wipe)
    with _exclusive(home), step("stopping"):
        Supervisor(_plan_to_stop(home)).stop()
    if wipe:
        _wipe(home)


def _plan_to_stop(home: Path) -> Plan:
    """Return the plan of the stack. Its processes can be found without one, so a damaged plan is no obstacle."""
    with contextlib.suppress(Refusal):
        if plan := Plan.load(home):
            return plan
    return Plan.of_a_folder(home)


def _wipe(home: Path) -> None:
    """Delete the stack's files. Files of other programs or people in the folder stay."""
    for entry in home.iterdir():
        if DATA_FOLDER_ENTRIES.fullmatch(entry.name):
            _delete(entry)
    with contextlib.suppress(OSError):  # the folder contains other files
        home.rmdir()
    report(
        f"deleted {home}"
        if not home.exists() or not any(home.iterdir())
        else f"deleted the stack's files in {home}; other files stay"
    )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@run.command("install-service")
@data_option
def install_service(data: Path | None) -> None:
    """Let systemd start the stack, now and at each boot."""
    service.require_systemd("install")
    home = _home(data)
    _prepare(home, load(StackSettings, None))
    service.install(home)


@run.command("uninstall-service")
def uninstall_service() -> None:
    """Stop the service and remove its units. The data stays."""
    service.uninstall()


@run.command("uninstall")
@data_option
@click.option("--yes", is_flag=True, help="Do not ask. The data stays, unless --delete-data is given too.")
@click.option("--delete-data", is_flag=True, help="Also delete the data folder, with every row in it.")
def uninstall_all(data: Path | None, yes: bool, delete_data: bool) -> None:
    """Show what ./run has left on this machine, and remove it after a question."""
    uninstall.uninstall(_home(data), yes=yes, delete_data=delete_data)


@run.command("prepare-service", hidden=True)
@data_option
def prepare_service(data: Path | None) -> None:
    """Write the second half of the start of the service. Its unit runs this command."""
    home = _home(data)
    _prepare(home, load(StackSettings, None))
    service.prepare(home)


@run.command()
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--watch", is_flag=True, help="Show the state again every two seconds, until Ctrl-C.")
def status(data: Path | None, as_json: bool, watch: bool) -> None:
    """Show the state of the stack, and what to do about whatever is wrong. Exits with 0 if it is ready, with 1 if
    something is wrong, and with 3 if it does not run."""
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
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


@run.command()
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
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    plan = Plan.load(home)
    names = _process_names(plan) if plan else []
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


@run.command(cls=VelikiyCommand, context_settings=PASS_ON, add_help_option=False)
@data_option
@click.argument(
    "arguments",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=lambda context, _, incomplete: context.command.shell_complete(context, incomplete),
)
def velikiy(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Run the project's commands with the settings of the stack: cache, keys, users, ..."""
    home = _home(data)
    plan = Plan.load(home)
    if plan is not None:
        os.environ.setdefault("SECRETS_DIR", str(plan.secrets_folder))
        os.environ.update(authentication(plan))
    option = "" if home == privileges.default_home() else f" --data {shlex.quote(str(home))}"
    os.environ["VELIKIY_COMMAND"] = f"{program()} velikiy{option}"  # for messages that contain a command
    python = python_command("velikiy", *arguments)
    os.execvp(python[0], python)  # noqa: S606


@run.command(context_settings=PASS_ON)
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open psql in the database of the stack.

    It connects as the role that owns the tables. ARGUMENTS go to psql, stdin and the exit code are those of psql. The
    help of psql: ./run psql -- --help.
    """
    consoles.psql(_address(data, "migration_database_url"), arguments)


@run.command(context_settings=PASS_ON)
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def redis(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open redis-cli at the Redis of the stack.

    ARGUMENTS go to redis-cli, stdin and the exit code are those of redis-cli. The help of redis-cli:
    ./run redis -- --help.
    """
    consoles.redis_cli(_address(data, "redis_url"), arguments)


@run.command("base-backup")
@click.option(
    "--keep", type=click.IntRange(min=1), metavar="N", help="Delete all but the newest N, and the log before."
)
@data_option
def base_backup(keep: int | None, data: Path | None) -> None:
    """Copy the cluster into the folder WAL_ARCHIVE, while it runs. Needed once, and then each week or so."""
    plan = _unprivileged_plan(data)
    if Supervisor(plan).pid() is None:
        raise Refusal(f"The stack is not running. Start it with {command('up', home=plan.home)}")
    recovery.make_base(plan, keep)


@run.command()
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
    plan = _unprivileged_plan(data)
    if archive := load(StackSettings, None).wal_archive:
        plan.wal_archive = str(archive)
    with _exclusive(plan.home):
        if Supervisor(plan).pid() is not None:
            raise Refusal(f"The stack is running. Stop it first with {command('down', home=plan.home)}")
        recovery.recover(plan, moment)


@run.command("completion")
@click.argument("shell", type=click.Choice(["bash"]))
def completion_(shell: str) -> None:
    """Print the completion of ./run for bash.

    Load it with "source <(./run completion bash)", or write it to
    ~/.local/share/bash-completion/completions/run.
    """
    click.echo(completion.script(str(CHECKOUT / "run")), nl=False)


@run.command(hidden=True, context_settings=PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def complete(words: tuple[str, ...]) -> None:
    """Print what may follow the WORDS, for the completion."""
    for line in completion.completions(run, list(words)):
        click.echo(line)


for command_for_development in development.COMMANDS:
    run.add_command(command_for_development)


# ---- helpers ----


@contextlib.contextmanager
def _of_a_stack(home: Path) -> Iterator[None]:
    """Keep other launchers away while the block changes the stack in the data folder.

    Raises:
        Refusal: There is no stack.
    """
    plan = Plan.load(home)
    if plan is None:
        raise Refusal(f"There is no stack in {home}. Start it with {command('up', home=home)}")
    os.environ.update(authentication(plan))  # for the launcher's own connections
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with _exclusive(home):
        yield


def _unprivileged_plan(data: Path | None) -> Plan:
    """Return the plan of a stack with its own PostgreSQL, as the user of the services.

    Raises:
        Refusal
    """
    home = _home(data)
    if not privileges.is_reexecuted() and (home / "stack.json").exists():
        privileges.reexec_unprivileged(home)
    plan = Plan.load(home)
    if plan is None:
        raise Refusal(f"There is no stack in {home}. Start it with {command('up', home=home)}")
    if not plan.own_postgres:
        raise Refusal("The stack uses your own PostgreSQL: archive and recover there.")
    return plan


def _address(data: Path | None, name: str) -> str:
    home = _home(data)
    plan = Plan.load(home)
    if plan is None:
        raise Refusal(f"There is no stack in {home}. Start it with {command('up', home=home)}")
    return plan.secret(name)


def _home(data: Path | None) -> Path:
    """Return the data folder, with links resolved: /proc shows the working folders of processes without links too.

    Raises:
        Refusal: Another user can change its content.
    """
    if privileges.is_reexecuted():
        return Path(os.environ["VELIKIY_HOME"])
    chosen = data or load(FolderSettings, None).data
    try:
        home = chosen.expanduser().resolve() if chosen else privileges.default_home()
        str(home).encode()
    except (RuntimeError, UnicodeEncodeError):  # ~ of an unknown user, a loop of links
        raise Refusal(f"{chosen} is not the path of a folder. Choose a folder with --data.") from None
    preflight.check_owner(home)
    return home


@contextlib.contextmanager
def _exclusive(home: Path) -> Iterator[None]:
    """Keep other launchers away from the data folder while the block runs."""
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another ./run that uses {home}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
