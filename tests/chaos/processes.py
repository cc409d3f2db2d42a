"""Faults of processes: killed, stopped, paused, starved, restarted."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
import psycopg

from testkit.stack import run_in
from tests.chaos.fault import POSTGRES_AWAY, POSTGRES_CRASHES, Fault, Inject, Limits
from tests.chaos.service import OWN_ROWS, Missing, Service
from tests.consistency.client import Client, NoResponse, NotSent

EDGES, APPS = ("edge1", "edge2"), ("app1", "app2")

Pick = Callable[[Service], list[int]]
"""Returns the processes that a fault takes."""

BRIEF = "it is over before status can look: a successor starts at once"

# ---- whom it hits ----


def whole(*names: str) -> Pick:
    return lambda service: [pid for name in names for pid in service.pids(name)]


def master(name: str) -> Pick:
    return lambda service: [service.master(name)]


def worker(name: str, index: int = 0) -> Pick:
    """Return one of the workers, ordered by their ids."""
    return lambda service: service.workers(name)[index : index + 1 or None]


def control_worker(service: Service) -> list[int]:
    """Return worker 0 of the first edge. Apps keep connections to its control listener, which no other worker accepts."""
    port = service.plan.control_ports[0]

    def found() -> list[int]:
        return [pid for pid in service.workers("edge1") if port in _accepted_at(pid)]

    return service.until(found, what="an app is connected to worker 0")


def client_worker(service: Service) -> list[int]:
    """Return a worker of the first edge that serves clients only."""
    return [pid for pid in service.workers("edge1") if pid not in control_worker(service)][:1]


def _accepted_at(pid: int) -> set[int]:
    """Return the local ports of the open connections of a process."""
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return {it.laddr.port for it in connections if it.status == psutil.CONN_ESTABLISHED}
    return set()


def backend(state: str = "") -> Pick:
    """Return a session of an app at PostgreSQL."""

    def pick(service: Service) -> list[int]:
        with service.connect() as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'velikiy%%' AND state LIKE %s",
                (state or "%",),
            ).fetchall()
        return [rows[0][0]] if rows else []

    return pick


def auxiliary(title: str) -> Pick:
    """Return a background process of PostgreSQL by a part of its title."""

    def pick(service: Service) -> list[int]:
        return [pid for pid in service.pids("postgres") if title in " ".join(_command_line(pid))]

    return pick


def supervisor(service: Service) -> list[int]:
    return [int((service.stack.data / "run" / "supervisord.pid").read_text())]


def _command_line(pid: int) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


# ---- what it does ----


def kill(pick: Pick, number: int = signal.SIGKILL, *, end: int = 0) -> Inject:
    """Send the processes a signal, and another one at the end, unless it is 0."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        pids = pick(service)
        assert pids, "there is no such process"
        try:
            service.kill(*pids, number=number)
            yield
        finally:
            if end:
                service.kill(*pids, number=end)

    return inject


def stop(pick: Pick) -> Inject:
    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        pids = pick(service)
        assert pids, "there is no such process"
        with service.stopped(*pids):
            yield

    return inject


def pause(pick: Pick, paused_s: float, runs_s: float) -> Inject:
    """Stop the processes for a moment, again and again, and let them run for a moment in between."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        def step(end: threading.Event) -> None:
            with service.stopped(*pick(service)):
                end.wait(paused_s)

        with service.repeat(step, runs_s):
            yield

    return inject


def again_and_again(pick: Pick, times: int) -> Inject:
    """Kill the process whenever it runs, so many times."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        killed: set[int] = set()

        def step(end: threading.Event) -> None:
            for pid in set(pick(service)) - killed if len(killed) < times else ():
                service.kill(pid)
                killed.add(pid)

        with service.repeat(step, 0.01):
            yield

    return inject


def crash(name: str) -> Inject:
    """Kill the program three times, each time as soon as its start is noted."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        noted = service.plan.home / "run" / f"{name}.spawned"

        def work(end: threading.Event) -> None:
            for _ in range(3):
                before = noted.read_text()
                service.kill(*service.pids(name))
                while noted.read_text() == before and not end.wait(0.01):
                    pass

        with service.threads(1, work):
            yield

    return inject


def down(*names: str) -> Inject:
    """Stop the programs as supervisor stops them, and start them at the end."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        try:
            for name in names:
                service.call_supervisor("stopProcess", name, False)
            yield
        finally:
            for name in names:
                service.until(lambda name=name: not service.stack.supervisor.pid_of(name), what=f"{name} ended")  # type: ignore[misc]
                service.stack.supervisor.start_program(name)

    return inject


