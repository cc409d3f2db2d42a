"""The classic design, running: edges over one gunicorn, with PostgreSQL and Redis of a stack of ours."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from tests.running import ROOT, clean_environment, folder, free_ports, running, status_of, wait_until

TEMPLATE = Path(__file__).parent / "nginx.conf"


@contextmanager
def classic(edges: int) -> Iterator[list[str]]:
    """The addresses of its edges. What the stack of ours runs besides the two servers stands idle meanwhile."""
    with running("--edges", "1", "--apps", "1") as ours, folder() as place, ExitStack() as processes:
        app, *listen = [f"127.0.0.1:{port}" for port in _ports(1 + edges)]
        cache = urlsplit(ours.redis_url)._replace(path="/1").geturl()  # ours is 0
        processes.enter_context(_gunicorn(app, ours.postgres, cache))
        for number, address in enumerate(listen, 1):
            processes.enter_context(_nginx(place / f"edge{number}", address, app))
        yield [f"http://{address}" for address in listen]


def _ports(count: int) -> range:
    first = free_ports(count)
    return range(first, first + count)


@contextmanager
def _gunicorn(listen: str, database: str, cache: str) -> Iterator[None]:
    command = [sys.executable, "-P", "-m", "gunicorn", "bench.classic.app:create_app()", "--bind", listen]
    # As in velikiy/gunicorn.conf.py, where the reasons are.
    command += ["--worker-class", "gthread", "--workers", "2", "--threads", "8", "--keep-alive", "75"]
    command += ["--no-control-socket", "--log-level", "warning"]
    environment = clean_environment(DATABASE_URL=database, REDIS_URL=cache, PYTHONPATH=str(ROOT))
    with _answering(command, f"http://{listen}", environment):
        yield


@contextmanager
def _nginx(place: Path, listen: str, app: str) -> Iterator[None]:
    place.mkdir()
    configuration = place / "nginx.conf"
    # "Safe" leaves Nginx's own variables, which have no value here, as they are.
    configuration.write_text(Template(TEMPLATE.read_text()).safe_substitute(FOLDER=place, LISTEN=listen, APP=app))
    command = ["/usr/sbin/nginx", "-e", "stderr", "-p", str(place), "-c", str(configuration)]
    with _answering(command, f"http://{listen}", clean_environment()):
        yield


@contextmanager
def _answering(command: list[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    """A server that answers, and is gone at the end with all that it has started."""
    # A session of its own: Ctrl-C is for us, who end it in its turn, and its workers can be ended without it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or status_of(f"{url}/users") == 200, what=" ".join(command))
        assert process.poll() is None, f"it did not start: {' '.join(command)}"
        yield
    finally:
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
