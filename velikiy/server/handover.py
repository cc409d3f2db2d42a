"""Let a running app become its next version, without a moment in which no process accepts connections.

On SIGHUP the master executes the script of its program again (APP_SCRIPT, `velikiy/stack/programs.py`), which names the
new code by then. The process id stays, so supervisor sees no restart, and so do the listeners, which the new master
inherits (sd_listen_fds(3), which gunicorn supports). The old workers serve until the new workers have loaded the app:
each new worker then ends the old worker of its number. Requests in the listener's queue wait for whichever accepts.

Relies on: gunicorn's socket activation, and that its arbiter finds the method `handle_hup` by its name.

Without APP_SCRIPT, as in a container, SIGHUP means what it means to gunicorn: new workers with the same code.
"""

import fcntl
import os
import signal
from contextlib import suppress
from typing import Any

FIRST_PASSED_DESCRIPTOR = 3
"""The number at which sd_listen_fds(3) expects the first listener."""

_predecessors = [int(pid) for pid in os.environ.pop("APP_PREDECESSORS", "").split()]


def install(server: Any) -> None:
    """Take over SIGHUP: gunicorn's hook `on_starting`."""
    script = os.environ.get("APP_SCRIPT")
    if script:
        server.handle_hup = lambda: _become_next_version(server, script)


def _become_next_version(server: Any, script: str) -> None:
    beyond = FIRST_PASSED_DESCRIPTOR + len(server.LISTENERS)
    copies = []
    for listener in server.LISTENERS:
        # A second copy would keep the listener open after the new version has closed its own.
        os.set_inheritable(listener.fileno(), False)
        copies.append(fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, beyond))  # so that no copy overwrites a listener
    for passed, copy in enumerate(copies, FIRST_PASSED_DESCRIPTOR):
        os.dup2(copy, passed)
    passed_on = {
        "LISTEN_FDS": str(len(copies)),
        "LISTEN_PID": str(os.getpid()),
        "APP_PREDECESSORS": " ".join(str(pid) for pid in server.WORKERS),
    }
    os.execve("/bin/sh", ["sh", script], {**os.environ, **passed_on})  # noqa: S606


def end_predecessor(worker: Any) -> None:
    """End the old workers whose place this worker takes. It has loaded the app. gunicorn's hook `post_worker_init`.

    A worker that replaces another one later has no predecessor: by then the process id may be another process's.
    """
    if worker.age <= worker.cfg.workers:
        for pid in _predecessors[worker.number :: worker.cfg.workers]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGWINCH)
