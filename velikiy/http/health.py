"""The health of this process: /livez, /readyz and /health."""

from flask import Flask, Response, request

from velikiy import leaving
from velikiy.coherence import RedisTier
from velikiy.coherence.redis_tier import NO_ANSWER, DoesNotAnswer
from velikiy.findings import Finding, merged
from velikiy.findings.caches import UNKNOWN_TABLE, edge, redis, table
from velikiy.findings.postgres import Diagnosis, is_readable, look, sessions_end, unreadable
from velikiy.http import responses
from velikiy.postgres import Database, DatabaseUnavailable
from velikiy.postgres.database import ENDED_WITHIN_S
from velikiy.resources.base import Resource

OK, NOT_USED, UNREADABLE = "ok", "not used", "the tables are missing or may not be read"

DIAGNOSIS_S = 0.3
"""Seconds that a health check waits for the reason why PostgreSQL is away. The next one has it."""


def install(app: Flask, resources: dict[str, Resource], database: Database, redis_tier: RedisTier) -> None:
    tables = list(resources)
    app.extensions["velikiy.database"] = database  # for velikiy/server/watch.py

    @app.get("/livez")
    def livez() -> Response:
        """Report that this process runs. It checks nothing else: a restart would not bring PostgreSQL back.

        An edge also wants to know whether it may send further requests to this instance: 503 if the instance is about
        to stop, 424 if PostgreSQL does not answer it. The edge adds a header that a client cannot send
        (edge/lua/balancer.lua).
        """
        if "Edge-Check" in request.headers:
            if leaving.has_begun():
                return responses.json({"status": "leaving"}, 503)
            if database.is_silent:
                return responses.json({"status": "without PostgreSQL"}, 424)
        return responses.json({"status": "alive"})

    diagnosis = Diagnosis(database.dsn)

    @app.get("/readyz")
    def readyz() -> Response:
        """Report whether this process can serve requests, and every finding. It needs PostgreSQL; without its caches
        it is only slower: degraded."""
        checks, findings = _look(database, redis_tier, tables, diagnosis)
        ready = checks["postgres"] == OK
        # The edge that passes this request on adds the state of its cache lease. A client cannot (edge/conf/site.conf).
        if state := request.headers.get("Edge-Lease"):
            checks["edge"], of_the_edge = edge(state)
            ready = ready and checks["edge"] != "leaving"
            findings += of_the_edge
        findings = merged(findings)
        degraded = any(it.wrong for it in findings)
        members: dict[str, object] = {
            "status": "degraded" if ready and degraded else "ready" if ready else "not ready",
            "checks": checks,
        }
        if findings:
            members["warnings"] = [it.sentence for it in findings]
            members["findings"] = [it.as_json() for it in findings]
        return responses.json(members, 200 if ready else 503)

    @app.get("/health")
    def health() -> Response:
        healthy = _is_readable(database)
        return responses.json({"status": "healthy" if healthy else "unhealthy"}, 200 if healthy else 503)


def _is_readable(database: Database) -> bool:
    """Before the first migration there is nothing to serve."""
    try:
        with database.reserved() as connection:
            return is_readable(connection)
    except DatabaseUnavailable:
        return False


def _look(
    database: Database, redis_tier: RedisTier, tables: list[str], diagnosis: Diagnosis
) -> tuple[dict[str, str], list[Finding]]:
    """Return the state of PostgreSQL and of Redis, and the findings. Other edges are left out: an edge that is gone is
    no reason to doubt this process. `./run status` names them."""
    ended = sessions_end(database.young_ends(), ENDED_WITHIN_S)
    try:
        with database.reserved() as connection:
            if not is_readable(connection):
                return {"postgres": UNREADABLE, "redis": _without_postgres(redis_tier)}, [unreadable()]
            findings = [*ended, *look(connection, tables)]
        # With a deadline of its own: a session may have locked the table, which says nothing about PostgreSQL.
        with database.reserved() as connection:
            try:
                known = table(connection)
            except UNKNOWN_TABLE:
                known = None
    except DatabaseUnavailable:
        away = diagnosis.finding(within=DIAGNOSIS_S)
        return {"postgres": NO_ANSWER, "redis": _without_postgres(redis_tier)}, [away, *ended]
    if known is None:
        return {"postgres": OK, "redis": _without_postgres(redis_tier)}, findings
    about_redis = redis(redis_tier, known)
    state = OK
    if any(it.wrong for it in about_redis):
        state = NO_ANSWER if _without_postgres(redis_tier) == NO_ANSWER else NOT_USED
    return {"postgres": OK, "redis": state}, [*findings, *about_redis]


def _without_postgres(redis_tier: RedisTier) -> str:
    try:
        redis_tier.identify()
    except DoesNotAnswer as error:
        return NO_ANSWER if str(error) == NO_ANSWER else NOT_USED
    return OK
