"""What each session of ours has, whatever DATABASE_URL, the role and the server's settings say."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import psycopg
import pytest
import requests
from flask import Flask
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.api import problem
from testkit.databases import drop_database, make_database, rows, superuser
from testkit.failpoints import serving
from testkit.outages import readiness
from testkit.stack import Stack, folder, free_ports, wait_until
from velikiy import coherence
from velikiy.bulk import exporter, insert
from velikiy.bulk.readers import Row
from velikiy.coherence import CachePath, Caches
from velikiy.coherence.locks import locks, writer_in_flight
from velikiy.http import health
from velikiy.postgres import Connection, Database, DatabaseUnavailable, migrate
from velikiy.postgres import database as postgres
from velikiy.relay.listener import Relay
from velikiy.resources.base import registry
from velikiy.settings import Settings
from velikiy.stack.cluster import binaries

ROLE = "ALTER ROLE velikiy"


def as_superuser(stack: Stack, *statements: str) -> list[tuple[object, ...]]:
    with psycopg.connect(superuser(stack), autocommit=True) as connection:
        for statement in statements:
            found = connection.execute(statement)
        return found.fetchall() if found.description else []


@contextmanager
def opened(dsn: str, timeout: float = 1) -> Iterator[Database]:
    database = Database(dsn, size=2, timeout=timeout)
    database.open()
    try:
        yield database
    finally:
        database.close()


def asked(database: Database, question: str) -> list[object]:
    """Return what the three pools answer."""
    with database.autocommit() as reads, database.transaction() as writes, database.reserved() as reserved:
        return [connection.execute(question).fetchall()[0][0] for connection in (reads, writes, reserved)]


class TestAStandby:
    @pytest.fixture(scope="class")
    @staticmethod
    def standby(stack: Stack) -> Iterator[int]:
        """Start a standby of the stack's PostgreSQL that streams, and yield its port."""
        programs, owner = binaries(stack.data / "postgres"), stack.data.stat()
        port = free_ports(1)
        [(connections,)] = stack.sql("SHOW max_connections")  # a standby must have as many
        with folder() as place:
            os.chown(place, owner.st_uid, owner.st_gid)
            subprocess.run(
                [programs / "pg_basebackup", "-D", place / "data", "-R", "-c", "fast", "-d", superuser(stack)],
                cwd=place,
                user=owner.st_uid,
                group=owner.st_gid,
                check=True,
            )
            settings = (f"port={port}", f"max_connections={connections}", f"unix_socket_directories={place}")
            server = subprocess.Popen(
                [programs / "postgres", "-D", place / "data", *(word for it in settings for word in ("-c", it))],
                cwd=place,
                user=owner.st_uid,
                group=owner.st_gid,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: ("streaming",) in as_superuser(stack, "SELECT state FROM pg_stat_replication"))
                wait_until(lambda: reachable(at(stack.postgres, port)))
                yield port
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(20)

    @pytest.mark.parametrize("first", ["standby", "primary"])
    @pytest.mark.parametrize("wanted", ["", "any", "prefer-standby"])
    def test_is_passed_over_by_reads_and_writes(self, stack: Stack, standby: int, first: str, wanted: str) -> None:
        dsn = both(stack, standby, first)
        with opened(make_conninfo(dsn, target_session_attrs=wanted) if wanted else dsn) as database:
            assert asked(database, "SELECT pg_is_in_recovery()") == [False, False, False]
            with database.transaction() as connection:
                connection.execute("UPDATE users SET name = name WHERE id = 1")

    @pytest.mark.parametrize("first", ["standby", "primary"])
    def test_is_passed_over_by_migrations(self, stack: Stack, standby: int, first: str) -> None:
        name, address = make_database(stack)
        try:
            wait_until(lambda: reachable(at(address, standby)), what="the standby has the new database")
            assert migrate.upgrade(make_conninfo(both(stack, standby, first), dbname=name), wait=5)
            assert rows(address, "SELECT count(*) FROM users") == [(3,)]
        finally:
            drop_database(stack, name)

    @pytest.mark.parametrize("first", ["standby", "primary"])
    def test_is_passed_over_by_the_relay(self, stack: Stack, standby: int, first: str, tmp_path: Path) -> None:
        dsn, heartbeat = both(stack, standby, first), tmp_path / "heartbeat"
        sessions = "SELECT pid FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
        before, ended = set(stack.sql(sessions)), threading.Event()
        with opened(dsn, timeout=5) as database:
            relay = Relay(dsn, database, coherence.connect(database, settings(stack, dsn)), {})

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

    def test_alone_it_is_no_database(self, stack: Stack, standby: int) -> None:
        dsn = at(stack.postgres, standby)
        with opened(dsn) as database, serving(coherence.connect(database, settings(stack, dsn))) as url:
            for method, path in (("GET", "/users/1"), ("GET", "/users?limit=3"), ("PUT", "/users/1")):
                began = time.monotonic()
                problem(requests.request(method, url + path, json={"name": "Alice"}, timeout=5), 503)
                assert time.monotonic() - began < 2.5


