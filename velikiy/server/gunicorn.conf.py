"""gunicorn's settings, the same with and without Docker; each that is not the default says why."""

import gc
import os
import resource
import sys
from contextlib import suppress
from typing import Any

from velikiy import logs
from velikiy.settings import BadSetting, Settings, load

MAX_DESCRIPTORS = 8192 + 512
OWN_DESCRIPTORS = 512
"""Of one process: connections to PostgreSQL, Redis and edges, logs, libraries."""

try:
    settings = load(Settings)
except BadSetting as bad:
    sys.exit(f"velikiy: {bad}")

bind = [os.environ.get("APP_LISTEN") or "127.0.0.1:5000"]

# Threads, since a request mostly waits for PostgreSQL or Redis, and connections from Nginx stay open (epoll_worker.py).
worker_class = "velikiy.server.epoll_worker.Worker"
workers = settings.app_workers
threads = settings.app_threads

# Longer than Nginx keeps its end (edge/nginx.conf, keepalive_timeout 30s): the side that reuses a connection
# must be the one that closes it, or a PUT may meet a connection that is just being closed.
keepalive = 75

# Connections of one process. Writes in the queue keep theirs open, and an edge renews its lease over a new connection,
# which must still be accepted. Each connection takes a file descriptor and a few kB. The limit of descriptors is raised
# as far as it may be: above it, accept(2) fails.
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
most = MAX_DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, MAX_DESCRIPTORS)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker_connections = max(threads + 1, most - OWN_DESCRIPTORS)

# Recycling workers by count resets connections under load; a leak is to be found, not to be hidden.
max_requests = 0

# A request is over in DATABASE_TIMEOUT seconds or little more; what runs longer at a stop is stuck.
graceful_timeout = 10
timeout = 30

# The worker's heartbeat file: on a disk that stalls, the default place makes the master kill good workers.
worker_tmp_dir = "/dev/shm"  # noqa: S108

# A second way in, which nobody here uses, and which cannot be created on a read-only file system.
control_socket_disable = True

# Only Nginx speaks to us, and nothing that a client sends may change which path or scheme we see.
forwarder_headers = ""
header_map = "drop"
forwarded_allow_ips = "127.0.0.1"

# Above what Nginx lets through (edge/nginx.conf, large_client_header_buffers).
limit_request_line = 8190
limit_request_field_size = 8190

accesslog = None  # the app logs its requests itself, with their ids
logger_class = "velikiy.server.epoll_worker.Logger"
loglevel = settings.log_level
logconfig_dict = logs.settings(settings.log_level)


def post_worker_init(worker: Any) -> None:
    """What is there now stays for as long as the process does: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pre_fork(server: Any, worker: Any) -> None:
    """Its number, from 0 on: that of one that has ended, or that will be the first to (at HUP, the oldest)."""

    def age_of_youngest(number: int) -> int:
        return max((other.age for other in server.WORKERS.values() if other.number == number), default=0)

    worker.number = min(range(server.num_workers), key=age_of_youngest)


def post_fork(server: Any, worker: Any) -> None:
    """A worker stays on one CPU, where it is known which (APP_FIRST_CPU).

    Its threads share one interpreter and so cannot use two, but the kernel spreads them: whenever the interpreter
    changes hands another CPU has to be woken, and finds its caches empty. On one CPU a miss took a quarter less time,
    a PUT a sixth. Only who knows of all processes on a machine can tell which CPUs are free; `./run` does, a container
    does not.

    With --reload, forget our own modules: this file made the master import them, and a worker that is forked anew after
    a change would find the old ones.
    """
    first = settings.app_first_cpu
    if first is not None and first >= 0:
        cpus = sorted(os.sched_getaffinity(0))
        with suppress(OSError):  # where it is forbidden it is no reason not to start
            os.sched_setaffinity(0, {cpus[(first + worker.number) % len(cpus)]})
    if server.cfg.reload:
        for name in [name for name in sys.modules if name.partition(".")[0] == "velikiy"]:
            del sys.modules[name]
