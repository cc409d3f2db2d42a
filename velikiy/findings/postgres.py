"""Findings about PostgreSQL: whether it serves, states in which writes may be lost, and sessions that block others."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from velikiy.coherence import CachePath
from velikiy.coherence.locks import EVERYTHING, OTHERS, PATHS, lock_id
from velikiy.coherence.tables import watched_tables
from velikiy.findings import Finding
from velikiy.findings.machine import clock_differs
from velikiy.postgres import CONNECT_OPTIONS, MIGRATION_LOCK, Connection, forgets
from velikiy.postgres.rights import SERVICE_TABLES, missing_rights

# The catalog answers at once. A query of the table would wait while another session has locked it.
READABLE = "SELECT coalesce(has_table_privilege(to_regclass('users'), 'SELECT'), false)"

RELAY_SILENT_S = 2.5
"""A relay sends a statement twice a second."""

# A role sees the sessions of its own name in full, so the state of the relay only if it connects as the same user.
RELAYS = """
SELECT count(*), extract(epoch FROM clock_timestamp() - max(state_change)) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'velikiy relay'
"""

HAZARDS = """
SELECT
    ARRAY(SELECT name FROM unnest(%s::text[]) name JOIN pg_class ON oid = to_regclass(name) WHERE relpersistence = 'u'),
    CASE WHEN current_setting('synchronous_standby_names') = '' THEN (SELECT count(*) FROM pg_stat_replication) END,
    (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'),
    extract(epoch FROM clock_timestamp()),
    current_setting('transaction_read_only') = 'on',
    ARRAY(SELECT name FROM unnest(%s::text[]) name WHERE to_regclass(name) IS NULL)
"""

OLD_LOCK_S = 15.0
"""No write of this service takes longer, so a lock that a session of it holds for longer belongs to a process that
hangs."""

OWN = "velikiy %"
"""The application names of this service's sessions."""

DISTURBING_LOCKS = """
SELECT
    session.pid, usename, application_name, client_addr::text, extract(epoch FROM coalesce(xact_start, state_change)),
    array_agg(concat(classid, ' ', objid) ORDER BY classid, objid), application_name LIKE %(own)s
FROM pg_locks JOIN pg_stat_activity session USING (pid)
WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid()
    AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (
        (objsubid = 2 AND classid IN (%(paths)s, %(others)s))
        OR (objsubid = 1 AND (classid::bigint << 32) | objid::bigint = %(migration)s)
    )
    AND (
        application_name NOT LIKE %(own)s
        OR xact_start NOT BETWEEN clock_timestamp() - make_interval(secs => %(old)s) AND clock_timestamp()
    )
GROUP BY 1, 2, 3, 4, 5, 7
ORDER BY 1
"""
"""The sessions with advisory locks whose first number is that of this service. Other locks belong to other programs,
and disturb no read. A time in the future is old as well: the clock was set back since."""

LOCK_HOARDERS = """
SELECT pid, {user}, application_name, client_addr::text, extract(epoch FROM coalesce(xact_start, state_change)), count
FROM (SELECT pid, count(*) FROM pg_lock_status() WHERE NOT fastpath GROUP BY pid) held
JOIN pg_stat_get_activity(NULL) session USING (pid)
WHERE count > current_setting('max_locks_per_transaction')::int * current_setting('max_connections')::int / 4
ORDER BY pid
"""
"""The sessions that fill a quarter of the table of locks, which all sessions share. Once it is full, no write gets a
lock (out_of_memory). The statement itself needs none, as long as it does not look up the names of roles."""

BLOCKERS = """
SELECT
    session.pid, usename, application_name, client_addr::text, extract(epoch FROM coalesce(xact_start, state_change)),
    string_agg(DISTINCT what, ', ')
FROM (
    SELECT unnest(pg_blocking_pids(pid)) AS pid, 'lets other sessions wait' AS what
    FROM pg_locks
    WHERE NOT granted AND waitstart NOT BETWEEN clock_timestamp() - interval '0.3 s' AND clock_timestamp()
    UNION ALL
    SELECT pid, 'has locked the table ' || relation::regclass
    FROM pg_locks
    WHERE granted AND relation = ANY (ARRAY(SELECT to_regclass(name)::oid FROM unnest(%(tables)s::text[]) name))
        AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
) blockers
JOIN pg_stat_activity session USING (pid)
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (xact_start IS NULL OR xact_start NOT BETWEEN clock_timestamp() - interval '1 s' AND clock_timestamp())
GROUP BY 1, 2, 3, 4, 5
ORDER BY 1
"""

WAITING_COMMITS = """
SELECT count(*), extract(epoch FROM min(query_start)), bool_or(wait_event = 'SyncRep')
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event IN ('SyncRep', 'WALSync', 'WALWrite', 'WALInitSync')
    AND query_start NOT BETWEEN clock_timestamp() - make_interval(secs => %s) AND clock_timestamp()
    AND (wait_event = 'SyncRep' OR query ILIKE 'commit%%')
"""
"""A long statement of a migration or an import also writes to the log now and then. A session that waits behind another
session's flush of the log waits for WALWrite. A role sees the waits of its own sessions only."""

SLOW_COMMIT_S = 0.3

MAX_YOUNG_ENDS = 2
"""A restart ends sessions that have begun long before. Young ones do not end so often by chance."""

SLOW_LOOK_S = 0.5
"""A look at PostgreSQL takes some ten short statements, and a thirtieth of this time. While forty processes
wanted each CPU, it was seen to take 0.6 s."""

NEXT_STEPS = {
    "password authentication failed": "Correct the user and the password",
    "no password supplied": "Add the password to the address: postgresql://user:password@host:5432/database",
    "does not exist": "Create it, or correct the name",
    "no pg_hba.conf entry": "Allow this user, database and machine in pg_hba.conf, or use TLS",
    "read-only": "Let it name the primary server: this one is a standby or accepts no writes",
    "too many": "Close connections, or raise max_connections or the CONNECTION LIMIT of the role",
    "connection slots": "Close connections, or raise max_connections",
    "permission denied for database": "GRANT CONNECT on the database to the user",
    "not permitted to log in": "ALTER ROLE ... LOGIN",
    "out of shared memory": "End the session that holds most locks: SELECT pid, count(*) FROM pg_locks GROUP BY 1",
    "starting up": "Wait until the server has started",
    "SSL": "Correct sslmode, and check the certificates",
    "could not translate host name": "Correct the name of the host",
    "Connection refused": "Check the host, the port and that the server runs",
    "No such file or directory": "Check the host, the port and that the server runs",  # at a Unix socket
    "timeout expired": "Check the host, the port and firewalls",
    "startup parameter": "It leads to PgBouncer: set DATABASE_DIRECT_URL, too (docs/scaling-postgresql.md)",
}
"""The next step of the operator, by a part of the message of PostgreSQL or its client."""

UNREACHED = ("Connection refused", "No such file or directory", "timeout expired")
"""The messages of a client that has reached no server."""

DEFAULT_STEP = "Check the address and that the server runs"


def next_step(message: str) -> str:
    return next((step for part, step in NEXT_STEPS.items() if part.lower() in message.lower()), DEFAULT_STEP)


def is_readable(connection: psycopg.Connection) -> bool:
    """Return whether the tables exist and this role may read them."""
    [(readable,)] = connection.execute(READABLE).fetchall()
    return bool(readable)


def unreadable() -> Finding:
    return Finding(
        "postgres.not_migrated",
        "The tables are missing in PostgreSQL, or the role of DATABASE_URL may not read them.",
        "Run ./run velikiy migrate, and check that DATABASE_URL names the right database.",
    )


def silent(since: float | None = None) -> Finding:
    return Finding(
        "postgres.silent",
        "PostgreSQL does not answer: requests that the caches cannot answer get 503.",
        "Run ./run logs postgres, and check that its server and the network work.",
        since=since,
    )


def why_away(dsn: str) -> Finding:
    """Return why PostgreSQL does not serve. Takes 2 s for each host of the address at most."""
    message = ""
    try:
        with Connection.connect(
            dsn, **{**CONNECT_OPTIONS, "target_session_attrs": "any"}, application_name="velikiy doctor"
        ) as connection:
            [(standby, read_only)] = connection.execute(
                "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on'"
            ).fetchall()
        if standby or read_only:
            return Finding(
                "postgres.standby",
                "DATABASE_URL leads to a standby, which accepts no writes."
                if standby
                else "DATABASE_URL leads to a PostgreSQL that accepts no writes (default_transaction_read_only).",
                "Let DATABASE_URL name the primary, or all hosts (docs/scaling-postgresql.md).",
            )
    except psycopg.Error as error:
        message = " ".join(str(error).split())
    _, refused, reason = message.rpartition("FATAL:")
    known = next((part for part in NEXT_STEPS if part.lower() in message.lower()), "")
    if refused or (known and known not in UNREACHED):
        text = (reason or message).strip().rstrip(".")
        return Finding(
            "postgres.refuses", f"PostgreSQL refuses the connection: {text}.", f"{next_step(message)} (DATABASE_URL)."
        )
    return silent()


class Diagnosis:
    """Finds out in the background why PostgreSQL is away. Health checks have one thread, which must not wait for it."""

    KEPT_S = 3.0

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._running = threading.Lock()
        self._found, self._found_at = silent(), -self.KEPT_S
        self._ended = threading.Event()

    def finding(self, *, within: float) -> Finding:
        if time.monotonic() - self._found_at > self.KEPT_S and self._running.acquire(blocking=False):
            self._found = silent()
            self._ended.clear()
            threading.Thread(target=self._find, name="diagnosis", daemon=True).start()
        self._ended.wait(within)
        return self._found

    def _find(self) -> None:
        try:
            with suppress(Exception):  # "does not answer" stays true
                self._found = why_away(self.dsn)
            self._found_at = time.monotonic()
        finally:
            self._running.release()
            self._ended.set()


def slow(seconds: float) -> list[Finding]:
    """Return whether PostgreSQL answers slowly. `seconds`: the time that a look at it has taken."""
    if seconds < SLOW_LOOK_S:
        return []
    return [
        Finding(
            "postgres.slow",
            f"PostgreSQL answers slowly: some short statements took {seconds * 1000:.0f} ms. Requests that the caches"
            " cannot answer are slow, and may get 503.",
            "Look at the CPU time, memory and disk of its machine, and at its sessions: ./run psql -c 'SELECT pid,"
            " state, wait_event, query FROM pg_stat_activity'",
            wrong=False,
        )
    ]


def sessions_end(count: int, seconds: float) -> list[Finding]:
    """Return whether PostgreSQL ends sessions of this process soon after they have begun. `count`: how often it has
    done so in the last `seconds`."""
    if count < MAX_YOUNG_ENDS:
        return []
    return [
        Finding(
            "postgres.sessions_end",
            f"Sessions of this service with PostgreSQL end soon after they have begun, again and again in {seconds:.0f}"
            " s. An administrator or a program ends them, or PostgreSQL crashes again and again.",
            "Run ./run logs postgres, which says why, and look for programs that call pg_terminate_backend.",
        )
    ]


def look(connection: Connection, tables: Sequence[str]) -> list[Finding]:
    """Return all findings about PostgreSQL and its sessions."""
    began = time.monotonic()
    try:
        found = [*hazards(connection, tables), *sessions(connection, tables)]
    except psycopg.errors.OutOfMemory:  # there is no room for a lock, and catalogs that databases share need one
        return hoarders(connection, "NULL")
    return found + slow(time.monotonic() - began)


def hazards(connection: Connection, tables: Sequence[str]) -> list[Finding]:
    """Return the states of PostgreSQL in which a write may be lost, not be seen, or wait."""
    before = time.time()
    [(unlogged, asynchronous, commits, their_time, read_only, absent)] = connection.execute(
        HAZARDS, ([*tables], [*tables, *SERVICE_TABLES])
    ).fetchall()
    found = [
        Finding(
            "postgres.forgets",
            f"PostgreSQL runs with {setting}: a crash may lose acknowledged writes, or all data.",
            "Switch it on in postgresql.conf, and restart PostgreSQL.",
            wrong=False,
        )
        for setting in forgets(connection)
    ]
    if read_only:
        found.append(
            Finding(
                "postgres.read_only",
                "PostgreSQL accepts no writes (default_transaction_read_only), so writes get 503 and edges lose their"
                " cache leases.",
                "Run as a superuser in psql: ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf();"
                " or reset it for the role and the database.",
            )
        )
    if absent:
        found.append(
            Finding(
                "postgres.tables",
                f"Tables of the service are missing: {', '.join(absent)}. A restore may have left them out. Requests"
                " that need them fail.",
                "Run ./run velikiy migrate, which creates `caches` again. Restore others from a backup"
                " (docs/backup.md).",
            )
        )
    if asynchronous:
        found.append(
            Finding(
                "postgres.asynchronous",
                f"{asynchronous} standbys or other receivers follow PostgreSQL, none of them synchronously: the"
                " promotion of a standby would lose acknowledged writes that reads have shown.",
                "Use synchronous replication (docs/scaling-postgresql.md).",
                wrong=False,
            )
        )
    if commits in ("off", "local") or (commits == "remote_write" and asynchronous is None):
        found.append(
            Finding(
                "postgres.synchronous_commit",
                f"PostgreSQL has synchronous_commit={commits} for programs that do not set it, as this service does: a"
                " crash or a failover may lose what they have written.",
                "Set it to on.",
                wrong=False,
            )
        )
    found += [
        Finding(
            "postgres.unlogged",
            f"The table {table} is UNLOGGED: a crash of PostgreSQL empties it.",
            f'Run ./run psql -c "ALTER TABLE {table} SET LOGGED"',
            wrong=False,
        )
        for table in unlogged
    ]
    found += [without_triggers(table) for it in watched_tables(connection, tables) for table in it.without_triggers]
    if missing := missing_rights(connection, tables):
        found.append(
            Finding(
                "postgres.rights",
                f"The role {connection.info.user} lacks rights on tables: {', '.join(missing)}.",
                "Run ./run velikiy migrate as the owner of the tables (MIGRATION_DATABASE_URL), which grants them.",
            )
        )
    found += relay(connection)
    found += connections(connection)
    found += clock_differs("PostgreSQL", "this machine", float(their_time) - before, delay=time.time() - before)
    return found


def relay(connection: Connection) -> list[Finding]:
    """Return whether no relay listens, or none answers."""
    [(count, silence)] = connection.execute(RELAYS).fetchall()
    if not count:
        return [
            Finding(
                "relay.away",
                "No relay listens to this database: changes by SQL from outside are not seen until the TTL ends, and"
                " Redis does not come back into use after an outage.",
                "Run ./run logs relay, which says why it ended. Without a stack start ./run velikiy relay.",
            )
        ]
    if silence is not None and silence > RELAY_SILENT_S:
        return [relay_silent(time.time() - float(silence))]
    return []


def without_triggers(table: str) -> Finding:
    return Finding(
        "postgres.triggers",
        f"Triggers of {table} are missing or disabled, so SQL from outside is not seen at once or not in the"
        " history, and the relay empties both caches each second.",
        f"Run ./run psql -c \"CALL add_triggers('{table}')\"",
    )


def relay_silent(since: float, pid: int = 0) -> Finding:
    return Finding(
        "relay.silent",
        "The relay hangs: it has not answered for seconds, so changes by SQL from outside are not seen.",
        f"Kill it: kill -9 {pid or 'PID'} - supervisor starts it again. ./run status shows its process id.",
        since=since,
    )


def sessions(connection: Connection, tables: Sequence[str]) -> list[Finding]:
    """Return the sessions that keep others waiting, and the sessions that hold locks of this service."""
    held_for = {
        _numbers(MIGRATION_LOCK >> 32, MIGRATION_LOCK): "a migration: no other migration begins",
        _numbers(PATHS, lock_id(EVERYTHING)): "a write to every path: no read is cached",
        **{
            _numbers(PATHS, lock_id(CachePath(f"/{table}", ""))): f"a write to /{table}: reads of it are not cached"
            for table in tables
        },
    }
    found = []
    values = {"own": OWN, "old": OLD_LOCK_S, "paths": PATHS, "others": OTHERS, "migration": MIGRATION_LOCK}
    for pid, user, program, address, since, numbers, own in connection.execute(DISTURBING_LOCKS, values).fetchall():
        meanings = [held_for[it] for it in numbers if it in held_for]
        if any(it.startswith(f"{PATHS} ") and it not in held_for for it in numbers):
            meanings.append("a write to a path: reads of it are not cached, and its writes may get 503")
        count = "an advisory lock" if len(numbers) == 1 else f"{len(numbers)} advisory locks"
        found.append(
            Finding(
                "locks.stuck" if own else "locks.foreign",
                f"{_session(pid, user, program, address)} holds {count} of this service"
                + (f", for {'; for '.join(meanings)}." if meanings else "."),
                _terminate(pid),
                since=since and float(since),
            )
        )
    found += hoarders(connection, "pg_get_userbyid(usesysid)")
    for pid, user, program, address, since, what in connection.execute(BLOCKERS, {"tables": [*tables]}).fetchall():
        found.append(
            Finding(
                "locks.blocking",
                f"{_session(pid, user, program, address)} {what}: requests may be answered 503.",
                _terminate(pid),
                since=since and float(since),
            )
        )
    return found + waiting_commits(connection)


def hoarders(connection: Connection, user: str) -> list[Finding]:
    """Return the sessions that hold so many locks that PostgreSQL soon has no room for others. `user`: an expression
    for the name of their role."""
    return [
        Finding(
            "locks.many",
            f"{_session(pid, user, program, address)} holds {held} locks. Once PostgreSQL has no room for more,"
            " writes get 503 and reads are not cached.",
            f"{_terminate(pid)}. Or raise max_locks_per_transaction.",
            since=since and float(since),
        )
        for pid, user, program, address, since, held in connection.execute(LOCK_HOARDERS.format(user=user)).fetchall()
    ]


def waiting_commits(connection: Connection) -> list[Finding]:
    """Return whether sessions wait for the disk, or for a standby, to keep what they commit."""
    [(count, since, for_standby)] = connection.execute(WAITING_COMMITS, (SLOW_COMMIT_S,)).fetchall()
    if not count:
        return []
    what, advice = (
        ("a synchronous standby", "Start that standby, or correct synchronous_standby_names.")
        if for_standby
        else (
            "the disk of its log (WAL)",
            "Look at that disk: iostat -x 1, dmesg, and the load of other programs on it.",
        )
    )
    sessions = "A session waits" if count == 1 else f"{count} sessions wait"
    return [
        Finding(
            "postgres.commits_wait",
            f"{sessions} in PostgreSQL for {what}: writes get 503, and edges lose their cache leases.",
            advice,
            since=since and float(since),
        )
    ]


ARCHIVER = """
SELECT failed_count, extract(epoch FROM last_failed_time), extract(epoch FROM last_archived_time) FROM pg_stat_archiver
WHERE current_setting('archive_mode') <> 'off' AND last_failed_time > coalesce(last_archived_time, '-infinity')
"""


def archive(connection: Connection) -> list[Finding]:
    """Return whether PostgreSQL cannot archive its log."""
    return [
        Finding(
            "postgres.archive",
            f"PostgreSQL cannot archive its log (WAL): {failures} attempts have failed. A recovery would end at the"
            " last archived file, and the log fills the disk.",
            "Run ./run logs postgres, which has the message of archive_command. Check that the folder WAL_ARCHIVE"
            " exists, has room, and may be written by PostgreSQL.",
            wrong=False,
            since=float(archived or failed),
        )
        for failures, failed, archived in connection.execute(ARCHIVER).fetchall()
    ]


def count_relays(connection: Connection) -> int:
    """Return how many relays listen to this database."""
    [(count, _)] = connection.execute(RELAYS).fetchall()
    return int(count)


CONNECTIONS = """
SELECT used, allowed FROM (VALUES
    (
        (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
    ),
    (
        (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()),
        (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
    ),
    (
        (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user),
        (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user)
    )
) limits (used, allowed)
WHERE allowed IS NOT NULL ORDER BY used::float / allowed DESC LIMIT 1
"""
"""The limit of the server, of the database or of the role that is nearest."""


def connections(connection: Connection) -> list[Finding]:
    """Return whether nearly all connections are in use."""
    [(used, allowed)] = connection.execute(CONNECTIONS).fetchall()
    if used < 0.9 * allowed:
        return []
    return [
        Finding(
            "postgres.connections",
            f"{used} of {allowed} connections to PostgreSQL are in use. Without a free one, requests get 503.",
            "Raise max_connections (or the CONNECTION LIMIT of the role or the database), or lower APPS, APP_WORKERS or"
            " APP_THREADS.",
            wrong=False,
        )
    ]


def locale(connection: Connection) -> list[Finding]:
    """Return whether the database compares texts in another way than the API promises."""
    encoding = connection.info.parameter_status("server_encoding")
    [(folds,)] = connection.execute("SELECT lower('ГЛЕБ') = 'глеб'").fetchall()
    if encoding == "UTF8" and folds:
        return []
    return [
        Finding(
            "postgres.locale",
            f"The database has the encoding {encoding} and a locale that "
            + ("knows all letters." if folds else "knows only ASCII letters: 'ГЛЕБ' and 'глеб' are different names."),
            "Create it with ENCODING 'UTF8' LC_CTYPE 'C.UTF-8' TEMPLATE template0, and restore a backup into it.",
        )
    ]


def migration_missing(state: str, newest: str) -> Finding:
    return Finding(
        "postgres.revision",
        f"The database has the revision {state}, and this code needs {newest}.",
        "Run ./run up --detach, or ./run velikiy migrate as the owner of the tables.",
    )


def migration_unknown(sentence: str) -> Finding:
    return Finding("postgres.revision", f"{sentence[0].upper()}{sentence[1:]}.", "Start that version of the code.")


def pooler_lacks(settings: list[str]) -> Finding:
    return Finding(
        "postgres.pooler",
        f"The sessions of PgBouncer at DATABASE_URL lack {', '.join(settings)}.",
        "Set them in its connect_query (docs/scaling-postgresql.md).",
    )


def two_leaders(hosts: list[str]) -> Finding:
    return Finding(
        "postgres.two_leaders",
        f"Two servers of DATABASE_URL take writes: {', '.join(hosts)}. Without synchronous replication, each has writes"
        " that the other lacks.",
        "Stop all but the leader that your failover manager names (docs/scaling-postgresql.md).",
    )


def _numbers(first: int, second: int) -> str:
    """Return the two numbers of a lock as pg_locks shows them."""
    return f"{first} {second & 0xFFFFFFFF}"


def _session(pid: int, user: str | None, program: str, address: str | None) -> str:
    origin = f" from {address}" if address else ""
    role = f"role {user}, " if user else ""
    return f"The session {pid} of PostgreSQL ({role}{program or 'a program without a name'}{origin})"


def _terminate(pid: int) -> str:
    return f'End its transaction there, or end it: ./run psql -c "SELECT pg_terminate_backend({pid})"'


def with_short_wait(dsn: str) -> str:
    """Return the address with limits for each statement, for a look that must end soon."""
    options = str(conninfo_to_dict(dsn).get("options") or "")
    return make_conninfo(dsn, options=f"{options} -c statement_timeout=1000 -c lock_timeout=300".strip())
