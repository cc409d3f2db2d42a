"""Show the services' log files as one stream."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from velikiy.command_line import has_colours


class Follower:
    """Reads the lines that were appended to a file since the last call, and follows the file through rotation."""

    def __init__(self, file: Path, *, from_start: bool) -> None:
        self.file = file
        self.stream: TextIO | None = None
        self.incomplete = ""
        """The beginning of a line whose end is not written yet."""
        self._open(from_start)

    def lines(self) -> list[str]:
        if self.stream is None:
            self._open(from_start=True)
        if self.stream is None:
            return []
        text = self.incomplete + self.stream.read()
        if self._is_rotated():
            text += self.stream.read()
            self.stream.close()
            self._open(from_start=True)
        *complete, self.incomplete = text.split("\n")
        return complete

    def _open(self, from_start: bool) -> None:
        try:
            self.stream = self.file.open(errors="replace")
        except FileNotFoundError:
            self.stream = None
            return
        if not from_start:
            self.stream.seek(0, os.SEEK_END)

    def _is_rotated(self) -> bool:
        assert self.stream is not None
        try:
            return os.fstat(self.stream.fileno()).st_ino != self.file.stat().st_ino
        except FileNotFoundError:
            return True


def files(logs: Path, prefix: str | None = None) -> list[Path]:
    """Return the log files of the processes whose names start with the prefix. Without a prefix, return all files but
    supervisord's own."""
    found = sorted(logs.glob("*.log"))
    if prefix:
        return [file for file in found if file.stem.startswith(prefix)]
    return [file for file in found if file.stem != "supervisord"]


def last_lines(file: Path, count: int) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-count:]


def show(file: Path, line: str) -> None:
    """Print the line after the name of its process, which is coloured on a terminal."""
    name = f"{file.stem:<10}"
    if has_colours():
        name = f"\033[36m{name}\033[0m"
    print(f"{name} {line}", flush=True)


def follow(logs: Path, prefix: str | None, is_over: Callable[[], bool], *, from_start: bool = False) -> None:
    """Show new lines as they are written, until `is_over` returns true."""
    followers: dict[Path, Follower] = {}
    while not is_over():
        for file in files(logs, prefix):
            if file not in followers:
                followers[file] = Follower(file, from_start=from_start)
            for line in followers[file].lines():
                show(file, line)
        from_start = True  # a file that appears later is new
        time.sleep(0.1)
