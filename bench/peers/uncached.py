"""Our own app without any cache: the fence does nothing but the transaction, and the SELECT. It shows what the caches
cost a write; there is no such switch in the product."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from flask import Flask

from velikiy import logs
from velikiy.coherence import NOT_TRIED, Answer, CachePath, Change, Entry, Gate, Lease, NotTried, connect
from velikiy.http import middleware, problems, routes
from velikiy.postgres import Connection, Database
from velikiy.resources.base import registry
from velikiy.settings import Settings, load

T = TypeVar("T")


class Uncached(Gate):
    def read(
        self,
        path: CachePath,
        variant: str,
        load: Callable[[Connection], Entry],
        from_edge: Lease | NotTried | None = NOT_TRIED,
    ) -> Answer:
        with self.database.autocommit() as connection:
            return Answer(load(connection), False, "none")

    def write(
        self,
        change: Callable[[Connection], Change[T]],
        timeout_factor: float = 1,
        lock_first: Sequence[CachePath] = (),
        until: float | None = None,
    ) -> T:
        with self.database.transaction(timeout_factor) as connection:
            return change(connection).outcome


def create_app() -> Flask:
    settings = load(Settings)
    logs.configure(settings.log_level)
    database = Database(settings.database_url, size=settings.app_threads, timeout=settings.database_timeout)
    gate = connect(database, settings)
    app = Flask(__name__, static_folder=None)
    middleware.install(app)
    middleware.install(app)
    problems.install(app)
    routes.install(app, registry(), Uncached(gate.database, gate.caches, gate.redis_tier, gate.edge_tier))
    database.open()
    return app
