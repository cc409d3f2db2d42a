"""Faults of PostgreSQL: its sessions, locks, roles, settings, tables and connections.

`what` of a fault names the party that does something: a stranger is a session or a program that is no part of the
service, and the administrator is a person who may do everything.
"""

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.databases import superuser_dsn
from tests.chaos.actions import kill, master, pause, whole
from tests.chaos.fault import MISSES_FAIL, WRITES_GO_ON, Fault, Inject, Limits
from tests.chaos.service import OWN_ROWS, Service
from velikiy.coherence import CachePath
from velikiy.coherence.locks import EVERYTHING, PATHS, lock_id

WRITERS, READERS = 100, 64

END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'velikiy'"
"""Ends the sessions of the apps and the relay, so that they connect again."""


def administrator(service: Service) -> "psycopg.Connection[Any]":
    """Return a connection of the superuser to the database of the service."""
    dsn = make_conninfo(superuser_dsn(service.stack), dbname=conninfo_to_dict(service.stack.postgres)["dbname"])
    options = "-c lock_timeout=5s -c synchronous_commit=local"  # another fault may hold a lock, or the standby away
    return psycopg.connect(dsn, autocommit=True, connect_timeout=5, application_name="chaos", options=options)


def administer(service: Service, *statements: str) -> None:
    """Run these statements as the superuser. While PostgreSQL takes no connections, try again."""

    def succeeds() -> bool:
        with suppress(psycopg.OperationalError, psycopg.InterfaceError), administrator(service) as connection:
            for statement in statements:
                connection.execute(statement)
            return True
        return False

    service.until(succeeds, within=30, what="PostgreSQL takes connections")


def altered(statements: list[str], undo: list[str]) -> Inject:
    """Return a fault in which the administrator runs these statements."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        try:
            administer(service, *statements)
            yield
        finally:
            administer(service, *undo)

    return inject


def of_role(setting: str) -> Inject:
    """Return a fault in which the role of the apps gets this setting, and its sessions connect again."""
    return altered([f"ALTER ROLE velikiy {setting}", END_SESSIONS], ["ALTER ROLE velikiy RESET ALL", END_SESSIONS])


def of_server(setting: str) -> Inject:
    """Return a fault in which the running server gets this setting."""
    reload = "SELECT pg_reload_conf()"
    return altered([f"ALTER SYSTEM SET {setting}", reload], ["ALTER SYSTEM RESET ALL", reload])


def in_open_transaction(*statements: str) -> Inject:
    """Return a fault in which a session runs these statements and leaves its transaction open."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with open_transaction(service, *statements):
            yield

    return inject


@contextmanager
def open_transaction(service: Service, *statements: str) -> Iterator[None]:
    connection = service.connect("owner", autocommit=False)
    try:
        for statement in statements:
            connection.execute(statement)
        yield
    finally:
        connection.close()  # rolls back


def again_and_again(statement: str, pause_s: float = 0.1) -> Inject:
    """Return a fault in which the administrator runs this statement again and again."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        def step(end: threading.Event) -> None:
            with suppress(psycopg.Error), administrator(service) as connection:
                while not end.wait(pause_s):
                    connection.execute(statement)

        with service.repeat(step, pause_s):
            yield

    return inject


# ---- locks ----


def row_locked(statement: str, writers: int) -> Inject:
    """Return a fault in which a session locks a row that so many clients write."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        def write(end: threading.Event) -> None:
            edge = random.randrange(2)
            while not end.is_set():
                service.request(edge, "PUT", f"/users/{user}", {"name": f"{OWN_ROWS}of a client"})
                end.wait(0.1)

        with (
            service.row() as user,
            ExitStack() as clients,
            open_transaction(service, statement.format(user=user)),
        ):
            clients.enter_context(service.threads(writers, write))
            yield

    return inject


