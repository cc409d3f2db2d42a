"""Look after the stack from the main process of the service: tell systemd that it lives, end programs that hang, and
copy what an operator should see into the journal.

supervisor restarts a program that ended. A program that hangs is not its business, so this process kills it.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from velikiy.stack import local_http, service
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import Supervisor

HUNG_AFTER_S = 30.0
"""A program that has not answered for so long is killed. An app may stand still for some seconds under a load that a
machine cannot carry, and a restart would take the rest of its work."""

CHECK_EVERY_S = 5.0

PROBE_TIMEOUT_S = 10.0
"""On a machine with far too much work, an answer may take seconds, and a restart would add to the work."""

PRIORITIES = {"warning": 4, "error": 3, "critical": 2, "alert": 1, "emerg": 0}
"""The levels that reach the journal, and their numbers there (sd-daemon(3)). Requests have the level info: at 50,000 a
second, journald would take the CPU from the service. They are in the log files."""

IMPORTANT = re.compile(rb'"level": ?"(%s)"' % "|".join(PRIORITIES).encode())
"""The part of a line that has one of these levels. An expression that begins with plain text runs over 2 GB of
requests in a second, and one for whole lines over a tenth of that."""

BLOCK_BYTES = 8 << 20
"""The most that is read of a file at a time. If more was written meanwhile, the newest lines count."""


def watch(plan: Plan, is_over: Callable[[], bool]) -> None:
    """Look after the stack until `is_over` returns true."""
    watch = Watch(plan)
    service.notify("READY=1", f"STATUS=serving at {plan.edge_urls[0]}")
    while not is_over():
        watch.step()
        time.sleep(0.1)
    watch.journal.copy()


class Watch:
    """The state of one service. Call `step` several times a second."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.supervisor = Supervisor(plan)
        self.journal = Journal(plan.logs)
        self.alive_at: dict[tuple[str, int], float] = {}
        """When each process, by name and pid, answered last. A process that is new gets its time."""

        self.next_check = 0.0

    def step(self) -> None:
        self.journal.copy()
        if time.monotonic() >= self.next_check:
            self.check()
            self.next_check = time.monotonic() + CHECK_EVERY_S

    def check(self) -> None:
        """Kill programs that hang, and tell systemd that this process and supervisord answer."""
        processes = self.supervisor.processes()
        if not processes:
            return  # supervisord hangs or has ended: without a message, systemd restarts the service
        service.notify("WATCHDOG=1")
        self.plan = Plan.load(self.plan.home) or self.plan  # `./run up` may have added apps and edges
        now = time.monotonic()
        seen = {}
        for process in processes:
            name, pid = process["name"], process["pid"]
            if pid and self._is_watched(name):
                answered = self._answers(name)
                service.notify("WATCHDOG=1")  # many programs that hang take their time
                seen[name, pid] = now if answered else self.alive_at.get((name, pid), now)
                if now - seen[name, pid] > HUNG_AFTER_S:
                    self._kill(name, pid)
        self.alive_at = seen

    def _is_watched(self, name: str) -> bool:
        return re.fullmatch(r"(app|edge)\d+", name) is not None

    def _answers(self, name: str) -> bool:
        """Return whether the app or the control listener of the edge answers. Neither answer depends on a server."""
        kind, number = name.rstrip("0123456789"), int(re.sub(r"\D", "", name))
        if kind == "app":
            return local_http.answers_at(self.plan.app_socket(number), "/livez", timeout=PROBE_TIMEOUT_S)
        if number > len(self.plan.control_ports):
            return True  # an edge of a plan that has changed meanwhile
        try:
            url = f"http://127.0.0.1:{self.plan.control_ports[number - 1]}/livez"
            local_http.get(url, timeout=PROBE_TIMEOUT_S)
        except local_http.UNANSWERED:
            return False
        return True

    def _kill(self, name: str, pid: int) -> None:
        print(f"<3>{name} ({pid}) has not answered for {HUNG_AFTER_S:.0f} s: it is killed", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Journal:
    """Copies new lines of the log files to stdout, which systemd connects with the journal."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.positions = {file: _end(file) for file in logs.glob("*.log")}
        """The file (its inode) and the position up to which it was read."""

    def copy(self) -> None:
        for file in sorted(self.logs.glob("*.log")):
            for line in self._new_lines(file):
                print(line.decode(errors="replace"), flush=True)

    def _new_lines(self, file: Path) -> list[bytes]:
        try:
            with file.open("rb") as stream:
                inode = os.fstat(stream.fileno()).st_ino
                known, position = self.positions.get(file, (inode, 0))
                if known != inode:
                    position = 0  # the file was rotated
                size = os.fstat(stream.fileno()).st_size
                if size - position > BLOCK_BYTES:
                    position = size - BLOCK_BYTES
                stream.seek(position)
                block = stream.read(BLOCK_BYTES)
        except FileNotFoundError:
            return []
        whole = block.rfind(b"\n") + 1
        self.positions[file] = (inode, position + whole)
        if file.stem == "supervisord":
            return [b"%s: %s" % (file.stem.encode(), line) for line in block[:whole].splitlines()]
        return [b"<%d>%s: %s" % (priority, file.stem.encode(), line) for priority, line in _important(block[:whole])]


def _important(block: bytes) -> Iterator[tuple[int, bytes]]:
    """Return the priority and the text of each line that an operator should see."""
    end = 0
    for found in IMPORTANT.finditer(block):
        if found.start() >= end:
            end = block.index(b"\n", found.end())
            yield PRIORITIES[found[1].decode()], block[block.rfind(b"\n", 0, found.start()) + 1 : end]


def _end(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_ino, state.st_size
