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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from dotenv import dotenv_values

from velikiy.settings import BadSetting, ServiceSettings, StackSettings, auth_mode, load, unreadable
from velikiy.stack import Refusal, consoles, log_files, preflight, privileges, service, service_watch, uninstall
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.messages import report, step
from velikiy.stack.plan import DATA_FOLDER_ENTRIES, Plan
from velikiy.stack.programs import authentication
from velikiy.stack.start import display_url, is_ready, start, warnings
from velikiy.stack.supervisor import Supervisor

NOT_RUNNING = 3
"""The exit code of `status` for a stopped stack, as in the Linux Standard Base."""

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
        _prepare(home, wanted)
        service.start_if_installed(home)
        privileges.reexec_unprivileged(home, live=reload)

    # Each signal raises KeyboardInterrupt, so that an interrupted start stops the programs that it has started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    runs_as_service = service.is_main_process() and not detach
    try:
        with _exclusive(home):
            if runs_as_service:
                service.take_over(home)
            started = start(home, wanted, reload, tls_self_signed, monitoring)
    except KeyboardInterrupt:
        report("\ninterrupted; nothing is left running")
        sys.exit(130)
    if detach or not started:
        return
    _stay_with(started, runs_as_service)


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


def _stay_with(plan: Plan, runs_as_service: bool) -> None:
    """Stay until Ctrl-C here, or until `./run down` elsewhere: show the logs, or look after the service."""
    supervisor = Supervisor(plan)
    started_pid = supervisor.pid()
    rounds = itertools.count(1)

    def is_over() -> bool:
        # The logs are read ten times a second; every three seconds is enough for supervisord.
        return next(rounds) % 30 == 0 and supervisor.pid() != started_pid

    try:
        if runs_as_service:
            service_watch.watch(plan, is_over)
        else:
            report("Ctrl-C stops the stack. Logs:")
            log_files.follow(plan.logs, None, is_over, from_start=True)
        if supervisor.pid() is None and supervisor.socket.exists():  # `./run down` removes the socket
            if runs_as_service:
                supervisor.stop()  # in order, before systemd kills what is left and starts the service again
            raise Refusal("supervisord has ended or hangs. Start the stack again with ./run up")
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
        service.stop_if_installed(home)
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
def status(data: Path | None, as_json: bool) -> None:
    """Show the processes of the stack and its addresses. Exits with 0 if the stack is ready, else with 3."""
    home = _home(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    state = _state(home)
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        _describe(state)
    sys.exit(0 if state["ready"] else NOT_RUNNING)


def _state(home: Path) -> dict[str, Any]:
    plan = Plan.load(home)
    state: dict[str, Any] = {"ready": False, "edges": [], "apps": [], "postgres": "", "redis": "", "data": str(home)}
    state["processes"], state["warnings"], state["metrics"] = [], [], ""
    if plan is None:
        return state
    state["edges"], state["apps"] = plan.edge_urls, plan.app_urls
    for name, file in (("postgres", "database_url"), ("redis", "redis_url")):
        with contextlib.suppress(FileNotFoundError):
            state[name] = consoles.masked(plan.secret(file))
    state["processes"] = [
        {"name": process["name"], "pid": process["pid"], "state": process["statename"]}
        for process in Supervisor(plan).processes()
    ]
    if any(process["name"] == "metrics" for process in state["processes"]):
        state["metrics"] = f"http://127.0.0.1:{plan.metrics_port}/metrics"
    if plan.monitoring:
        state["prometheus"] = f"http://127.0.0.1:{plan.prometheus_port}"
    state["ready"] = bool(state["processes"]) and is_ready(plan)
    if state["ready"]:
        state["warnings"] = warnings(plan)
    return state


def _describe(state: dict[str, Any]) -> None:
    if not state["processes"]:
        click.echo(f"not running (data: {state['data']}); start it with ./run up")
        return
    ready = "ready, with warnings" if state["warnings"] else "ready"
    click.echo(ready if state["ready"] else "not ready; see ./run logs for the reason")
    for warning in state["warnings"]:
        click.echo(f"  warning    {warning}")
    for url in state["edges"]:
        click.echo(f"  {display_url(url)}")
    for process in state["processes"]:
        click.echo(f"  {process['name']:<10} {process['state'].lower():<10} {process['pid'] or '-'}")
    if state["metrics"]:
        click.echo(f"  metrics at {state['metrics']}")
    if "prometheus" in state:
        click.echo(f"  alerts at {state['prometheus']}/alerts")
    click.echo(f"  data in {state['data']}")


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
