"""What would go wrong, said before anything is done."""

import shutil
import socket
from pathlib import Path

from velikiy.stack import Refusal, privileges
from velikiy.stack.plan import OURS, bracketed, is_free

ROOM_FIRST = 400
ROOM_LATER = 100
"""Megabytes: a new cluster takes 40, its log up to 80 while it is small, the edge's cache 128."""


def data_folder(data: Path) -> None:
    """It is ours, or empty, or can be made; and the services can get there.

    Raises:
        Refusal
    """
    if len(str(data)) > 80:
        raise Refusal(
            f"The path {data} is too long for sockets (over 80 characters). Choose another folder with --data."
        )
    if odd := set('"%;$\\{}') & set(str(data)):
        raise Refusal(
            f"The path {data} contains {' '.join(sorted(odd))}, which Nginx would misread. Choose another with --data."
        )
    if data.exists() and not data.is_dir():
        raise Refusal(f"{data} is not a folder. Choose a folder with --data.")
    foreign = [entry for entry in data.iterdir() if not OURS.fullmatch(entry.name)] if data.is_dir() else []
    if foreign and not (data / "stack.json").exists():
        raise Refusal(f"{data} contains other files. Choose an empty or a new folder with --data.")
    for parent in reversed(data.parents):
        if parent.exists() and not privileges.may_enter(parent):
            raise Refusal(
                f"{data} cannot hold the data: the services run as the user {privileges.services().pw_name}, which "
                f"may not enter {parent}. Choose another folder with --data."
            )


def room(data: Path) -> None:
    """Raises: Refusal, where the disk is as good as full."""
    existing = next(folder for folder in (data, *data.parents) if folder.exists())
    needed = ROOM_LATER if (data / "postgres" / "PG_VERSION").exists() else ROOM_FIRST
    free = shutil.disk_usage(existing).free // 1_000_000
    if free < needed:
        raise Refusal(
            f"The disk of {data} has {free} MB left, but {needed} MB are needed. "
            "Free some space or choose another folder with --data; the data is untouched."
        )


def address(bind: str) -> None:
    """Raises: Refusal, where the machine has no such address."""
    there = False
    try:
        socket.getaddrinfo(bind, None, flags=socket.AI_NUMERICHOST)
        there = bool(bind) and is_free(bind, 0)
    except OSError:
        pass
    if not there:
        raise Refusal(
            f"This machine has no address {bind}. Use --bind 127.0.0.1 for this machine only, "
            "or --bind 0.0.0.0 for all of its networks."
        )


def port(wanted: int | None, bind: str, edges: int, ours: list[int]) -> int:
    """The first edge's port: the one asked for, else 80, else 8080. `ours`: those that our own edges will let go.

    Raises:
        Refusal: none of them can be had.
    """
    if wanted is not None:
        if wanted + edges - 1 > 65_535:
            raise Refusal(f"Edge {edges} would need port {wanted + edges - 1}. Choose a lower port with --port.")
        why = _obstacle(wanted, bind, edges, ours)
        if why:
            raise Refusal(f"{why} Choose another port with --port.")
        return wanted
    obstacles = []
    for candidate in (80, 8080):
        why = _obstacle(candidate, bind, edges, ours)
        if not why:
            return candidate
        obstacles.append(why)
    raise Refusal(f"{' '.join(obstacles)} Choose another port with --port.")


def _obstacle(first: int, bind: str, edges: int, ours: list[int]) -> str:
    for number in set(range(first, first + edges)) - set(ours):
        try:
            if not is_free(bind, number):
                return f"Port {number} on {bracketed(bind)} is in use by another program."
        except PermissionError:
            return f"This user may not open port {number}."
    return ""
