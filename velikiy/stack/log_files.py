"""The services' log files, as one stream."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


class Follower:
    """Reads what was appended to a file since the last time; follows it through rotation."""

    def __init__(self, file: Path, *, from_start: bool) -> None:
        self.file = file
        self.stream: TextIO | None = None
        self.rest = ""
        self._open(from_start)

    def lines(self) -> list[str]:
        if self.stream is None:
            self._open(from_start=True)
        if self.stream is None:
            return []
        text = self.rest + self.stream.read()
        if self._rotated():
            text += self.stream.read()
            self.stream.close()
            self._open(from_start=True)
        *whole, self.rest = text.split("\n")
        return whole

    def _open(self, from_start: bool) -> None:
        try:
            self.stream = self.file.open(errors="replace")
        except FileNotFoundError:
            self.stream = None
            return
        if not from_start:
            self.stream.seek(0, os.SEEK_END)

    def _rotated(self) -> bool:
        assert self.stream is not None
        try:
            return os.fstat(self.stream.fileno()).st_ino != self.file.stat().st_ino
        except FileNotFoundError:
            return True


def files(logs: Path, name: str | None = None) -> list[Path]:
    """Those of one process, or of all whose names start so; supervisord's own only by its name."""
    found = sorted(logs.glob("*.log"))
    if name:
        return [file for file in found if file.stem.startswith(name)]
    return [file for file in found if file.stem != "supervisord"]


def last(file: Path, count: int) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-count:]


def show(file: Path, line: str) -> None:
    """Coloured names for people, plain ones in pipes."""
    name = f"{file.stem:<10}"
    if sys.stdout.isatty():
        name = f"\033[36m{name}\033[0m"
    print(f"{name} {line}", flush=True)


def follow(logs: Path, name: str | None, until: Callable[[], bool], *, from_start: bool = False) -> None:
    followers: dict[Path, Follower] = {}
    while not until():
        for file in files(logs, name):
            if file not in followers:
                followers[file] = Follower(file, from_start=from_start)
            for line in followers[file].lines():
                show(file, line)
        from_start = True  # a file that appears later is new
        time.sleep(0.1)
