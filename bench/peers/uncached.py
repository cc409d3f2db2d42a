"""Our own app without any cache: the fence does nothing but the transaction, and the SELECT. It shows what the caches
cost a write; there is no such switch in the product."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from flask import Flask

from velikiy import logs
from velikiy.coherence import UNASKED, Answer, Change, Entry, Fence, Lease, Path, Unasked, connect
from velikiy.http import problems, routes
from velikiy.postgres import Connection, Database
from velikiy.resources.base import registry
from velikiy.settings import Settings, load

T = TypeVar("T")


class Uncached(Fence):
    def read(
        self, path: Path, variant: str, load: Callable[[Connection], Entry], asked: Lease | Unasked | None = UNASKED
    ) -> Answer:
        with self.database.autocommit() as connection:
            return Answer(load(connection), False, "none")

    def write(
        self,
        change: Callable[[Connection], Change[T]],
        times: float = 1,
        foreseen: Sequence[Path] = (),
        until: float | None = None,
    ) -> T:
        with self.database.transaction(times) as connection:
            return change(connection).outcome


def create_app() -> Flask:
    settings = load(Settings)
    logs.configure(settings.log_level)
    database = Database(settings.database_url, size=settings.app_threads, timeout=settings.database_timeout)
    fence = connect(database, settings)
    app = Flask(__name__, static_folder=None)
    problems.install(app)
    routes.install(app, registry(), Uncached(fence.database, fence.caches, fence.redis_tier, fence.edge_tier))
    database.open()
    return app
