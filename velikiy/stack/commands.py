"""up, down, status, logs: the stack's life, one function each."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from velikiy.cli import write_secrets
from velikiy.settings import BadSetting, Settings, StackSettings, load
from velikiy.stack import Refusal, account, cluster, preflight, tail
from velikiy.stack.plan import CHECKOUT, Plan, fingerprint
from velikiy.stack.supervise import FIRST, Supervisor

ENV_FILE = CHECKOUT / ".env"
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
    _knobs(wanted)  # a bad one is refused before anything is made
    home = _home(data)
    # Signals come as KeyboardInterrupt wherever we are: a start that is broken off is taken back.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    preflight.data_folder(home)
    preflight.room(home)
    preflight.address(wanted.bind)
    account.folder(home)
    with _alone(home):
        started = _start(home, wanted, set(given), reload)
    if detach or not started:
        return
    say("Ctrl-C stops everything. The logs:")
    supervisor = Supervisor(started)
    try:
        tail.follow(started.logs, None, lambda: False, from_start=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second Ctrl-C of an impatient person
        with _step("\nstopping"):
            supervisor.stop()


def _start(home: Path, wanted: StackSettings, given: set[str], reload: bool) -> Plan | None:
    """The plan that runs from now on; None where it did already."""
    began = time.monotonic()
    before = Plan.load(home)
    running = before is not None and Supervisor(before).pid() is not None
    plan = Plan(
        data=str(home),
        bind=wanted.bind,
        port=wanted.port or 0,
        edges=wanted.edges,
        apps=wanted.apps,
        reload=reload,
        own_postgres=wanted.database_url is None,
        own_redis=wanted.redis_url is None,
    )
    if running and before is not None:
        # What is not asked for stays as it runs.
        plan.port = wanted.port or before.port
        for name in ("bind", "edges", "apps"):
            if name not in given:
                setattr(plan, name, getattr(before, name))
    knobs = _knobs(wanted)
    plan.fingerprint = fingerprint(
        *(plan.bind, plan.edges, plan.apps, plan.reload, knobs, wanted.database_url, wanted.redis_url),
        sys.executable,
    )
    same = before is not None and (before.fingerprint, before.port) == (plan.fingerprint, plan.port)
    if before is not None and running and same and _ready(before):
        say(f"It is running already: {before.edge_urls[0]}  (./run logs -f shows the logs, ./run down stops it)")
        return None

    binaries = cluster.binaries(plan.cluster) if plan.own_postgres else None
    if plan.reload and account.is_root() and not account.may_enter(CHECKOUT):
        raise Refusal(
            f"--reload runs the code where it is, and the user {account.NAME} may not enter {CHECKOUT}. "
            "Clone it somewhere else, for example into /srv."
        )
    if before is not None:
        with _step("stopping what runs with other settings") if running else contextlib.nullcontext():
            Supervisor(before).stop()
    # Now that ours have let go of their ports.
    plan.port = preflight.port(plan.port or None, plan.bind, plan.edges)
    plan.choose_ports(before)
    _lay_out(plan, wanted)
    settings = load(Settings, None, **_addresses(plan, wanted), **knobs)

    supervisor = Supervisor(plan)
    try:
        if binaries and not plan.cluster.exists():
            with _step("creating the database cluster"):
                cluster.create(plan, binaries)
        _launch(plan, settings, binaries, supervisor)
    except BaseException:
        supervisor.stop()
        raise
    say(f"Velikiy Flask is ready after {time.monotonic() - began:.1f} s: {_shown(plan.edge_urls[0])}")
    for n, url in enumerate(plan.edge_urls[1:], 2):
        say(f"  edge {n}  {_shown(url)}")
    if plan.port != 80 and wanted.port is None:
        say("  (port 80 is taken, or this user may not open it)")
    option = "" if home == _default_home() else f" --data {home}"
    say(f"  try     curl -i {_shown(plan.edge_urls[0])}/users")
    say(f"  logs    ./run logs -f{option}    (files in {plan.logs})")
    say(f"  stop    ./run down{option}")
    return plan


def _lay_out(plan: Plan, wanted: StackSettings) -> None:
    """Folders, the code's copy, passwords and addresses."""
    home = plan.home
    plan.save()
    servers = ["redis", *(f"app{n + 1}" for n in range(plan.apps)), *(f"edge{n + 1}" for n in range(plan.edges))]
    for name in ("run", "logs", *servers):
        account.folder(home / name)
    account.folder(plan.secrets, 0o700)
    plan.copy_code()
    postgres, redis = f"127.0.0.1:{plan.postgres_port}", f"127.0.0.1:{plan.redis_port}"
    write_secrets(plan.secrets, postgres=postgres, redis=redis, mode=0o400)
    for name, address in (("database_url", wanted.database_url), ("redis_url", wanted.redis_url)):
        if address:
            (plan.secrets / name).chmod(0o600)
            (plan.secrets / name).write_text(address + "\n")
    for file in plan.secrets.iterdir():
        account.give(file)


