"""What tests do to this machine, and undo: full disks, ports in use."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from testkit.stack import folder

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


@contextmanager
def listening(port: int) -> Iterator[None]:
    with closing(socket.create_server(("127.0.0.1", port))):
        yield


@dataclass
class Disk:
    place: Path

    @contextmanager
    def full(self) -> Iterator[None]:
        filler = self.place / "filler"
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"\0" * 1_000_000)
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Disk]:
    with folder() as place:
        options = f"size={megabytes}m,mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)
        try:
            yield Disk(place)
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
