"""The processes that a fault takes, and the actions on them: kill, stop, pause, starve, restart."""

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
from tests.chaos.fault import Inject
from tests.chaos.service import OWN_ROWS, Missing, Service
from tests.consistency.client import Client, NoResponse, NotSent

Pick = Callable[[Service], list[int]]
"""Returns the processes that a fault takes."""

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


COMMIT_S = 0.2
"""A COMMIT that an app has sent before it was stopped is done after so long."""


@contextmanager
def stopped_in_transaction(service: Service, random: random.Random) -> Iterator[None]:
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
            service.wait(COMMIT_S)
            stopped_inside = is_locked()
        began = time.monotonic()
        yield
        service.until(lambda: not is_locked(), within=10, what="PostgreSQL ends the transaction of the stopped app")
        service.note(f"its row was locked for {time.monotonic() - began:.1f} s")
        begun.close()
        response = service.request(0, "GET", f"/users/{user}")
        if not stopped_inside:
            service.note("its write was over before it was stopped")
        elif response and orjson.loads(response.body).get("name") == late:
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
