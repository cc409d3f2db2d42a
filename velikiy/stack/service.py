"""Run a stack as a service of systemd.

The unit (deploy/systemd/velikiy.service) divides a start as `privileges` divides each command: its ExecStartPre runs as
root, reads the settings, copies the code and writes the second half of the start to SECOND_EXECUTION. Its ExecStart
runs that file under the services' account in a sandbox, and stays as the main process, which starts the stack, looks
after it and stops it.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

from velikiy import whole_file
from velikiy.stack import Refusal, privileges
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import Supervisor

UNIT = "velikiy.service"
UNIT_FOLDER = Path("/etc/systemd/system")
TEMPLATES = CHECKOUT / "deploy" / "systemd"

SECOND_EXECUTION = Path("/run/velikiy/start")
"""The script of ExecStart. It contains the settings, so only root and the services' account may read it."""

BACKUPS = Path("/var/backups/velikiy")
"""The folder of the backups that a timer makes."""

OPEN_FILES = 65_536
"""The limit of open files of the service. A machine that allows fewer keeps its own limit."""

OF_SYSTEMD = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID")
"""Variables that systemd sets for each process of a unit."""


# ---- the units ----


def install(home: Path, archive: Path | None) -> None:
    """Write the units, start the stack with them now and at each boot.

    Args:
        home: The data folder.
        archive: WAL_ARCHIVE, where PostgreSQL writes as well.

    Raises:
        Refusal: Another data folder has the service, or systemd cannot start the stack.
    """
    other = _installed_for()
    if other and other != home:
        raise Refusal(f"{UNIT} runs the stack in {other}. Run {command('uninstall-service')} first.")
    _refuse_strange_path(CHECKOUT)
    account = privileges.service_account()  # the unit names this account
    BACKUPS.mkdir(mode=0o700, parents=True, exist_ok=True)  # systemd makes no sandbox around a folder that is missing
    was_active = _is_active()
    changed = {unit.name for unit in _templates() if _write(unit, home, archive)}
    timers = [unit.name for unit in _templates() if unit.suffix == ".timer"]
    _systemctl("daemon-reload")
    _systemctl("enable", "--quiet", UNIT, *timers)
    if not was_active:
        start()
    elif UNIT in changed:
        report(f"The unit has changed. Run this at a time that suits you: systemctl restart {UNIT}")
    report(f"{UNIT} runs the stack in {home} as the user {account.pw_name}, also after a boot.")
    report(f"  state    systemctl status velikiy        {command('status', home=home)}")
    report(f"  journal  journalctl -u velikiy -f        (requests: {command('logs', home=home)})")
    report("  apply    systemctl reload velikiy        (newer code and changes of .env, without a failed request)")
    report(f"  remove   {command('uninstall-service')}         (the data stays)")
    for timer in timers:
        _systemctl("restart", timer)
        report(f"  backup   systemctl list-timers {timer}   (each night, to {BACKUPS})")


def uninstall() -> None:
    """Stop the service and remove its units.

    Raises:
        Refusal: Only root may do so.
    """
    written = [UNIT_FOLDER / name for name in installed_units()]
    if not written:
        report("There is no service to remove.")
        return
    require_systemd("remove")
    with step(f"stopping and removing {', '.join(unit.name for unit in written)}"):
        for unit in written:
            if is_enabled(unit.name):
                _systemctl("disable", "--quiet", unit.name)
            _systemctl("stop", unit.name)
            unit.unlink()
            shutil.rmtree(unit.with_name(f"{unit.name}.d"), ignore_errors=True)  # of `systemctl edit`
        _systemctl("daemon-reload")
        shutil.rmtree(SECOND_EXECUTION.parent, ignore_errors=True)


def installed_units() -> list[str]:
    return [unit.name for unit in _templates() if (UNIT_FOLDER / unit.name).exists()]


def start() -> None:
    """Start the service, and wait until the stack is ready.

    Raises:
        Refusal: The stack does not start.
    """
    with step(f"starting {UNIT}"):
        try:
            _systemctl("start", UNIT)
        except Refusal:
            raise Refusal(f"{UNIT} does not start. journalctl -u velikiy -n 50 shows why.") from None


def start_if_installed(home: Path) -> None:
    """Start the stack by its service, if it has one: else the stack would run outside of the service.

    Raises:
        Refusal: The stack does not start.
    """
    if _is_in_charge(home) and not _is_active():
        start()


def stop_if_installed(home: Path) -> None:
    """Stop the service of the stack, if it runs.

    Raises:
        Refusal: systemd cannot stop it.
    """
    if _is_in_charge(home) and _is_active():
        with step(f"stopping {UNIT}"):
            _systemctl("stop", UNIT)
        report(f"It starts again at the next boot. To prevent that: {command('uninstall-service')}")


def refuse_restart(running: Plan, obstacle: str) -> None:
    """Leave it to systemd to restart a whole stack. A stack that a person's command starts would run outside of the
    service.

    Raises:
        Refusal: The stack belongs to the service.
    """
    pid = Supervisor(running).pid()
    if pid is not None and _unit_of(pid) == UNIT:
        raise Refusal(
            f"The stack must restart as a whole, because {obstacle}. {UNIT} runs it: keep the settings in .env and not "
            f"on the command line, then run: systemctl restart {UNIT}"
        )


