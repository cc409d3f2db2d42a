"""Databases for tests, on the PostgreSQL server of a stack."""

from itertools import count

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from testkit.stack import Stack

_numbers = count(1)


def superuser(stack: Stack) -> str:
    password = (stack.data / "secrets" / "postgres_password").read_text().strip()
    return make_conninfo(stack.postgres, user="postgres", password=password, dbname="postgres")


def make_database(stack: Stack, options: str = "") -> tuple[str, str]:
    name = f"migration_{next(_numbers)}"
    with psycopg.connect(superuser(stack), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER velikiy " + options).format(sql.Identifier(name)))
    return name, make_conninfo(stack.postgres, dbname=name)


def drop_database(stack: Stack, name: str) -> None:
    with psycopg.connect(superuser(stack), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def rows(address: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(address, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def execute(address: str, script: str) -> None:
    with psycopg.connect(address) as connection:
        connection.execute(script)
