"""Properties of each PostgreSQL session of the service, whatever DATABASE_URL, the role and the server's settings say."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
import requests
from flask import Flask
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.api import check_problem
from testkit.databases import create_database, drop_database, fetch_rows, superuser_dsn
from testkit.failpoints import running_app
from testkit.outages import readiness
from testkit.stack import EDGE_SECRET, Stack, folder, free_ports, wait_until
from velikiy import coherence
from velikiy.bulk import exporter, insert
from velikiy.coherence import CachePath, Caches
from velikiy.coherence.locks import check, locks, writer_in_flight
from velikiy.coherence.membership import Grant
from velikiy.coherence.shards import Server, ShardMap
from velikiy.findings import Finding
from velikiy.findings.postgres import look, sessions_end, waiting_commits
from velikiy.http import health
from velikiy.postgres import Connection, Database, DatabaseUnavailable, Statement, migrate
from velikiy.postgres import database as postgres
from velikiy.relay.listener import Relay
from velikiy.resources.base import registry
from velikiy.settings import Settings
from velikiy.stack.cluster import binaries

ALTER_ROLE = "ALTER ROLE velikiy_owner"


def as_superuser(stack: Stack, *statements: str) -> list[tuple[object, ...]]:
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def open_database(dsn: str, timeout: float = 1) -> Iterator[Database]:
    database = Database(dsn, size=2, timeout=timeout)
    database.open()
    try:
        yield database
    finally:
        database.close()


def query_each_pool(database: Database, query: str) -> list[object]:
    """Return the value that a connection of each of the three pools returns."""
    with database.autocommit() as reads, database.transaction() as writes, database.reserved() as reserved:
        return [connection.execute(query).fetchall()[0][0] for connection in (reads, writes, reserved)]


class TestStandby:
    @pytest.fixture(scope="class")
    @staticmethod
    def standby(stack: Stack) -> Iterator[int]:
        """Start a streaming standby of the stack's PostgreSQL, and yield its port."""
        programs, owner = binaries(stack.data / "postgres"), stack.data.stat()
        port = free_ports(1)
        [(connections,)] = stack.sql("SHOW max_connections")  # PostgreSQL requires the same number of a standby
        with folder() as home:
            os.chown(home, owner.st_uid, owner.st_gid)
            subprocess.run(
                [programs / "pg_basebackup", "-D", home / "data", "-R", "-c", "fast", "-d", superuser_dsn(stack)],
                cwd=home,
                user=owner.st_uid,
                group=owner.st_gid,
                check=True,
            )
            settings = (f"port={port}", f"max_connections={connections}", f"unix_socket_directories={home}")
            options = (argument for setting in settings for argument in ("-c", setting))
            server = subprocess.Popen(
                [programs / "postgres", "-D", home / "data", *options],
                cwd=home,
                user=owner.st_uid,
                group=owner.st_gid,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: ("streaming",) in as_superuser(stack, "SELECT state FROM pg_stat_replication"))
                wait_until(lambda: is_reachable(at_port(stack.postgres, port)))
                yield port
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(20)

    def test_readiness_warns_of_a_standby_that_follows_asynchronously(self, stack: Stack, standby: int) -> None:
        [warning] = requests.get(f"{stack.app}/readyz", timeout=5).json()["warnings"]
        assert warning.startswith("1 standbys or other receivers follow PostgreSQL, none of them synchronously")

    def test_relay_warns_of_two_hosts_that_take_writes(self, stack: Stack) -> None:
        """The second host is the first by another name."""
        host = conninfo_to_dict(stack.postgres)["host"]
        with open_database(make_conninfo(stack.postgres, host=f"{host},{host}/.")) as database:
            assert database.believers() == [f"{host}/.:5432", f"{host}:5432"]
        with open_database(stack.postgres) as database:
            assert database.believers() == [f"{host}:5432"]

    @pytest.mark.parametrize("first", ["standby", "primary"])
    @pytest.mark.parametrize("target", ["", "any", "prefer-standby"])
    def test_reads_and_writes_pass_over_a_standby(self, stack: Stack, standby: int, first: str, target: str) -> None:
        dsn = standby_and_primary(stack, standby, first)
        with open_database(make_conninfo(dsn, target_session_attrs=target) if target else dsn) as database:
            assert query_each_pool(database, "SELECT pg_is_in_recovery()") == [False, False, False]
            with database.transaction() as connection:
                connection.execute("UPDATE users SET name = name WHERE id = 1")

    @pytest.mark.parametrize("first", ["standby", "primary"])
    def test_migrations_pass_over_a_standby(self, stack: Stack, standby: int, first: str) -> None:
        name, dsn = create_database(stack)
        try:
            wait_until(lambda: is_reachable(at_port(dsn, standby)), what="the standby has the new database")
            assert migrate.upgrade(make_conninfo(standby_and_primary(stack, standby, first), dbname=name), wait=5)
            assert fetch_rows(dsn, "SELECT count(*) FROM users") == [(3,)]
        finally:
            drop_database(stack, name)

    @pytest.mark.parametrize("first", ["standby", "primary"])
    def test_relay_passes_over_a_standby(self, stack: Stack, standby: int, first: str, tmp_path: Path) -> None:
        dsn, heartbeat = standby_and_primary(stack, standby, first), tmp_path / "heartbeat"
        sessions = "SELECT pid FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
        before, ended = set(stack.sql(sessions)), threading.Event()
        with open_database(dsn, timeout=5) as database:
            relay = Relay(database, coherence.connect(database, settings(stack, dsn)), {})

            def listen() -> None:
                try:
                    relay.run_once(heartbeat)
                except psycopg.Error:
                    ended.set()

            threading.Thread(target=listen, daemon=True).start()
            wait_until(lambda: heartbeat.exists() or ended.is_set())
            assert not ended.is_set()
            [(session,)] = set(stack.sql(sessions)) - before
            stack.sql("SELECT pg_terminate_backend(%s)", session)
            assert ended.wait(5)

    def test_standby_without_its_primary_counts_as_an_unavailable_database(self, stack: Stack, standby: int) -> None:
        dsn = at_port(stack.postgres, standby)
        with open_database(dsn) as database, running_app(coherence.connect(database, settings(stack, dsn))) as url:
            for method, path in (("GET", "/users/1"), ("GET", "/users?limit=3"), ("PUT", "/users/1")):
                began = time.monotonic()
                check_problem(requests.request(method, url + path, json={"name": "Alice"}, timeout=5), 503)
                assert time.monotonic() - began < 2.5


