"""`./run up`, `restart`, `rollback` and `down`."""

import contextlib
import itertools
import shutil
import signal
import sys
import time
from pathlib import Path

import click

from velikiy.findings import configuration
from velikiy.settings import ServiceSettings, StackSettings, auth_mode, load
from velikiy.stack import Refusal, change, log_view, preflight, privileges, service, service_watch
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.commands.folder import changing_stack, data_option, exclusive, home_of, processes, unprivileged_home
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import DATA_FOLDER_ENTRIES, Plan
from velikiy.stack.start import display_url, start
from velikiy.stack.supervisor import Supervisor


def _number(setting: str) -> click.IntRange:
    """Return the type of an option with the range of the setting of this name."""
    bounds = {type(rule).__name__: rule for rule in StackSettings.model_fields[setting].metadata}
    return click.IntRange(bounds["Ge"].ge, bounds["Le"].le)


@click.command()
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
    home = home_of(data)
    if not privileges.is_reexecuted():
        for found in configuration.unknown_in(CHECKOUT / ".env"):
            report(f"warning: {found.sentence}")
        prepare(home, wanted)
        service.start_if_installed(home)
        privileges.reexec_unprivileged(home, live=reload)

    # Each signal raises KeyboardInterrupt, so that an interrupted start stops the programs that it has started.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or by & in a script
            signal.signal(number, _interrupt)
    began = time.time()
    runs_as_service = service.is_main_process() and not detach
    try:
        with exclusive(home):
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


def prepare(home: Path, wanted: StackSettings) -> None:
    """Do what the person who starts the stack does, and not the services' account.

    Raises:
        Refusal: The stack cannot start. Nothing was created.
    """
    services = load(ServiceSettings, None)  # refuse a bad value before anything is created
    auth_mode(services.auth, wanted.bind)
    preflight.check_location(home)
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
        with exclusive(plan.home), step("\nstopping"):
            if supervisor.pid() == started_pid:
                supervisor.stop()


@click.command()
@click.argument("name", required=False, shell_complete=processes)
@data_option
def restart(name: str | None, data: Path | None) -> None:
    """Restart the programs of the stack one after the other, or those of NAME (app, edge1, postgres, ...).

    No request fails, except while PostgreSQL restarts. PostgreSQL and Redis are restarted only by their names.
    """
    home = unprivileged_home(data)
    with changing_stack(home):
        change.restart(home, name)


@click.command()
@data_option
def rollback(data: Path | None) -> None:
    """Go back to the code and the settings that ran before the last `up`. The command once more returns to the newer
    version."""
    home = unprivileged_home(data)
    with changing_stack(home):
        plan = change.roll_back(home)
    report(f"The version before runs: {display_url(plan.edge_urls[0])}")
    again = " or ".join(command(word, home=home) for word in ("up", "rollback"))
    report(f"To change to the newer version again: {again}")


@click.command()
@data_option
@click.option("--wipe", is_flag=True, help="Also delete the data folder, with every row in it.")
def down(data: Path | None, wipe: bool) -> None:
    """Stop the stack and keep its data."""
    home = home_of(data)
    if not privileges.is_reexecuted():
        if not any((home / name).exists() for name in ("stack.json", "run")):
            report(f"There is no stack in {home}.")
            return
        service.stop_if_installed(home)
        privileges.reexec_unprivileged(home, wait=wipe)
    with exclusive(home), step("stopping"):
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
    own = [entry for entry in home.iterdir() if DATA_FOLDER_ENTRIES.fullmatch(entry.name)]
    for entry in sorted(own, key=lambda it: it.name == "lock"):  # the lock last, as others wait for it
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
