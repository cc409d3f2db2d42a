"""The health of this process: /livez, /readyz and /health."""

from collections.abc import Callable

import orjson
import psycopg
from flask import Flask, Response, request

from velikiy import leaving
from velikiy.coherence import Caches, RedisTier
from velikiy.coherence.redis_tier import NO_ANSWER, DoesNotAnswer
from velikiy.coherence.tables import trigger_advice, watched_tables
from velikiy.postgres import Connection, Database, DatabaseUnavailable, forgets
from velikiy.postgres.rights import missing_rights
from velikiy.resources.base import Resource

OK, NOT_USED, UNREADABLE = "ok", "not used", "the tables are missing or may not be read"

# The catalog answers at once. A query of the table would wait while another session has locked it.
READABLE = "SELECT coalesce(has_table_privilege(to_regclass('users'), 'SELECT'), false)"


# A role sees the sessions of its own name, so the relay's only if it connects as the same user.
HAZARDS = """
SELECT
    NOT EXISTS (
        SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'velikiy relay'
    ),
    ARRAY(SELECT name FROM unnest(%s::text[]) name JOIN pg_class ON oid = to_regclass(name) WHERE relpersistence = 'u'),
    CASE WHEN current_setting('synchronous_standby_names') = '' THEN (SELECT count(*) FROM pg_stat_replication) END,
    (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit')
"""


def install(
    app: Flask, resources: dict[str, Resource], database: Database, caches: Caches, redis_tier: RedisTier
) -> None:
    tables = list(resources)

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
        postgres, warnings = _check(database, lambda connection: _hazards(connection, tables))
        ready = postgres == OK
        redis, hazards = _redis(caches, redis_tier)
        warnings += hazards if ready else []
        checks = {"postgres": postgres, "redis": redis}
        members: dict[str, object] = {"status": "ready" if ready else "not ready", "checks": checks}
        # The edge that passes this request on adds the state of its cache lease. A client cannot (edge/conf/site.conf).
        if lease := request.headers.get("Edge-Lease"):
            held, *others = lease.split("; ")
            state = dict(other.split("=", 1) for other in others)
            checks["edge"] = {"held": OK, "leaving": "leaving"}.get(held, "no lease")
            if held == "leaving":
                members["status"], ready = "not ready", False
                warnings.append("This edge is about to stop. Send requests to another edge.")
            elif held != "held":
                warnings.append(
                    "This edge has no cache lease, so it does not use its cache: every read goes to an app."
                )
            if "redis" in state:
                warnings.append(
                    "This edge reaches another Redis than the apps, so it uses none. Give it the same REDIS_URL."
                )
            if days := state.get("certificate"):
                warnings.append(_expiry(int(days)))
        if warnings:
            members["warnings"] = warnings
        return _json(members, 200 if ready else 503)

    @app.get("/health")
    def health() -> Response:
        healthy = _check(database)[0] == OK
        return _json({"status": "healthy" if healthy else "unhealthy"}, 200 if healthy else 503)


def _expiry(days: int) -> str:
    state = f"expires in {days} days" if days > 1 else "expires within two days" if days >= 0 else "has expired"
    return f"The certificate of this edge {state}. Replace the files of TLS_CERT and TLS_KEY: no restart is needed."


def _check(
    database: Database, hazards: Callable[[Connection], list[str]] = lambda connection: []
) -> tuple[str, list[str]]:
    """Return the state of PostgreSQL, and the hazards if it is ready. Before the first migration there is nothing to
    serve."""
    try:
        with database.reserved() as connection:
            [(readable,)] = connection.execute(READABLE).fetchall()
            return (OK, hazards(connection)) if readable else (UNREADABLE, [])
    except DatabaseUnavailable:
        return NO_ANSWER, []


def _hazards(connection: Connection, tables: list[str]) -> list[str]:
    """Return a warning of each state of PostgreSQL in which a write may be lost or not be seen."""
    [(no_relay, unlogged, asynchronous, commits)] = connection.execute(HAZARDS, (tables,)).fetchall()
    warnings = [
        f"PostgreSQL runs with {setting}: a crash may lose acknowledged writes, or all data."
        for setting in forgets(connection)
    ]
    if asynchronous:
        warnings.append(
            f"{asynchronous} standbys or other receivers follow PostgreSQL, none of them synchronously: the promotion"
            " of a standby would lose acknowledged writes that reads have shown. Use synchronous replication"
            " (docs/scaling-postgresql.md)."
        )
    if commits in ("off", "local") or (commits == "remote_write" and asynchronous is None):
        warnings.append(
            f"PostgreSQL has synchronous_commit={commits} for programs that do not set it, as this service does: a"
            " crash or a failover may lose what they have written. Set it to on."
        )
    warnings += [f"The table {table} is UNLOGGED: a crash of PostgreSQL empties it." for table in unlogged]
    warnings += [
        f"{trigger_advice(table)}." for it in watched_tables(connection, tables) for table in it.without_triggers
    ]
    if missing := missing_rights(connection, tables):
        warnings.append(
            f"The role {connection.info.user} lacks rights on tables: {', '.join(missing)}. Run velikiy migrate as the"
            " owner of the tables (MIGRATION_DATABASE_URL), which grants them."
        )
    if no_relay:
        warnings.append(
            "No relay listens to this database: changes by SQL from outside are not seen until the TTL ends, and Redis"
            " does not come back into use after an outage. Start ./run velikiy relay."
        )
    return warnings


def _redis(caches: Caches, redis_tier: RedisTier) -> tuple[str, list[str]]:
    """Return the state of Redis, and warnings."""
    try:
        ours = redis_tier.identify()
    except DoesNotAnswer as error:
        state = NO_ANSWER if str(error) == NO_ANSWER else NOT_USED
        return state, [f"Redis {error}: reads that miss at the edge go to PostgreSQL."]
    try:
        with caches.database.reserved() as connection:
            redis, announced = caches.redis(connection), caches.announced(connection)
    except (DatabaseUnavailable, psycopg.Error):  # the second: the table is missing
        return OK, []
    rivals = [it.address for it in announced if not it.overlaps(ours)]
    if rivals:
        return NOT_USED, [
            f"Processes on this database reach different servers as Redis ({', '.join([ours.address, *rivals])}), so"
            " none of them uses Redis. Give all the same REDIS_URL."
        ]
    if redis.fenced:
        return NOT_USED, [
            "Redis is out of use, because a write could not invalidate it. The relay empties it and puts it back into"
            " use within seconds; if that lasts longer, the relay's log says why."
        ]
    if redis.shards and redis.shards.overlaps(ours) and redis.shards.id != ours.id:
        return NOT_USED, [
            "The servers of the Redis cluster have changed. The relay empties them and puts Redis back into use once"
            " the cluster has settled, within seconds."
        ]
    if redis.shards and redis.shards.id != ours.id:
        return NOT_USED, [
            f"This process reaches another Redis ({ours.address}) than the one that is registered"
            f" ({redis.shards.address}), and does not use it. If Redis was restarted, that ends within seconds."
            " Otherwise give all processes on this database the same REDIS_URL."
        ]
    return OK, []


def _json(members: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(members), status, content_type="application/json")
