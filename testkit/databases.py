"""Databases for tests, on the PostgreSQL server of a stack."""

from itertools import count

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from testkit.stack import Stack

_numbers = count(1)


def superuser_dsn(stack: Stack) -> str:
    password = (stack.data / "secrets" / "postgres_password").read_text().strip()
    return make_conninfo(stack.postgres, user="postgres", password=password, dbname="postgres")


def create_database(stack: Stack, options: str = "") -> tuple[str, str]:
    """Create a database that belongs to the app's role; return its name and its DSN."""
    name = f"migration_{next(_numbers)}"
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER velikiy " + options).format(sql.Identifier(name)))
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
