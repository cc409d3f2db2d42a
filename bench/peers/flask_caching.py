"""Flask with Flask-Caching on Redis: views are cached, a write deletes what it changes, after its COMMIT."""

import os

import orjson
from flask import Flask, abort, request
from flask_caching import Cache
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from bench.peers.user import SELECT, UPDATE, Changes

JSON = {"Content-Type": "application/json"}


def create_app() -> Flask:
    app = Flask(__name__)
    # `cached`, and no memoize: that one asks Redis twice for each read.
    cache = Cache(app, config={"CACHE_TYPE": "RedisCache", "CACHE_REDIS_URL": os.environ["REDIS_URL"]})
    database = ConnectionPool(
        os.environ["DATABASE_URL"],
        kwargs={"autocommit": True, "row_factory": dict_row},
        min_size=1,
        max_size=8,
        open=True,
    )

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
