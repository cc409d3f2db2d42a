"""Change this machine for a test, and undo the change: full disks, ports in use."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from testkit.stack import folder as temporary_folder

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


@contextmanager
def port_in_use(port: int) -> Iterator[None]:
    with closing(socket.create_server(("127.0.0.1", port))):
        yield


@dataclass
class Disk:
    folder: Path

    @contextmanager
    def filled(self) -> Iterator[None]:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"\0" * 1_000_000)
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Disk]:
    with temporary_folder() as folder:
        options = f"size={megabytes}m,mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
        try:
            yield Disk(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
