"""Consoles of PostgreSQL and Redis. Passwords pass through the environment, because every user of the machine sees the
arguments of commands."""

import os
import re
import shutil
from collections.abc import Sequence
from typing import NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

from velikiy.redis_address import RedisAddress
from velikiy.stack import Refusal

CONNECT_S = 2


def psql(address: str, arguments: Sequence[str]) -> NoReturn:
    """Become psql, connected to this address.

    Raises:
        Refusal: psql is not installed.
    """
    from velikiy.postgres import client_programs  # an import at the top would delay each command

    try:
        program = client_programs.find("psql")
    except client_programs.NotInstalled as error:
        raise Refusal(f"{error}.") from None
    os.execve(program, ["psql", *arguments], client_programs.environment(address))  # noqa: S606


def redis_cli(address: str, arguments: Sequence[str]) -> NoReturn:
    """Become redis-cli, connected to this address.

    Raises:
        Refusal: redis-cli is not installed.
    """
    program = shutil.which("redis-cli")
    if program is None:
        raise Refusal("redis-cli is not installed. Install Debian's redis-tools.")
    url = urlsplit(_address_of_a_server(address))
    if url.scheme == "unix":
        server = ["-s", unquote(url.path), "-n", parse_qs(url.query).get("db", ["0"])[0]]
    else:
        server = ["-h", url.hostname or "localhost", "-p", str(url.port or 6379), "-n", url.path.strip("/") or "0"]
        server += ["-c"]  # follows the redirections of a cluster
    server += ["--tls"] if url.scheme == "rediss" else []
    server += ["--user", unquote(url.username)] if url.username else []
    password = {"REDISCLI_AUTH": unquote(url.password)} if url.password else {}
    os.execve(program, ["redis-cli", *server, *arguments], {**os.environ, **password})  # noqa: S606


def _address_of_a_server(address: str) -> str:
    """Return the address of one server in use. REDIS_URL may name several hosts, or Sentinels."""
    from velikiy.coherence.redis_servers import AWAY, RedisServers

    named = RedisAddress.parse(address)
    if named.is_fixed:
        return address
    try:
        return named.of(RedisServers(address, CONNECT_S).discover().servers[0].place)
    except AWAY as error:
        raise Refusal(f"No Redis of REDIS_URL can be used ({error}).") from None


def masked(address: str) -> str:
    """Return the address of a server without its password, for people and programs that only show it."""
    address = re.sub(r"(://[^:/?]*:).*@", r"\1***@", address)
    return re.sub(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", r"\1***", address)
