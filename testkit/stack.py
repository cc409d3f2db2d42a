"""Start stacks for tests with `./run`, as a person would, on free ports and in temporary folders."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import psutil
import psycopg
import redis
import requests

from velikiy.stack.plan import Plan, is_free
from velikiy.stack.supervisor import Supervisor

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

EDGE_SECRET = "of-all-stacks-under-test"
"""One for all, so that edges, apps and writers of a test fit each other."""

PERSONAL_SETTINGS = (
    "DATABASE_URL",
    "MIGRATION_DATABASE_URL",
    "DATABASE_DIRECT_URL",
    "REDIS_URL",
    "PORT",
    "BIND",
    "EDGES",
    "APPS",
    "DATA",
    "WAL_ARCHIVE",
    "ALLOWED_HOSTS",
    "AUTH",
    "CORS_ORIGINS",
    "TLS_CERT",
    "TLS_KEY",
    "TLS_HSTS",
    "HTTP_PORT",
    "EDGE_TTL",
    "RATE_REQUESTS",
    "RATE_WINDOW",
    "RATE_CONNECTIONS",
    "IDEMPOTENCY_QUOTA",
    "HISTORY_DAYS",
    "REDIS_TTL",
    "SECRETS_DIR",
    "EDGE_SECRET",
)
"""Settings of the person who runs the tests. They must not reach the stacks under test."""


def wait_until(condition: Callable[[], T], *, within: float = 20, every: float = 0.05, what: str = "") -> T:
    """Return the first true value of the condition.

    Raises:
        AssertionError: The condition did not become true in time.
    """
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what or condition}"
        time.sleep(every)
    return value


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `./run ...` as a person would type it."""
    return run_in(ROOT, *arguments, **environment)


def refused(*arguments: str, **environment: str) -> str:
    """Return the message with which `./run` refuses the command."""
    completed = run(*arguments, **environment)
    assert completed.returncode == 1, (completed.stdout, completed.stderr)
    assert "Traceback" not in completed.stderr
    assert completed.stdout == ""
    message = completed.stderr.strip()
    assert message.startswith("./run: ")
    return message


def run_in(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `./run ...` in another checkout."""
    return subprocess.run(
        [str(root / "run"), *arguments],
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process' environment without personal settings, and with the given variables."""
    passed_on = {
        name: value for name, value in os.environ.items() if name not in PERSONAL_SETTINGS and name != "PYTHONPATH"
    }
    return {**passed_on, "EDGE_SECRET": EDGE_SECRET, **more}


def free_ports(count: int) -> int:
    """Return the first of several free ports in a row, below the range from which Linux gives ports to clients."""
    for first in range(30_000 + os.getpid() % 500 * 4, 32_700, count):
        if all(is_free("127.0.0.1", first + n) for n in range(count)):
            return first
    raise AssertionError("no free ports")


@contextmanager
def folder() -> Iterator[Path]:
    """Create a temporary folder that the services' user can enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="velikiy-test-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Stack:
    """A running stack, as `./run status --json` describes it."""

    def __init__(self, data: Path, root: Path = ROOT) -> None:
        self.data = data
        self.root = root
        self.edges: list[str] = []
        self.apps: list[str] = []
        self.postgres = ""
        """The address with the role that owns the tables, as `./run psql` uses it."""

        self.redis_url = ""
        self.refresh()

    def refresh(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(run_in(self.root, "status", "--json", "--data", str(self.data)).stdout)
        self.edges, self.apps = state["edges"], state["apps"]
        self.postgres, self.redis_url = self.secret("migration_database_url"), self.secret("redis_url")
        return state

    def secret(self, name: str) -> str:
        """Return a secret of the stack, or an empty string if it does not exist yet."""
        file = self.data / "secrets" / name
        return file.read_text().strip() if file.exists() else ""

    @property
    def edge(self) -> str:
        return self.edges[0]

    @property
    def app(self) -> str:
        return self.apps[0]

    @property
    def port(self) -> str:
        """The port of the first edge."""
        return self.edge.rpartition(":")[2]

    @property
    def supervisor(self) -> Supervisor:
        plan = Plan.load(self.data)
        assert plan is not None
        return Supervisor(plan)

    def pids(self) -> dict[str, int]:
        """Return the pid of each running process by its name. A process with children is listed as its master."""
        return {p["name"]: p["pid"] for p in self.supervisor.processes() if p["statename"] == "RUNNING"}

    def log(self, name: str) -> str:
        return (self.data / "logs" / f"{name}.log").read_text()

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def forget_edges(self, condition: str) -> None:
        """Delete rows of edges that a test has registered, as if they had resigned."""
        self.sql(f"UPDATE caches SET excluded = true WHERE kind = 'edge' AND {condition}")
        self.sql(f"DELETE FROM caches WHERE kind = 'edge' AND {condition}")

    def redis(self) -> "redis.Redis":
        return redis.Redis.from_url(self.redis_url)

    @property
    def redis_socket(self) -> str:
        """The path of the Unix socket of Redis."""
        return unquote(urlsplit(self.redis_url).path)

    def redis_through(self, port: int, password: str | None = None, database: int = 0) -> str:
        """Return the address of Redis through a proxy at this port."""
        password = self.secret("redis_password") if password is None else password
        return f"redis://default:{password}@127.0.0.1:{port}/{database}"

    def redis_database(self, number: int) -> str:
        """Return the address of another database of Redis."""
        return urlsplit(self.redis_url)._replace(query=f"db={number}").geturl()

    def healthy(self) -> bool:
        return all(status_of(f"{edge}/health") == 200 for edge in self.edges)


def has_ended(process: psutil.Process) -> bool:
    """Return whether the process has ended, also if its parent has not collected it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children_of(master: int) -> dict[int, str]:
    """Return the pid and the command line of each child of the process. A child that ends meanwhile is left out."""
    children = {}
    for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            children[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text()
    return children


def status_of(url: str) -> int:
    """Return the status of the response, or 0 if no server responds."""
    try:
        return requests.get(url, timeout=5).status_code
    except requests.RequestException:
        return 0


@contextmanager
def running(*options: str, data: Path | None = None, root: Path = ROOT, **environment: str) -> Iterator[Stack]:
    """Start a stack, and stop and delete it at the end.

    Args:
        options: Options of `./run up`. Without `--port` the stack gets free ports.
        data: The data folder, or None for a temporary folder.
        root: The checkout that starts the stack.
        environment: Settings of the stack.
    """
    with folder() as temporary:
        data = data or temporary / "data"
        if "--port" not in options:
            options = ("--port", str(free_ports(4)), *options)
        try:
            started = run_in(root, "up", "--detach", "--data", str(data), *options, **environment)
            assert started.returncode == 0, started.stderr
            yield Stack(data, root)
        finally:
            run_in(root, "down", "--wipe", "--data", str(data))


def start(stack: Stack, *options: str) -> subprocess.CompletedProcess[str]:
    """Start the stack again, at its old address."""
    return run_in(stack.root, "up", "--detach", "--data", str(stack.data), "--port", stack.port, *options)
