"""up, down, status, logs: the stack's life, one function each."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from velikiy.settings import BadSetting, StackSettings, load
from velikiy.stack import Refusal, account, preflight, tail
from velikiy.stack.plan import Plan
from velikiy.stack.start import ENV_FILE, default_home, knobs_of, ready, say, shown, start, step
from velikiy.stack.supervise import Supervisor

NOT_RUNNING = 3
"""Exit code of `status`, as the Linux Standard Base has it."""

DATA = click.option("--data", type=click.Path(path_type=Path), help="The stack's folder.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def run() -> None:
    """Velikiy Flask without Docker."""


@run.command()
@click.option("--detach", "-d", is_flag=True, help="Return when it is ready, instead of showing the logs.")
@click.option("--port", type=int, help="Of the first edge; the others follow. Default: 80 where possible, else 8080.")
@click.option("--edges", type=int, help="How many Nginx edges. Default: 1.")
@click.option("--apps", type=int, help="How many app instances. Default: 2.")
@click.option("--bind", help="Address the edges listen on. Default: 127.0.0.1, this machine alone.")
@click.option("--reload", is_flag=True, help="Restart the app when its code changes.")
@DATA
def up(
    detach: bool,
    port: int | None,
    edges: int | None,
    apps: int | None,
    bind: str | None,
    reload: bool,
    data: Path | None,
) -> None:
    """Start everything, and say where it is."""
    given = {"port": port, "edges": edges, "apps": apps, "bind": bind, "data": data}
    given = {name: value for name, value in given.items() if value is not None}
    wanted = load(StackSettings, ENV_FILE, **given)
    knobs_of(wanted)  # a bad one is refused before anything is made
    home = _home(data)
    # Signals come as KeyboardInterrupt wherever we are: a start that is broken off is taken back.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    preflight.data_folder(home)
    preflight.room(home)
    preflight.address(wanted.bind)
    account.folder(home)
    with _alone(home):
        started = start(home, wanted, set(given), reload)
    if detach or not started:
        return
    say("Ctrl-C stops everything. The logs:")
    supervisor = Supervisor(started)
    try:
        tail.follow(started.logs, None, lambda: False, from_start=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second Ctrl-C of an impatient person
        with step("\nstopping"):
            supervisor.stop()


@run.command()
@DATA
@click.option("--wipe", is_flag=True, help="Delete the data folder too: every user in it is lost.")
def down(data: Path | None, wipe: bool) -> None:
    """Stop everything; the data stays."""
    home = _home(data)
    plan = Plan.load(home)
    if plan is None:
        say(f"There is no stack in {home}.")
        return
    with _alone(home), step("stopping"):
        Supervisor(plan).stop()
    if wipe:
        # What others may have put there is not ours to delete.
        for pattern in ("run", "logs", "secrets", "code*", "postgres*", "redis", "app*", "edge*", "lock", "*.json"):
            for entry in home.glob(pattern):
                _delete(entry)
        with contextlib.suppress(OSError):  # something of others is in it
            home.rmdir()
        say(f"deleted {home}")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@run.command()
@DATA
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(data: Path | None, as_json: bool) -> None:
    """What runs, and where. Exits with 0 when it is ready, else with 3."""
    state = _state(_home(data))
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        _describe(state)
    sys.exit(0 if state["ready"] else NOT_RUNNING)


def _state(home: Path) -> dict[str, Any]:
    plan = Plan.load(home)
    state: dict[str, Any] = {"ready": False, "edges": [], "apps": [], "postgres": "", "redis": "", "data": str(home)}
    state["processes"] = []
    if plan is None:
        return state
    state["edges"], state["apps"] = plan.edge_urls, plan.app_urls
    for name, file in (("postgres", "database_url"), ("redis", "redis_url")):
        with contextlib.suppress(FileNotFoundError):
            state[name] = (plan.secrets / file).read_text().strip()
    state["processes"] = [
        {"name": process["name"], "pid": process["pid"], "state": process["statename"]}
        for process in Supervisor(plan).processes()
    ]
    state["ready"] = bool(state["processes"]) and ready(plan)
    return state


def _describe(state: dict[str, Any]) -> None:
    if not state["processes"]:
        click.echo(f"not running (data: {state['data']}); ./run up starts it")
        return
    click.echo("ready" if state["ready"] else "not ready; ./run logs shows why")
    for url in state["edges"]:
        click.echo(f"  {shown(url)}")
    for process in state["processes"]:
        click.echo(f"  {process['name']:<10} {process['state'].lower():<10} {process['pid'] or '-'}")
    click.echo(f"  data in {state['data']}")


@run.command()
@click.argument("name", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on.")
@click.option("--lines", "-n", default=50, show_default=True, help="Of each log.")
@DATA
def logs(name: str | None, follow: bool, lines: int, data: Path | None) -> None:
    """Show the logs: of all processes, or of those whose names start with NAME (edge, app1, postgres, ...)."""
    plan = Plan.load(_home(data))
    found = tail.files(plan.logs, name) if plan else []
    if plan is None or not found:
        names = ", ".join(file.stem for file in tail.files(plan.logs)) if plan else ""
        raise Refusal(f"There is no log of '{name or ''}'; there are: {names or 'none, nothing was started yet'}.")
    for file in found:
        for line in tail.last(file, lines):
            tail.show(file, line)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            tail.follow(plan.logs, name, lambda: False)


@run.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def velikiy(arguments: tuple[str, ...]) -> None:
    """The project's own commands, with the settings of the stack in the data folder (DATA=... names another)."""
    plan = Plan.load(_home(None))
    if plan is not None:
        os.environ.setdefault("SECRETS_DIR", str(plan.secrets))
    os.execv(sys.executable, [sys.executable, "-P", "-m", "velikiy", *arguments])  # noqa: S606


# ---- small things ----


def _home(data: Path | None) -> Path:
    chosen = data or load(StackSettings, ENV_FILE).data
    return Path(os.path.abspath(chosen.expanduser())) if chosen else default_home()  # noqa: PTH100


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One launcher at a time works on a data folder."""
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another ./run is at work on {home}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        run(prog_name="./run", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (Refusal, BadSetting) as error:
        say(f"./run: {error}")
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            say(f"./run: the disk is full ({error.filename}). Make room and start again; the data is untouched.")
        elif isinstance(error, PermissionError):
            say(f"./run: {error.filename} belongs to somebody else. Run it as that user, or choose another --data.")
        else:
            raise
        return 1
    except (KeyboardInterrupt, click.Abort):
        say("\nbroken off; nothing is left running")
        return 130
    return 0
