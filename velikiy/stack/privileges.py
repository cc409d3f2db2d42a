"""Under whose account things run: never root's, but for the three things that only root can do.

`./run` comes in twice. First as whoever typed it: settings are read, the data folder is made, the code is copied to
where every user may read it. Then the same command starts again from that copy, for root as a system user, and does
the rest. So nothing that root does touches a folder in which the services could lay a trap (a symbolic link, say).
"""

import compileall
import contextlib
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from velikiy.stack import Refusal

NAME = "velikiy"
"""The system user that root's services run as."""

CHECKOUT = Path(__file__).parent.parent.parent
CODE = ("velikiy", "migrations", "edge", "deploy")
"""What of the checkout the services need."""

UNUSED = 30 * 24 * 3600
"""Seconds."""

NET_BIND_SERVICE = 10
"""The number of the capability to listen below port 1024 (capabilities(7))."""

WITHOUT_LOW_PORTS = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all"]
"""Prefix for a child that does not need what its parent was given."""


def is_root() -> bool:
    return os.geteuid() == 0


def handed_over() -> bool:
    """Whether this is the second time."""
    return "VELIKIY_CODE" in os.environ


def default_home() -> Path:
    """Of whoever typed the command."""
    if handed_over():
        return Path(os.environ["VELIKIY_DEFAULT_HOME"])
    return Path("/var/lib/velikiy") if is_root() else Path.home() / ".local/share/velikiy"


def code() -> Path:
    """What the services run: a copy, so that an edit or a `git pull` in the checkout cannot meet a worker that is
    just restarted; with --reload the checkout itself."""
    return Path(os.environ["VELIKIY_CODE"])


def hand_over(home: Path, *, live: bool = False, wait: bool = False) -> NoReturn:
    """Start the same command again as the services' account, from the copy of the code (`live`: from the checkout).

    `wait`: for its end, and then remove the data folder where it was left empty; in /var/lib only root can.
    """
    place = CHECKOUT if live else _copy()
    if live and is_root() and not may_enter(CHECKOUT):
        raise Refusal(
            f"--reload runs the code from the checkout, but the user {NAME} may not enter {CHECKOUT}. "
            "Clone the project into another folder, for example /srv."
        )
    command = [sys.executable, "-P", "-m", "velikiy.stack", *sys.argv[1:], "--data", str(home)]
    if is_root():
        command = [*_dropping(keep_low_ports=_has_low_ports()), *command]
    ours = {"PYTHONPATH": place, "VELIKIY_CODE": place, "VELIKIY_DEFAULT_HOME": default_home(), "HOME": home}
    environment = {**os.environ, **{name: str(value) for name, value in ours.items()}}
    os.chdir("/")  # the folder that it was typed in may be closed to the services' account
    if wait:
        ended = subprocess.run(command, env=environment, check=False).returncode
        with contextlib.suppress(OSError):
            home.rmdir()
        sys.exit(ended)
    os.execvpe(command[0], command, environment)  # noqa: S606


def make_home(home: Path) -> None:
    """The data folder, where it is missing; it belongs to the services' account."""
    home.mkdir(mode=0o755, parents=True, exist_ok=True)
    if is_root():
        account = services()
        os.chown(home, account.pw_uid, account.pw_gid, follow_symlinks=False)


def services() -> pwd.struct_passwd:
    """The account of the services: our own, or for root a system user, which is made where it is missing."""
    if not is_root():
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(NAME)
    except KeyError:
        shell, folder = "/usr/sbin/nologin", "/nonexistent"
        subprocess.run(["useradd", "--system", "--shell", shell, "--home-dir", folder, NAME], check=True)
        return pwd.getpwnam(NAME)


def may_enter(path: Path) -> bool:
    """Whether the services' account can reach what is in this folder."""
    test = ["test", "-x", str(path)]
    return subprocess.run([*_dropping(), *test] if is_root() else test, check=False).returncode == 0


def _dropping(*, keep_low_ports: bool = False) -> list[str]:
    """Prefix with which root runs a command as the services' account."""
    account = services()
    ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    capabilities = "+net_bind_service" if keep_low_ports else "-all"
    return ["setpriv", *ids, "--no-new-privs", f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]


def _has_low_ports() -> bool:
    """A container's root may have been stripped of it."""
    status = Path("/proc/self/status").read_text()
    permitted = next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:"))
    return bool(int(permitted, 16) >> NET_BIND_SERVICE & 1)


def _copy() -> Path:
    """Of the code, named by its contents, beside the Python environments; several stacks share it."""
    if handed_over():
        return code()
    digest = hashlib.sha256(str(sys.implementation.cache_tag).encode())  # of what is compiled
    files = [file for name in CODE for file in sorted((CHECKOUT / name).rglob("*")) if "__pycache__" not in file.parts]
    for file in files:
        digest.update(str(file.relative_to(CHECKOUT)).encode() + b"\0" + (file.read_bytes() if file.is_file() else b""))
    place = Path(os.environ["VELIKIY_CACHE"]) / f"code-{digest.hexdigest()[:16]}"
    if place.exists():
        with contextlib.suppress(OSError):
            os.utime(place)  # see _clear_up
        return place
    new = place.with_name(f"{place.name}.{os.getpid()}")
    for name in CODE:
        shutil.copytree(CHECKOUT / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
    for entry in (new, *new.rglob("*")):  # whatever the umask was under which it was cloned
        entry.chmod(0o755 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o644)
    # Now: root's services cannot write here, and each process would compile for itself, at each start.
    compileall.compile_dir(new, stripdir=new, prependdir=place, quiet=2)
    try:
        new.rename(place)
    except OSError:  # somebody else was faster
        shutil.rmtree(new)
    _clear_up(place.parent)
    return place


def _clear_up(cache: Path) -> None:
    """Copies of the code, and Python environments, that former versions left: those for which no command has asked in
    UNUSED, and from which nothing runs. A service that dies is started again from where it was."""
    for entry in (*cache.glob("code-*"), *cache.glob("venv-*")):
        with contextlib.suppress(OSError):  # somebody else does the same
            if entry.stat().st_mtime < time.time() - UNUSED and not _somebody_runs(entry.name):
                gone = entry.with_suffix(".gone")
                entry.rename(gone)  # at once for all: broken off, half of it would be taken for whole
                shutil.rmtree(gone, ignore_errors=True)


def _somebody_runs(name: str) -> bool:
    """By the last part of the path, which is a digest: folders may be reached in more than one way."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if os.fsencode(name) in process.read_bytes():
                return True
    return False