def refuse_closed_archive(running: Plan | None, archive: Path) -> None:
    """Refuse an archive in which the service may not write. PostgreSQL would keep its log until the disk is full.

    Raises:
        Refusal: The unit does not permit it.
    """
    pid = Supervisor(running).pid() if running else None
    belongs_to_service = is_main_process() or (pid is not None and _unit_of(pid) == UNIT)
    if belongs_to_service and _permission(archive) not in (UNIT_FOLDER / UNIT).read_text().splitlines():
        raise Refusal(
            f"{UNIT} may not write to WAL_ARCHIVE={archive}. Run {command('install-service')}, which permits it, and"
            f" then: systemctl restart {UNIT}"
        )


def _permission(archive: Path) -> str:
    """Return the line of the unit. A folder that is missing must not keep systemd from making the sandbox."""
    return f"ReadWritePaths=-{archive}"


def _templates() -> list[Path]:
    return sorted(file for file in TEMPLATES.iterdir() if file.suffix in (".service", ".timer"))


def _write(template: Path, home: Path, archive: Path | None) -> bool:
    """Write the unit of a template. Return whether that changes the unit."""
    text = filled(template.read_text(), home, archive)
    unit = UNIT_FOLDER / template.name
    if unit.exists() and unit.read_text() == text:
        return False
    unit.write_text(text)
    unit.chmod(0o644)
    return True


def filled(text: str, home: Path, archive: Path | None) -> str:
    """Return the text of a template with the paths and limits of this machine."""
    in_homes = any(str(home).startswith(folder) for folder in ("/home/", "/root/"))
    values = {
        "RUN": _quoted(CHECKOUT / "run"),
        "CHECKOUT": str(CHECKOUT).replace("%", "%%"),
        "DATA": _quoted(home),
        "ARCHIVE": _permission(archive) if archive else "",
        "BACKUPS": str(BACKUPS),
        "OPEN_FILES": str(min(OPEN_FILES, _most_open_files())),
        # Homes are hidden, unless the data is below one.
        "PROTECT_HOME": "read-only" if in_homes else "yes",
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _quoted(path: Path) -> str:
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def _refuse_strange_path(path: Path) -> None:
    if odd := set("\"'\\$\n") & set(str(path)):
        raise Refusal(
            f"The path {path} contains {' '.join(sorted(odd))}, which systemd would misread. Move the checkout."
        )


def _most_open_files() -> int:
    """Return the limit that this machine allows. Without CAP_SYS_RESOURCE, systemd cannot raise its own."""
    for line in Path("/proc/1/limits").read_text().splitlines():
        if match := re.match(r"Max open files\s+\S+\s+(\d+)", line):
            status = Path("/proc/1/status").read_text()
            capabilities = int(re.search(r"^CapEff:\s+(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
            return OPEN_FILES if capabilities >> CAP_SYS_RESOURCE & 1 else int(match[1])
    return OPEN_FILES


CAP_SYS_RESOURCE = 24
"""The number of the capability to raise a limit (capabilities(7))."""


def require_systemd(what: str) -> None:
    """
    Raises:
        Refusal: This account or this machine can have no service.
    """
    if not privileges.is_root():
        raise Refusal(f"Only root can {what} a service. Run the command with sudo.")
    if not _is_running_systemd():
        raise Refusal("This machine was not booted with systemd, so it has no such services.")


def _is_running_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def _is_in_charge(home: Path) -> bool:
    """Return whether the service runs the stack of this folder, and this process is not a part of the service."""
    is_installed = privileges.is_root() and _is_running_systemd() and _installed_for() == home
    return is_installed and _unit_of(os.getpid()) != UNIT


def _installed_for() -> Path | None:
    """Return the data folder in the unit, or None if there is no unit."""
    try:
        found = re.search(r'^ReadWritePaths="?(.*?)"?$', (UNIT_FOLDER / UNIT).read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return Path(found[1].replace("%%", "%")) if found else None


def _is_active() -> bool:
    state = subprocess.run(["systemctl", "is-active", UNIT], capture_output=True, text=True, check=False)
    return state.stdout.strip() in ("active", "activating", "reloading", "deactivating")


def is_enabled(unit: str) -> bool:
    return (
        subprocess.run(["systemctl", "is-enabled", "--quiet", unit], capture_output=True, check=False).returncode == 0
    )


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refusal(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip()}")


def _unit_of(pid: int) -> str:
    """Return the name of the systemd service that the process belongs to, or an empty string."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:  # the process has ended
        return ""
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or controllers == "name=systemd":
            services = [part for part in path.split("/") if part.endswith(".service")]
            if services:
                return services[-1]
    return ""


# ---- the start ----


def prepare(home: Path) -> None:
    """Write the script with which the services' account goes on, as `privileges.reexec_unprivileged` would do."""
    words, environment = privileges.second_execution(home, ["up"])
    account = privileges.service_account()
    folder = SECOND_EXECUTION.parent
    folder.mkdir(mode=0o750, exist_ok=True)
    os.chown(folder, 0, account.pw_gid)
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in sorted(environment.items())
        if name not in OF_SYSTEMD and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    ]
    text = "\n".join(["#!/bin/sh", *exports, f"exec {shlex.join(words)}"]) + "\n"
    whole_file.replace(SECOND_EXECUTION, text, mode=0o640, group=account.pw_gid, durable=False)


def is_main_process() -> bool:
    """Return whether systemd waits for messages of this process."""
    return "NOTIFY_SOCKET" in os.environ


def take_over(home: Path) -> None:
    """Stop a stack that was started by hand, so that this process can start it as a part of the service."""
    running = Plan.load(home)
    if running and Supervisor(running).pid() is not None:
        with step("stopping the stack that was started by hand"):
            Supervisor(running).stop()


def notify(*lines: str) -> None:
    """Send the lines to systemd (sd_notify(3))."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendall("\n".join(lines).encode())
