"""Run the velikiy stack and its peers: one PostgreSQL with one table of users, one Redis with a database for each.

A peer starts when it is first used, and stays. An idle peer costs memory only.
"""

import itertools
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import redis
import requests
from werkzeug.http import http_date

from bench import servers
from bench.peers import builds
from testkit.stack import ROOT, Stack, folder, free_ports, run_in, running
from velikiy.coherence.entry import found
from velikiy.stack.plan import is_free

HERE = Path(__file__).parent
CACHE_ASIDE_CONF = HERE.parent / "cache_aside" / "nginx.conf"

WORKERS = 2
"""Processes of each app and of each Nginx."""

REDIS_TTL = 3600
"""Seconds, for all designs: entries that are filled before a row must still be there at its end."""

LONG_EDGE_TTL = 3600
"""Seconds: EDGE_TTL of a service that uses what its edges know (docs/configuration.md)."""

REDIS_TIMEOUT_S = 60
"""To remove the entries of all designs takes seconds on a busy machine."""

MAX_EDGES = 8
"""Edges of the velikiy stack."""

Command = tuple[str | bytes | int, ...]

NGINX_HEADERS = (
    "Date",
    "Server",
    "Connection",
    "Content-Length",
    "Content-Type",
    "Transfer-Encoding",
    "Keep-Alive",
)
"""Headers that Nginx adds by itself."""


@dataclass(frozen=True, eq=False)  # eq=False: a peer can be a key
class Peer:
    name: str
    url: str
    roots: dict[str, list[int]]
    missing: str = ""
    """The reason in a few words if the peer cannot run on this machine."""

    def users(self, number: int) -> str:
        return f"{self.url}/users/{number}"


def roots_of(stack: Stack) -> dict[str, list[int]]:
    """Return the root processes of a stack by group."""
    roots: dict[str, list[int]] = {}
    for name, pid in stack.pids().items():
        roots.setdefault(name.rstrip("0123456789"), []).append(pid)
    supervisor = stack.supervisor.pid()
    assert supervisor is not None
    return {**roots, "supervisor": [supervisor]}


