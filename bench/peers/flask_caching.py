"""Flask with Flask-Caching on Redis: views are cached, and a write deletes the view that it changes after COMMIT."""

import os

import orjson
from flask import Flask, abort, request
from flask_caching import Cache
from psycopg_pool import ConnectionPool

from bench.peers.user import POOL, SELECT, UPDATE, Changes

JSON = {"Content-Type": "application/json"}


def create_app() -> Flask:
    app = Flask(__name__)
    # `cached` and not `memoize`, which reads Redis twice per request.
    cache = Cache(app, config={"CACHE_TYPE": "RedisCache", "CACHE_REDIS_URL": os.environ["REDIS_URL"]})
    database = ConnectionPool(os.environ["DATABASE_URL"], open=True, **POOL)

    @app.get("/users/<int:user_id>")
    @cache.cached(timeout=int(os.environ.get("REDIS_TTL", "60")))
    def get_user(user_id: int) -> tuple[bytes, int, dict[str, str]]:
        with database.connection() as connection:
            row = connection.execute(SELECT, (user_id,)).fetchone()
        if row is None:
            abort(404)
        return orjson.dumps(row), 200, JSON

    @app.put("/users/<int:user_id>")
    def update_user(user_id: int) -> tuple[bytes, int, dict[str, str]]:
        changes = Changes.model_validate_json(request.get_data())
        with database.connection() as connection:
            row = connection.execute(UPDATE, (changes.name, changes.email, user_id)).fetchone()
        if row is None:
            abort(404)
        cache.delete(f"view//users/{user_id}")
        return b'{"message":"Updated"}', 200, JSON

    return app
