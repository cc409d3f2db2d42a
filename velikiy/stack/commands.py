"""Define the commands of `./run` for a stack: up, down, status, logs, velikiy, psql, redis."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from dotenv import dotenv_values

from velikiy.findings import configuration
from velikiy.settings import BadSetting, ServiceSettings, StackSettings, auth_mode, load, unreadable
from velikiy.stack import Refusal, consoles, log_files, preflight, privileges, reaper
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.messages import report, step
from velikiy.stack.plan import DATA_FOLDER_ENTRIES, Plan
from velikiy.stack.programs import authentication
from velikiy.stack.start import start
from velikiy.stack.supervisor import Supervisor

NOT_RUNNING = 3
"""The exit code of `status` for a stopped stack, as in the Linux Standard Base."""

SOMETHING_IS_WRONG = 1

WATCH_S = 2.0

data_option = click.option("--data", type=click.Path(path_type=Path), help="Folder of the stack.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def run() -> None:
    """Run Velikiy Flask without Docker."""


@run.command()
@click.option("--detach", "-d", is_flag=True, help="Return when the stack is ready, instead of showing the logs.")
@click.option(
    "--port",
    type=int,
    help="Port of the first edge; the other edges use the next ports. Default: 80 if possible, else 8080.",
)
@click.option("--edges", type=int, help="Number of Nginx edges. Default: 1.")
@click.option("--apps", type=int, help="Number of app instances. Default: 2.")
@click.option("--bind", help="Address that the edges listen on. Default: 127.0.0.1 (this machine only).")
@click.option("--tls-self-signed", is_flag=True, help="Serve https with a certificate that signs itself, to try TLS.")
@click.option("--monitoring", is_flag=True, help="Also start Prometheus, with the alerts of deploy/prometheus.")
@click.option("--reload", is_flag=True, help="Restart the app when its code changes.")
@data_option
def up(
    detach: bool,
    port: int | None,
    edges: int | None,
    apps: int | None,
    bind: str | None,
    tls_self_signed: bool,
    monitoring: bool,
    reload: bool,
    data: Path | None,
) -> None:
    """Start the stack and print its addresses."""
    given = {"port": port, "edges": edges, "apps": apps, "bind": bind}
    wanted = load(StackSettings, None, **{name: value for name, value in given.items() if value is not None})
    home = _home(data)
    if not privileges.is_reexecuted():
        for found in configuration.unknown_in(CHECKOUT / ".env"):
            report(f"warning: {found.sentence}")
        services = load(ServiceSettings, None)  # refuse a bad value before anything is created
        auth_mode(services.auth, wanted.bind)
        preflight.check_data_folder(home)
        preflight.check_free_space(home)
        preflight.check_address(wanted.bind)
        preflight.check_open_files()
        privileges.make_home(home)
        privileges.reexec_unprivileged(home, live=reload)

    # Each signal raises KeyboardInterrupt, so that an interrupted start stops the programs that it has started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with _exclusive(home):
            started = start(home, wanted, reload, tls_self_signed, monitoring)
    except KeyboardInterrupt:
        report("\ninterrupted; nothing is left running")
        sys.exit(130)
    if detach or not started:
        return
    _stay_with(started)


def _stay_with(plan: Plan) -> None:
    """Show the logs until Ctrl-C here, or until `./run down` elsewhere."""
    supervisor = Supervisor(plan)
    started_pid = supervisor.pid()
    rounds = itertools.count(1)

    def is_over() -> bool:
        # The logs are read ten times a second; every three seconds is enough for supervisord.
        return next(rounds) % 30 == 0 and supervisor.pid() != started_pid

    report("Ctrl-C stops the stack. Logs:")
    try:
        log_files.follow(plan.logs, None, is_over, from_start=True)
        report("\nthe stack was stopped by another command")
    except (KeyboardInterrupt, BrokenPipeError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not interrupt the stop
            signal.signal(number, signal.SIG_IGN)
        with _exclusive(plan.home), step("\nstopping"):
            if supervisor.pid() == started_pid:
                supervisor.stop()


@run.command()
@data_option
@click.option("--wipe", is_flag=True, help="Also delete the data folder, with every row in it.")
def down(data: Path | None, wipe: bool) -> None:
    """Stop the stack and keep its data."""
    home = _home(data)
    if not privileges.is_reexecuted():
        if not (home / "stack.json").exists():
            report(f"There is no stack in {home}.")
            return
        privileges.reexec_unprivileged(home, wait=wipe)
    plan = Plan.load(home)
    if plan is None:
        return
    with _exclusive(home), step("stopping"):
        Supervisor(plan).stop()
    if wipe:
        _wipe(home)


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
    found = look(plan) if plan and reaper.leftovers(home) else None
    if as_json:
        state = status_report.as_json(found) if found else status_report.stopped(home)
        output = json.dumps(state, indent=None if clear else 2)
    elif found:
        output = "\n".join(status_report.text(found))
    else:
        output = f"not running (data: {home}); start it with ./run up"
    click.echo(f"\033[H\033[2J{output}" if clear else output)
    if not found:
        return NOT_RUNNING
    return 0 if found.ready else SOMETHING_IS_WRONG


@run.command()
@click.argument("name", required=False)
@click.option("--follow", "-f", is_flag=True, help="Keep printing new lines.")
@click.option(
    "--lines", "-n", type=click.IntRange(min=0), default=50, show_default=True, help="Number of lines from each log."
)
@data_option
def logs(name: str | None, follow: bool, lines: int, data: Path | None) -> None:
    """Show the logs of all processes, or of the processes whose names start with NAME (edge, app1, postgres, ...)."""
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    plan = Plan.load(home)
    found = log_files.files(plan.logs, name) if plan else []
    if plan is None or not found:
        names = ", ".join(file.stem for file in log_files.files(plan.logs)) if plan else ""
        raise Refusal(
            f"There is no log of '{name}'. Choose from: {names}."
            if names
            else "There are no logs yet. Start the stack with ./run up."
        )
    for file in found:
        for line in log_files.last_lines(file, lines):
            log_files.show(file, line)
    if follow:
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            log_files.follow(plan.logs, name, lambda: False)


@run.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": False},
    add_help_option=False,
)
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def velikiy(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Run the project's commands with the settings of the stack in the data folder."""
    plan = Plan.load(_home(data))
    if plan is not None:
        os.environ.setdefault("SECRETS_DIR", str(plan.secrets_folder))
        os.environ.update(authentication(plan))
    os.execv(sys.executable, [sys.executable, "-P", "-m", "velikiy", *arguments])  # noqa: S606