def command(*words: str) -> Inject:
    """Run `./run` beside the load."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        failures: list[str] = []

        def work(end: threading.Event) -> None:
            completed = run_in(service.stack.root, *words, "--data", str(service.stack.data))
            if completed.returncode:
                failures.append(completed.stderr.strip())

        thread = threading.Thread(target=work, args=(threading.Event(),))
        thread.start()
        try:
            while thread.is_alive():
                service.wait(0.1)
            yield
        finally:
            thread.join()
            for failure in failures:
                service.violation(f"./run {' '.join(words)} failed: {failure}")

    return inject


def in_turn(*steps: tuple[float, Inject]) -> Inject:
    """Begin several faults, each so many seconds after the one before."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with contextlib.ExitStack() as begun:
            for seconds, step in steps:
                service.wait(seconds)
                begun.enter_context(step(service, random))
            yield

    return inject


@contextmanager
def _stopped_in_transaction(service: Service, random: random.Random) -> Iterator[None]:
    """Stop an app between the locks and the COMMIT of a write: it waits there for the exclusion of an edge."""
    late = f"{OWN_ROWS}late"
    with service.row() as user, service.connect() as connection, contextlib.ExitStack() as begun:

        def is_locked() -> bool:
            try:
                connection.execute("SELECT FROM users WHERE id = %s FOR UPDATE NOWAIT", (user,))
            except psycopg.errors.LockNotAvailable:
                return True
            return False

        def write(_: threading.Event) -> None:
            client = Client(service.stack.apps[0], 15)
            with contextlib.suppress(NotSent, NoResponse):
                client.request(b"PUT", f"/users/{user}".encode(), orjson.dumps({"name": late}))
            client.close()

        with service.stopped(*service.pids("edge2")):
            begun.enter_context(service.threads(1, write))
            service.until(is_locked, within=4, what="a write waits for an edge")
            begun.enter_context(service.stopped(*service.pids("app1")))
        began = time.monotonic()
        yield
        service.until(lambda: not is_locked(), within=10, what="PostgreSQL ends the transaction of the stopped app")
        service.note(f"its row was locked for {time.monotonic() - began:.1f} s")
        begun.close()
        response = service.request(0, "GET", f"/users/{user}")
        if response and orjson.loads(response.body).get("name") == late:
            service.violation("a stopped app has committed, although PostgreSQL had ended its transaction")


def limited(pick: Pick, what: str, value: Callable[[psutil.Process], int]) -> Inject:
    """Lower a limit of running processes, as a container or a careless administrator would."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        before: dict[int, str] = {}
        try:
            for pid in pick(service):
                before[pid] = _limit(pid, what)
                _set_limit(pid, what, str(value(psutil.Process(pid))))
            yield
        finally:
            for pid, limit in before.items():
                with contextlib.suppress(psutil.Error, subprocess.CalledProcessError):
                    _set_limit(pid, what, limit)

    return inject


OPTIONS = {"Max open files": "nofile", "Max address space": "as"}


def _limit(pid: int, what: str) -> str:
    """Return the soft limit. prlimit(2) would refuse root of a container, too."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line.removeprefix(what).split()[0] for line in lines if line.startswith(what))


def _set_limit(pid: int, what: str, limit: str) -> None:
    """Set the soft limit under the account of the process: root of a container may not set that of another account."""
    process = psutil.Process(pid)
    subprocess.run(
        ["prlimit", "--pid", str(pid), f"--{OPTIONS[what]}={limit}:"],
        user=process.uids().real,
        group=process.gids().real,
        extra_groups=[],
        check=True,
    )


def removed(entry: Callable[[Service], Path], after: Inject | None = None) -> Inject:
    """Remove a file or a folder of a program that runs. The name comes back at the end, unless the program has made it
    again."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        path = entry(service)
        aside = path.with_name(f"{path.name}.away")
        path.rename(aside)
        try:
            with after(service, random) if after else contextlib.nullcontext():
                yield
        finally:
            if not path.exists():
                aside.rename(path)
            elif aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)

    return inject


HOG = "while True: pass"


def hogs(count: int) -> Inject:
    """Let so many other processes take all the CPU time that they get."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        started = [subprocess.Popen([sys.executable, "-S", "-c", HOG]) for _ in range(count)]
        try:
            yield
        finally:
            for hog in started:
                hog.kill()
                hog.wait()

    return inject


def nice(pick: Pick) -> Inject:
    """Let a program run only when nothing else wants to, beside processes that always want to."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        if os.geteuid():
            raise Missing("only root can raise the priority again")
        pids = pick(service)
        threads = [int(it.name) for pid in pids for it in Path(f"/proc/{pid}/task").iterdir()]
        try:
            for thread in threads:
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, 19)
            with hogs(2)(service, random):
                yield
        finally:
            for thread in threads:
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, 0)

    return inject


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
        _stopped_in_transaction,
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
