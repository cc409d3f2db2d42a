"""Starting a server of a peer's, and being rid of it afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from string import Template

from testkit.stack import ROOT, clean_environment, free_ports, status_of, wait_until

THREADS = 8
"""Of one worker, as in ours."""


def addresses(count: int) -> list[str]:
    first = free_ports(count)
    return [f"127.0.0.1:{port}" for port in range(first, first + count)]


@contextmanager
def answering(command: list[str], url: str, environment: dict[str, str], pass_fds: Sequence[int] = ()) -> Iterator[int]:
    """The process of a server that answers, and is gone at the end with all that it has started."""
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C is for us, who end it in its turn, and its workers can be ended without it.
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            pass_fds=pass_fds,
        )
        try:
            wait_until(lambda: process.poll() is not None or status_of(url) == 200, what=" ".join(command))
            if process.poll() is not None:
                said.seek(0)
                raise RuntimeError(f"it did not start: {' '.join(command)}\n{said.read().decode(errors='replace')}")
            yield process.pid
        finally:
            try:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def gunicorn(app: str, listen: str, *, workers: int = 2, **environment: str) -> Iterator[int]:
    command = [sys.executable, "-P", "-m", "gunicorn", app, "--bind", listen]
    # A socket for each worker, as of uvicorn below: else one of them may take all connections that wait.
    command += ["--reuse-port"]
    # As in velikiy/server/gunicorn.conf.py, where the reasons are.
    command += ["--worker-class", "gthread", "--workers", str(workers), "--threads", str(THREADS), "--keep-alive", "75"]
    command += ["--worker-tmp-dir", "/dev/shm", "--no-control-socket", "--log-level", "warning"]  # noqa: S108
    with answering(command, f"http://{listen}/users/1", ours_for(**environment)) as process:
        yield process


@contextmanager
def gunicorn_as_ours(app: str, listen: str, *, workers: int = 2, **environment: str) -> Iterator[int]:
    """With our worker and settings, on the CPUs that ours stay on: what differs from ours is the app alone."""
    command = [sys.executable, "-P", "-m", "gunicorn", "-c", str(ROOT / "velikiy/server/gunicorn.conf.py"), app]
    ours = {"APP_LISTEN": listen, "APP_WORKERS": str(workers), "APP_THREADS": str(THREADS), "APP_FIRST_CPU": "0"}
    with answering(command, f"http://{listen}/users/1", ours_for(**ours, **environment)) as process:
        yield process


@contextmanager
def uvicorn(app: str, listen: str, *, workers: int = 2, **environment: str) -> Iterator[list[int]]:
    """One process for each worker, each with a socket of its own for the same port (SO_REUSEPORT): then the kernel
    shares the connections out. Of uvicorn's own --workers, which share a socket, the one that wakes first takes all
    that wait, and wrk opens its connections at once: one worker had work, the other had none."""
    host, _, port = listen.rpartition(":")
    command = [sys.executable, "-P", "-m", "uvicorn", app, "--factory", "--timeout-keep-alive", "75"]
    command += ["--no-access-log", "--log-level", "warning"]  # as gunicorn
    with ExitStack() as context:
        sockets = [context.enter_context(socket.socket()) for _ in range(workers)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # uvicorn takes a socket that it is given for one of Unix, and so does not do this itself; without it each
            # answer waits 40 ms for the acknowledgement of its header. Connections have it from their listener.
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.bind((host, int(port)))
        yield [
            context.enter_context(
                answering(
                    [*command, "--fd", str(one.fileno())],
                    f"http://{listen}/users/1",
                    ours_for(**environment),
                    pass_fds=[one.fileno()],
                )
            )
            for one in sockets
        ]


@contextmanager
def nginx(template: Path, place: Path, listen: str, **values: str) -> Iterator[int]:
    """`values`: what the template leaves open, besides FOLDER and LISTEN."""
    place.mkdir()
    configuration = place / "nginx.conf"
    # "Safe" leaves Nginx's own variables, which have no value here, as they are.
    text = Template(template.read_text()).safe_substitute(FOLDER=place, LISTEN=listen, **values)
    configuration.write_text(text)
    command = ["/usr/sbin/nginx", "-e", "stderr", "-p", str(place), "-c", str(configuration)]
    with answering(command, f"http://{listen}/users/1", clean_environment()) as process:
        yield process


@contextmanager
def varnish(template: Path, place: Path, listen: str, app: str) -> Iterator[int]:
    place.mkdir()
    host, _, port = app.rpartition(":")
    configuration = place / "default.vcl"
    configuration.write_text(Template(template.read_text()).substitute(HOST=host, PORT=port))
    command = ["/usr/sbin/varnishd", "-F", "-a", listen, "-f", str(configuration), "-n", str(place / "work")]
    command += ["-s", "malloc,256m"]  # Debian's unit
    with answering(command, f"http://{listen}/users/1", clean_environment()) as process:
        yield process


def ours_for(**values: str) -> dict[str, str]:
    return clean_environment(PYTHONPATH=str(ROOT), **values)
