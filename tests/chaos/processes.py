"""Faults of processes: killed, stopped, paused, starved, restarted."""

import os
import signal

from tests.chaos.actions import (
    again_and_again,
    auxiliary,
    backend,
    client_worker,
    command,
    control_worker,
    crash,
    down,
    hogs,
    in_turn,
    kill,
    limited,
    master,
    nice,
    pause,
    removed,
    stop,
    stopped_in_transaction,
    supervisor,
    whole,
    worker,
)
from tests.chaos.fault import POSTGRES_AWAY, POSTGRES_CRASHES, Fault, Limits

EDGES, APPS = ("edge1", "edge2"), ("app1", "app2")

BRIEF = "it is over before status can look: a successor starts at once"


def edge_of(name: str) -> tuple[str, ...]:
    return (name,) if name in EDGES else ()


# ---- the table ----

SILENT = {
    "edge1": ("process.silent", "edge.silent", "edge.fenced"),
    "edge2": ("process.silent", "edge.silent", "edge.fenced"),
    "app1": ("process.silent", "app.silent"),
    "app2": ("process.silent", "app.silent"),
    "relay": ("relay.silent",),
    "redis": ("redis.unusable",),
    "postgres": ("postgres.silent",),
}
HALF_AWAY = Limits(miss_s=3.0)
"""One of two apps is stopped. The first read that no cache answers waits for it longer if a 503 came a moment ago: then
PostgreSQL may be away, and the other app would not answer either."""

LIMITS = {"postgres": POSTGRES_AWAY, "app1": HALF_AWAY, "app2": HALF_AWAY}
ALL = (*EDGES, *APPS, "relay", "redis", "postgres")
PROGRAMS = {"edge": "An edge", "app": "An app", "relay": "The relay", "redis": "Redis", "postgres": "PostgreSQL"}


def _subject(name: str) -> str:
    return PROGRAMS[name.rstrip("12")]