def at(dsn: str, port: int) -> str:
    return make_conninfo(dsn, port=port)


def both(stack: Stack, standby: int, first: str) -> str:
    ports = [str(standby), str(conninfo_to_dict(stack.postgres)["port"])]
    ports = ports if first == "standby" else ports[::-1]
    return make_conninfo(stack.postgres, host="127.0.0.1,127.0.0.1", port=",".join(ports))


def reachable(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def settings(stack: Stack, dsn: str) -> Settings:
    return Settings(database_url=dsn, redis_url=stack.redis_url)


class TestWhatWasAcknowledged:
    @pytest.fixture
    def change(self, stack: Stack) -> Iterator[Callable[[str], None]]:
        """Yield what changes a setting of the running server; take the changes back afterwards."""

        def reload(*statements: str) -> None:
            as_superuser(stack, *statements, "SELECT pg_reload_conf()")

        yield lambda setting: reload(f"ALTER SYSTEM SET {setting}")
        reload("ALTER SYSTEM RESET ALL")

    @pytest.fixture
    def of_the_role(self, stack: Stack) -> Iterator[Callable[[str], None]]:
        def alter(setting: str) -> None:
            as_superuser(stack, f"{ROLE} SET {setting}")

        yield alter
        as_superuser(stack, f"{ROLE} RESET ALL")

    @pytest.mark.parametrize(
        ("chosen", "shown"),
        [(same, same) for same in ("on", "local", "remote_write", "remote_apply")] + [("off", "on")],
    )
    def test_is_on_the_disk_whatever_the_role_has(
        self, stack: Stack, of_the_role: Callable[[str], None], chosen: str, shown: str
    ) -> None:
        of_the_role(f"synchronous_commit = {chosen}")
        with opened(stack.postgres) as database:
            assert asked(database, "SHOW synchronous_commit") == [shown] * 3

    def test_is_on_the_disk_whatever_the_address_has(self, stack: Stack) -> None:
        with opened(make_conninfo(stack.postgres, options="-c synchronous_commit=off")) as database:
            assert asked(database, "SHOW synchronous_commit") == ["on"] * 3

    def test_is_on_the_disk_when_the_server_is_told_otherwise_later(
        self, stack: Stack, change: Callable[[str], None]
    ) -> None:
        with opened(stack.postgres) as database, database.autocommit() as connection:
            connection.extend_deadline(10)
            change("synchronous_commit = off")
            wait_until(lambda: stack.sql("SHOW synchronous_commit") == [("off",)], within=5)
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)

    @pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
    def test_a_server_that_may_lose_it_is_warned_of(
        self, stack: Stack, change: Callable[[str], None], setting: str
    ) -> None:
        assert "warnings" not in readiness(stack)[1]
        change(f"{setting} = off")
        wait_until(lambda: f"{setting}=off" in str(readiness(stack)[1].get("warnings")))
        status, members = readiness(stack)
        assert (status, members["checks"]) == (200, {"postgres": "ok", "redis": "ok"})
        # The relay says so when it begins to listen.
        said = stack.log("relay").count(f"{setting}=off")
        stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'velikiy relay'")
        wait_until(lambda: stack.log("relay").count(f"{setting}=off") > said)
        change(f"{setting} = on")
        wait_until(lambda: "warnings" not in readiness(stack)[1])


