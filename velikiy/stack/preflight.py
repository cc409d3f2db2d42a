"""Refuse a start that would fail, before anything is changed."""

import os
import pwd
import resource
import shlex
import shutil
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from velikiy.findings import machine
from velikiy.stack import Refusal, privileges
from velikiy.stack.messages import as_owner_of, report
from velikiy.stack.plan import DATA_FOLDER_ENTRIES, Plan, bracketed, is_free

MIN_FREE_NEW_MB = 400
"""Free space for a new stack: a new cluster takes 40 MB, its log up to 80 MB while it is small, the edge's cache 128
MB."""

MIN_FREE_MB = 100
"""Free space for a stack that already has a cluster."""

MAX_DATA_PATH = 80
"""Bytes. The path of a Unix socket has a limit of 107 bytes, and up to 27 of them follow the data folder."""


SIGNS_OF_A_STACK = ("stack.json", "run/supervisord.conf")
"""Without the first, `./run down` still stops what runs in the folder."""


def check_location(data: Path) -> None:
    """Check that sockets and configurations can contain the path, and that the services can enter the folder.

    Raises:
        Refusal: The folder cannot be used.
    """
    if len(os.fsencode(data)) > MAX_DATA_PATH:
        raise Refusal(
            f"The path {data} is too long for sockets (over {MAX_DATA_PATH} bytes). Choose another folder with --data."
        )
    if odd := set('"%;$\\{},') & set(str(data)):
        raise Refusal(
            f"The path {data} contains {' '.join(sorted(odd))}, which Nginx or PostgreSQL would misread. "
            "Choose another with --data."
        )
    for parent in reversed(data.parents):
        if parent.exists() and not privileges.may_enter(parent):
            raise _cannot_enter(data, parent)


def check_content(data: Path) -> None:
    """Check that the folder is the folder of a stack, is empty, or does not exist yet, and that the services can enter
    the folder of a stack.

    Raises:
        Refusal: The folder is something else.
    """
    if not data.exists():
        return
    if not data.is_dir():
        raise Refusal(f"{data} is not a folder. Choose a folder with --data.")
    if any((data / name).exists() for name in SIGNS_OF_A_STACK):
        # Until there is a stack, root may have no account for the services yet.
        if not privileges.may_enter(data):
            closed = next(it for it in (*reversed(data.parents), data) if not privileges.may_enter(it))
            raise _cannot_enter(data, closed)
    elif any(not DATA_FOLDER_ENTRIES.fullmatch(entry.name) for entry in data.iterdir()):
        raise Refusal(f"{data} contains other files and no stack. Choose an empty or a new folder with --data.")


def _cannot_enter(data: Path, folder: Path) -> Refusal:
    return Refusal(
        f"{data} cannot hold the data: the services run as the user {privileges.service_account().pw_name}, "
        f"which may not enter {folder}. Choose another folder with --data."
    )


def check_owner(data: Path) -> None:
    """Check that no other user can change the data folder, its parents or the folders of the stack in it.

    Raises:
        Refusal: Another user owns one of them or may write there.
    """
    _check_owners((*reversed(data.parents), data), data)
    check_content(data)  # first: entries of the same names in /etc belong to other programs
    entries = [*data.iterdir()] if data.is_dir() else []
    _check_owners([entry for entry in entries if DATA_FOLDER_ENTRIES.fullmatch(entry.name)], data)


