"""Keep each worker process on one CPU.

Gains: on one CPU a miss takes a quarter less time, and a PUT a sixth. The threads of a process share one interpreter
and cannot use two CPUs, but the kernel spreads them: each time the interpreter changes hands, another CPU has to wake
up, and finds its caches empty.
Relies on: gunicorn's hooks, and sched_setaffinity(2).
Remove when: the threads of a process can compute at the same time (Python without the GIL).

The choice of the CPUs (APP_FIRST_CPU) is the launcher's, which knows all processes of the stack
(`velikiy/stack/programs.py:_apps`). A container does not know its neighbours, so it pins nothing by default. The worker
has to pin itself, because gunicorn forks workers whenever one has ended.
"""

import os
from contextlib import suppress
from typing import Any


def assign_number(server: Any, worker: Any) -> None:
    """Give the worker the number, from 0 on, of a worker that has ended. At a reload, when none has ended yet, it gets
    the number of the oldest worker, which ends first. gunicorn's hook `pre_fork`."""

    def age_of_youngest(number: int) -> int:
        return max((other.age for other in server.WORKERS.values() if other.number == number), default=0)

    worker.number = min(range(server.num_workers), key=age_of_youngest)


def pin(worker: Any, first_cpu: int | None) -> None:
    """Pin this process to the CPU of its number, counted from the first CPU of its app instance."""
    if first_cpu is None or first_cpu < 0:
        return
    cpus = sorted(os.sched_getaffinity(0))
    with suppress(OSError):  # where pinning is forbidden, the worker starts all the same
        os.sched_setaffinity(0, {cpus[(first_cpu + worker.number) % len(cpus)]})
