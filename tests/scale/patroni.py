"""Three hosts with PostgreSQL under Patroni, etcd, an app and an edge each; Redis and a relay on the first."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import requests

from testkit.cluster import Cluster, Host, cluster
from testkit.stack import EDGE_SECRET, ROOT, status_of, wait_until

TTL_S, LOOP_WAIT_S, RETRY_TIMEOUT_S = 10, 1, 4
"""Patroni's times, with LOOP_WAIT_S + 2 x RETRY_TIMEOUT_S <= TTL_S: a leader that is cut off steps down in time."""

POSTGRES, ETCD, PATRONI, APP, EDGE, CONTROL, REDIS = 18410, 18411, 18413, 18414, 18415, 18416, 18417
ETCD_PEER = 18412

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]

CONFIGURATION = """
scope: velikiy
name: {name}
restapi: {{listen: "{address}:{rest}", connect_address: "{address}:{rest}"}}
etcd: {{hosts: [{etcd}]}}
bootstrap:
  dcs:
    ttl: {ttl}
    loop_wait: {loop_wait}
    retry_timeout: {retry_timeout}
    synchronous_mode: true
    postgresql:
      use_pg_rewind: true
      parameters: {{max_connections: 100, wal_keep_size: 64MB}}
  initdb: [{{encoding: UTF8}}, {{locale: C.UTF-8}}, data-checksums]
  pg_hba: [host replication replicator all scram-sha-256, host all all all scram-sha-256]
postgresql:
  listen: "{address}:{port}"
  connect_address: "{address}:{port}"
  data_dir: {folder}/data
  bin_dir: {programs}
  pgpass: {folder}/pgpass
  basebackup: [{{checkpoint: fast}}]
  authentication:
    superuser: {{username: postgres, password: secret}}
    replication: {{username: replicator, password: secret}}
    rewind: {{username: postgres, password: secret}}
  parameters:
    unix_socket_directories: {folder}
    shared_buffers: 16MB
    deadlock_timeout: 100ms
    fsync: 'on'
"""


@dataclass
class Node:
    host: Host

    @property
    def address(self) -> str:
        return self.host.address

    @property
    def app(self) -> str:
        return f"http://{self.address}:{APP}"

    @property
    def edge(self) -> str:
        return f"http://{self.address}:{EDGE}"

    def superuser(self) -> "psycopg.Connection[tuple[object, ...]]":
        """Connect to the PostgreSQL of this host, whatever it is."""
        return psycopg.connect(
            host=self.address, port=POSTGRES, user="postgres", password="secret", autocommit=True, connect_timeout=2
        )

    def takes_writes(self) -> bool:
        """Return whether the PostgreSQL of this host believes that it is the leader."""
        with suppress(psycopg.Error), self.superuser() as connection:
            return connection.execute("SELECT NOT pg_is_in_recovery()").fetchone() == (True,)
        return False

    def has_role(self, role: str) -> bool:
        """Return whether Patroni reports this role: primary, replica, synchronous."""
        try:
            return requests.get(f"http://{self.address}:{PATRONI}/{role}", timeout=1).status_code == 200
        except requests.RequestException:
            return False


