"""Is it alive, is it ready, is it healthy: three questions with three answers."""

import orjson
import psycopg
from flask import Flask, Response

from velikiy.coherence import RedisTier
from velikiy.postgres import Database, DatabaseUnavailable


def install(app: Flask, database: Database, redis_tier: RedisTier) -> None:
    @app.get("/livez")
    def livez() -> Response:
        """This process answers. It touches nothing: a restart would not bring PostgreSQL back."""
        return _json({"status": "alive"})

    @app.get("/readyz")
    def readyz() -> Response:
        """May traffic be sent here? Not without PostgreSQL; without Redis it is only slower."""
        postgres, redis = _answers(database), redis_tier.answers()
        checks = {"postgres": "ok" if postgres else "does not answer", "redis": "ok" if redis else "does not answer"}
        members: dict[str, object] = {"status": "ready" if postgres else "not ready", "checks": checks}
        if postgres and not redis:
            members["warnings"] = ["Redis does not answer: reads that miss at the edge go to PostgreSQL."]
        return _json(members, 200 if postgres else 503)

    @app.get("/health")
    def health() -> Response:
        healthy = _answers(database)
        return _json({"status": "healthy" if healthy else "unhealthy"}, 200 if healthy else 503)


def _answers(database: Database) -> bool:
    """Whether the table can be read, too: before the first migration there is nothing to serve."""
    try:
        with database.autocommit() as connection:
            connection.execute("SELECT FROM users LIMIT 0")
    except (DatabaseUnavailable, psycopg.Error):
        return False
    return True


def _json(members: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(members), status, content_type="application/json")
