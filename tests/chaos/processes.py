"""Faults of processes: killed, stopped, slowed, restarted."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from tests.chaos.fault import Fault, Inject
from tests.chaos.service import Service


def stop(*names: str) -> Inject:
    """Return a fault that stops all processes of these programs."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with service.stopped(*(pid for name in names for pid in service.pids(name))):
            yield

    return inject


FAULTS = [
    Fault("stop-redis", "Redis is stopped (SIGSTOP).", stop("redis"), named=("redis.unusable",)),
]