FAULTS = [
    *(
        Fault(
            f"kill-{name}",
            f"{_subject(name)} is killed (kill -9 of its master).",
            kill(master(name)),
            seconds=0.3,
            unnamed=BRIEF,
            victims=edge_of(name),
            limits=POSTGRES_CRASHES if name == "postgres" else Limits(),
        )
        for name in ALL
    ),
    *(
        Fault(
            f"kill-{name}-group",
            f"{_subject(name)} is killed with all its workers, as the kernel does when a group has no memory left.",
            kill(whole(name)),
            seconds=0.3,
            unnamed=BRIEF,
            victims=edge_of(name),
            limits=POSTGRES_CRASHES if name == "postgres" else Limits(),
        )
        for name in ("edge1", "app1", "postgres")
    ),
    *(
        Fault(
            f"stop-{name}",
            f"All processes of {_subject(name).replace('An ', 'an ').replace('The ', 'the ')} are stopped (SIGSTOP).",
            stop(whole(name)),
            seconds=2.0,
            named=SILENT[name],
            victims=edge_of(name),
            limits=LIMITS.get(name, Limits()),
        )
        for name in ALL
    ),
    Fault(
        "stop-both-apps",
        "Both apps are stopped (SIGSTOP).",
        stop(whole(*APPS)),
        named=("process.silent", "app.silent"),
        limits=Limits(reads=0.0, hit_s=1.6, miss_s=5.0, write_s=9.0),
    ),
    Fault(
        "stop-both-edges",
        "Both edges are stopped (SIGSTOP).",
        stop(whole(*EDGES)),
        named=("process.silent", "edge.silent", "edge.fenced"),
        victims=EDGES,
    ),
    *(
        Fault(
            f"kill-edge1-worker{index}",
            what,
            kill(pick),
            seconds=0.3,
            unnamed=BRIEF,
            victims=("edge1",),
        )
        for index, pick, what in (
            (0, control_worker, "Worker 0 of an edge, which renews its lease and accepts drops, is killed."),
            (1, client_worker, "A worker of an edge that serves clients is killed."),
        )
    ),
    *(
        Fault(
            f"stop-edge1-worker{index}",
            what,
            stop(pick),
            seconds=1.5,
            unnamed="another worker kills it after 0.5 s, and a new one takes its place",
            victims=("edge1",),
        )
        for index, pick, what in (
            (0, control_worker, "Worker 0 of an edge, which renews its lease and accepts drops, is stopped."),
            (1, client_worker, "A worker of an edge that serves clients is stopped."),
        )
    ),
    Fault(
        "stop-edge1-master",
        "The master of an edge is stopped. Its workers go on.",
        stop(master("edge1")),
        unnamed="no request needs the master",
    ),
    Fault("kill-app1-worker", "A worker of an app is killed.", kill(worker("app1")), seconds=0.3, unnamed=BRIEF),
    Fault(
        "stop-app1-worker",
        "A worker of an app is stopped.",
        stop(worker("app1")),
        unnamed="the master kills it after 0.5 s, and a new one takes its place",
    ),
    Fault(
        "stop-app1-master",
        "The master of an app is stopped. Its workers go on.",
        stop(master("app1")),
        unnamed="no request needs the master",
    ),
    Fault(
        "stop-app1-in-transaction",
        "An app is stopped between the locks and the COMMIT of a write.",
        stopped_in_transaction,
        named=SILENT["app1"],
        pairs=False,
    ),
    Fault(
        "stop-backend",
        "A session of an app at PostgreSQL is stopped.",
        stop(backend()),
        unnamed="one connection of many hangs, and its request has a deadline",
        limits=Limits(reads=0.5, miss_s=4.0),
    ),
    Fault(
        "kill-backend",
        "A session of an app at PostgreSQL is killed, after which PostgreSQL restarts all of them.",
        kill(backend()),
        seconds=0.3,
        unnamed=BRIEF,
        limits=POSTGRES_CRASHES,
    ),
    *(
        Fault(
            f"stop-postgres-{name}",
            f"The {title} of PostgreSQL is stopped.",
            stop(auxiliary(title)),
            unnamed=why,
            limits=Limits(miss_s=3.0),
        )
        for name, title, why in (
            ("wal-writer", "walwriter", "each COMMIT flushes by itself"),
            ("checkpointer", "checkpointer", "checkpoints can wait"),
            ("autovacuum", "autovacuum launcher", "vacuum can wait"),
        )
    ),
    Fault(
        "kill-postgres-checkpointer",
        "The checkpointer of PostgreSQL is killed, after which PostgreSQL restarts all sessions.",
        kill(auxiliary("checkpointer")),
        seconds=0.3,
        unnamed=BRIEF,
        limits=POSTGRES_CRASHES,
    ),
    Fault(
        "stop-supervisor",
        "supervisord is stopped. It restarts nothing.",
        stop(supervisor),
        named=("supervisor.silent",),
        pairs=False,
    ),
    Fault(
        "stop-supervisor-kill-app1",
        "supervisord is stopped, and an app ends meanwhile.",
        in_turn((0, stop(supervisor)), (0, kill(whole("app1")))),
        named=("supervisor.silent", "process.silent"),
        pairs=False,
    ),
    *(
        Fault(
            f"down-{name}",
            f"{_subject(name)} was stopped through supervisor, and stays away.",
            down(name),
            named=("process.down", "relay.away", "redis.unusable", "postgres.silent"),
            victims=edge_of(name),
            limits=LIMITS.get(name, Limits()),
            pairs=False,
        )
        for name in ("edge1", "app1", "relay", "redis", "postgres")
    ),
    Fault(
        "crash-app1",
        "An app ends again and again.",
        crash("app1"),
        seconds=3.0,
        named=("process.crash_loop",),
        pairs=False,
    ),
    Fault(
        "crash-relay",
        "The relay ends again and again.",
        crash("relay"),
        seconds=3.0,
        named=("process.crash_loop",),
        pairs=False,
    ),
    Fault(
        "crash-app1-workers",
        "Workers of an app end again and again.",
        again_and_again(worker("app1", -1), 5),
        named=("process.workers_end",),
        pairs=False,
    ),
    Fault(
        "pause-edge1",
        "All processes of an edge pause for 0.3 s, again and again.",
        pause(whole("edge1"), 0.3, 0.2),
        seconds=3.0,
        named=("edge.fenced", "edge.unsteady", "edge.silent", "edge.no_lease"),
        victims=("edge1",),
    ),
    Fault(
        "pause-app1",
        "All processes of an app pause for 0.3 s, again and again.",
        pause(whole("app1"), 0.3, 0.3),
        seconds=2.0,
        unnamed="it serves, only slower",
    ),
    Fault(
        "pause-redis",
        "Redis pauses for 0.3 s, again and again.",
        pause(whole("redis"), 0.3, 0.3),
        seconds=3.0,
        named=("redis.unusable", "redis.fenced", "redis.unsteady"),
    ),
    Fault(
        "pause-postgres",
        "PostgreSQL pauses for 0.3 s, again and again.",
        pause(whole("postgres"), 0.3, 0.3),
        seconds=2.0,
        unnamed="it serves, only slower",
    ),
    Fault(
        "stop-redis-then-edge1",
        "Redis is stopped, and 1.5 s later an edge.",
        in_turn((0, stop(whole("redis"))), (1.5, stop(whole("edge1")))),
        named=("redis.unusable",),
        victims=("edge1",),
        limits=Limits(write_s=6.0),
    ),
    *(
        Fault(
            f"reload-{name}",
            f"{what} is reloaded (SIGHUP).",
            kill(master(name), signal.SIGHUP),
            seconds=0.5,
            unnamed="it serves meanwhile",
            # A signal to Nginx itself closes idle connections at once. `./run restart` lets clients leave first.
            victims=("edge1",) if name == "edge1" else (),
        )
        for name, what in (("edge1", "An edge"), ("app1", "An app"), ("postgres", "PostgreSQL"))
    ),
    Fault(
        "quit-edge1",
        "An edge is asked to end (SIGQUIT) while it serves.",
        kill(master("edge1"), signal.SIGQUIT),
        seconds=0.5,
        unnamed=BRIEF,
        victims=("edge1",),
    ),
    *(
        Fault(
            f"end-{name}",
            f"{_subject(name)} is asked to end (SIGTERM) while it serves.",
            kill(master(name), signal.SIGTERM),
            seconds=0.5,
            unnamed=BRIEF,
            limits=POSTGRES_CRASHES if name == "postgres" else Limits(),
        )
        for name in ("app1", "relay", "redis")
    ),
    *(
        Fault(
            f"restart-{name}",
            f"`./run restart {name}`.",
            command("restart", name),
            seconds=0.0,
            unnamed="an operator does it on purpose, and waits for it",
            limits=POSTGRES_AWAY if name == "postgres" else Limits(writes=0.0 if name == "redis" else 1.0),
            pairs=False,
        )
        for name in ("edge1", "app1", "relay", "redis", "postgres")
    ),
    Fault(
        "restart-all",
        "`./run restart`: everything but PostgreSQL and Redis, one after the other.",
        command("restart"),
        seconds=0.0,
        unnamed="an operator does it on purpose, and waits for it",
        limits=Limits(writes=1.0),
        pairs=False,
    ),
    Fault(
        "starve-cpu",
        "Other processes take all CPU time that they get.",
        hogs(2 * (os.cpu_count() or 1)),
        unnamed="everything is slower, and nothing is wrong",
        limits=Limits(hit_s=2.0, miss_s=3.0),
    ),
    *(
        Fault(
            f"starve-{name}",
            f"{_subject(name)} gets only CPU time that no other process wants.",
            nice(whole(name)),
            unnamed="it is slower, and nothing is wrong",
            victims=edge_of(name),
            limits=Limits(hit_s=2.0, miss_s=3.0),
        )
        for name in ("edge1", "app1", "redis", "postgres", "relay")
    ),
    Fault(
        "few-files-app1",
        "The workers of an app may open no further file or connection.",
        limited(lambda service: service.workers("app1"), "Max open files", lambda it: it.num_fds()),
        unnamed="it serves over the connections that it has, and the other app serves the rest",
    ),
    Fault(
        "few-files-edge1",
        "The workers of an edge may open no further file or connection.",
        limited(lambda service: service.workers("edge1"), "Max open files", lambda it: it.num_fds()),
        unnamed="it serves over the connections that it has",
        victims=("edge1",),
    ),
    Fault(
        "little-memory-app1",
        "The workers of an app get no further memory.",
        limited(lambda service: service.workers("app1"), "Max address space", lambda it: it.memory_info().vms),
        unnamed="requests that need more fail in that app only",
        limits=Limits(reads=0.0),
    ),
    Fault(
        "remove-app1-socket",
        "The Unix socket of an app is removed.",
        removed(lambda service: service.plan.app_socket(1)),
        named=("process.silent", "app.silent"),
    ),
    Fault(
        "remove-postgres-socket",
        "The Unix socket of PostgreSQL is removed.",
        removed(lambda service: service.plan.sockets / ".s.PGSQL.5432"),
        named=("postgres.silent", "postgres.refuses"),
        limits=POSTGRES_AWAY,
    ),
    Fault(
        "remove-redis-socket",
        "The Unix socket of Redis is removed.",
        removed(lambda service: service.plan.redis_socket),
        named=("redis.unusable",),
    ),
    Fault(
        "remove-edge1-folder",
        "The folder of an edge is removed, with its temporary files.",
        removed(lambda service: service.plan.home / "edge1"),
        unnamed="hits, misses and writes need no file",
        victims=("edge1",),
        pairs=False,
    ),
    Fault(
        "remove-logs",
        "The folder of the logs is removed.",
        removed(lambda service: service.plan.logs),
        unnamed="the programs write on to the open files",
        pairs=False,
    ),
    Fault(
        "remove-metrics",
        "The folder in which the apps count is removed.",
        removed(lambda service: service.plan.metrics_folder),
        unnamed="the counts are lost, and requests go on",
    ),
    Fault(
        "remove-heartbeat",
        "The heartbeat of the relay is removed.",
        removed(lambda service: service.plan.heartbeat),
        unnamed="the relay writes it again",
    ),
]
