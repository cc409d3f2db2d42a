"""velikiy's own app without any cache: the gate does nothing but the transaction and the SELECT.

It shows what the caches cost a write. The product has no such switch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask

from velikiy import http, logs
from velikiy.coherence import Answer, CachePath, Change, Entry, Gate, connect
from velikiy.http.auth import Auth
from velikiy.http.browsers import Browsers
from velikiy.postgres import Connection, Database
from velikiy.resources.base import registry
from velikiy.resources.idempotency import IdempotencyKeys
from velikiy.settings import Settings, load

T = TypeVar("T")


class Uncached(Gate):
    def read(self, path: CachePath, variant: str, load: Callable[[Connection], Entry], *_: Any, **__: Any) -> Answer:
        with self.database.autocommit() as connection:
            return Answer(load(connection), False, "none")

    def write(self, change: Callable[[Connection], Change[T]], timeout_factor: float = 1, *_: Any, **__: Any) -> T:
        with self.database.transaction(timeout_factor) as connection:
            return change(connection).outcome


def create_app() -> Flask:
    settings = load(Settings)
    logs.configure(settings.log_level)
    database = Database(settings.database_url, size=settings.app_threads, timeout=settings.database_timeout)
    gate = connect(database, settings)
    uncached = Uncached(gate.database, gate.caches, gate.redis_tier, gate.edge_tier)
    app = Flask(__name__, static_folder=None)
    auth, idempotency_keys = Auth(settings.auth_mode, uncached), IdempotencyKeys(settings.quota_of_idempotency_keys)
    http.install(app, registry(), uncached, Browsers.of(settings), auth, idempotency_keys)
    database.open()
    return app