@contextmanager
def table_locked(service: Service, random: random.Random) -> Iterator[None]:
    def read(end: threading.Event) -> None:
        edge, number = random.randrange(2), random.randrange(1, 100)
        while not end.wait(0.1):
            service.request(edge, "GET", f"/users?limit={number}&sort=-name")

    with ExitStack() as clients, open_transaction(service, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"):
        clients.enter_context(service.threads(READERS, read))
        yield


def path_locked(path: CachePath) -> Inject:
    return in_open_transaction(f"SELECT pg_advisory_lock({PATHS}, {lock_id(path)})")


@contextmanager
def locks_exhausted(service: Service, random: random.Random) -> Iterator[None]:
    with administrator(service) as connection:
        # A session keeps such locks even if the statement fails.
        with suppress(psycopg.errors.OutOfMemory):
            connection.execute("SELECT count(pg_advisory_lock(1, n)) FROM generate_series(1, 50000) n")
        yield


# ---- connections ----


@contextmanager
def connections_taken(service: Service, random: random.Random) -> Iterator[None]:
    """A stranger takes every connection, those of the apps included."""
    held: list[psycopg.Connection[Any]] = []
    full = threading.Event()

    def take(end: threading.Event) -> None:
        while not end.is_set():
            try:
                held.append(service.connect("owner"))
            except psycopg.OperationalError:
                full.set()
                end.wait(0.02)

    with administrator(service) as connection, service.threads(4, take):
        try:
            service.until(full.is_set)
            connection.execute(END_SESSIONS)
            yield
        finally:
            full.set()
    for one in held:
        one.close()


@contextmanager
def password_changed(service: Service, random: random.Random) -> Iterator[None]:
    with administrator(service) as connection:
        [(secret,)] = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'velikiy'").fetchall()
    try:
        administer(service, "ALTER ROLE velikiy PASSWORD 'another'", END_SESSIONS)
        yield
    finally:
        administer(service, f"ALTER ROLE velikiy PASSWORD '{secret}'")


# ---- processes ----


@contextmanager
def stopped_in_commit(service: Service, random: random.Random) -> Iterator[None]:
    """Stop PostgreSQL when one of its sessions carries out a COMMIT."""
    # A COMMIT waits for so many microseconds before it flushes the log. Otherwise none would last long enough.
    slow = ("ALTER SYSTEM SET commit_delay = 100000", "ALTER SYSTEM SET commit_siblings = 0")
    reload = "SELECT pg_reload_conf()"
    try:
        administer(service, *slow, reload)
        sessions = _sessions(service, "velikiy writes")
        until = time.monotonic() + 2
        while not any(map(_commits, sessions)) and time.monotonic() < until:
            pass
        # The sessions first: the commit must not end meanwhile.
        with service.stopped(*sessions, *service.pids("postgres")):
            service.note("in a COMMIT" if any(map(_commits, sessions)) else "not in a COMMIT")
            yield
    finally:
        administer(service, "ALTER SYSTEM RESET ALL", reload)


def _sessions(service: Service, name: str) -> list[int]:
    with administrator(service) as connection:
        rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (name,)).fetchall()
    return [int(pid) for (pid,) in rows]


def _commits(session: int) -> bool:
    try:
        return b" COMMIT" in Path(f"/proc/{session}/cmdline").read_bytes()
    except OSError:
        return False


@contextmanager
def standby(service: Service, random: random.Random) -> Iterator[None]:
    """Restart PostgreSQL as a standby."""
    sign = service.plan.cluster / "standby.signal"
    try:
        sign.touch()
        service.kill(service.master("postgres"), number=signal.SIGINT)
        yield
    finally:
        sign.unlink(missing_ok=True)
        service.kill(service.master("postgres"), number=signal.SIGINT)