@dataclass
class Failover:
    cluster: Cluster
    nodes: list[Node]

    @property
    def hosts(self) -> list[Host]:
        return self.cluster.hosts

    @property
    def database_url(self) -> str:
        hosts = ",".join(f"{node.address}:{POSTGRES}" for node in self.nodes)
        return f"postgresql://velikiy:secret@{hosts}/velikiy"

    @property
    def edges(self) -> tuple[str, ...]:
        return tuple(node.edge for node in self.nodes)

    def leader(self) -> Node:
        """Return the leader, once it has a synchronous standby and every host takes part again."""
        wait_until(self._is_settled, within=90, every=0.2, what="Patroni has a leader and two replicas")
        return next(node for node in self.nodes if node.has_role("primary"))

    def _is_settled(self) -> bool:
        roles = sorted((node.has_role("primary"), node.has_role("replica")) for node in self.nodes)
        return roles == [(False, True), (False, True), (True, False)] and any(
            node.has_role("synchronous") for node in self.nodes
        )

    def successor(self, old: Node) -> Node:
        """Wait until another host takes writes, and return it."""
        others = [node for node in self.nodes if node is not old]
        wait_until(lambda: any(node.takes_writes() for node in others), within=60, every=0.02)
        return next(node for node in others if node.takes_writes())

    def switch_over(self, old: Node) -> None:
        requests.post(
            f"http://{old.address}:{PATRONI}/switchover", json={"leader": old.host.name}, timeout=30
        ).raise_for_status()

    def start_etcd(self, node: Node) -> None:
        peers = ",".join(f"{other.host.name}=http://{other.address}:{ETCD_PEER}" for other in self.nodes)
        node.host.start(
            "etcd",
            *["etcd", "--name", node.host.name, "--data-dir", "etcd", "--log-level", "error", "--unsafe-no-fsync"],
            # Patroni before 3.0.3 overwrites the key of a new leader if it uses the API of version 3 (patroni#2689).
            "--enable-v2",
            *["--listen-peer-urls", f"http://{node.address}:{ETCD_PEER}"],
            *["--initial-advertise-peer-urls", f"http://{node.address}:{ETCD_PEER}"],
            *["--listen-client-urls", f"http://{node.address}:{ETCD}"],
            *["--advertise-client-urls", f"http://{node.address}:{ETCD}", "--initial-cluster", peers],
        )

    def start_patroni(self, node: Node) -> None:
        file = node.host.folder / "patroni.yml"
        file.write_text(
            CONFIGURATION.format(
                name=node.host.name,
                address=node.address,
                rest=PATRONI,
                port=POSTGRES,
                etcd=", ".join(f'"{other.address}:{ETCD}"' for other in self.nodes),
                folder=node.host.folder,
                programs=PROGRAMS,
                ttl=TTL_S,
                loop_wait=LOOP_WAIT_S,
                retry_timeout=RETRY_TIMEOUT_S,
            )
        )
        node.host.start("patroni", "/usr/bin/patroni", str(file), user="postgres", PYTHONPATH="")

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": self.database_url,
            "REDIS_URL": f"redis://{self.nodes[0].address}:{REDIS}/0",
            "EDGE_SECRET": EDGE_SECRET,
            "AUTH": "off",
            "BIND": "0.0.0.0",
            "APP_WORKERS": "1",
            "EDGE_WORKERS": "1",
            "RATE_REQUESTS": "0",
            "RATE_CONNECTIONS": "0",
        }

    def start_service(self) -> None:
        environment = self.environment()
        first = self.nodes[0].host
        first.start("redis", "redis-server", "--bind", first.address, "--port", str(REDIS), "--protected-mode", "no",
                    "--save", "")  # fmt: skip
        first.run(sys.executable, "-P", "-m", "velikiy", "migrate", **environment)
        apps = ",".join(f"{node.address}:{APP}" for node in self.nodes)
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", f"{ROOT}/velikiy/server/gunicorn.conf.py"]
        for node in self.nodes:
            listen = f"{node.address}:{APP}"
            node.host.start("app", *gunicorn, "velikiy:create_app()", **environment, APP_LISTEN=listen)
            node.host.start("relay", sys.executable, "-P", "-m", "velikiy", "relay", **environment)
            node.host.start(
                "edge",
                f"{ROOT}/edge/start",
                **environment,
                EDGE_DATA=str(node.host.folder / "edge"),
                EDGE_LISTEN=f"{node.address}:{EDGE}",
                EDGE_CONTROL=f"{node.address}:{CONTROL}",
                EDGE_APPS=apps,
            )
        wait_until(lambda: all(status_of(f"{node.edge}/health") == 200 for node in self.nodes), within=60)

    def explain(self) -> str:
        """Return what each Patroni has logged last, for a test that fails."""
        return "\n".join(f"{node.host.name}\n{node.host.log('patroni')[-1500:]}" for node in self.nodes)


@contextmanager
def failover() -> Iterator[Failover]:
    """Start everything, with the leader on the first host."""
    with cluster(nodes=3) as machines:
        service = Failover(machines, [Node(host) for host in machines.hosts])
        for node in service.nodes:
            service.start_etcd(node)
        service.start_patroni(service.nodes[0])
        try:
            wait_until(lambda: service.nodes[0].has_role("primary"), within=60, what="PostgreSQL has a leader")
            with service.nodes[0].superuser() as connection:
                connection.execute("CREATE ROLE velikiy LOGIN PASSWORD 'secret'")
                connection.execute("CREATE DATABASE velikiy OWNER velikiy")
            for node in service.nodes[1:]:
                service.start_patroni(node)
            service.leader()
            service.start_service()
            yield service
        except BaseException:
            print(service.explain())
            raise


if __name__ == "__main__":  # to look around by hand
    with failover() as it:
        print(it.edges, it.database_url, flush=True)
        time.sleep(3600)
