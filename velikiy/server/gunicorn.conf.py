"""gunicorn's settings, the same with and without Docker. Each value that is not the default says why."""

import gc
import os
import resource
import sys
from typing import Any

from velikiy import logs
from velikiy.server import cpu_pinning, handover, stopped_workers, worker_ends
from velikiy.settings import BadSetting, Settings, load

GARBAGE_OBJECTS = 20_000
"""New objects after which Python looks for garbage, some MB. With the default of 700 it looks several times for each
request, and finds next to nothing."""

RESERVED_DESCRIPTORS = 512
"""Descriptors of a process for other purposes: connections to PostgreSQL, Redis and edges, logs, libraries."""

MAX_DESCRIPTORS = 8192 + RESERVED_DESCRIPTORS

logs.configure_service("info")  # for the lines before the level is known
try:
    settings = load(Settings)
    settings.auth_mode  # noqa: B018  # refuse to publish without a choice of AUTH
except BadSetting as bad:
    logs.cannot_start(bad)
logs.configure_service(settings.log_level)

bind = [os.environ.get("APP_LISTEN") or "127.0.0.1:5000"]
if app_socket := os.environ.get("APP_SOCKET"):  # where the edges of the same stack reach the app
    bind.append(f"unix:{app_socket}")

umask = 0o077  # only this account connects to the socket

# Threads, since a request mostly waits for PostgreSQL or Redis, and connections from Nginx stay open.
workers = settings.app_workers
threads = settings.app_threads
if settings.app_worker_class == "epoll":
    worker_class = "velikiy.server.epoll_worker.Worker"
else:
    worker_class = "velikiy.server.plain_worker.Worker"

# Longer than Nginx keeps its end (edge/conf/upstream.conf, keepalive_timeout 5s). The side that reuses a connection
# must be the side that closes it, or a PUT may arrive on a connection that is just being closed.
keepalive = 75

# Connections of one process. Writes in the queue keep their connections open, and an edge renews its cache lease over a
# new connection, which must still be accepted. Each connection takes a file descriptor and a few kB. The limit of
# descriptors is raised as far as the system allows: above the limit, accept(2) fails.
_, max_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
if max_descriptors == resource.RLIM_INFINITY or max_descriptors > MAX_DESCRIPTORS:
    max_descriptors = MAX_DESCRIPTORS
resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker_connections = max(threads + 1, max_descriptors - RESERVED_DESCRIPTORS)

# Recycling workers by count resets connections under load. A leak has to be found and not to be hidden.
max_requests = 0

# A request ends in little more than DATABASE_TIMEOUT seconds. At a stop, a request that takes longer than 10 seconds is
# stuck. The edges need some seconds before that to choose other instances (velikiy/server/stopping.py).
graceful_timeout = 13
timeout = 30

# The folder of the worker's heartbeat file. In the default folder, a disk that stalls makes the master kill healthy
# workers.
worker_tmp_dir = "/dev/shm"  # noqa: S108

# gunicorn's control socket has no use here, and cannot be created on a read-only file system.
control_socket_disable = True

# All requests come from the edge, and no header of a client may change the path that the app sees.
forwarder_headers = ""
header_map = "drop"
forwarded_allow_ips = "127.0.0.1"

# Above the limits of Nginx (edge/conf/timeouts_and_sizes.conf, large_client_header_buffers).
limit_request_line = 8190
limit_request_field_size = 16 * 1024

accesslog = None  # the app logs its requests itself, with their ids
logger_class = "velikiy.server.logger.Logger"
loglevel = settings.log_level
logconfig_dict = logs.dict_config(settings.log_level)

child_exit = worker_ends.note
pre_fork = cpu_pinning.assign_number


def on_starting(server: Any) -> None:
    worker_ends.forget()
    handover.install(server)
    stopped_workers.install(server)


def post_fork(server: Any, worker: Any) -> None:
    """Pin the worker. With --reload, also forget this project's modules: this file made the master import them, and a
    worker that is forked after a change would find the old modules."""
    cpu_pinning.pin(worker, settings.app_first_cpu)
    if server.cfg.reload:
        for name in [name for name in sys.modules if name.partition(".")[0] == "velikiy"]:
            del sys.modules[name]
    from velikiy import metrics  # not at the top: the master counts nothing

    metrics.APP_WORKER_STARTS.inc()  # here, so that workers count that end while they load the app


def post_worker_init(worker: Any) -> None:
    """Serve metrics in worker 0, watch PostgreSQL, take the objects that exist now out of garbage collection (they live
    as long as the process), and end a worker of the version before."""
    from velikiy import metrics
    from velikiy.server import watch

    if worker.number == 0:
        metrics.serve()
    watch.begin(worker)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    handover.end_predecessor(worker)
