"""Inject faults into a stack during a run: kill or stop processes, empty Redis. Seeded, and undone at the end."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import redis

from testkit.stack import Stack
from velikiy.stack.reaper import leftovers

KINDS = ("kill", "kill-postgres", "stop-edge", "stop-redis", "flush", "sql")
"""`sql` is part of the load (tests/consistency/load.py:SqlWriter)."""


class Faults:
    def __init__(self, stack: Stack, kinds: set[str], seed: int, *, every: float = 2.0, stopped: float = 10.0) -> None:
        """
        Args:
            every: Seconds between two kills.
            stopped: Seconds for which a process is stopped.
        """
        self.stack = stack
        self.done: list[tuple[int, str]] = []
        """Time (monotonic ns) and description of each fault."""
        self._random = random.Random(f"{seed} faults")
        self._every, self._stopped = every, stopped
        self.over = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._undo: list[tuple[float, str]] = []
        self._names = [f"edge{n}" for n in range(1, len(stack.edges) + 1)]
        self._names += [f"app{n}" for n in range(1, len(stack.apps) + 1)]
        self._names += ["redis"]
        plan: dict[str, tuple[float, Callable[[], None]]] = {
            "kill": (every, lambda: self._kill(self._names)),
            "kill-postgres": (4 * every, lambda: self._kill(["postgres"])),
            "stop-edge": (2 * stopped, lambda: self._suspend(self._random.choice(self._names[: len(stack.edges)]))),
            "stop-redis": (2 * stopped, lambda: self._suspend("redis")),
            "flush": (1.0, self._flush),
        }
        now = time.monotonic()
        self._plan = {kind: plan[kind] for kind in sorted(kinds & set(plan))}
        self._due = {kind: now + pause / 2 for kind, (pause, _) in self._plan.items()}

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            now = time.monotonic()
            for kind, (pause, act) in self._plan.items():
                if now >= self._due[kind]:
                    act()
                    self._due[kind] = now + pause * self._random.uniform(0.7, 1.3)
            for at, name in list(self._undo):
                if now >= at:
                    self._undo.remove((at, name))
                    self._resume(name)

    def end(self) -> None:
        """Inject no more faults, and continue every stopped process."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        while self._undo:
            self._resume(self._undo.pop()[1])

    def _pids(self, name: str) -> list[int]:
        """Return the master and the workers."""
        return leftovers(self.stack.data / name)

    def _kill(self, names: list[str]) -> None:
        name = self._random.choice(names)
        pids = sorted(self._pids(name))
        if not pids:
            return
        pid = self._random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self._note(f"kill -9 {name} ({'master' if pid == pids[0] else 'worker'})")

    def _suspend(self, name: str) -> None:
        for pid in self._pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._undo.append((time.monotonic() + self._stopped, name))
        self._note(f"SIGSTOP {name}")

    def _resume(self, name: str) -> None:
        for pid in self._pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._note(f"SIGCONT {name}")

    def _flush(self) -> None:
        with contextlib.suppress(redis.RedisError):
            client = redis.Redis.from_url(self.stack.redis_url, socket_timeout=0.5, socket_connect_timeout=0.5)
            with contextlib.closing(client):
                client.flushall()
            self._note("FLUSHALL")

    def _note(self, what: str) -> None:
        self.done.append((time.monotonic_ns(), what))
