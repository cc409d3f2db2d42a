"""Is it alive, is it ready, is it healthy: three questions with three answers."""

import orjson
from flask import Flask, Response, request

from velikiy.coherence import RedisTier
from velikiy.postgres import Database, DatabaseUnavailable, forgets

OK, SILENT, UNREADABLE = "ok", "does not answer", "the tables are missing or may not be read"

# Asked of the catalog: to ask the table would wait for whoever has locked it.
READABLE = "SELECT coalesce(has_table_privilege(to_regclass('users'), 'SELECT'), false)"


def install(app: Flask, database: Database, redis_tier: RedisTier) -> None:
    @app.get("/livez")
    def livez() -> Response:
        """This process answers. It touches nothing: a restart would not bring PostgreSQL back."""
        return _json({"status": "alive"})

    @app.get("/readyz")
    def readyz() -> Response:
        """May traffic be sent here? Not without PostgreSQL; without Redis it is only slower."""
        (postgres, warnings), redis = _look_at(database), redis_tier.answers()
        ready = postgres == OK
        checks = {"postgres": postgres, "redis": OK if redis else SILENT}
        members: dict[str, object] = {"status": "ready" if ready else "not ready", "checks": checks}
        if ready and not redis:
            warnings.append("Redis does not answer: reads that miss at the edge go to PostgreSQL.")
        # The edge that passes the question on says whether it has a lease (edge/nginx.conf); a client cannot.
        if lease := request.headers.get("Edge-Lease"):
            checks["edge"] = OK if lease == "held" else "no lease"
            if lease != "held":
                warnings.append(
                    "This edge has no cache lease, so it does not use its cache: every read goes to an app."
                )
        if warnings:
            members["warnings"] = warnings
        return _json(members, 200 if ready else 503)

    @app.get("/health")
    def health() -> Response:
        healthy = _look_at(database)[0] == OK
        return _json({"status": "healthy" if healthy else "unhealthy"}, 200 if healthy else 503)


def _look_at(database: Database) -> tuple[str, list[str]]:
    """Return what is wrong with PostgreSQL, and warnings. Before the first migration there is nothing to serve."""
    try:
        with database.reserved() as connection:
            [(readable,)] = connection.execute(READABLE).fetchall()
            warnings = [
                f"PostgreSQL runs with {setting}: a crash may lose acknowledged writes, or all data."
                for setting in forgets(connection)
            ]
            return OK if readable else UNREADABLE, warnings
    except DatabaseUnavailable:
        return SILENT, []


def _json(members: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(members), status, content_type="application/json")
