"""The health of this process: /livez, /readyz and /health."""

import orjson
from flask import Flask, Response, request

from velikiy import leaving
from velikiy.coherence import RedisTier
from velikiy.postgres import Database, DatabaseUnavailable, forgets

OK, NO_ANSWER, UNREADABLE = "ok", "does not answer", "the tables are missing or may not be read"

# The catalog answers at once. A query of the table would wait while another session has locked it.
READABLE = "SELECT coalesce(has_table_privilege(to_regclass('users'), 'SELECT'), false)"


def install(app: Flask, database: Database, redis_tier: RedisTier) -> None:
    @app.get("/livez")
    def livez() -> Response:
        """Report that this process runs. It checks nothing else: a restart would not bring PostgreSQL back.

        An edge also wants to know whether it may send further requests to this instance. It adds a header that a client
        cannot send (edge/lua/balancer.lua).
        """
        if leaving.has_begun() and "Edge-Check" in request.headers:
            return _json({"status": "leaving"}, 503)
        return _json({"status": "alive"})

    @app.get("/readyz")
    def readyz() -> Response:
        """Report whether this process can serve requests. It needs PostgreSQL; without Redis it is only slower."""
        (postgres, warnings), obstacle = _check(database), redis_tier.obstacle()
        ready = postgres == OK
        checks = {"postgres": postgres, "redis": obstacle or OK}
        members: dict[str, object] = {"status": "ready" if ready else "not ready", "checks": checks}
        if ready and obstacle:
            warnings.append(f"Redis {obstacle}: reads that miss at the edge go to PostgreSQL.")
        # The edge that passes this request on adds the state of its cache lease. A client cannot (edge/conf/site.conf).
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
        healthy = _check(database)[0] == OK
        return _json({"status": "healthy" if healthy else "unhealthy"}, 200 if healthy else 503)


def _check(database: Database) -> tuple[str, list[str]]:
    """Return the state of PostgreSQL, and warnings. Before the first migration there is nothing to serve."""
    try:
        with database.reserved() as connection:
            [(readable,)] = connection.execute(READABLE).fetchall()
            warnings = [
                f"PostgreSQL runs with {setting}: a crash may lose acknowledged writes, or all data."
                for setting in forgets(connection)
            ]
            return OK if readable else UNREADABLE, warnings
    except DatabaseUnavailable:
        return NO_ANSWER, []


def _json(members: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(members), status, content_type="application/json")
