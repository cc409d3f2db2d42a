"""The folder of the stack that a command works on: its option, its plan, and its lock."""

import contextlib
import errno
import fcntl
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click

from velikiy.settings import BadSetting, FolderSettings, load
from velikiy.stack import Refusal, log_files, preflight, privileges
from velikiy.stack.messages import command, report
from velikiy.stack.plan import Plan
from velikiy.stack.programs import authentication


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
        plan = Plan.load(home_of(context.params.get("data")))
        return [name for name in process_names(plan) if name.startswith(incomplete)] if plan else []
    except (Refusal, BadSetting, OSError):
        return []


def process_names(plan: Plan) -> list[str]:
    return [name.replace(log_files.SUPERVISOR, "supervisor") for name in log_files.names(plan.logs)]


def plan_of(home: Path) -> Plan:
    """
    Raises:
        Refusal: There is no stack in this folder.
    """
    plan = Plan.load(home)
    if plan is None:
        raise no_stack(home)
    return plan


def no_stack(home: Path) -> Refusal:
    return Refusal(f"There is no stack in {home}. Start it with {command('up', home=home)}")


@contextlib.contextmanager
def changing_stack(home: Path) -> Iterator[None]:
    """Keep other launchers away while the block changes the stack in the data folder.

    Raises:
        Refusal: There is no stack.
    """
    os.environ.update(authentication(plan_of(home)))  # for the launcher's own connections
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with exclusive(home):
        yield


def unprivileged_home(data: Path | None) -> Path:
    """Return the data folder, as the user of the services: for another user, start the command again as that user."""
    home = home_of(data)
    if not privileges.is_reexecuted():
        privileges.reexec_unprivileged(home)
    return home


def unprivileged_plan(data: Path | None) -> Plan:
    """Return the plan of a stack with its own PostgreSQL, as the user of the services.

    Raises:
        Refusal
    """
    home = home_of(data)
    if not privileges.is_reexecuted() and (home / "stack.json").exists():
        privileges.reexec_unprivileged(home)
    plan = plan_of(home)
    if not plan.own_postgres:
        raise Refusal("The stack uses your own PostgreSQL: archive and recover there.")
    return plan


def home_of(data: Path | None) -> Path:
    """Return the data folder, with links resolved: /proc shows the working folders of processes without links too.

    Raises:
        Refusal: The folder is something else than a data folder, or another user can change its content.
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
def exclusive(home: Path) -> Iterator[None]:
    """Keep other launchers away from the data folder while the block runs."""
    while True:
        with _opened(home / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another ./run that uses {home}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_the_same(lock.fileno(), home / "lock"):
                yield
                return


def _opened(lock: Path) -> IO[str]:
    """Open the file of the lock, and create it if it is missing. A disk that can only be read since it has failed must
    not keep `./run down` from its work.

    Raises:
        Refusal: The folder does not exist any more.
        OSError
    """
    try:
        return lock.open("w")
    except FileNotFoundError:
        raise Refusal(f"{lock.parent} was deleted by another ./run. Run the command again.") from None
    except OSError as error:
        if error.errno != errno.EROFS or not lock.exists():
            raise
        return lock.open()


def _is_the_same(descriptor: int, file: Path) -> bool:
    """Return whether the open file still has this name. `down --wipe` deletes the lock for which others wait, and the
    next launcher locks a new one."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