@run.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open psql in the database of the stack, as the role that owns the tables. ARGUMENTS go to psql."""
    consoles.psql(_address(data, "migration_database_url"), arguments)


@run.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@data_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def redis(data: Path | None, arguments: tuple[str, ...]) -> None:
    """Open redis-cli at the Redis of the stack. ARGUMENTS go to redis-cli."""
    consoles.redis_cli(_address(data, "redis_url"), arguments)


# ---- helpers ----


def _address(data: Path | None, name: str) -> str:
    home = _home(data)
    plan = Plan.load(home)
    if plan is None:
        raise Refusal(f"There is no stack in {home}. Start it with ./run up.")
    return plan.secret(name)


def _home(data: Path | None) -> Path:
    """Return the data folder, with links resolved: /proc shows the working folders of processes without links too.

    Raises:
        Refusal: Another user can change its content.
    """
    chosen = data or load(StackSettings, None).data
    home = chosen.expanduser().resolve() if chosen else privileges.default_home()
    if not privileges.is_reexecuted():
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
    """Run the command that was typed, and return the exit status of `./run`."""
    socket.setdefaulttimeout(10)  # a supervisord that hangs must not block the launcher
    try:
        _prepare_environment()
        run(prog_name="./run", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (Refusal, BadSetting) as error:
        report(f"./run: {error}")
        return 1
    except OSError as error:
        advice = _advice(error)
        if advice is None:
            raise
        report(f"./run: {advice}")
        return 1
    except (KeyboardInterrupt, click.Abort):
        return 130
    return 0


def _prepare_environment() -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # a person's settings for psql must not reach the stack's servers
    if not privileges.is_reexecuted():  # the account of the second execution may not be able to read .env
        try:
            values = dotenv_values(CHECKOUT / ".env")
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(unreadable(error)) from None
        for name, value in values.items():
            os.environ.setdefault(name, value or "")


def _advice(error: OSError) -> str | None:
    """Return a sentence about an error that its reader can repair, or None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename}). Free some space and start again; the data is untouched."
    if isinstance(error, PermissionError):
        return f"{error.filename} belongs to another user. Run ./run as that user, or choose another --data."
    if error.errno == errno.EROFS:
        return f"{error.filename} is on a disk that can only be read. Choose another folder with --data."
    return f"{error.filename}: {error.strerror}. Choose another folder with --data." if error.filename else None
