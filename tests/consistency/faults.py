"""Inject faults of `./run chaos` into a stack during a soak, several kinds at once, each again and again. Seeded, and
undone at the end."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
import redis

from testkit.stack import Stack
from tests.chaos.fault import Inject
from tests.chaos.service import Interrupted, Service
from tests.chaos.table import faults

KINDS = ("kill", "kill-postgres", "stop-edge", "stop-redis", "flush", "sql")
"""`sql` is part of the load (tests/consistency/load.py:SqlWriter)."""


@contextmanager
def flush(service: Service, random: random.Random) -> Iterator[None]:
    with contextlib.suppress(redis.RedisError), contextlib.closing(service.redis(socket_timeout=0.5)) as client:
        client.flushall()
    yield


def injections(kind: str, stack: Stack) -> list[tuple[str, Inject]]:
    """Return the faults of this kind that the stack has the processes for."""
    absent = [name for name, count in (("edge2", len(stack.edges)), ("app2", len(stack.apps))) if count < 2]
    return [it for it in _of_kind(kind) if not any(name in it[0] for name in absent)]


def _of_kind(kind: str) -> list[tuple[str, Inject]]:
    if kind == "flush":
        return [("flush-redis", flush)]
    if kind.startswith("kill"):
        killed = {name: fault.inject for name, fault in faults().items() if name.startswith("kill-")}
        of_postgres = {name for name in killed if "postgres" in name or "backend" in name}
        return [it for it in killed.items() if (it[0] in of_postgres) == (kind == "kill-postgres")]
    return [(name, faults()[name].inject) for name in (f"{kind}1", f"{kind}2", kind) if name in faults()]


class Faults:
    def __init__(self, stack: Stack, kinds: set[str], seed: int, *, every: float = 2.0, stopped: float = 10.0) -> None:
        """
        Args:
            every: Seconds between two kills.
            stopped: Seconds for which a process is stopped.
        """
        self.over = threading.Event()
        self.done: list[tuple[int, str]] = []
        """Time (monotonic ns) and name of each fault."""
        self._service = Service(stack, stack.edges)
        plan = {
            "kill": (every, 0.0),
            "kill-postgres": (4 * every, 0.0),
            "stop-edge": (2 * stopped, stopped),
            "stop-redis": (2 * stopped, stopped),
            "flush": (1.0, 0.0),
        }
        self._threads = [
            threading.Thread(
                target=self._repeat,
                args=(injections(kind, stack), *plan[kind], random.Random(f"{seed} {kind}")),
                daemon=True,
            )
            for kind in sorted(kinds & plan.keys())
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Inject no more faults, and continue every stopped process."""
        self._service.ending.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _repeat(self, injected: Sequence[tuple[str, Inject]], pause: float, held: float, random: random.Random) -> None:
        """Inject one of the faults, again and again.

        Args:
            pause: Seconds from the begin of a fault to that of the next.
            held: Seconds for which a fault lasts.
        """
        with contextlib.suppress(Interrupted):
            self._service.wait(pause / 2)
            while True:
                due = time.monotonic() + pause * random.uniform(0.7, 1.3)
                name, inject = random.choice(injected)
                # A process that another fault has killed may not run again yet.
                with contextlib.suppress(AssertionError, psycopg.Error), inject(self._service, random):
                    self.done.append((time.monotonic_ns(), name))
                    self._service.wait(held)
                self._service.wait(max(0.0, due - time.monotonic()))