def _stop_within(postgres: str, user: int, path: str) -> None:
    """Write, and stop this process with the row and its path locked. Once it goes on, exit with 75 if PostgreSQL does
    not commit."""
    database = Database(postgres, size=1, timeout=1)
    database.open()
    try:
        with database.transaction(1, *locks([CachePath(path, "")])) as connection:
            connection.execute("UPDATE users SET name = 'Of a writer that was stopped' WHERE id = %s", (user,))
            os.kill(os.getpid(), signal.SIGSTOP)
    except DatabaseUnavailable:
        sys.exit(75)


def _stop_while_migrating(postgres: str) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    with mock.patch("alembic.command.upgrade", stop):
        migrate.upgrade(postgres, wait=5)


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[Callable[[], int | None]]:
    """Run this in a process of its own until it stops itself. Yield what lets it go on and returns its exit code."""
    stopped = get_context("spawn").Process(target=target, args=arguments)
    stopped.start()

    def go_on() -> int | None:
        os.kill(stopped.pid or 0, signal.SIGCONT)
        stopped.join(10)
        return stopped.exitcode

    try:
        wait_until(lambda: " T " in Path(f"/proc/{stopped.pid}/stat").read_text(), what="it has stopped")
        yield go_on
    finally:
        stopped.kill()
        stopped.join()


class TestAStoppedProcess:
    @pytest.fixture(autouse=True)
    def patient(self, stack: Stack) -> Iterator[None]:
        """Switch off the timeout that deploy/postgres/postgresql.conf has: a PostgreSQL of one's own has none."""
        as_superuser(stack, f"{ROLE} SET idle_in_transaction_session_timeout = 0")
        yield
        as_superuser(stack, f"{ROLE} RESET ALL")

    def test_gives_up_its_row_and_its_paths(self, stack: Stack, new_user: dict[str, str]) -> None:
        path = f"/users/{new_user['id']}"
        with process(_stop_within, stack.postgres, int(new_user["id"]), path) as go_on:
            began = time.monotonic()

            def written() -> bool:
                return requests.put(new_user["url"], json={"name": "New"}, timeout=5).status_code == 200

            assert not written()
            wait_until(written, within=1 + postgres.IDLE_S + 2)
            assert time.monotonic() - began > 6  # two fences, which a writer may have to wait for
            with Connection.connect(stack.postgres, autocommit=True) as connection:
                assert not writer_in_flight(connection, CachePath(path, ""))
            assert go_on() == 75
        assert requests.get(new_user["url"], timeout=5).json()["name"] == "New"

    def test_gives_up_the_tables_that_it_was_changing(self, stack: Stack) -> None:
        name, address = make_database(stack)
        try:
            with process(_stop_while_migrating, address):
                assert migrate.upgrade(make_conninfo(address, options="-c statement_timeout=15s"), wait=5)
        finally:
            drop_database(stack, name)


