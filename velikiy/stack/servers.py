"""Check PostgreSQL and Redis servers that the user has set, before anything is changed.

The sentences name the setting, the cause and the next step. A Redis that does not answer is no reason to refuse: the
service works without it. A Redis that answers and cannot be used is a mistake in the settings.
"""

import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict

from velikiy.coherence.redis_connections import CANNOT_SAVE, DROP, LOADING, NO_MEMORY, refusal
from velikiy.coherence.redis_servers import NotReady, RedisServers
from velikiy.coherence.redis_tier import RedisTier
from velikiy.coherence.shards import SLOTS, Server, ShardMap
from velikiy.findings.postgres import next_step
from velikiy.postgres import CONNECT_OPTIONS, lacking_settings
from velikiy.postgres.rights import missing_rights
from velikiy.settings import ServiceSettings
from velikiy.stack import Refusal
from velikiy.stack.messages import report
from velikiy.stack.plan import Plan

OLDEST_POSTGRES = 15
OLDEST_REDIS = 7

REDIS_TIMEOUT_S = 2

PROBE_KEY = "user:0"
"""A key of the form that the service uses, for a row that does not exist: the user of Redis may be limited to keys."""

SAME_DATABASE = "SELECT oid, pg_postmaster_start_time() FROM pg_database WHERE datname = current_database()"
"""Equal for two connections only if both lead to the same database of the same server."""

CONNECTION_LIMITS = """
SELECT name, value FROM (
    SELECT 'max_connections of the server', current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int
    UNION ALL SELECT 'CONNECTION LIMIT of the role', rolconnlimit FROM pg_roles WHERE rolname = current_user
    UNION ALL
    SELECT 'CONNECTION LIMIT of the database', datconnlimit FROM pg_database WHERE datname = current_database()
) limits (name, value)
WHERE value >= 0 ORDER BY value LIMIT 1
"""


def check_postgres(url: str, migration_url: str | None) -> None:
    """
    Args:
        url: DATABASE_URL.
        migration_url: MIGRATION_DATABASE_URL, whose role grants the other role what it lacks.

    Raises:
        Refusal: The service cannot use this PostgreSQL.
    """
    version, database, missing = _inspect("DATABASE_URL", url)
    if version < OLDEST_POSTGRES:
        raise Refusal(f"DATABASE_URL names PostgreSQL {version}. Use PostgreSQL {OLDEST_POSTGRES} or newer.")
    if migration_url:
        if _inspect("MIGRATION_DATABASE_URL", migration_url)[1] != database:
            raise Refusal("MIGRATION_DATABASE_URL names another database than DATABASE_URL. Only the role may differ.")
    elif missing:
        raise Refusal(
            f"The user of DATABASE_URL lacks rights on tables: {', '.join(missing)}. Make the user their owner (ALTER "
            "TABLE ... OWNER TO ...), or set MIGRATION_DATABASE_URL to the address with their owner, which grants them."
        )


def _inspect(name: str, url: str) -> tuple[int, object, list[str]]:
    """Return the major version of the server, what identifies the database, and the rights that the user lacks.

    Raises:
        Refusal: No connection can be made.
    """
    from velikiy.resources.base import registry  # an import at the top would delay each command

    try:
        # The apps send options, too, which a pooler refuses.
        options = f"{conninfo_to_dict(url).get('options') or ''} -c timezone=UTC"
        with psycopg.connect(url, **CONNECT_OPTIONS, application_name="velikiy up", options=options) as connection:
            version = connection.info.server_version // 10_000
            database = connection.execute(SAME_DATABASE).fetchone()
            return version, database, missing_rights(connection, list(registry()))
    except psycopg.Error as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"{name} cannot be used: {message}. {next_step(message)}.") from None


def check_pooler(url: str) -> None:
    """
    Raises:
        Refusal: The sessions of this PgBouncer are not set up for the service.
    """
    try:
        with psycopg.connect(
            url, **CONNECT_OPTIONS, application_name="velikiy up", prepare_threshold=None
        ) as connection:
            lacking = lacking_settings(connection)
    except psycopg.Error as error:
        raise Refusal(f"DATABASE_URL cannot be used: {' '.join(str(error).split())}. Check PgBouncer.") from None
    if lacking:
        raise Refusal(
            f"The sessions of PgBouncer at DATABASE_URL lack {', '.join(lacking)}. Set them in its connect_query"
            " (docs/scaling-postgresql.md)."
        )


