"""The stack of ours and the peers, running: one PostgreSQL with one table of users, one Redis with a database for each.

A peer starts when somebody asks for it, and stays; one that stands idle costs memory only.
"""

import itertools
import pickle
from collections.abc import Iterator
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
from testkit.stack import ROOT, Stack, folder, free_ports, run_in, running
from velikiy.coherence.entry import found
from velikiy.stack.plan import is_free

HERE = Path(__file__).parent
CLASSIC = HERE.parent / "classic" / "nginx.conf"

WORKERS = 2
"""Processes of each app, and of each Nginx."""

REDIS_TTL = 3600
"""Seconds; for all of them. What is filled before a row is measured must still be there at its end."""


EDGES = 8
"""Of ours, at most."""


@dataclass(frozen=True)
class Peer:
    name: str
    url: str
    roots: dict[str, list[int]]

    def users(self, number: int) -> str:
        return f"{self.url}/users/{number}"


class Peers:
    """All that is measured. Names are as in the table."""

    def __init__(self, ours: Stack, place: Path, context: ExitStack) -> None:
        self.ours = ours
        self.place = place
        self.context = context
        # Behind those that edges of ours may get: a stack that is started anew needs them free.
        self._ports = itertools.count(max(int(edge.rpartition(":")[2]) for edge in ours.edges) + EDGES)

    # ---- ours ----

    @cached_property
    def velikiy(self) -> Peer:
        return Peer("velikiy", self.ours.edge, self.roots_of_ours())

    @cached_property
    def velikiy_app(self) -> Peer:
        """The app alone, without an edge before it."""
        return Peer("velikiy, app alone", self.ours.app, self.roots_of_ours())

    def roots_of_ours(self) -> dict[str, list[int]]:
        roots: dict[str, list[int]] = {}
        for name, pid in self.ours.pids().items():
            roots.setdefault(name.rstrip("0123456789"), []).append(pid)
        supervisor = self.ours.supervisor.pid()
        assert supervisor is not None
        return {**roots, "supervisor": [supervisor]}

    @property
    def shared(self) -> dict[str, list[int]]:
        roots = self.roots_of_ours()
        return {name: roots[name] for name in ("postgres", "redis")}

    # ---- peers ----

    @property
    def database(self) -> str:
        """As peers see it: SQL of theirs is not to be told to our relay, which no peer has to pay for."""
        return f"{self.ours.postgres}?options={quote('-c velikiy.passes_gate=on')}"

    def redis_url(self, number: int) -> str:
        return urlsplit(self.ours.redis_url)._replace(path=f"/{number}").geturl()

    @cached_property
    def classic_app(self) -> Peer:
        return self._gunicorn("classic, app alone", "bench.classic.app:create_app()", 1)

    @cached_property
    def classic(self) -> Peer:
        return self._nginx("classic", CLASSIC, self.classic_app)

    @cached_property
    def classic_correct(self) -> Peer:
        app = self._gunicorn("classic without caches", "bench.classic.app:create_app()", 1, CACHES="off")
        return self._nginx("classic without caches", HERE / "plain.conf", app)

    @cached_property
    def uncached(self) -> Peer:
        app = self._gunicorn(
            "velikiy without caches", "bench.peers.uncached:create_app()", 0, serve=servers.gunicorn_as_ours
        )
        return self._nginx("velikiy without caches", HERE / "plain.conf", app)

    @cached_property
    def flask_caching(self) -> Peer:
        return self._gunicorn("Flask-Caching", "bench.peers.flask_caching:create_app()", 2)

    @cached_property
    def fastapi(self) -> Peer:
        listen = self._address()
        processes = self.context.enter_context(
            servers.uvicorn("bench.peers.fastapi:create_app", listen, workers=WORKERS, **self._servers(3))
        )
        return Peer("FastAPI", f"http://{listen}", {"app": processes, **self.shared})

    @cached_property
    def varnish(self) -> Peer:
        listen = self._address()
        process = self.context.enter_context(
            servers.varnish(HERE / "varnish.vcl", self.place / "varnish", listen, urlsplit(self.ours.app).netloc)
        )
        ours = {name: pids for name, pids in self.roots_of_ours().items() if name != "edge"}
        return Peer("Varnish", f"http://{listen}", {"edge": [process], **ours})

    @cached_property
    def stock(self) -> Peer:
        ours = {name: pids for name, pids in self.roots_of_ours().items() if name != "edge"}
        app = Peer("", self.ours.app, ours)
        return self._nginx("proxy_cache", HERE / "stock.conf", app)

    @cached_property
    def limit(self) -> Peer:
        """`return 200` of what our edge answers, header for header."""
        url = f"{self.ours.edge}/users/1"
        requests.get(url, timeout=5)
        answer = requests.get(url, timeout=5)
        kept = {name: value for name, value in answer.headers.items() if name not in OF_NGINX}
        headers = "\n".join(f"add_header {name} '{value}';" for name, value in kept.items())
        listen = self._address()
        process = self.context.enter_context(
            servers.nginx(HERE / "limit.conf", self.place / "limit", listen, HEADERS=headers, BODY=answer.text)
        )
        return Peer("return 200", f"http://{listen}", {"edge": [process]})

    def _address(self) -> str:
        return f"127.0.0.1:{next(port for port in self._ports if is_free('127.0.0.1', port))}"

    def _gunicorn(
        self, name: str, app: str, database: int, *, serve: Any = servers.gunicorn, **environment: str
    ) -> Peer:
        listen = self._address()
        process = self.context.enter_context(
            serve(app, listen, workers=WORKERS, **self._servers(database), **environment)
        )
        return Peer(name, f"http://{listen}", {"app": [process], **self.shared})

    def _nginx(self, name: str, template: Path, app: Peer) -> Peer:
        listen = self._address()
        place = self.place / name.replace(" ", "-")
        process = self.context.enter_context(servers.nginx(template, place, listen, APP=urlsplit(app.url).netloc))
        return Peer(name, f"http://{listen}", {"edge": [process], **app.roots})

    def _servers(self, number: int) -> dict[str, str]:
        return {"DATABASE_URL": self.database, "REDIS_URL": self.redis_url(number), "REDIS_TTL": str(REDIS_TTL)}

    # ---- what is in them ----

    def seed(self, count: int) -> None:
        """So many users, with the ids from 1 on."""
        there = self.ours.sql("SELECT count(*) FROM users")[0][0]
        if count > there:
            done = run_in(
                self.ours.root, "velikiy", "--data", str(self.ours.data), "users", "seed", "--count", str(count - there)
            )
            assert done.returncode == 0, done.stderr
            self.ours.sql("VACUUM ANALYZE users")
        last, rows = self.ours.sql("SELECT max(id), count(*) FROM users")[0]
        assert last == rows, f"{rows} users, and the last is {last}: the load asks for all ids up to it"

    def forget(self) -> None:
        """Nothing in any Redis; what edges have runs out by itself, or is dropped by who asks for other users."""
        with redis.Redis.from_url(self.ours.redis_url) as server:
            server.flushall()

    def asked_of_redis(self) -> int:
        """How many scripts Redis has run until now. Nobody but our edges and apps has scripts there: where all are
        reads of what it has, each is one of these."""
        with redis.Redis.from_url(self.ours.redis_url) as server:
            return int(server.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def fill_redis(self, count: int) -> None:
        """The first users, as each of the apps would have stored them. By a read for each it would take minutes."""
        self.forget()
        statement = (
            "SELECT id, updated_at, row_to_json(r)::text FROM"
            " (SELECT id, name, email, created_at, updated_at, version FROM users WHERE id <= %s) r"
        )
        rows = [
            (number, found(body.encode(), modified=http_date(changed)))
            for number, changed, body in self.ours.sql(statement, count)
        ]
        keep = REDIS_TTL * 1000
        json = {"Content-Type": "application/json"}

        def ours(pipeline: Any, number: int, entry: Any) -> None:
            pipeline.hset(f"user:{number}", mapping={"body:": entry.pack(), "filled": "1"})
            pipeline.pexpire(f"user:{number}", keep)

        def plain(pipeline: Any, number: int, entry: Any) -> None:
            pipeline.set(f"user:{number}", entry.body, px=keep)

        def flask_caching(pipeline: Any, number: int, entry: Any) -> None:
            value = b"!" + pickle.dumps((entry.body, 200, json))
            pipeline.set(f"flask_cache_view//users/{number}", value, px=keep)

        for database, put in ((0, ours), (1, plain), (2, flask_caching), (3, plain)):
            with redis.Redis.from_url(self.redis_url(database)) as server:
                for start in range(0, len(rows), 1000):
                    with server.pipeline(transaction=False) as pipeline:
                        for number, entry in rows[start : start + 1000]:
                            put(pipeline, number, entry)
                        pipeline.execute()
        self._check_fill(rows[count // 2])

    def _check_fill(self, row: tuple[int, Any]) -> None:
        """That it is found: PostgreSQL is not asked for a row that everybody is said to have."""
        number, entry = row
        answer = requests.get(f"{self.ours.app}/users/{number}", timeout=5)
        assert "redis; hit" in answer.headers["Cache-Status"], "what we store in Redis has another form by now"
        assert answer.content == entry.body


OF_NGINX = ("Date", "Server", "Connection", "Content-Length", "Content-Type", "Transfer-Encoding", "Keep-Alive")
"""What it says by itself."""


@contextmanager
def peers(edges: int = 2, root: Path = ROOT) -> Iterator[Peers]:
    """`root`: the checkout that our stack is started from."""
    port = free_ports(2 * EDGES)
    options = ("--port", str(port), "--edges", str(edges), "--apps", "1")
    with running(*options, root=root, REDIS_TTL=str(REDIS_TTL)) as ours, folder() as place, ExitStack() as context:
        yield Peers(ours, place, context)