def _launch(plan: Plan, settings: Settings, binaries: Path | None, supervisor: Supervisor) -> None:
    programs = plan.programs(settings, binaries)
    servers = " and ".join(program.name for program in programs if program.name in FIRST)
    with _step(f"starting {servers or 'the supervisor'}"):
        supervisor.start(programs)
        if binaries:
            cluster.create_database(plan, within=60)
    with _step("bringing the tables up to date"):
        _migrate(settings)
    rest = [program.name for program in programs if program.name not in FIRST]
    with _step(f"starting {', '.join(rest)}"):
        for name in rest:
            supervisor.start_program(name)
        _wait_until_ready(plan, within=60)


def _migrate(settings: Settings) -> None:
    from velikiy import migrate  # SQLAlchemy takes half a second to import

    try:
        migrate.upgrade(settings.database_url, wait=10)
    except migrate.CannotMigrate as error:
        raise Refusal(f"The tables could not be brought up to date: {error}") from None


def _wait_until_ready(plan: Plan, *, within: float) -> None:
    until = time.monotonic() + within
    while not _ready(plan):
        if time.monotonic() > until:
            for file in tail.files(plan.logs):
                for line in tail.last(file, 5):
                    say(f"{file.stem:<10} {line}")
            raise Refusal(
                f"It is not healthy after {within:g} s. The ends of the logs are above, all of them in {plan.logs}."
            )
        time.sleep(0.05)


def _ready(plan: Plan) -> bool:
    """Every edge answers /health."""
    for url in plan.edge_urls:
        try:
            with urllib.request.urlopen(url + "/health", timeout=3) as answer:  # noqa: S310
                if answer.status != 200:
                    return False
        except (OSError, urllib.error.URLError):
            return False
    return True


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
    with _alone(home), _step("stopping"):
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
    state["ready"] = bool(state["processes"]) and _ready(plan)
    return state


def _describe(state: dict[str, Any]) -> None:
    if not state["processes"]:
        click.echo(f"not running (data: {state['data']}); ./run up starts it")
        return
    click.echo("ready" if state["ready"] else "not ready; ./run logs shows why")
    for url in state["edges"]:
        click.echo(f"  {_shown(url)}")
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


def _default_home() -> Path:
    return Path("/var/lib/velikiy") if account.is_root() else Path.home() / ".local/share/velikiy"


def _home(data: Path | None) -> Path:
    chosen = data or load(StackSettings, ENV_FILE).data
    return Path(os.path.abspath(chosen.expanduser())) if chosen else _default_home()  # noqa: PTH100


def _knobs(wanted: StackSettings) -> dict[str, Any]:
    """The app's settings but for its servers' addresses, which are not known yet where the servers are ours."""
    stand_in = {"database_url": "postgresql://", "redis_url": "redis://"}
    settings = load(Settings, ENV_FILE, **{**stand_in, **_given_addresses(wanted)})
    return {name: value for name, value in settings if not name.endswith("_url")}


def _given_addresses(wanted: StackSettings) -> dict[str, str]:
    given = {"database_url": wanted.database_url, "redis_url": wanted.redis_url}
    return {name: address for name, address in given.items() if address}


def _addresses(plan: Plan, wanted: StackSettings) -> dict[str, str]:
    ours = {name: (plan.secrets / name).read_text().strip() for name in ("database_url", "redis_url")}
    return {**ours, **_given_addresses(wanted)}


def _shown(url: str) -> str:
    return url.removesuffix(":80")


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


def say(text: str) -> None:
    """To people: not into a pipe that waits for results."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    """Progress: what is being done, and how long it took."""
    began = time.monotonic()
    print(f"{what} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"done ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)


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
