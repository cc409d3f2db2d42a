"""Starts one server under supervisor: `python reaper.py COMMAND...` becomes the command, after cleaning up.

Uses nothing but the standard library and imports nothing of the project: it runs before each restart, and must
work when everything else is broken.
"""

import contextlib
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

OURS = ("nginx", "postgres", "redis-", "python")
"""How the programs that we start are named; a shell that somebody left standing in a data folder is not ours."""

PAUSE = 1.0
"""Seconds between two starts at least: a server that cannot start is tried for ever, but not busily."""


PIPE = 256 * 1024
"""Bytes of what is printed that wait for supervisor. It asks little more for a large piece than for a small one, and a
busy edge prints 30 MB/s; of a program that has ended it takes no more than this."""


def leftovers(folder: Path) -> list[int]:
    """Processes of our programs, of this account, that work in this folder or below it.

    The folder is what survives: the master's pid is gone with it, and servers overwrite their own names.
    """
    found = []
    world = Path("/proc/self/ns/mnt").readlink()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if entry.stat().st_uid != folder.stat().st_uid:
                continue
            if (entry / "ns/mnt").readlink() != world:  # a container's: its paths only look like ours
                continue
            cwd, program = (entry / "cwd").readlink(), (entry / "exe").readlink().name
        except OSError:  # gone meanwhile, or not ours to look at
            continue
        if program.startswith(OURS) and (cwd == folder or folder in cwd.parents):
            found.append(int(entry.name))
    return found


def reap(folder: Path, *, grace: float = 0.0) -> None:
    """End them: politely and within `grace` seconds, then at once.

    A killed Nginx master leaves workers that go on serving and keep the port; a killed postmaster leaves
    backends that keep its shared memory.
    """
    polite = time.monotonic() + grace
    asked: set[int] = set()
    while pids := leftovers(folder):
        for pid in pids:
            try:
                if time.monotonic() >= polite:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    # PostgreSQL takes TERM for "when all clients have left"; INT is its fast shutdown, and for
                    # the others as good as TERM.
                    os.kill(pid, signal.SIGINT)
                    asked.add(pid)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def main() -> None:
    folder = Path.cwd()
    last = folder.parent / "run" / f"{folder.name}.spawned"
    with contextlib.suppress(FileNotFoundError):
        time.sleep(min(PAUSE, max(0.0, PAUSE - (time.time() - last.stat().st_mtime))))
    last.touch()

    reap(folder)
    # Redis would serve again what was true when somebody saved it by hand.
    (folder / "dump.rdb").unlink(missing_ok=True)
    # PostgreSQL refuses to start when the pid in here is alive, even if some other process has it by now.
    # No postmaster of this folder is left at this point.
    (folder / "postmaster.pid").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # no pipe, or others of this account have many
        fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, PIPE)
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606


if __name__ == "__main__":
    main()
