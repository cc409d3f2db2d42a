"""Under whose account the services run: never root."""

import os
import pwd
import subprocess
from pathlib import Path

from velikiy.stack import Refusal

NAME = "velikiy"
"""The system user that root's services drop to."""


def is_root() -> bool:
    return os.geteuid() == 0


def services() -> pwd.struct_passwd:
    """The account of the services: our own, or for root a system user, which is made where it is missing."""
    if not is_root():
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(NAME)
    except KeyError:
        shell, home = "/usr/sbin/nologin", "/nonexistent"
        subprocess.run(["useradd", "--system", "--shell", shell, "--home-dir", home, NAME], check=True)
        return pwd.getpwnam(NAME)


def dropped(command: list[str], *, low_ports: bool = False) -> list[str]:
    """The command as the services' account runs it; `low_ports`: it may listen below 1024 all the same."""
    if not is_root():
        return command
    account = services()
    ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    capabilities = "+net_bind_service" if low_ports else "-all"
    return ["setpriv", *ids, "--no-new-privs", f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", *command]


WITHOUT_LOW_PORTS = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all"]
"""Prefix for a child that does not need what its parent was given."""


def folder(path: Path, mode: int = 0o755) -> None:
    """Make it where it is missing, and give it to the services' account."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    path.chmod(mode)
    give(path)


def give(path: Path) -> None:
    if is_root():
        account = services()
        os.chown(path, account.pw_uid, account.pw_gid)


def may_enter(path: Path) -> bool:
    """Whether the services' account can reach what is in this folder."""
    return subprocess.run(dropped(["test", "-x", str(path)]), check=False).returncode == 0


def refuse_unreachable(data: Path) -> None:
    for parent in reversed(data.parents):
        if parent.exists() and not may_enter(parent):
            raise Refusal(
                f"{data} cannot hold the data: the user {services().pw_name}, under which the services run, may not "
                f"enter {parent}. Choose another folder with --data."
            )
