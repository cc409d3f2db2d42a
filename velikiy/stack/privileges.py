"""Choose the account that the services run as. Root does only the three things that need root.

`./run` executes each command twice. The first execution has the account of the person who typed the command: it reads
the settings, creates the data folder and copies the code to where every user may read it. Then the same command starts
again from that copy and does the rest; if root typed it, under a system user. So root never touches a folder in which
the services could lay a trap, such as a symbolic link.
"""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from velikiy.command_line import python_command
from velikiy.stack import Refusal, code_copy
from velikiy.stack.code_copy import CHECKOUT

SERVICE_USER = "velikiy"
"""The system user that root's services run as."""

CAP_NET_BIND_SERVICE = 10
"""The number of the capability to listen below port 1024 (capabilities(7))."""

WITHOUT_LOW_PORTS = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all"]
"""Prefix of the command of a child that does not need its parent's capability."""


def is_root() -> bool:
    return os.geteuid() == 0


def is_reexecuted() -> bool:
    """Return whether this is the second execution, which is unprivileged."""
    return "VELIKIY_CODE" in os.environ


def default_home() -> Path:
    """Return the default data folder of the person who typed the command."""
    if is_reexecuted():
        return Path(os.environ["VELIKIY_DEFAULT_HOME"])
    return Path("/var/lib/velikiy") if is_root() else Path.home() / ".local/share/velikiy"


def reexec_unprivileged(home: Path, *, live: bool = False, wait: bool = False) -> NoReturn:
    """Start the same command again under the services' account.

    Args:
        home: The data folder.
        live: Run the code from the checkout and not from a copy.
        wait: Wait until the command ends, then remove the data folder if it is empty. In /var/lib only root may.

    Raises:
        Refusal: The services' account cannot reach the checkout.
    """
    if live and is_root() and not may_enter(CHECKOUT):
        raise Refusal(
            f"--reload runs the code from the checkout, but the user {SERVICE_USER} may not enter {CHECKOUT}. "
            "Clone the project into another folder, for example /srv."
        )
    command, environment = second_execution(home, sys.argv[1:], live=live)
    if is_root():
        command = [*_as_service_account(keep_low_ports=_may_open_low_ports()), *command]
    os.chdir("/")  # the current folder may be closed to the services' account
    if wait:
        signal.signal(signal.SIGINT, lambda *_: None)  # the command has received it, too, and ends in order
        status = subprocess.run(command, env=environment, check=False).returncode
        with contextlib.suppress(OSError):
            home.rmdir()
        sys.exit(status)
    os.execvpe(command[0], command, environment)  # noqa: S606


def second_execution(home: Path, arguments: list[str], *, live: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment with which the services' account goes on."""
    code = CHECKOUT if live else code_copy.make()
    added = {
        "PYTHONPATH": code,
        "VELIKIY_CODE": code,
        "VELIKIY_HOME": home,
        "VELIKIY_DEFAULT_HOME": default_home(),
        "HOME": home,
    }
    environment = {**os.environ, **{name: str(value) for name, value in added.items()}}
    return python_command("velikiy.stack", *arguments), environment


def make_home(home: Path) -> None:
    """Create the data folder if it is missing, and give it to the services' account, which alone may enter it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)
    if is_root():
        account = service_account()
        os.chown(home, account.pw_uid, account.pw_gid, follow_symlinks=False)


def trusted_accounts() -> set[int]:
    """Return the ids of the accounts that may own a data folder and its parents: root, this account, and for root the
    account of the services."""
    accounts = {0, os.geteuid()}
    if is_root():
        with contextlib.suppress(KeyError):
            accounts.add(pwd.getpwnam(SERVICE_USER).pw_uid)
    return accounts


def service_account() -> pwd.struct_passwd:
    """Return the account of the services: the current account, or for root a system user, which is created if it is
    missing."""
    if not is_root():
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(SERVICE_USER)
    except KeyError:
        shell, folder = "/usr/sbin/nologin", "/nonexistent"
        subprocess.run(["useradd", "--system", "--shell", shell, "--home-dir", folder, SERVICE_USER], check=True)
        return pwd.getpwnam(SERVICE_USER)


def may_enter(path: Path) -> bool:
    """Return whether the services' account can reach the content of the folder."""
    test = ["test", "-x", str(path)]
    return subprocess.run([*_as_service_account(), *test] if is_root() else test, check=False).returncode == 0


def _as_service_account(*, keep_low_ports: bool = False) -> list[str]:
    """Return the prefix with which root runs a command under the services' account."""
    account = service_account()
    ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    capabilities = "+net_bind_service" if keep_low_ports else "-all"
    return ["setpriv", *ids, "--no-new-privs", f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]


def _may_open_low_ports() -> bool:
    """Return whether this process has the capability. The root user of a container may lack it."""
    status = Path("/proc/self/status").read_text()
    permitted = next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:"))
    return bool(int(permitted, 16) >> CAP_NET_BIND_SERVICE & 1)
