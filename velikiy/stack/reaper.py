"""Start one server under supervisor: `python reaper.py COMMAND...` cleans up, then becomes the command.

Gains: a server restarts however its predecessor ended. A killed Nginx master leaves workers that keep the port, and a
killed postmaster leaves backends that keep its shared memory.
Relies on: Linux' /proc, and a working folder of its own for each server.
Remove when: supervisor ends all descendants of a killed process itself.

The module uses only the standard library and imports nothing of the project: it runs before each restart, and must work
when everything else is broken.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

PROGRAM_PREFIXES = ("nginx", "postgres", "redis-", "python", "prometheus")
"""The beginnings of the names of the programs that a stack starts. A person's shell in a data folder is not among
them."""

MIN_START_INTERVAL_S = 1.0
"""Seconds between two starts. A server that cannot start is tried for ever, and this keeps the CPU free."""

KEPT_MOMENTS = 10

CRASH_LOOP_S, CRASH_LOOP_RESTARTS, CRASH_LOOP_OVER_S = 60.0, 3, 15.0
"""So many restarts within these seconds mean that a program ends again and again, until it has run for the last number
of seconds. An upgrade restarts it once."""

STDOUT_PIPE_BYTES = 256 * 1024
"""Size of the pipe from the server to supervisor. Supervisor takes little more time for a large piece than for a small
one, and a busy edge prints 30 MB/s: it enlarges its pipe (edge/lua/log.lua)."""


def leftovers(folder: Path) -> list[int]:
    """Return the processes of a stack's programs, under this account, that work in the folder or below it.

    The working folder identifies them: the pid of a killed master is gone, and servers overwrite their own names.
    """
    found = []
    mount_namespace = Path("/proc/self/ns/mnt").readlink()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if entry.stat().st_uid != folder.stat().st_uid:
                continue
            if (entry / "ns/mnt").readlink() != mount_namespace:  # in a container, the same path is another folder
                continue
            cwd, program = (entry / "cwd").readlink(), (entry / "exe").readlink().name
        except OSError:  # the process has ended, or this account may not inspect it
            continue
        if program.startswith(PROGRAM_PREFIXES) and (cwd == folder or folder in cwd.parents):
            found.append(int(entry.name))
    return found


def reap(folder: Path, *, grace: float = 0.0) -> None:
    """End the leftovers of the folder: interrupt them, and kill the rest after `grace` seconds."""
    kill_at = time.monotonic() + grace
    interrupted: set[int] = set()
    while pids := leftovers(folder):
        for pid in pids:
            try:
                if time.monotonic() >= kill_at:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in interrupted:
                    # On SIGTERM PostgreSQL waits until all clients have left; SIGINT is its fast shutdown. The other
                    # programs take SIGINT for SIGTERM.
                    os.kill(pid, signal.SIGINT)
                    interrupted.add(pid)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def main() -> None:
    folder = Path.cwd()
    if os.environ.get("LISTEN_PID") != str(os.getpid()):  # else an app becomes its next version, beside its old workers
        _pace_restarts(folder)
        reap(folder)
        _remove_stale_files(folder)
    with contextlib.suppress(OSError):  # stdout is no pipe, or this account has reached its limit for pipes
        fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, STDOUT_PIPE_BYTES)
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606


def _pace_restarts(folder: Path) -> None:
    """Wait until MIN_START_INTERVAL_S has passed since the last start. Note the number of starts, and the moments of
    the last ones, for the metrics and for findings (velikiy/findings/processes.py). Log a program that ends again and
    again."""
    noted = folder.parent / "run" / f"{folder.name}.spawned"
    with contextlib.suppress(FileNotFoundError):
        elapsed = time.time() - noted.stat().st_mtime
        time.sleep(min(MIN_START_INTERVAL_S, max(0.0, MIN_START_INTERVAL_S - elapsed)))
    count, moments = starts(noted)
    moments = [*moments[1 - KEPT_MOMENTS :], time.time()]
    with contextlib.suppress(OSError):  # a full disk
        noted.write_text("".join(f"{it}\n" for it in (count + 1, *moments)))
    noted.touch()
    if recent := crash_loop(count + 1, moments):
        _log("error", "process.crash_loop", process=folder.name, restarts=len(recent), within_s=CRASH_LOOP_S)


def starts(noted: Path) -> tuple[int, list[float]]:
    """Return how often a program was started, and the moments (Unix time) of the last starts."""
    try:
        count, *moments = noted.read_text().split()
        return int(count), [float(it) for it in moments]
    except (OSError, ValueError):  # the first start, or a file that a full disk has cut off
        return 0, []


def crash_loop(count: int, moments: list[float]) -> list[float]:
    """Return the moments of the restarts that are so many within a short time that the program ends again and again;
    else none. The start of the stack is no restart."""
    now = time.time()
    # A clock that was set back leaves moments in the future.
    recent = [it for it in moments[1 if count == len(moments) else 0 :] if now - CRASH_LOOP_S < it <= now]
    goes_on = len(recent) >= CRASH_LOOP_RESTARTS and recent[-1] > now - CRASH_LOOP_OVER_S
    return recent if goes_on else []


def _log(level: str, event: str, **members: object) -> None:
    """Log in the form of the other lines, which programs read."""
    print(json.dumps({"event": event, "level": level, "time": _now(), **members}), flush=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _remove_stale_files(folder: Path) -> None:
    # From a dump that a person saved by hand, Redis would serve old entries.
    (folder / "dump.rdb").unlink(missing_ok=True)
    # PostgreSQL refuses to start if the pid in this file is alive, even if another program has that pid by now. No
    # postmaster of this folder is left at this point.
    (folder / "postmaster.pid").unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        _log("critical", "cannot_start", reason=str(error), command=sys.argv[1:2])
        sys.exit(1)
