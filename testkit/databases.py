"""Databases for tests, on the PostgreSQL server of a stack, and Redis servers of their own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from redis import Redis
from redis.exceptions import RedisError

from testkit.stack import Stack, free_ports, wait_until

_numbers = count(1)


def superuser_dsn(stack: Stack) -> str:
    password = (stack.data / "secrets" / "postgres_password").read_text().strip()
    return make_conninfo(stack.postgres, user="postgres", password=password, dbname="postgres")


def create_database(stack: Stack, options: str = "") -> tuple[str, str]:
    """Create a database that belongs to the role which owns the tables; return its name and its DSN."""
    name = f"migration_{next(_numbers)}"
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER velikiy_owner " + options).format(sql.Identifier(name)))
    return name, make_conninfo(stack.postgres, dbname=name)


def drop_database(stack: Stack, name: str) -> None:
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def fetch_rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def execute(dsn: str, script: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(script)


@contextmanager
def redis_at_a_socket(path: Path) -> Iterator[None]:
    """Run a Redis without a password at a Unix socket that every user may use."""
    options = ["--port", "0", "--unixsocket", str(path), "--unixsocketperm", "777", "--dir", "/", "--save", ""]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as server:
        with Redis(unix_socket_path=str(path)) as client:
            wait_until(lambda: answers(client))
        yield
        server.terminate()


@contextmanager
def redis_server(data: Path | None = None, port: int = 0) -> Iterator[int]:
    """Run a Redis without a password, and return its port. With a folder, Redis keeps its entries there."""
    port = port or free_ports(1)
    keep = ["--dir", str(data), "--appendonly", "yes"] if data else ["--dir", "/", "--save", ""]
    with subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", *keep], stdout=subprocess.DEVNULL
    ) as server:
        with Redis(port=port) as client:
            wait_until(lambda: answers(client))
        try:
            yield port
        finally:
            server.terminate()


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False