@contextmanager
def busy(service: Service, random: random.Random) -> Iterator[None]:
    def compute(end: threading.Event) -> None:
        with suppress(psycopg.Error), service.connect("owner", options="-c statement_timeout=300ms") as connection:
            while not end.is_set():
                with suppress(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT count(*) FROM generate_series(1, 100000000)")

    with service.threads(4, compute):
        yield


FAULTS = [
    # Locks
    Fault(
        "postgres-row-locked",
        f"A session of psql is left open after SELECT ... FOR UPDATE of a row that {WRITERS} clients write.",
        row_locked("SELECT FROM users WHERE id = {user} FOR UPDATE", WRITERS),
        named=("locks.blocking",),
    ),
    Fault(
        "postgres-row-updated",
        "A session leaves an UPDATE of a row uncommitted, which two clients write again and again.",
        row_locked("UPDATE users SET name = name WHERE id = {user}", 2),
        named=("locks.blocking",),
        limits=WRITES_GO_ON,
    ),
    Fault(
        "postgres-table-locked",
        f"A session holds the table of users in ACCESS EXCLUSIVE mode, beside {READERS} readers of lists.",
        table_locked,
        named=("locks.blocking",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-index-created",
        "A session has created an index of the table of users and has not committed.",
        in_open_transaction("CREATE INDEX chaos_index ON users (name)"),
        named=("locks.blocking",),
    ),
    Fault(
        "postgres-history-locked",
        "A session holds the table of the history in EXCLUSIVE mode.",
        in_open_transaction("LOCK TABLE row_history IN EXCLUSIVE MODE"),
        named=("locks.blocking",),
    ),
    Fault(
        "postgres-caches-locked",
        "A session holds the table `caches` in ACCESS EXCLUSIVE mode.",
        in_open_transaction("LOCK TABLE caches IN ACCESS EXCLUSIVE MODE"),
        named=("locks.blocking",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-edges-locked",
        "A session holds the rows of the edges in the table `caches`.",
        in_open_transaction("SELECT FROM caches WHERE kind = 'edge' FOR UPDATE"),
        named=("locks.blocking",),
    ),
    Fault(
        "postgres-path-locked",
        "A stranger holds the advisory lock of /users.",
        path_locked(CachePath("/users", "")),
        named=("locks.foreign",),
    ),
    Fault(
        "postgres-all-paths-locked",
        "A stranger holds the advisory lock that stands for all paths.",
        path_locked(EVERYTHING),
        named=("locks.foreign",),
    ),
    Fault(
        "postgres-lock-table-full",
        "A stranger takes advisory locks until PostgreSQL has no room for more.",
        locks_exhausted,
        named=("locks.many",),
    ),
    Fault(
        "postgres-idle-transaction",
        "A session that has read the users leaves its transaction open.",
        in_open_transaction("SELECT * FROM users"),
        unnamed="harmless: it blocks no other session",
        limits=WRITES_GO_ON,
    ),
    # Sessions and connections
    Fault(
        "postgres-connections-taken",
        "A stranger takes every connection, also those of the apps, whose sessions have been ended.",
        connections_taken,
        named=("postgres.refuses", "postgres.connections"),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-connection-limit",
        "The role of the apps gets a CONNECTION LIMIT of 1, and its sessions end.",
        altered(
            ["ALTER ROLE velikiy CONNECTION LIMIT 1", END_SESSIONS],
            ["ALTER ROLE velikiy CONNECTION LIMIT -1"],
        ),
        named=("postgres.refuses", "postgres.connections"),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-password-changed",
        "The role of the apps gets another password, and its sessions end.",
        password_changed,
        named=("postgres.refuses",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-login-forbidden",
        "The role of the apps may no longer log in, and its sessions end.",
        altered(["ALTER ROLE velikiy NOLOGIN", END_SESSIONS], ["ALTER ROLE velikiy LOGIN"]),
        named=("postgres.refuses",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-sessions-ended",
        "The administrator ends all sessions of the service again and again.",
        again_and_again(END_SESSIONS),
        named=("postgres.sessions_end",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-statements-cancelled",
        "The administrator cancels the statements of all sessions again and again.",
        again_and_again("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'velikiy'", 0.02),
        unnamed="a cancelled request is answered 503, and the next one succeeds",
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-listener-ended",
        "The administrator ends the session of the relay again and again.",
        again_and_again(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'velikiy relay'", 0.05
        ),
        named=("relay.away", "relay.silent"),
        limits=WRITES_GO_ON,
    ),
    # The server
    Fault(
        "postgres-immediate-shutdown",
        "PostgreSQL is shut down at once (SIGQUIT), and is started again by supervisor.",
        kill(master("postgres"), signal.SIGQUIT),
        unnamed="it serves again within two seconds",
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-smart-shutdown",
        "PostgreSQL is asked to shut down once all clients have left (SIGTERM).",
        kill(master("postgres"), signal.SIGTERM, end=signal.SIGINT),
        named=("postgres.refuses",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-stopped-in-commit",
        "PostgreSQL is stopped (SIGSTOP) during a COMMIT.",
        stopped_in_commit,
        seconds=3,
        named=("postgres.silent",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-paused",
        "PostgreSQL pauses for 0.2 s again and again.",
        pause(whole("postgres"), 0.2, 0.02),
        unnamed="statements take up to 0.2 s, as on a busy machine, and are answered",
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-slow",
        "PostgreSQL pauses for 0.6 s again and again.",
        pause(whole("postgres"), 0.6, 0.05),
        named=("postgres.slow", "postgres.silent"),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-busy",
        "Four sessions of a stranger compute without end.",
        busy,
        unnamed="the machine is busy, and everything is answered",
    ),
    Fault(
        "postgres-standby",
        "PostgreSQL is restarted as a standby.",
        standby,
        named=("postgres.standby",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-standby-missing",
        "Each COMMIT has to wait for a synchronous standby that is away.",
        of_server("synchronous_standby_names = 'away'"),
        pairs=False,  # writes hold their locks for as long as it lasts, which statements of other faults wait for
        named=("postgres.commits_wait",),
        limits=MISSES_FAIL,
    ),
    # Settings
    Fault(
        "postgres-read-only",
        "The server is set to default_transaction_read_only.",
        of_server("default_transaction_read_only = on"),
        named=("postgres.read_only", "postgres.standby"),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-fsync-off",
        "The server is set to fsync=off.",
        of_server("fsync = off"),
        named=("postgres.forgets",),
        limits=WRITES_GO_ON,
    ),
    Fault(
        "postgres-role-read-only",
        "The role of the apps is set to default_transaction_read_only, and its sessions end.",
        of_role("SET default_transaction_read_only = on"),
        named=("postgres.standby",),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-role-commits-asynchronously",
        "The role of the apps is set to synchronous_commit=off, and its sessions end.",
        of_role("SET synchronous_commit = off"),
        named=("postgres.synchronous_commit",),
    ),
    Fault(
        "postgres-role-impatient",
        "The role of the apps gets a statement_timeout and a lock_timeout of 1 ms, and its sessions end.",
        altered(
            [
                "ALTER ROLE velikiy SET statement_timeout = 1",
                "ALTER ROLE velikiy SET lock_timeout = 1",
                END_SESSIONS,
            ],
            ["ALTER ROLE velikiy RESET ALL"],
        ),
        unnamed="harmless: the sessions of the service set what they need",
    ),
    Fault(
        "postgres-search-path-changed",
        "The role of the apps gets a search_path without the tables, and its sessions end.",
        of_role("SET search_path = pg_catalog"),
        named=("postgres.not_migrated",),
        limits=MISSES_FAIL,
    ),
    # Tables
    Fault(
        "postgres-rights-revoked",
        "The role of the apps loses its right to update users.",
        altered(["REVOKE UPDATE ON users FROM velikiy"], ["GRANT UPDATE ON users TO velikiy"]),
        named=("postgres.rights",),
    ),
    Fault(
        "postgres-table-renamed",
        "The table of users is renamed for a while.",
        altered(["ALTER TABLE users RENAME TO users_away"], ["ALTER TABLE users_away RENAME TO users"]),
        named=("postgres.tables", "postgres.not_migrated"),
        limits=MISSES_FAIL,
    ),
    Fault(
        "postgres-table-inherited",
        "A table without our triggers inherits from the table of users.",
        altered(["CREATE TABLE chaos_child () INHERITS (users)"], ["DROP TABLE IF EXISTS chaos_child"]),
        named=("postgres.triggers",),
    ),
    Fault(
        "postgres-trigger-disabled",
        "The trigger that reports updated users is disabled.",
        altered(["ALTER TABLE users DISABLE TRIGGER rows_updated"], ["ALTER TABLE users ENABLE TRIGGER rows_updated"]),
        named=("postgres.triggers",),
    ),
    Fault(
        "postgres-vacuum-full",
        "The administrator runs VACUUM FULL of the table of users again and again.",
        again_and_again("VACUUM FULL users", 0.3),
        unnamed="each holds the table for some milliseconds",
    ),
    Fault(
        "postgres-row-of-redis-deleted",
        "The row of Redis in the table `caches` is deleted again and again.",
        again_and_again("DELETE FROM caches WHERE name = 'redis'"),
        named=("redis.row_missing", "redis.fenced"),
    ),
    Fault(
        "postgres-caches-emptied",
        "All rows of the table `caches` are deleted while edges hold leases.",
        altered(["DELETE FROM caches"], []),
        unnamed="edges register again and the relay inserts the row of Redis within a second",
    ),
    # Long variants
    Fault(
        "postgres-stopped-in-commit-20s",
        "PostgreSQL is stopped (SIGSTOP) during a COMMIT, and goes on after 20 s.",
        stopped_in_commit,
        seconds=20,
        named=("postgres.silent",),
        limits=Limits(reads=0.0, hit_s=1.5, miss_s=3.0, write_s=5.0),
        pairs=False,
    ),
]