class Peers:
    """Everything that is measured, under the names of the table."""

    def __init__(self, stack: Stack, directory: Path, context: ExitStack) -> None:
        self.stack = stack
        self.directory = directory
        self.context = context
        # Above the ports of MAX_EDGES edges, which must stay free for a restart of the stack.
        self._ports = itertools.count(max(int(edge.rpartition(":")[2]) for edge in stack.edges) + MAX_EDGES)

    # ---- velikiy ----

    @cached_property
    def velikiy(self) -> Peer:
        return Peer("velikiy", self.stack.edge, self.stack_roots())

    @cached_property
    def velikiy_app(self) -> Peer:
        """The app without an edge in front."""
        return Peer("velikiy, app alone", self.stack.app, self.stack_roots())

    def stack_roots(self) -> dict[str, list[int]]:
        return roots_of(self.stack)

    @property
    def shared(self) -> dict[str, list[int]]:
        roots = self.stack_roots()
        return {name: roots[name] for name in ("postgres", "redis")}

    def up(self, *options: str, **settings: str) -> None:
        """Apply other options and settings to the running stack."""
        data = str(self.stack.data)
        done = run_in(self.stack.root, "up", "--detach", *options, "--data", data, REDIS_TTL=str(REDIS_TTL), **settings)
        assert done.returncode == 0, done.stderr
        self.stack.refresh()

    @contextmanager
    def long_edge_ttl(self) -> Iterator[None]:
        """Let the edges use entries for LONG_EDGE_TTL. Their processes and their memory stay."""
        self.up(EDGE_TTL=str(LONG_EDGE_TTL))
        yield
        self.up()  # after an exception the stack ends

    # ---- peers ----

    @property
    def database(self) -> str:
        """The address for peers. Their sessions do not notify the relay, whose work no peer should pay for."""
        return f"{self.stack.postgres}&options={quote('-c velikiy.passes_gate=on')}"

    def redis_url(self, number: int) -> str:
        return self.stack.redis_database(number)

    def _redis(self, database: int = 0) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url(database), socket_timeout=REDIS_TIMEOUT_S)

    @cached_property
    def cache_aside_app(self) -> Peer:
        return self._gunicorn("cache-aside, app alone", "bench.cache_aside.app:create_app()", 1)

    @cached_property
    def cache_aside(self) -> Peer:
        return self._nginx("cache-aside", CACHE_ASIDE_CONF, self.cache_aside_app)

    @cached_property
    def cache_aside_uncached(self) -> Peer:
        app = self._gunicorn("cache-aside without caches", "bench.cache_aside.app:create_app()", 1, CACHES="off")
        return self._nginx("cache-aside without caches", HERE / "plain.conf", app)

    @cached_property
    def uncached(self) -> Peer:
        app = self._gunicorn(
            "velikiy without caches", "bench.peers.uncached:create_app()", 0, serve=servers.gunicorn_like_velikiy
        )
        return self._nginx("velikiy without caches", HERE / "plain.conf", app)

    @cached_property
    def flask_caching(self) -> Peer:
        return self._gunicorn("Flask-Caching", "bench.peers.flask_caching:create_app()", 2)

    @cached_property
    def fastapi(self) -> Peer:
        listen = self._address()
        processes = self.context.enter_context(
            servers.uvicorn("bench.peers.fastapi:create_app", listen, workers=WORKERS, **self._addresses(3))
        )
        return Peer("FastAPI", f"http://{listen}", {"app": processes, **self.shared})

    @cached_property
    def fastify(self) -> Peer:
        return self._built("Fastify", 4, builds.fastify, servers.node)

    @cached_property
    def go(self) -> Peer:
        return self._built("Go", 5, builds.go, servers.go)

    @cached_property
    def haproxy(self) -> Peer:
        if not shutil.which("haproxy", path="/usr/sbin"):
            return Peer("HAProxy", "", {}, missing="no haproxy")
        listen, app = self._address(), urlsplit(self.stack.app).netloc
        process = self.context.enter_context(
            servers.haproxy(HERE / "haproxy.cfg", self.directory / "haproxy", listen, app)
        )
        return Peer("HAProxy", f"http://{listen}", {"edge": [process], **self._roots_without_edges()})

    @cached_property
    def varnish(self) -> Peer:
        listen, app = self._address(), urlsplit(self.stack.app).netloc
        process = self.context.enter_context(
            servers.varnish(HERE / "varnish.vcl", self.directory / "varnish", listen, app)
        )
        return Peer("Varnish", f"http://{listen}", {"edge": [process], **self._roots_without_edges()})

    @cached_property
    def proxy_cache(self) -> Peer:
        app = Peer("", self.stack.app, self._roots_without_edges())
        return self._nginx("proxy_cache", HERE / "proxy_cache.conf", app)

    @cached_property
    def limit(self) -> Peer:
        """`return 200` with the response of velikiy's edge, header for header."""
        url = f"{self.stack.edge}/users/1"
        requests.get(url, timeout=5)
        response = requests.get(url, timeout=5)
        headers = "\n".join(
            f"add_header {name} '{value}';" for name, value in response.headers.items() if name not in NGINX_HEADERS
        )
        listen = self._address()
        process = self.context.enter_context(
            servers.nginx(HERE / "limit.conf", self.directory / "limit", listen, HEADERS=headers, BODY=response.text)
        )
        return Peer("return 200", f"http://{listen}", {"edge": [process]})

    def _roots_without_edges(self) -> dict[str, list[int]]:
        return {name: pids for name, pids in self.stack_roots().items() if name != "edge"}

    def _address(self) -> str:
        return f"127.0.0.1:{next(port for port in self._ports if is_free('127.0.0.1', port))}"

    def _gunicorn(
        self, name: str, app: str, database: int, *, serve: Any = servers.gunicorn, **environment: str
    ) -> Peer:
        listen = self._address()
        process = self.context.enter_context(
            serve(app, listen, workers=WORKERS, **self._addresses(database), **environment)
        )
        return Peer(name, f"http://{listen}", {"app": [process], **self.shared})

    def _built(self, name: str, database: int, build: Callable[[], Path], serve: Any) -> Peer:
        try:
            program = build()
        except builds.NotBuilt as reason:
            return Peer(name, "", {}, missing=str(reason))
        listen = self._address()
        # URL parsers of other languages refuse the address of a Unix socket in the form of redis-py.
        addresses = {
            "REDIS_SOCKET": self.stack.redis_socket,
            "REDIS_PASSWORD": self.stack.secret("redis_password"),
            "REDIS_DATABASE": str(database),
        }
        process = self.context.enter_context(
            serve(program, listen, workers=WORKERS, **self._addresses(database), **addresses)
        )
        return Peer(name, f"http://{listen}", {"app": [process], **self.shared})

    def _nginx(self, name: str, template: Path, app: Peer) -> Peer:
        listen = self._address()
        directory = self.directory / name.replace(" ", "-")
        process = self.context.enter_context(servers.nginx(template, directory, listen, APP=urlsplit(app.url).netloc))
        return Peer(name, f"http://{listen}", {"edge": [process], **app.roots})

    def _addresses(self, number: int) -> dict[str, str]:
        return {
            "DATABASE_URL": self.database,
            "REDIS_URL": self.redis_url(number),
            "REDIS_TTL": str(REDIS_TTL),
            "EDGE_SECRET": "of-the-peers-of-velikiy",
        }

    # ---- their data ----

    def seed(self, count: int) -> None:
        """Fill the table up to `count` users, with ids from 1 on."""
        present = self.stack.sql("SELECT count(*) FROM users")[0][0]
        if count > present:
            data, missing = str(self.stack.data), str(count - present)
            done = run_in(self.stack.root, "velikiy", "--data", data, "users", "seed", "--count", missing)
            assert done.returncode == 0, done.stderr
            self.stack.sql("VACUUM ANALYZE users")
        last, rows = self.stack.sql("SELECT max(id), count(*) FROM users")[0]
        assert last == rows, f"{rows} users, but the last id is {last}: the load requests every id up to the last"

    def empty_redis(self) -> None:
        """Empty Redis, for all designs. Entries of edges expire, or are evicted when other users are requested."""
        with self._redis() as server:
            server.flushall()

    def redis_reads(self) -> int:
        """Return how many scripts Redis has run so far.

        Only velikiy's edges and apps run scripts there, so each script is a read, as long as Redis has every entry.
        """
        with self._redis() as server:
            return int(server.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def fill_redis(self, count: int) -> None:
        """Fill Redis with the first users, in the form of each app. Reads through the apps would take minutes."""
        self.empty_redis()
        statement = (
            "SELECT id, updated_at, row_to_json(r)::text FROM"
            " (SELECT id, name, email, created_at, updated_at, version FROM users WHERE id <= %s) r"
        )
        rows = [
            (number, found(body.encode(), modified=http_date(changed)))
            for number, changed, body in self.stack.sql(statement, count)
        ]
        ttl_ms = REDIS_TTL * 1000
        json = {"Content-Type": "application/json"}

        def velikiy(number: int, entry: Any) -> list[Command]:
            key = f"user:{number}"
            return [("HSET", key, "body:", entry.pack(), "filled", "1"), ("PEXPIRE", key, ttl_ms)]

        def body_only(number: int, entry: Any) -> list[Command]:
            return [("SET", f"user:{number}", entry.body, "PX", ttl_ms)]

        def flask_caching(number: int, entry: Any) -> list[Command]:
            value = b"!" + pickle.dumps((entry.body, 200, json))
            return [("SET", f"flask_cache_view//users/{number}", value, "PX", ttl_ms)]

        packer: Any = redis.Connection()  # type: ignore[no-untyped-call]  # never connects
        for form, databases in ((velikiy, [0]), (body_only, [1, 3, 4, 5]), (flask_caching, [2])):
            for start in range(0, len(rows), 1000):
                commands = [it for number, entry in rows[start : start + 1000] for it in form(number, entry)]
                packed = packer.pack_commands(commands)  # once for all databases: Python takes longest
                for database in databases:
                    self._send(database, packed, len(commands))
        self._check_fill(rows[count // 2])

    def _send(self, database: int, packed: list[bytes], count: int) -> None:
        """Send so many commands to Redis, and read their replies."""
        with self._redis(database) as server:
            connection = server.connection_pool.get_connection()
            connection.send_packed_command(packed)
            for _ in range(count):
                connection.read_response()
            server.connection_pool.release(connection)

    def _check_fill(self, row: tuple[int, Any]) -> None:
        """Check that Redis has all entries and that velikiy finds one: otherwise the load would reach PostgreSQL."""
        with self._redis() as server:
            evicted = server.info("stats")["evicted_keys"]
        assert evicted == 0, f"the entries of all designs do not fit into Redis: it has evicted {evicted}"
        number, entry = row
        response = requests.get(f"{self.stack.app}/users/{number}", timeout=5)
        assert "redis; hit" in response.headers["Cache-Status"], "velikiy stores entries in Redis in another form now"
        assert response.content == entry.body


@contextmanager
def peers(edges: int = 2, root: Path = ROOT) -> Iterator[Peers]:
    """Start the velikiy stack from the checkout `root`. Peers start on first use, and end with the block."""
    port = free_ports(2 * MAX_EDGES)
    options = ("--port", str(port), "--edges", str(edges), "--apps", "1")
    with (
        running(*options, root=root, REDIS_TTL=str(REDIS_TTL)) as stack,
        folder() as directory,
        ExitStack() as context,
    ):
        yield Peers(stack, directory, context)
