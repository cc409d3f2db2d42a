"""A PostgreSQL and a Redis of the user's own over TLS, and what `./run up` says about certificates that do not fit."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
import requests
from psycopg.conninfo import make_conninfo

from testkit.certificates import Authority
from testkit.databases import create_database, drop_database, superuser_dsn
from testkit.stack import ROOT, Stack, folder, free_ports, refused, running, wait_until


class Servers(NamedTuple):
    stack: Stack
    """The stack whose PostgreSQL speaks TLS."""

    postgres: str
    redis: str
    trusted: Path
    """The certificate of the authority that has signed the servers' certificates."""

    foreign: Path
    """The certificate of an authority that has signed none of the servers' certificates."""


@contextmanager
def redis_with_tls(path: Path, authority: Authority) -> Iterator[str]:
    """Start a Redis that speaks only TLS, and return its host and port."""
    port = str(free_ports(1))
    files = ["--tls-cert-file", str(path / "cert"), "--tls-key-file", str(path / "key")]
    others = ["--tls-ca-cert-file", str(authority.cert), "--tls-auth-clients", "no", "--save", ""]
    command = ["redis-server", "--port", "0", "--tls-port", port, "--bind", "127.0.0.1", *files, *others]
    process = subprocess.Popen(command, cwd="/tmp", stdout=subprocess.DEVNULL)
    try:
        ping = ["redis-cli", "-p", port, "--tls", "--cacert", str(authority.cert), "ping"]
        wait_until(lambda: subprocess.run(ping, capture_output=True, text=True, check=False).stdout)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with folder() as path, folder() as other, running() as stack:
        authority = Authority(path)
        authority.sign(path / "cert", path / "key")
        _switch_tls_on(stack, path)
        with redis_with_tls(path, authority) as redis:
            postgres = make_conninfo(at_port(stack.postgres), sslmode="verify-full", sslrootcert=str(authority.cert))
            url = f"rediss://{redis}/0?ssl_ca_certs={authority.cert}"
            yield Servers(stack, postgres, url, authority.cert, Authority(other).cert)


def _switch_tls_on(stack: Stack, path: Path) -> None:
    cluster = stack.data / "postgres"
    for name in ("cert", "key"):  # PostgreSQL accepts no key that others may read
        file = Path(shutil.copy(path / name, cluster / f"server.{name}"))
        file.chmod(0o600)
        os.chown(file, cluster.stat().st_uid, cluster.stat().st_gid)
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET ssl_cert_file = 'server.cert'")
        connection.execute("ALTER SYSTEM SET ssl_key_file = 'server.key'")
        connection.execute("ALTER SYSTEM SET ssl = on")
    # TLS needs TCP: let the server listen on a port as well, as a server of one's own does.
    script = stack.data / "run" / "postgres"
    script.write_text(script.read_text().replace("listen_addresses=", "listen_addresses=127.0.0.1"))
    killed = stack.pids()["postgres"]
    os.kill(killed, signal.SIGINT)
    wait_until(lambda: stack.pids().get("postgres", killed) != killed)
    wait_until(stack.healthy, within=30)


def _set_tls(stack: Stack, value: str) -> None:
    with psycopg.connect(superuser_dsn(stack), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET ssl = {value}")
        connection.execute("SELECT pg_reload_conf()")
    wait_until(lambda: stack.sql("SHOW ssl") == [(value,)])


def at_port(dsn: str) -> str:
    return make_conninfo(dsn, host="127.0.0.1", port=5432)


def refused_up(**environment: str) -> str:
    with folder() as temporary:
        return refused("up", "--detach", "--data", str(temporary / "data"), **environment)


def test_stack_uses_both_servers_over_tls_only(servers: Servers) -> None:
    name, postgres = create_database(servers.stack)
    postgres = make_conninfo(at_port(postgres), sslmode="verify-full", sslrootcert=str(servers.trusted))
    with running(DATABASE_URL=postgres, REDIS_URL=servers.redis) as stack:
        assert stack.refresh()["warnings"] == []
        checks = subprocess.run([str(ROOT / "test_app.sh"), stack.edge], capture_output=True, text=True, check=False)
        assert checks.returncode == 0, checks.stdout
        rows = servers.stack.sql(
            "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = %s", name
        )
        assert rows == [(True,)]
        requests.get(f"{stack.edge}/users/1", timeout=5)
        assert "redis; " in requests.get(f"{stack.edges[0]}/users?limit=3", timeout=5).headers["Cache-Status"]
    drop_database(servers.stack, name)


def test_postgres_whose_certificate_is_not_trusted_is_named(servers: Servers) -> None:
    message = refused_up(DATABASE_URL=make_conninfo(servers.postgres, sslrootcert=str(servers.foreign)))
    assert "DATABASE_URL cannot be used" in message
    assert "certificate verify failed" in message
    assert "Correct sslmode, and check the certificates" in message


def test_postgres_without_tls_is_named(servers: Servers) -> None:
    _set_tls(servers.stack, "off")
    try:
        message = refused_up(DATABASE_URL=make_conninfo(at_port(servers.stack.postgres), sslmode="require"))
    finally:
        _set_tls(servers.stack, "on")
    assert "server does not support SSL" in message
    assert "Correct sslmode, and check the certificates" in message


def test_redis_whose_certificate_is_not_trusted_is_named(servers: Servers) -> None:
    address = servers.redis.partition("?")[0]
    message = refused_up(REDIS_URL=f"{address}?ssl_ca_certs={servers.foreign}")
    assert "The Redis of REDIS_URL does not speak TLS at this address, or its certificate is not trusted" in message
