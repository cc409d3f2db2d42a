"""A stack for tests: started by `./run` as a person would, on ports and in a folder of its own."""

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

import psycopg
import redis
import requests

from velikiy.stack.plan import Plan, is_free
from velikiy.stack.supervisor import Supervisor

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

QUIET = ("DATABASE_URL", "REDIS_URL", "PORT", "BIND", "EDGES", "APPS", "DATA", "EDGE_TTL", "REDIS_TTL", "SECRETS_DIR")
"""Settings of the person who runs the tests; they are not to reach the stacks under test."""


def wait_until(condition: Callable[[], T], *, within: float = 20, every: float = 0.05, what: str = "") -> T:
    """The condition's first true value.

    Raises:
        AssertionError: it did not become true in time.
    """
    until = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {within} s: {what or condition}"
        time.sleep(every)
    return value


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`./run ...`, as a person would type it."""
    return run_in(ROOT, *arguments, **environment)


def refused(*arguments: str, **environment: str) -> str:
    """The one sentence in which `./run` says why not."""
    answer = run(*arguments, **environment)
    assert answer.returncode == 1, (answer.stdout, answer.stderr)
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    said = answer.stderr.strip()
    assert said.startswith("./run: ")
    return said


def run_in(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, in another checkout."""
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
    kept = {name: value for name, value in os.environ.items() if name not in QUIET and name != "PYTHONPATH"}
    return {**kept, **more}


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that Linux gives to clients."""
    for first in range(30_000 + os.getpid() % 500 * 4, 32_700, count):
        if all(is_free("127.0.0.1", first + n) for n in range(count)):
            return first
    raise AssertionError("no free ports")


@contextmanager
def folder() -> Iterator[Path]:
    """One that the services' user can enter, unlike pytest's own."""
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
        self.redis_url = ""
        self.refresh()

    def refresh(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(run_in(self.root, "status", "--json", "--data", str(self.data)).stdout)
        self.edges, self.apps = state["edges"], state["apps"]
        self.postgres, self.redis_url = state["postgres"], state["redis"]
        return state

    @property
    def edge(self) -> str:
        return self.edges[0]

    @property
    def app(self) -> str:
        return self.apps[0]

    @property
    def port(self) -> str:
        """Of the first edge."""
        return self.edge.rpartition(":")[2]

    @property
    def supervisor(self) -> Supervisor:
        plan = Plan.load(self.data)
        assert plan is not None
        return Supervisor(plan)

    def pids(self) -> dict[str, int]:
        """Of the processes that run, by name; those of the masters."""
        return {p["name"]: p["pid"] for p in self.supervisor.processes() if p["statename"] == "RUNNING"}

    def log(self, name: str) -> str:
        return (self.data / "logs" / f"{name}.log").read_text()

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> "redis.Redis":
        return redis.Redis.from_url(self.redis_url)

    def healthy(self) -> bool:
        return all(status_of(f"{edge}/health") == 200 for edge in self.edges)


def children_of(master: int) -> dict[int, str]:
    """Its processes and their command lines; of one that ends in between, nothing."""
    children = {}
    for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            children[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text()
    return children


def status_of(url: str) -> int:
    """0 where nobody answers."""
    try:
        return requests.get(url, timeout=5).status_code
    except requests.RequestException:
        return 0


@contextmanager
def running(*options: str, data: Path | None = None, root: Path = ROOT, **environment: str) -> Iterator[Stack]:
    """A stack that is stopped and deleted at the end; without a port among the options it gets free ones. `root`: the
    checkout that it is started from."""
    with folder() as place:
        data = data or place / "data"
        if "--port" not in options:
            options = ("--port", str(free_ports(4)), *options)
        try:
            started = run_in(root, "up", "--detach", "--data", str(data), *options, **environment)
            assert started.returncode == 0, started.stderr
            yield Stack(data, root)
        finally:
            run_in(root, "down", "--wipe", "--data", str(data))


def start(stack: Stack, *options: str) -> subprocess.CompletedProcess[str]:
    """Again, and at its old address."""
    return run_in(stack.root, "up", "--detach", "--data", str(stack.data), "--port", stack.port, *options)