def check_redis(url: str) -> None:
    """
    Raises:
        Refusal: The service cannot use this Redis.
    """
    servers = RedisServers(url, REDIS_TIMEOUT_S)
    try:
        shards = servers.discover()
        for server in shards.servers:
            _check_redis_server(servers, server, shards)
        _warn_of_later_refusals(url)
    except NotReady as error:
        report(f"warning: the Redis of REDIS_URL {refusal(error)}. Until it has settled, the service works without it.")
    except (redis.exceptions.RedisError, OSError) as error:
        sentence = refusal(error)
        if sentence in PASSING:
            report(f"warning: the Redis of REDIS_URL {sentence}. Until that is mended, the service works without it.")
        elif sentence:
            raise Refusal(f"The Redis of REDIS_URL {sentence}. Correct the address or the server.") from None
        elif isinstance(error, redis.exceptions.ResponseError):
            raise Refusal(f"The Redis of REDIS_URL refuses to serve: {error}.") from None
        else:
            report(
                f"warning: the Redis of REDIS_URL does not answer ({type(error).__name__}). The service works without"
                " it, more slowly. Check the host, the port, and whether the server expects TLS (rediss://)."
            )


PASSING = (NO_MEMORY, CANNOT_SAVE, LOADING)
"""Reasons that a Redis of the user's own may have for a while: the service works without it meanwhile."""


def _warn_of_later_refusals(url: str) -> None:
    """Warn of what makes Redis useless, although writes work: reads that it refuses, and commands that are needed after
    an outage."""
    tier = RedisTier(url, lambda: None, ttl=60, timeout=REDIS_TIMEOUT_S)
    if lacking := tier.lacking_rights():
        rights = " ".join(f"+{command.lower()}" for command in lacking)
        report(
            f"warning: the user of REDIS_URL may not run {', '.join(lacking)}: Redis stays out of use after an outage."
            f" Grant it as an administrator of Redis: ACL SETUSER NAME {rights}"
        )
    elif reason := tier.trial(PROBE_KEY):
        report(f"warning: the Redis of REDIS_URL {reason}. Until that is mended, the service works without it.")


def _check_redis_server(servers: RedisServers, server: Server, shards: ShardMap) -> None:
    """
    Raises:
        Refusal
        redis.exceptions.RedisError
        OSError
    """
    connections = servers.connections_to(server, shards)
    keys = (PROBE_KEY, *(f"{PROBE_KEY}{number}" for number in range(10 * SLOTS)))
    key = next((key for key in keys if shards.shard_of(key).server == server), "")
    if key:  # the commands of a write; a primary without slots gets no keys
        connections.run(DROP, (key, "up", 1000), before=[("UNLINK", key)], at=server.id)
    try:
        version = int(connections.facts().members.get("redis_version", str(OLDEST_REDIS)).split(".")[0])
        [[flushdb]] = connections.exchange(("COMMAND", "INFO", "FLUSHDB"))
    except (redis.exceptions.RedisError, OSError, ValueError):  # its user may not ask for that
        return
    if version < OLDEST_REDIS:
        raise Refusal(f"REDIS_URL names Redis {version}. Use Redis {OLDEST_REDIS} or newer.")
    if flushdb is None:
        raise Refusal("The Redis of REDIS_URL lacks the command FLUSHDB, with which the service empties it.")


def warn_of_few_connections(plan: Plan, settings: ServiceSettings) -> None:
    """Warn if PostgreSQL has not enough connections for the apps."""
    needed = plan.apps * settings.app_workers * (2 * settings.app_threads + 2) + 8  # the relay, a command, migrations
    try:
        with psycopg.connect(plan.direct_url, **CONNECT_OPTIONS, application_name="velikiy up") as connection:
            row = connection.execute(CONNECTION_LIMITS).fetchone()
    except psycopg.Error:  # the apps log the reason
        return
    if row and row[1] < needed:
        report(
            f"warning: the apps may open {needed} connections to PostgreSQL, but {row[0]} allows {row[1]}: under load, "
            "requests would be answered 503. Raise the limit, or lower APPS, APP_WORKERS or APP_THREADS."
        )
