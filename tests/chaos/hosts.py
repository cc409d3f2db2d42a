"""The service on seven hosts (testkit.cluster): PostgreSQL, Redis, two apps, the relay and two edges, one on each.

A host is a network namespace. A fault cuts its links, slows them or makes them lossy, in both directions or in one, for
connections that are open as well as for new ones. The connections of the edges to `app1`, and those of `app1` to
PostgreSQL and Redis, pass proxies in this process, where a fault changes and withholds bytes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import redis

from testkit.cluster import Cluster, Host, cluster
from testkit.name_server import NameServer, name_server
from testkit.stack import EDGE_SECRET, ROOT, Stack, status_of, wait_until
from testkit.tcp_proxy import tcp_proxy
from tests.chaos.service import Kind, Missing, Service, need_programs
from velikiy.coherence import RedisTier
from velikiy.coherence.membership import RECORD
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.findings import Finding, caches, merged, postgres, processes
from velikiy.resources.base import registry
from velikiy.stack import local_http

POSTGRES, REDIS, APP, EDGE, CONTROL = 22001, 22002, 22003, 22004, 22005

NAMES = ("postgres", "redis", "app1", "app2", "relay", "edge1", "edge2")

LOOK_S = 1.4
"""Seconds for which findings() waits for a part, as `./run status` does."""

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@dataclass
class Hosts(Service):
    """It has no plan and no supervisor."""

    cluster: Cluster = field(kw_only=True)
    proxy_address: str = field(kw_only=True)
    """Where the proxies listen: the address under which the edges reach app1, and app1 reaches PostgreSQL and Redis."""

    names: NameServer | None = None
    """The name server of a service whose parts know each other by names."""

    def host(self, name: str) -> Host:
        return self.cluster.hosts[NAMES.index(name)]

    def end(self, name: str) -> Host | str:
        """Return the end of a link: a host, `clients`, or `proxies` for app1 as the others see it."""
        ends = {"clients": self.cluster.outside, "proxies": self.proxy_address}
        return ends.get(name) or self.host(name)

    @property
    def apps(self) -> list[str]:
        return [f"http://{self.host(name).address}:{APP}" for name in ("app1", "app2")]

    def pids(self, name: str) -> list[int]:
        return sorted(self.host(name).processes())

    def connect(self, role: str = "owner", **options: Any) -> "psycopg.Connection[Any]":
        user = "postgres" if role == "owner" else "velikiy"
        options = {"autocommit": True, "connect_timeout": 5, "application_name": "chaos", **options}
        return psycopg.connect(self.database_url(user), **options)

    def database_url(self, user: str = "velikiy", host: str = "") -> str:
        return f"postgresql://{user}:secret@{host or self.host('postgres').address}:{POSTGRES}/velikiy"

    def redis_url(self, host: str = "") -> str:
        return f"redis://{host or self.host('redis').address}:{REDIS}/0"

    def redis(self, **options: Any) -> "redis.Redis":
        return redis.Redis.from_url(self.redis_url(), **{"socket_timeout": 2, "socket_connect_timeout": 2, **options})

    def forget(self) -> None:
        with self.connect() as connection:
            connection.execute("DELETE FROM caches WHERE name LIKE %s", (f"{RECORD}%",))

    # ---- what is seen ----

    def findings(self) -> list[Finding]:
        """Return what the health checks of every edge and app say, and the state of PostgreSQL, Redis and the table
        `caches` from outside, as `velikiy doctor` sees them."""
        looks: list[Callable[[], list[Finding]]] = [self._of_postgres, self._of_redis]
        looks += [partial(_of_app, name, url) for name, url in zip(("app1", "app2"), self.apps, strict=True)]
        looks += [partial(self._of_edge, number) for number in range(len(self.edges))]
        with ThreadPoolExecutor(len(looks)) as pool:
            return merged([finding for found in pool.map(lambda look: look(), looks) for finding in found])

    def _of_postgres(self) -> list[Finding]:
        dsn = postgres.with_short_wait(self.database_url("postgres"))
        try:
            with psycopg.connect(dsn, autocommit=True, connect_timeout=2) as connection:
                known = caches.table(connection)  # type: ignore[arg-type]
                found = postgres.hazards(connection, [*registry()])  # type: ignore[arg-type]
        except psycopg.Error:
            return [postgres.silent()]
        self.more["table"] = known
        return [*found, *caches.edges(known), *caches.unsteady(known)]

    def _of_redis(self) -> list[Finding]:
        known = self.more.get("table")
        tier = RedisTier(self.redis_url(), lambda: None, ttl=60, timeout=LOOK_S / 3)
        try:
            tier.identify()
        except DoesNotAnswer as error:
            return [caches.redis_unusable(str(error))]
        return caches.redis(tier, known) if known else []

    def _of_edge(self, number: int) -> list[Finding]:
        name = f"edge{number + 1}"
        with suppress(*local_http.UNANSWERED):
            state = json.loads(local_http.get_any(f"{self.edges[number]}/readyz", timeout=LOOK_S))
            if "checks" in state:
                return [Finding.from_json(it) for it in state.get("findings", ())]
        # Without any app, only the control listener answers, for orchestrators.
        with suppress(*local_http.UNANSWERED):
            control = f"http://{self.host(name).address}:{CONTROL}/readyz"
            has_no_lease = "no cache lease" in local_http.get_any(control, timeout=LOOK_S)
            return [caches.silent_apps(len(self.apps)), *([caches.no_lease()] if has_no_lease else [])]
        return [processes.hangs(name, LOOK_S, 0)]


def _of_app(name: str, url: str) -> list[Finding]:
    try:
        state = json.loads(local_http.get_any(f"{url}/readyz", timeout=LOOK_S))
    except local_http.UNANSWERED:
        return [processes.hangs(name, LOOK_S, 0)]
    return [Finding.from_json(it) for it in state.get("findings", ())]


# ---- starting ----


@contextmanager
def start(*, by_name: bool = False) -> Iterator[Hosts]:
    """
    Args:
        by_name: The parts of the service know each other by names, as containers do.
    """
    if os.geteuid() != 0:
        raise Missing("only root can create network namespaces")
    need_programs("ip", "nsenter", "iptables-restore")
    with ExitStack() as context:
        machines = context.enter_context(cluster(len(NAMES)))
        addresses = dict(zip(NAMES, (host.address for host in machines.hosts), strict=True))
        stack = Stack.__new__(Stack)  # its addresses, without `./run status`, which does not know these servers
        service = Hosts(
            stack,
            [f"http://{addresses[name]}:{EDGE}" for name in ("edge1", "edge2")],
            cluster=machines,
            proxy_address=machines.add_outside_address(),
        )
        stack.data, stack.edges, stack.apps = machines.hosts[0].folder.parent, service.edges, service.apps
        stack.postgres, stack.redis_url = service.database_url("postgres"), service.redis_url()
        try:
            _start_servers(service)
            service.proxies = {
                name: context.enter_context(
                    tcp_proxy((addresses[host], port), service.proxy_address, port, record=False)
                )
                for name, host, port in (
                    ("app", "app1", APP),
                    ("postgres", "postgres", POSTGRES),
                    ("redis", "redis", REDIS),
                )
            }
            if by_name:
                known = {name_of(name): [address] for name, address in addresses.items()}
                service.names = context.enter_context(name_server(machines.outside, known))
            _start_service(service)
        except BaseException:
            print("\n".join(f"{host.name} {file.name}\n{file.read_text(errors='replace')[-2000:]}"
                            for host in machines.hosts for file in host.folder.glob("*.log")))  # fmt: skip
            raise
        yield service


def _start_servers(service: Hosts) -> None:
    host = service.host("postgres")
    password = host.folder / "password"
    password.write_text("secret")
    password.chmod(0o644)
    host.run(str(PROGRAMS[-1] / "initdb"), "--pgdata", "data", "--username", "postgres", "--encoding", "UTF8", "--locale",
             "C.UTF-8", "--auth", "scram-sha-256", "--pwfile", str(password), "--no-sync", user="postgres")  # fmt: skip
    with (host.folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all scram-sha-256\n")
    settings = {
        "listen_addresses": host.address,
        "port": str(POSTGRES),
        "unix_socket_directories": "",
        "max_connections": "150",
        "deadlock_timeout": "100ms",
    }
    host.start("postgres", str(PROGRAMS[-1] / "postgres"), "-D", "data",
               *(f"--{name}={value}" for name, value in settings.items()), user="postgres")  # fmt: skip
    host = service.host("redis")
    host.start("redis", "redis-server", "--bind", host.address, "--port", str(REDIS), "--protected-mode", "no",
               "--save", "", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")  # fmt: skip

    def answers() -> bool:
        with (
            suppress(psycopg.Error),
            psycopg.connect(
                service.database_url("postgres").replace("/velikiy", "/postgres"), autocommit=True
            ) as connection,
        ):
            connection.execute("CREATE ROLE velikiy LOGIN PASSWORD 'secret'")
            connection.execute("CREATE DATABASE velikiy OWNER velikiy")
            return True
        return False

    wait_until(answers, within=20, what="PostgreSQL answers")


def name_of(host: str) -> str:
    return f"{host}.chaos"


WITH_NAME_SERVER = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


def _start_service(service: Hosts) -> None:
    resolving: list[str] = []
    place = {name: service.host(name).address for name in NAMES}
    if service.names:
        file = service.host("relay").folder / "resolv.conf"
        file.write_text(f"nameserver {service.cluster.outside}\n")
        resolving = ["unshare", "--mount", "sh", "-c", WITH_NAME_SERVER, str(file)]
        place = {name: name_of(name) for name in NAMES}
    common = {
        "PYTHONPATH": str(ROOT),
        "EDGE_SECRET": EDGE_SECRET,
        "AUTH": "off",
        "BIND": "0.0.0.0",
        "RATE_REQUESTS": "0",
        "RATE_CONNECTIONS": "0",
        "METRICS": "off",
    }
    direct = {
        **common,
        "DATABASE_URL": service.database_url(host=place["postgres"]),
        "REDIS_URL": service.redis_url(place["redis"]),
    }
    by_proxies = {
        **common,
        "DATABASE_URL": service.database_url(host=service.proxy_address),
        "REDIS_URL": service.redis_url(service.proxy_address),
    }
    relay = service.host("relay")
    relay.run(*resolving, sys.executable, "-P", "-m", "velikiy", "migrate", **direct)
    relay.start("relay", *resolving, sys.executable, "-P", "-m", "velikiy", "relay", **direct)
    gunicorn = [
        sys.executable,
        "-m",
        "gunicorn",
        "-c",
        f"{ROOT}/velikiy/server/gunicorn.conf.py",
        "velikiy:create_app()",
    ]
    for name, environment in (("app1", by_proxies), ("app2", direct)):
        host = service.host(name)
        host.start("app", *resolving, *gunicorn, **environment, APP_LISTEN=f"{host.address}:{APP}", APP_FIRST_CPU="-1")
    for name in ("edge1", "edge2"):
        host = service.host(name)
        host.start("edge", *resolving, f"{ROOT}/edge/start", **direct, EDGE_DATA=str(host.folder / "edge"),
                   EDGE_LISTEN=f"{host.address}:{EDGE}", EDGE_CONTROL=f"{host.address}:{CONTROL}",
                   EDGE_ADDRESS=place[name], EDGE_APPS=f"{service.proxy_address}:{APP},{place['app2']}:{APP}")  # fmt: skip
    wait_until(lambda: all(status_of(f"{edge}/health") == 200 for edge in service.edges), within=40)


HOSTS = Kind("hosts", start)
"""The service on hosts of their own, with TCP between its servers."""

NAMED_HOSTS = Kind("hosts with names", partial(start, by_name=True))
"""The same with a name server. app1 and the edges reach the proxies by their address."""
