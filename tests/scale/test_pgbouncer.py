"""Apps behind PgBouncer in transaction mode, which lends a session of PostgreSQL for one transaction."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.stack import Stack, folder, free_ports, refused, running, wait_until
from tests.consistency.load import Load
from tests.consistency.soak import Soak, progress
from velikiy.postgres import Database, DatabaseUnavailable

pytestmark = [pytest.mark.scale, pytest.mark.exclusive]

CONNECT_QUERY = (
    'SET velikiy.passes_gate = on; SET TimeZone = UTC; SET default_transaction_isolation = "read committed";'
    " SET synchronous_commit = on; SET statement_timeout = 900; SET lock_timeout = 800; SET idle_in_transaction_session_timeout = 3000"
)

CONFIGURATION = """
[databases]
velikiy = host={host} port={port} dbname={dbname} {connect_query}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = 3
admin_users = velikiy
logfile =
"""


@contextmanager
def pgbouncer(stack: Stack, connect_query: str = f"connect_query='{CONNECT_QUERY}'") -> Iterator[str]:
    """Run a PgBouncer in front of the stack's PostgreSQL, with three sessions, and yield the address for apps."""
    to = conninfo_to_dict(stack.postgres)
    listen = free_ports(1)
    with folder() as path:
        (path / "users.txt").write_text(f'"{to["user"]}" "{to["password"]}"\n')
        file = path / "pgbouncer.ini"
        file.write_text(
            CONFIGURATION.format(
                host=to["host"],
                port=to.get("port", "5432"),
                dbname=to["dbname"],
                folder=path,
                listen=listen,
                connect_query=connect_query,
            )
        )
        owner = stack.data.stat()  # who alone may connect to the socket of PostgreSQL
        with subprocess.Popen(
            ["/usr/sbin/pgbouncer", str(file)],
            user=owner.st_uid,
            group=owner.st_gid,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            stderr=(path / "log").open("wb"),
        ) as process:
            address = make_conninfo(stack.postgres, host="127.0.0.1", port=listen)
            try:
                wait_until(lambda: answers(address), what="PgBouncer answers")
                yield address
            finally:
                process.terminate()


def answers(address: str) -> bool:
    try:
        psycopg.connect(address, connect_timeout=2).close()
    except psycopg.Error:
        return False
    return True


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running() as stack:
        yield stack


def test_promise_holds_behind_pgbouncer_while_sql_bypasses_it(stack: Stack) -> None:
    """The sixteen threads of the apps share three sessions."""
    with (
        pgbouncer(stack) as pooler,
        running(
            "--edges", "2", DATABASE_URL=pooler, DATABASE_DIRECT_URL=stack.postgres, REDIS_URL=stack.redis_url
        ) as pooled,
    ):
        soak = Soak(Load(tuple(pooled.edges), seed=1, database=stack.postgres))
        for _ in soak.run(12):
            pass
        print(progress(soak.seconds, soak.verdict, soak.verdict.reads / soak.seconds))
        assert soak.verdict.wrong == 0, soak.verdict
        assert soak.verdict.writes["ok"] > 50


def test_start_names_what_the_sessions_of_a_pooler_lack(stack: Stack) -> None:
    with folder() as data, pgbouncer(stack, "") as pooler:
        command = ("up", "--detach", "--data", str(data / "data"), "--port", str(free_ports(1)))
        lacking = refused(*command, DATABASE_URL=pooler, DATABASE_DIRECT_URL=stack.postgres)
        assert "velikiy.passes_gate=on" in lacking and "connect_query" in lacking
        assert "DATABASE_DIRECT_URL" in refused(*command, DATABASE_URL=pooler)


def test_writes_bound_their_own_transactions_behind_a_pooler_that_does_not(stack: Stack) -> None:
    """A process that is stopped inside a transaction would keep a session of the pooler, a row and its paths for good."""
    without_timeouts = CONNECT_QUERY.partition(" SET statement_timeout")[0]
    with pgbouncer(stack, f"connect_query='{without_timeouts}'") as pooler:
        database = Database(pooler, size=1, timeout=1, pooled=True)
        database.open()
        try:
            for factor, idle in ((1, "3s"), (3, "5s")):
                with database.transaction(factor) as connection:
                    [shown] = connection.execute("SHOW idle_in_transaction_session_timeout").fetchall()
                    assert shown == (idle,)
        finally:
            database.close()


def test_apps_use_no_session_of_a_pooler_that_lacks_settings(stack: Stack) -> None:
    with pgbouncer(stack, "") as pooler:
        database = Database(pooler, size=1, timeout=1, pooled=True)
        database.open()
        try:
            with pytest.raises(DatabaseUnavailable), database.autocommit():
                pass
        finally:
            database.close()