class TestAnIdleTransaction:
    @pytest.fixture
    def hasty(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
        """Open a database whose transactions end after a second without a statement."""
        monkeypatch.setattr(postgres, "IDLE_S", 0)
        with opened(stack.postgres) as database:
            yield database

    def test_is_ended_and_the_writer_is_told(self, hasty: Database) -> None:
        def write() -> None:
            with hasty.transaction() as connection:
                connection.execute("SELECT")
                connection.extend_deadline(2)  # it is not our own deadline that we are told of
                time.sleep(1.5)
                connection.execute("SELECT")

        with pytest.raises(DatabaseUnavailable):
            write()
        assert asked(hasty, "SELECT 1") == [1, 1, 1]

    def test_has_more_time_where_the_request_has(self, hasty: Database) -> None:
        with hasty.transaction(timeout_factor=3) as connection:
            connection.execute("SELECT")
            time.sleep(1.5)
            connection.execute("SELECT")

    def test_of_an_import_waits_for_a_slow_disk(self, stack: Stack, hasty: Database) -> None:
        gate = coherence.connect(hasty, settings(stack, stack.postgres))

        def keep(_: Connection, refused: list[Row]) -> list[Row]:
            time.sleep(1.5)
            return refused

        assert insert.write(registry()["users"], gate, [], keep) == []

    def test_of_an_export_waits_for_a_slow_reader(
        self, stack: Stack, hasty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = coherence.connect(hasty, settings(stack, stack.postgres))

        @contextmanager
        def slow(*_: object, **__: object) -> Iterator[Callable[..., None]]:
            yield lambda *_: time.sleep(1.5)

        monkeypatch.setattr(exporter, "progress_bar", slow)
        count = exporter.export_to(registry()["users"], gate, str(tmp_path / "users.csv"), "csv")
        assert len((tmp_path / "users.csv").read_text().splitlines()) == count + 1


class TestAPoolThatIsExhausted:
    @pytest.mark.parametrize("which", ["reads", "writes"])
    def test_makes_no_other_pool_refuse(self, stack: Stack, which: str) -> None:
        with opened(stack.postgres) as database, ExitStack() as held:
            take = database.autocommit if which == "reads" else database.transaction
            for _ in range(2):
                held.enter_context(take()).extend_deadline(60)

            def is_refused() -> None:
                with pytest.raises(DatabaseUnavailable), take():
                    pass

            is_refused()
            waits = held.enter_context(ThreadPoolExecutor(1)).submit(is_refused)  # it finds out whether that is over
            while not waits.done():
                for other in {database.autocommit, database.transaction, database.reserved} - {take}:
                    with other() as connection:
                        assert connection.execute("SELECT 1").fetchone() == (1,)
            waits.result()

    def test_leaves_edges_their_leases_and_the_app_its_health(self, stack: Stack) -> None:
        with opened(stack.postgres) as database, ExitStack() as held:
            gate = coherence.connect(database, settings(stack, stack.postgres))
            app = Flask("in this process")
            health.install(app, database, gate.redis_tier)
            for take in (database.autocommit, database.transaction):
                for _ in range(2):
                    held.enter_context(take()).extend_deadline(60)
            try:
                assert gate.caches.register("a/b", "192.0.2.7:1", "1") is False
                assert gate.caches.renew("a/b", "1") is False
            finally:
                stack.sql("DELETE FROM caches WHERE address = '192.0.2.7:1'")
            assert app.test_client().get("/health").status_code == 200
            assert app.test_client().get("/readyz").json == {
                "status": "ready",
                "checks": {"postgres": "ok", "redis": "ok"},
            }


def test_an_edge_keeps_its_lease_while_the_row_of_redis_is_missing(stack: Stack) -> None:
    name, address = make_database(stack)
    try:
        migrate.upgrade(address, wait=5)
        with opened(address) as database:
            caches = Caches(database, threads=2)
            assert caches.register("a/b", "192.0.2.8:1", "1") is False
            with database.autocommit() as connection:
                connection.execute("DELETE FROM caches WHERE kind = 'redis'")
            assert caches.renew("a/b", "1") is True  # Redis is fenced, and it is not
            assert caches.renew("a/b", "2") is None
    finally:
        drop_database(stack, name)
