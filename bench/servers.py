"""Start the servers of peers, and end them."""

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
"""Threads of one worker, as in velikiy's own app."""


def addresses(count: int) -> list[str]:
    first = free_ports(count)
    return [f"127.0.0.1:{port}" for port in range(first, first + count)]


@contextmanager
def run_server(
    command: list[str], url: str, environment: dict[str, str], pass_fds: Sequence[int] = ()
) -> Iterator[int]:
    """Start a server and wait until it responds to `url` with 200. Yield its process id.

    At the end the server is terminated, and all processes that it has started are killed.
    """
    with tempfile.TemporaryFile() as stderr:
        # In a session of its own the server does not receive Ctrl-C, which this process handles, and its workers can be
        # killed without this process.
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=pass_fds,
        )
        try:
            wait_until(lambda: process.poll() is not None or status_of(url) == 200, what=" ".join(command))
            if process.poll() is not None:
                stderr.seek(0)
                error = stderr.read().decode(errors="replace")
                raise RuntimeError(f"the server did not start: {' '.join(command)}\n{error}")
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
    # A socket for each worker, as for uvicorn below: otherwise one worker may accept all waiting connections.
    command += ["--reuse-port"]
    # As in velikiy/server/gunicorn.conf.py, which gives the reasons.
    command += ["--worker-class", "gthread", "--workers", str(workers), "--threads", str(THREADS), "--keep-alive", "75"]
    command += ["--worker-tmp-dir", "/dev/shm", "--no-control-socket", "--log-level", "warning"]  # noqa: S108
    with run_server(command, f"http://{listen}/users/1", environment_with(**environment)) as process:
        yield process


@contextmanager
def gunicorn_like_velikiy(app: str, listen: str, *, workers: int = 2, **environment: str) -> Iterator[int]:
    """Start gunicorn with velikiy's worker and settings, on the same CPUs, so that only the app differs."""
    command = [sys.executable, "-P", "-m", "gunicorn", "-c", str(ROOT / "velikiy/server/gunicorn.conf.py"), app]
    settings = {"APP_LISTEN": listen, "APP_WORKERS": str(workers), "APP_THREADS": str(THREADS), "APP_FIRST_CPU": "0"}
    with run_server(command, f"http://{listen}/users/1", environment_with(**settings, **environment)) as process:
        yield process


@contextmanager
def uvicorn(app: str, listen: str, *, workers: int = 2, **environment: str) -> Iterator[list[int]]:
    """Start one process for each worker, each with a socket of its own for the same port (SO_REUSEPORT): then the
    kernel distributes the connections.

    With uvicorn's own --workers, which share a socket, the worker that wakes first accepts all waiting connections, and
    wrk opens all its connections at once: one worker had work, the other had none.
    """
    host, _, port = listen.rpartition(":")
    command = [sys.executable, "-P", "-m", "uvicorn", app, "--factory", "--timeout-keep-alive", "75"]
    command += ["--no-access-log", "--log-level", "warning"]  # as for gunicorn
    with ExitStack() as context:
        sockets = [context.enter_context(socket.socket()) for _ in range(workers)]
        for listener in sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # uvicorn takes an inherited socket for a Unix socket and does not set this option itself. Without it each
            # response waits 40 ms for the acknowledgement of its header. Connections inherit it from their listener.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.bind((host, int(port)))
        yield [
            context.enter_context(
                run_server(
                    [*command, "--fd", str(listener.fileno())],
                    f"http://{listen}/users/1",
                    environment_with(**environment),
                    pass_fds=[listener.fileno()],
                )
            )
            for listener in sockets
        ]


@contextmanager
def nginx(template: Path, directory: Path, listen: str, **values: str) -> Iterator[int]:
    """Start Nginx with a configuration from `template`.

    Args:
        values: The variables of the template, besides FOLDER and LISTEN.
    """
    directory.mkdir()
    configuration = directory / "nginx.conf"
    # safe_substitute leaves Nginx's own variables, which have no value here, as they are.
    text = Template(template.read_text()).safe_substitute(FOLDER=directory, LISTEN=listen, **values)
    configuration.write_text(text)
    command = ["/usr/sbin/nginx", "-e", "stderr", "-p", str(directory), "-c", str(configuration)]
    with run_server(command, f"http://{listen}/users/1", clean_environment()) as process:
        yield process


@contextmanager
def varnish(template: Path, directory: Path, listen: str, app: str) -> Iterator[int]:
    directory.mkdir()
    host, _, port = app.rpartition(":")
    configuration = directory / "default.vcl"
    configuration.write_text(Template(template.read_text()).substitute(HOST=host, PORT=port))
    command = ["/usr/sbin/varnishd", "-F", "-a", listen, "-f", str(configuration), "-n", str(directory / "work")]
    command += ["-s", "malloc,256m"]  # as in Debian's unit
    with run_server(command, f"http://{listen}/users/1", clean_environment()) as process:
        yield process


@contextmanager
def haproxy(template: Path, directory: Path, listen: str, app: str) -> Iterator[int]:
    directory.mkdir()
    configuration = directory / "haproxy.cfg"
    configuration.write_text(Template(template.read_text()).substitute(LISTEN=listen, APP=app))
    command = ["/usr/sbin/haproxy", "-db", "-f", str(configuration)]
    with run_server(command, f"http://{listen}/users/1", clean_environment()) as process:
        yield process


@contextmanager
def node(folder: Path, listen: str, *, workers: int = 2, **environment: str) -> Iterator[int]:
    """Start the server.js of this folder. It starts its workers by itself."""
    host, _, port = listen.rpartition(":")
    settings = {"HOST": host, "PORT": port, "WORKERS": str(workers), "NODE_ENV": "production"}
    command = ["node", str(folder / "server.js")]
    with run_server(command, f"http://{listen}/users/1", clean_environment(**settings, **environment)) as process:
        yield process


@contextmanager
def go(program: Path, listen: str, *, workers: int = 2, **environment: str) -> Iterator[int]:
    """Start a program in Go. It is one process, in which `workers` threads run Go at the same time."""
    settings = {"LISTEN": listen, "GOMAXPROCS": str(workers)}
    url = f"http://{listen}/users/1"
    with run_server([str(program)], url, clean_environment(**settings, **environment)) as process:
        yield process


def environment_with(**values: str) -> dict[str, str]:
    return clean_environment(PYTHONPATH=str(ROOT), **values)