def _check_owners(paths: Iterable[Path], data: Path) -> None:
    """
    Raises:
        Refusal
    """
    trusted = privileges.trusted_accounts()
    for path in paths:
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise Refusal(f"{path} is in a file, and not in a folder. Choose a folder with --data.") from None
        if found.st_uid not in trusted:
            advice = f"{as_owner_of(str(path))}, or choose" if path == data else "Choose"
            raise Refusal(
                f"{path} belongs to another user ({_name(found.st_uid)}), who could replace what the stack reads there."
                f" {advice} another folder with --data."
            )
        if path in data.parents:
            # In a folder with the sticky bit, such as /tmp, users replace only their own files.
            is_open = bool(found.st_mode & stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        else:
            is_open = bool(found.st_mode & (stat.S_IWOTH | stat.S_IWGRP))
        if stat.S_ISDIR(found.st_mode) and is_open and (path != data or any(data.iterdir())):
            raise Refusal(
                f"Other users may write in {path}. Check its content, take the right away"
                f" (chmod go-w {shlex.quote(str(path))}) and start again, or choose another folder with --data."
            )


def _name(account: int) -> str:
    try:
        return pwd.getpwuid(account).pw_name
    except KeyError:
        return str(account)


def check_free_space(data: Path) -> None:
    """Check that the disk has room for the stack.

    Raises:
        Refusal: The disk is nearly full.
    """
    existing = next(folder for folder in (data, *data.parents) if folder.exists())
    needed = MIN_FREE_MB if (data / "postgres" / "PG_VERSION").exists() else MIN_FREE_NEW_MB
    free = shutil.disk_usage(existing).free // 1_000_000
    if free < needed:
        raise Refusal(
            f"The disk of {data} has {free} MB left, but {needed} MB are needed. "
            "Free some space or choose another folder with --data; the data is untouched."
        )


MIN_OPEN_FILES = 1024
"""Below this limit supervisor does not start."""


def check_open_files() -> None:
    """Check that the services may open enough files and connections. Each service raises its limit by itself as far as
    the hard limit allows.

    Raises:
        Refusal: The hard limit is too low to start.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= machine.ENOUGH_OPEN_FILES:
        return
    found = machine.few_open_files(limit)
    if limit < MIN_OPEN_FILES:
        raise Refusal(
            f"The limit of open files is {limit}, but {MIN_OPEN_FILES} are needed (ulimit -n). {found.advice}"
        )
    report(f"warning: {found.what[0].lower()}{found.what[1:]} {found.advice}")


def check_address(bind: str) -> None:
    """Check that the machine has this address.

    Raises:
        Refusal: The machine has no such address.
    """
    is_local = False
    try:
        socket.getaddrinfo(bind, None, flags=socket.AI_NUMERICHOST)
        is_local = bool(bind) and is_free(bind, 0)
    except OSError:
        pass
    if not is_local:
        raise Refusal(
            f"This machine has no address {bind}. Use --bind 127.0.0.1 for this machine only, "
            "or --bind 0.0.0.0 for all of its networks."
        )


def choose_port(wanted: int | None, bind: str, edges: int, reusable: list[int], defaults: tuple[int, ...]) -> int:
    """Return the port of the first edge: the wanted port, else the first default that can be opened.

    Args:
        wanted: The port that the user has set.
        bind: The address that the edges listen on.
        edges: The number of edges; each takes a port.
        reusable: Ports of this stack's own edges, which will release them.
        defaults: The ports to try.

    Raises:
        Refusal: A port is in use, or this user may not open it.
    """
    if wanted is not None:
        if wanted + edges - 1 > 65_535:
            raise Refusal(f"Edge {edges} would need port {wanted + edges - 1}. Choose a lower port with --port.")
        if obstacle := _obstacle(wanted, bind, edges, reusable):
            raise Refusal(f"{obstacle} Choose another port with --port.")
        return wanted
    obstacles = []
    for candidate in defaults:
        obstacle = _obstacle(candidate, bind, edges, reusable)
        if not obstacle:
            return candidate
        obstacles.append(obstacle)
    raise Refusal(f"{' '.join(obstacles)} Choose another port with --port.")


def check_inner_port(setting: str, port: int, running: Plan | None) -> None:
    """Refuse a port on 127.0.0.1 that another program uses.

    Raises:
        Refusal
    """
    own = (running.metrics_port, running.prometheus_port) if running else ()
    if port and port not in own and not is_free("127.0.0.1", port):
        raise Refusal(f"{setting}={port} is in use by another program. Choose another port.")


def choose_http_port(wanted: int | None, plan: Plan, reusable: list[int]) -> int:
    """Return the port where the first edge redirects plain HTTP to TLS, or 0: the wanted port, else 80 beside 443.

    Raises:
        Refusal: The wanted port is in use, or this user may not open it.
    """
    if wanted is None:
        is_possible = plan.port == 443 and not _obstacle(80, plan.bind, 1, reusable)
        return 80 if is_possible else 0
    if wanted in plan.edge_ports:
        raise Refusal(f"HTTP_PORT={wanted} is the port of an edge. Choose another HTTP_PORT, or 0 for none.")
    if wanted and (obstacle := _obstacle(wanted, plan.bind, 1, reusable)):
        raise Refusal(f"{obstacle} Choose another HTTP_PORT, or 0 for none.")
    return wanted


def _obstacle(first: int, bind: str, edges: int, reusable: list[int]) -> str:
    """Return why the edges cannot listen on ports from `first` on, or an empty string if they can."""
    for number in set(range(first, first + edges)) - set(reusable):
        try:
            if not is_free(bind, number):
                return f"Port {number} on {bracketed(bind)} is in use by another program."
        except PermissionError:
            return f"This user may not open port {number}."
    return ""