def at_port(dsn: str, port: int) -> str:
    return make_conninfo(dsn, host="127.0.0.1", port=port)


def standby_and_primary(stack: Stack, standby: int, first: str) -> str:
    """Return a DSN that lists both servers, beginning with the server that `first` names."""
    servers = [("127.0.0.1", str(standby)), (str(conninfo_to_dict(stack.postgres)["host"]), "5432")]
    hosts, ports = zip(*(servers if first == "standby" else servers[::-1]), strict=True)
    return make_conninfo(stack.postgres, host=",".join(hosts), port=",".join(ports))


class TestOldLeader:
    """A leader whose synchronous standby was promoted, which acknowledges nothing any more."""

    @pytest.fixture
    def old_leader(self, stack: Stack) -> Iterator[Database]:
        """The database of the stack, whose PostgreSQL loses its synchronous standby once the pools are open."""
        with open_database(stack.postgres) as database:
            query_each_pool(database, "SELECT 1")
            as_superuser(stack, "ALTER SYSTEM SET synchronous_standby_names = 'promoted'", "SELECT pg_reload_conf()")
            wait_until(lambda: stack.sql("SHOW synchronous_standby_names") == [("promoted",)])
            yield database
        as_superuser(stack, "ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
        wait_until(lambda: requests.get(f"{stack.edge}/readyz", timeout=5).json().get("warnings") is None)

    def test_commits_that_wait_for_a_standby_are_named(self, stack: Stack, old_leader: Database) -> None:
        with Connection.connect(superuser_dsn(stack), dbname="velikiy", autocommit=True) as connection:
            found = wait_until(lambda: waiting_commits(connection))  # the edges renew their leases
        assert found[0].name == "postgres.commits_wait"
        assert "a synchronous standby" in found[0].what

    def test_old_leader_answers_nothing_that_it_reads(self, stack: Stack, old_leader: Database) -> None:
        def read() -> None:
            with old_leader.autocommit() as connection:
                connection.enqueue(check(CachePath("/users/1", "users:1")))
                connection.query(Statement("SELECT 1"))

        def refuse() -> None:
            with old_leader.transaction() as connection:
                connection.execute("SELECT 1")
                raise ValueError("a refusal, because of a row that was read")

        for answer in (read, refuse, Caches(old_leader, threads=1).in_use):  # by the last, a process would use Redis
            with pytest.raises(DatabaseUnavailable):
                answer()

    def test_pool_takes_no_connection_to_an_old_leader(self, stack: Stack, old_leader: Database) -> None:
        with open_database(stack.postgres) as database, pytest.raises(DatabaseUnavailable):
            query_each_pool(database, "SELECT 1")

    def test_commit_whose_wait_for_the_standby_is_cancelled_is_not_acknowledged(
        self, stack: Stack, old_leader: Database
    ) -> None:
        def write(database: Database) -> None:
            with database.transaction(20) as connection:
                connection.execute("UPDATE users SET name = name WHERE id = 1")

        ended = threading.Event()

        def cancel() -> None:  # again and again: the apps of the stack also have sessions that wait
            waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            while not ended.wait(0.05):
                as_superuser(stack, f"{waiting} AND application_name = 'velikiy writes'")

        with ThreadPoolExecutor() as pool:
            cancelled = pool.submit(cancel)
            try:
                with pytest.raises(DatabaseUnavailable, match="OperationalError"):
                    write(old_leader)
            finally:
                ended.set()
            cancelled.result()


def is_reachable(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def settings(stack: Stack, dsn: str) -> Settings:
    return Settings(database_url=dsn, redis_url=stack.redis_url, edge_secret=EDGE_SECRET)


HOSTILE_SETTINGS = (
    "statement_timeout = 1",
    "lock_timeout = 1",
    "idle_in_transaction_session_timeout = 1",
    "idle_session_timeout = 50",
    "synchronous_commit = off",
    "default_transaction_isolation = serializable",
    "TimeZone = 'Asia/Tokyo'",
    "client_min_messages = error",
    "standard_conforming_strings = off",
    "velikiy.passes_gate = off",
)


class TestDurability:
    @pytest.fixture
    def set_on_server(self, stack: Stack) -> Iterator[Callable[[str], None]]:
        """Yield a function that changes a setting of the running server; reset all settings afterwards."""

        def reload(*statements: str) -> None:
            as_superuser(stack, *statements, "SELECT pg_reload_conf()")

        yield lambda setting: reload(f"ALTER SYSTEM SET {setting}")
        reload("ALTER SYSTEM RESET ALL")

    @pytest.fixture
    def set_on_role(self, stack: Stack) -> Iterator[Callable[[str], None]]:
        """Yield a function that changes a setting of the app's role; reset all its settings afterwards."""

        def alter(setting: str) -> None:
            as_superuser(stack, f"{ALTER_ROLE} SET {setting}")

        yield alter
        as_superuser(stack, f"{ALTER_ROLE} RESET ALL")

    @pytest.mark.parametrize(
        ("configured", "effective"),
        [(weak, "on") for weak in ("off", "local", "remote_write", "on")] + [("remote_apply", "remote_apply")],
    )
    def test_commit_waits_for_the_disk_whatever_the_setting_of_the_role(
        self, stack: Stack, set_on_role: Callable[[str], None], configured: str, effective: str
    ) -> None:
        set_on_role(f"synchronous_commit = {configured}")
        with open_database(stack.postgres) as database:
            assert query_each_pool(database, "SHOW synchronous_commit") == [effective] * 3

    def test_commit_waits_for_the_disk_whatever_the_options_of_database_url(self, stack: Stack) -> None:
        with open_database(make_conninfo(stack.postgres, options="-c synchronous_commit=off")) as database:
            assert query_each_pool(database, "SHOW synchronous_commit") == ["on"] * 3

    def test_commit_waits_for_the_disk_when_the_server_setting_changes_under_an_open_session(
        self, stack: Stack, set_on_server: Callable[[str], None]
    ) -> None:
        with open_database(stack.postgres) as database, database.autocommit() as connection:
            connection.extend_deadline(10)
            set_on_server("synchronous_commit = off")
            wait_until(lambda: stack.sql("SHOW synchronous_commit") == [("off",)], within=5)
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)

    def test_sessions_work_whatever_the_settings_of_the_role(
        self, stack: Stack, set_on_role: Callable[[str], None]
    ) -> None:
        for setting in HOSTILE_SETTINGS:
            set_on_role(setting)
        with open_database(stack.postgres) as database:
            for name, value in postgres.SESSION.items():
                assert query_each_pool(database, f"SHOW {name}") == [value] * 3
            assert query_each_pool(database, "SHOW statement_timeout") == ["900ms"] * 3
            assert query_each_pool(database, "SHOW lock_timeout") == ["800ms"] * 3
            assert query_each_pool(database, "SHOW idle_in_transaction_session_timeout") == ["3s"] * 3
            with database.transaction() as connection:
                connection.execute("UPDATE users SET name = name WHERE id = 1")
                connection.execute("SELECT pg_sleep(0.2)")
        name, dsn = create_database(stack)
        try:
            assert migrate.upgrade(dsn, wait=5)
        finally:
            drop_database(stack, name)
        # Only here: with this setting libpq passes the server over, as a standby.
        set_on_role("default_transaction_read_only = on")
        with open_database(stack.postgres) as database, pytest.raises(DatabaseUnavailable):
            query_each_pool(database, "SELECT 1")

    def test_readiness_warns_of_commits_that_other_programs_do_not_wait_for(
        self, stack: Stack, set_on_server: Callable[[str], None]
    ) -> None:
        set_on_server("synchronous_commit = off")
        wait_until(lambda: "synchronous_commit=off" in str(readiness(stack)[1].get("warnings")))
        set_on_server("synchronous_commit = on")
        wait_until(lambda: "warnings" not in readiness(stack)[1])

    @pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
    def test_readiness_and_relay_warn_of_a_server_that_may_lose_acknowledged_writes(
        self, stack: Stack, set_on_server: Callable[[str], None], setting: str
    ) -> None:
        assert "warnings" not in readiness(stack)[1]
        set_on_server(f"{setting} = off")
        wait_until(lambda: f"{setting}=off" in str(readiness(stack)[1].get("warnings")))
        status, members = readiness(stack)
        assert (status, members["checks"]) == (200, {"postgres": "ok", "redis": "ok"})
        # The relay logs the warning when it begins to listen.
        logged = stack.log("relay").count(f"{setting}=off")
        stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'velikiy relay'")
        wait_until(lambda: stack.log("relay").count(f"{setting}=off") > logged)
        set_on_server(f"{setting} = on")
        wait_until(lambda: "warnings" not in readiness(stack)[1])


def _stop_in_transaction(postgres: str, user: int, path: str) -> None:
    """Write, and stop this process while it holds the locks of the row and its path. When it continues, exit with 75 if
    PostgreSQL does not commit."""
    database = Database(postgres, size=1, timeout=1)
    database.open()
    try:
        with database.transaction() as connection:
            connection.query(*locks([CachePath(path, "")]))
            connection.execute("UPDATE users SET name = 'By a stopped writer' WHERE id = %s", (user,))
            os.kill(os.getpid(), signal.SIGSTOP)
    except DatabaseUnavailable:
        sys.exit(75)


def _stop_while_migrating(postgres: str) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    with mock.patch("alembic.command.upgrade", stop):
        migrate.upgrade(postgres, wait=5)


@contextmanager
def stopped_process(target: Callable[..., None], *arguments: object) -> Iterator[Callable[[], int | None]]:
    """Run the target in another process until it stops itself.

    Yields:
        A function that continues the process and returns its exit code.
    """
    process = get_context("spawn").Process(target=target, args=arguments)
    process.start()

    def resume() -> int | None:
        os.kill(process.pid or 0, signal.SIGCONT)
        process.join(10)
        return process.exitcode

    try:
        wait_until(lambda: " T " in Path(f"/proc/{process.pid}/stat").read_text(), what="the process has stopped")
        yield resume
    finally:
        process.kill()
        process.join()


class TestStoppedProcess:
    @pytest.fixture(autouse=True)
    def no_idle_timeout_of_the_server(self, stack: Stack) -> Iterator[None]:
        """Switch off the timeout of deploy/postgres/postgresql.conf: a PostgreSQL that the user provides has none."""
        as_superuser(stack, f"{ALTER_ROLE} SET idle_in_transaction_session_timeout = 0")
        yield
        as_superuser(stack, f"{ALTER_ROLE} RESET ALL")

    def test_stopped_writer_loses_its_locks_and_cannot_commit(self, stack: Stack, new_user: dict[str, str]) -> None:
        path = f"/users/{new_user['id']}"
        with stopped_process(_stop_in_transaction, stack.postgres, int(new_user["id"]), path) as resume:

            def write() -> bool:
                return requests.put(new_user["url"], json={"name": "New"}, timeout=5).status_code == 200

            assert not write()
            wait_until(write, within=1 + postgres.IDLE_S + 2)
            with Connection.connect(stack.postgres, autocommit=True) as connection:
                assert not writer_in_flight(connection, CachePath(path, ""))
            assert resume() == 75
        assert requests.get(new_user["url"], timeout=5).json()["name"] == "New"

    def test_stopped_migration_loses_its_locks(self, stack: Stack) -> None:
        name, dsn = create_database(stack)
        try:
            with stopped_process(_stop_while_migrating, dsn):
                assert migrate.upgrade(make_conninfo(dsn, options="-c statement_timeout=15s"), wait=5)
        finally:
            drop_database(stack, name)


class TestIdleTransaction:
    @pytest.fixture
    def impatient_database(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
        """A database that ends a transaction after a second without a statement."""
        monkeypatch.setattr(postgres, "IDLE_S", 0)
        with open_database(stack.postgres) as database:
            yield database

    def test_idle_transaction_ends_and_its_writer_gets_an_error(self, impatient_database: Database) -> None:
        def write() -> None:
            with impatient_database.transaction() as connection:
                connection.execute("SELECT")
                connection.extend_deadline(2)  # so that the error is not that of our own deadline
                time.sleep(1.5)
                connection.execute("SELECT")

        with pytest.raises(DatabaseUnavailable):
            write()
        assert query_each_pool(impatient_database, "SELECT 1") == [1, 1, 1]

    def test_idle_timeout_grows_with_the_timeout_of_the_request(self, impatient_database: Database) -> None:
        with impatient_database.transaction(timeout_factor=3) as connection:
            connection.execute("SELECT")
            time.sleep(1.5)
            connection.execute("SELECT")

    def test_transaction_of_an_import_outlasts_a_slow_disk(self, stack: Stack, impatient_database: Database) -> None:
        gate = coherence.connect(impatient_database, settings(stack, stack.postgres))

        def keep(_: Connection, outcome: insert.Outcome) -> insert.Outcome:
            time.sleep(1.5)
            return outcome

        assert insert.write(registry()["users"], gate, [], "reject", keep, "import") == insert.Outcome()

    def test_transaction_of_an_export_outlasts_a_slow_reader(
        self, stack: Stack, impatient_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = coherence.connect(impatient_database, settings(stack, stack.postgres))

        @contextmanager
        def slow(*_: object, **__: object) -> Iterator[Callable[..., None]]:
            yield lambda *_: time.sleep(1.5)

        monkeypatch.setattr(exporter, "progress_bar", slow)
        count = exporter.export_to(registry()["users"], gate, str(tmp_path / "users.csv"), "csv")
        assert len((tmp_path / "users.csv").read_text().splitlines()) == count + 1


class TestSessionsThatEnd:
    @staticmethod
    def end_sessions(database: Database) -> None:
        for pid in set(query_each_pool(database, "SELECT pg_backend_pid()")):
            with psycopg.connect(database.dsn, autocommit=True) as outside:
                outside.execute("SELECT pg_terminate_backend(%s, 2000)", (pid,))

    def test_sessions_that_end_soon_after_they_have_begun_are_counted(
        self, stack: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres, "YOUNG_S", 600)  # the machine may be busy
        with open_database(stack.postgres) as database:
            monkeypatch.setattr(postgres, "ENDED_WITHIN_S", 600)
            self.end_sessions(database)
            query_each_pool(database, "SELECT 1")
            count = database.young_ends()
            assert count <= 1, "one restart ends a session of each pool"
            assert not sessions_end(count, 10)
            while not (found := sessions_end(database.young_ends(), 10)):
                self.end_sessions(database)
                query_each_pool(database, "SELECT 1")
        assert found[0].name == "postgres.sessions_end"

    def test_restart_of_postgresql_is_not_taken_for_that(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_database(stack.postgres) as database:
            monkeypatch.setattr(postgres, "YOUNG_S", 0)  # the sessions have begun long before
            self.end_sessions(database)
            query_each_pool(database, "SELECT 1")
            assert database.young_ends() == 0


def has_room_for_locks(dsn: str) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(dsn) as connection:
        return connection.execute("SELECT pg_advisory_xact_lock(1, 1) IS NOT NULL").fetchone() == (True,)
    return False


def test_session_that_fills_the_table_of_locks_is_named(stack: Stack) -> None:
    with Connection.connect(stack.postgres, autocommit=True) as connection, psycopg.connect(stack.postgres) as hoarder:
        tables, session = list(registry()), hoarder.info.backend_pid
        look(connection, tables)  # the catalog is read once
        hoarder.autocommit = True
        with pytest.raises(psycopg.errors.OutOfMemory):
            hoarder.execute("SELECT count(pg_advisory_lock(1, n)) FROM generate_series(1, 50000) n")
        connection.extend_deadline(5)
        [found] = [it for it in look(connection, tables) if it.name == "locks.many"]
    assert f"The session {session} " in found.what
    wait_until(lambda: has_room_for_locks(stack.postgres), what="its locks are gone")


def test_locked_table_of_caches_is_named_and_not_taken_for_a_silent_postgresql(stack: Stack) -> None:
    with psycopg.connect(stack.postgres) as outside:
        outside.execute("LOCK TABLE caches IN ACCESS EXCLUSIVE MODE")

        def names() -> list[str]:
            return [it["name"] for it in requests.get(f"{stack.app}/readyz", timeout=5).json().get("findings", [])]

        wait_until(lambda: "locks.blocking" in names())
        assert "postgres.silent" not in names()
    wait_until(lambda: readiness(stack)[1].get("warnings") is None)


def test_locked_table_of_caches_behind_a_slow_look_is_not_taken_for_a_silent_postgresql(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_look(*arguments: Any) -> list[Finding]:
        time.sleep(0.4)
        return look(*arguments)

    monkeypatch.setattr(health, "look", slow_look)
    with open_database(stack.postgres) as database, psycopg.connect(stack.postgres) as outside:
        outside.execute("LOCK TABLE caches IN ACCESS EXCLUSIVE MODE")
        with running_app(coherence.connect(database, settings(stack, stack.postgres))) as url:
            state = requests.get(f"{url}/readyz", timeout=5).json()
    assert state["checks"]["postgres"] == "ok"
    assert "postgres.silent" not in str(state)


@pytest.mark.long
def test_server_without_a_free_connection_is_named_and_requests_get_503(stack: Stack) -> None:
    def limit(connections: int) -> None:
        as_superuser(stack, f"ALTER ROLE velikiy_owner CONNECTION LIMIT {connections}")

    with open_database(stack.postgres) as database:
        query_each_pool(database, "SELECT 1")
        limit(1)
        try:
            with running_app(coherence.connect(database, settings(stack, stack.postgres))) as url:
                found = requests.get(f"{url}/readyz", timeout=5).json()
                assert "postgres.connections" in [it["name"] for it in found["findings"]]
                with ExitStack() as held:
                    for take in 2 * (database.autocommit, database.transaction):
                        with suppress(DatabaseUnavailable):  # the pool has only connections from before the limit
                            held.enter_context(take()).extend_deadline(60)
                    stack.redis().flushdb()
                    for method in ("GET", "PUT"):
                        response = requests.request(method, f"{url}/users/1", json={"name": "A"}, timeout=5)
                        check_problem(response, 503)
                        assert response.headers["Retry-After"] == "1"
                        assert "no free connection" in response.json()["detail"]
                        assert "not carried out" in response.json()["detail"]
        finally:
            limit(-1)


class TestExhaustedPool:
    @pytest.mark.parametrize("pool", ["reads", "writes"])
    def test_other_pools_work_while_one_pool_is_exhausted(self, stack: Stack, pool: str) -> None:
        with open_database(stack.postgres) as database, ExitStack() as held:
            take = database.autocommit if pool == "reads" else database.transaction
            for _ in range(2):
                held.enter_context(take()).extend_deadline(60)

            def is_refused() -> None:
                with pytest.raises(DatabaseUnavailable), take():
                    pass

            is_refused()
            # This request probes whether the pool has recovered; other pools must work meanwhile.
            probing = held.enter_context(ThreadPoolExecutor(1)).submit(is_refused)
            while not probing.done():
                for other in {database.autocommit, database.transaction, database.reserved} - {take}:
                    with other() as connection:
                        assert connection.execute("SELECT 1").fetchone() == (1,)
            probing.result()

    def test_leases_and_health_checks_work_while_the_pools_of_requests_are_exhausted(self, stack: Stack) -> None:
        with open_database(stack.postgres) as database, ExitStack() as held:
            gate = coherence.connect(database, settings(stack, stack.postgres))
            app = Flask("in this process")
            health.install(app, registry(), database, gate.redis_tier)
            for take in (database.autocommit, database.transaction):
                for _ in range(2):
                    held.enter_context(take()).extend_deadline(60)
            try:
                grant = gate.caches.register("a/b", "192.0.2.7:1", "1")
                assert grant
                assert grant.redis
                assert gate.caches.renew("a/b", "1") == grant
            finally:
                stack.forget_edges("address = '192.0.2.7:1'")
            assert app.test_client().get("/health").status_code == 200
            assert app.test_client().get("/readyz").json == {
                "status": "ready",
                "checks": {"postgres": "ok", "redis": "ok"},
            }


def test_edge_keeps_its_lease_while_the_row_of_redis_is_missing(stack: Stack) -> None:
    name, dsn = create_database(stack)
    try:
        migrate.upgrade(dsn, wait=5)
        with open_database(dsn) as database:
            caches = Caches(database, threads=2)
            with database.autocommit() as connection:
                caches.adopt_redis(caches.redis(connection), ShardMap.plain(Server("1/0", "localhost:1")))
            assert caches.register("a/b", "192.0.2.8:1", "1") == Grant("1/0@localhost:1")
            with database.autocommit() as connection:
                connection.execute("DELETE FROM caches WHERE kind = 'redis'")
            assert caches.renew("a/b", "1") == Grant("")  # Redis counts as fenced; the edge has its lease
            assert caches.renew("a/b", "2") is None
    finally:
        drop_database(stack, name)
