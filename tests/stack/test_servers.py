"""`./run up` names what is wrong with a PostgreSQL or a Redis of the user's own, before anything is started."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from testkit.databases import create_database, drop_database
from testkit.stack import Stack, folder, free_ports, refused, run, running, wait_until
from velikiy.stack.reaper import leftovers


@contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """Start a Redis of its own, and return its host and port."""
    port = str(free_ports(1))
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", *options]
    process = subprocess.Popen(command, cwd="/tmp", stdout=subprocess.DEVNULL)
    try:
        ping = ["redis-cli", "-p", port, "ping"]
        wait_until(lambda: subprocess.run(ping, capture_output=True, text=True, check=False).stdout)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def refused_up(**environment: str) -> str:
    with folder() as temporary:
        message = refused(
            "up", "--detach", "--data", str(temporary / "data"), "--port", str(free_ports(1)), **environment
        )
        assert leftovers(temporary / "data") == []
        return message


@pytest.mark.parametrize(
    ("options", "url", "cause"),
    [
        (["--requirepass", "secret"], "redis://:wrong@{}", "refuses the user or the password"),
        (["--requirepass", "secret"], "redis://{}", "needs a password, which the address lacks"),
        (["--replicaof", "127.0.0.1 1"], "redis://{}", "is a replica that accepts no writes"),
        (["--rename-command", "EVAL", ""], "redis://{}", "lacks a command that this service needs"),
        (["--rename-command", "FLUSHDB", ""], "redis://{}", "lacks the command FLUSHDB"),
        (["--user", "low", "on", ">pw", "~*", "+@read", "+ping"], "redis://low:pw@{}", "does not permit its user"),
        ([], "redis://{}/99", "has no database of this number"),
        ([], "rediss://{}", "does not speak TLS"),
    ],
)
def test_redis_that_cannot_be_used_is_named_with_the_cause(
    stack: Stack, options: list[str], url: str, cause: str
) -> None:
    with redis_server(*options) as address:
        message = refused_up(REDIS_URL=url.format(address))
    assert "The Redis of REDIS_URL" in message
    assert cause in message


def test_redis_that_does_not_answer_is_a_warning_and_no_refusal() -> None:
    with folder() as temporary:
        data = temporary / "data"
        try:
            started = run(
                "up", "--detach", "--data", str(data), "--port", str(free_ports(1)), REDIS_URL="redis://127.0.0.1:1"
            )
            assert started.returncode == 0, started.stderr
            assert "warning: the Redis of REDIS_URL does not answer" in started.stderr
        finally:
            run("down", "--wipe", "--data", str(data))


def test_cache_show_names_a_wrong_password_of_redis() -> None:
    with running() as stack:
        wrong = f"unix://:wrong@{stack.redis_socket}"
        shown = run("velikiy", "cache", "show", "/users", DATA=str(stack.data), REDIS_URL=wrong)
        assert "refuses the user or the password" in shown.stdout


@pytest.mark.parametrize(
    ("change", "cause", "next_step"),
    [
        ({"password": "wrong"}, "password authentication failed", "Correct the user and the password"),
        ({"dbname": "nothing"}, 'database "nothing" does not exist', "Create it, or correct the name"),
        ({"port": "1"}, "No such file or directory", "Check the host, the port and that the server runs"),
        ({"host": "127.0.0.1", "port": "1"}, "Connection refused", "Check the host, the port and that the server runs"),
    ],
)
def test_postgresql_that_cannot_be_used_is_named_with_the_cause(
    stack: Stack, change: dict[str, str], cause: str, next_step: str
) -> None:
    address = psycopg.conninfo.make_conninfo(stack.postgres, **change)
    message = refused_up(DATABASE_URL=address)
    assert "DATABASE_URL cannot be used" in message
    assert cause in message
    assert next_step in message


def test_standby_postgresql_is_refused(stack: Stack) -> None:
    address = psycopg.conninfo.make_conninfo(stack.postgres, options="-c default_transaction_read_only=on")
    assert "Let it name the primary server" in refused_up(DATABASE_URL=address)


def test_user_of_postgresql_without_rights_on_the_tables_is_refused(stack: Stack) -> None:
    password = (stack.data / "secrets" / "postgres_password").read_text().strip()
    superuser = psycopg.conninfo.make_conninfo(stack.postgres, user="postgres", password=password)
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN PASSWORD 'pw'")
        try:
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
            address = psycopg.conninfo.make_conninfo(stack.postgres, user="reader", password="pw")
            message = refused_up(DATABASE_URL=address)
        finally:
            connection.execute("DROP OWNED BY reader")
            connection.execute("DROP ROLE reader")
    assert "may not read and write these tables: users" in message


def test_too_few_connections_of_postgresql_are_a_warning(stack: Stack) -> None:
    name, address = create_database(stack)
    try:
        with folder() as temporary:
            data = temporary / "data"
            command = ("up", "--detach", "--data", str(data), "--port", str(free_ports(1)), "--apps", "1")
            try:
                started = run(*command, DATABASE_URL=address, APP_THREADS="100")
                assert started.returncode == 0, started.stderr
                assert "max_connections of the server allows" in started.stderr
            finally:
                run("down", "--wipe", "--data", str(data))
    finally:
        drop_database(stack, name)


def test_addresses_work_with_psql_and_redis_cli(stack: Stack) -> None:
    password = {"REDISCLI_AUTH": stack.secret("redis_password")}
    for command in (["psql", stack.postgres, "-Atc", "SELECT 'PONG'"], ["redis-cli", "-s", stack.redis_socket, "ping"]):
        answered = subprocess.run(command, env={**os.environ, **password}, capture_output=True, text=True, check=False)
        assert answered.stdout.strip() == "PONG", answered.stderr
