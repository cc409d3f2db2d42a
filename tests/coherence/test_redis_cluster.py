"""A Redis Cluster as tier 2: each key has one server, which the registered map names, and redirections are not followed.

The app and the relay run in this process, on a database of their own, with an edge in front.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from urllib.parse import urlsplit

import pytest
import requests
from redis import Redis

from testkit.databases import create_database, drop_database, redis_server
from testkit.failpoints import Failpoints, Users, failpoint_gate, has_cache_lease, running_app, running_edge
from testkit.redis_cluster import Cluster, Node, cluster, replicas, sentinels
from testkit.stack import Stack, wait_until
from velikiy.coherence import CachePath, Gate
from velikiy.coherence.redis_servers import RedisServers
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.shards import SLOTS, Server, Shard, ShardMap, slot_of
from velikiy.coherence.timing import DROP_TIMEOUT_S, EXCLUSION_S
from velikiy.postgres import migrate
from velikiy.relay.janitor import Janitor
from velikiy.resources.base import registry
from velikiy.settings import BadSetting, Settings, load
from velikiy.stack import Refusal
from velikiy.stack.servers import check_redis

_numbers = count(1)


@dataclass
class Service:
    gate: Gate
    users: Users
    failpoints: Failpoints
    janitor: Janitor
    edge: str

    def user(self, name: str = "old") -> int:
        return self.users.create(name=name, email=f"cluster{next(_numbers)}@example.com")

    def name(self, user: int) -> str:
        response = requests.get(f"{self.edge}/users/{user}", timeout=10)
        assert response.status_code == 200, response.text
        return str(response.json()["name"])

    def is_read_by_the_edge(self, user: int) -> bool:
        """Return whether the edge reads this user from Redis by itself."""
        self.failpoints.reached.clear()
        with self.gate.database.autocommit() as connection:
            self.gate.edge_tier.drop(self.gate.caches.edges(connection), [path_of(user)])
        response = requests.get(f"{self.edge}/users/{user}", timeout=10)
        return "redis; hit" in response.headers["Cache-Status"] and self.failpoints.reached == []

    def redis_in_use(self) -> ShardMap | None:
        return self.gate.caches.in_use()

    def put_into_use(self) -> None:
        """Let the relay look after Redis until it is in use."""

        def look() -> bool:
            self.janitor.look_after_redis()
            return self.redis_in_use() is not None

        wait_until(look, within=30)
        user = self.user()
        wait_until(lambda: self.is_read_by_the_edge(user))


@contextmanager
def service(stack: Stack, redis_url: str) -> Iterator[Service]:
    name, postgres = create_database(stack)
    failpoints = Failpoints()
    gate = failpoint_gate(postgres, redis_url, failpoints)
    try:
        migrate.upgrade(postgres, wait=5)
        with running_app(gate) as app, running_edge(urlsplit(app).netloc, REDIS_URL=redis_url) as (edge, _):
            wait_until(lambda: has_cache_lease(edge))
            running = Service(gate, Users(gate), failpoints, Janitor(gate.database, gate), edge)
            running.put_into_use()
            yield running
    finally:
        gate.database.close()
        drop_database(stack, name)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def module_service(stack: Stack, nodes: Cluster) -> Iterator[Service]:
    with service(stack, nodes.url) as running:
        yield running


@pytest.fixture
def clustered(module_service: Service) -> Service:
    if module_service.redis_in_use() is None or module_service.gate.redis_tier.breaker_open:
        module_service.put_into_use()
    return module_service


def path_of(user: int) -> CachePath:
    return registry()["users"].row_path(user)


def user_at(service: Service, nodes: Cluster, node: Node) -> int:
    """Create a user whose key is at this node."""
    while nodes.owner(slot_of(path_of(user := service.user()).key)) is not node:
        pass
    return user


class TestKeys:
    def test_edge_and_app_find_each_key_at_its_server(self, clustered: Service, nodes: Cluster) -> None:
        users = [user_at(clustered, nodes, node) for node in nodes.nodes]
        for user in users:
            assert clustered.is_read_by_the_edge(user)
            assert clustered.gate.redis_tier.read(path_of(user), "")
        keys = [path_of(user).key for user in users]
        assert [node.command("EXISTS", key) for node, key in zip(nodes.nodes, keys, strict=True)] == [
            1,
            1,
            1,
        ]

    @pytest.mark.parametrize("key", ["user:1", "all_users", "x{a}b", "{}q", "a{b", "}{x}y", "{{a}}", "день:{7}", "{"])
    def test_slot_of_a_key_is_the_slot_of_the_cluster(self, nodes: Cluster, key: str) -> None:
        assert slot_of(key) == int(nodes.nodes[0].cluster("KEYSLOT", key))

    def test_map_has_one_text_for_every_process(self) -> None:
        shards = ShardMap(
            [
                Shard(Server("a.b/0", "[::1]:7000"), ((0, 4), (6, 6))),
                Shard(Server("c.d/0", "redis-2.example:7001"), ((5, 5), (7, SLOTS - 1))),
            ]
        )
        parsed = ShardMap.parse(str(shards))
        assert (str(parsed), parsed.id) == (str(shards), shards.id)
        assert [parsed.shard_of(f"user:{n}").server.id for n in range(9)] == [
            "a.b/0" if slot_of(f"user:{n}") in (0, 1, 2, 3, 4, 6) else "c.d/0" for n in range(9)
        ]
        socket = ShardMap.plain(Server("a.b/3", "/run/a=b;c@d.sock"))
        assert ShardMap.parse(str(socket)).servers == socket.servers


class TestWrites:
    def test_write_drops_its_paths_at_the_server_of_each(self, clustered: Service, nodes: Cluster) -> None:
        for user in [user_at(clustered, nodes, node) for node in nodes.nodes]:
            for address in (f"/users/{user}", "/users", "/users/count"):
                requests.get(clustered.edge + address, timeout=10)
            clustered.users.update(user, "new")
            assert clustered.name(user) == "new"
            for key in ("all_users", "count_users"):
                assert not nodes.owner(slot_of(key)).command("EXISTS", key)
            assert clustered.is_read_by_the_edge(user)

    def test_purge_of_everything_empties_every_server(self, clustered: Service, nodes: Cluster) -> None:
        for node in nodes.nodes:
            user_at(clustered, nodes, node)
        with clustered.gate.database.autocommit() as connection:
            clustered.gate.drop(connection, None)
        assert [node.client.dbsize() for node in nodes.nodes] == [0, 0, 0]

    def test_drop_waits_for_several_silent_servers_no_longer_than_for_one(
        self, clustered: Service, nodes: Cluster
    ) -> None:
        paths = [path_of(user_at(clustered, nodes, node)) for node in nodes.nodes]
        shards = clustered.redis_in_use()
        assert shards
        clustered.gate.redis_tier.drop(paths, shards=shards)
        for node in nodes.nodes:
            node.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(DoesNotAnswer):
                clustered.gate.redis_tier.drop(paths, shards=shards)
            assert time.monotonic() - began < 2 * DROP_TIMEOUT_S
        finally:
            for node in nodes.nodes:
                node.send_signal(signal.SIGCONT)


@pytest.mark.scale
class TestSlots:
    def test_slot_that_moved_is_not_followed_and_the_write_fences_redis(
        self, clustered: Service, nodes: Cluster
    ) -> None:
        source, target = nodes.nodes[0], nodes.nodes[1]
        user = user_at(clustered, nodes, source)
        slot = slot_of(path_of(user).key)
        nodes.move_slots([slot], target)
        try:
            wait_until(lambda: not clustered.gate.redis_tier.breaker_open)
            assert clustered.gate.redis_tier.read(path_of(user), "") is None
            began = time.monotonic()
            clustered.users.update(user, "new")
            assert time.monotonic() - began > EXCLUSION_S
            assert clustered.redis_in_use() is None
            assert target.command("HEXISTS", path_of(user).key, "body:")  # the old entry
            assert clustered.name(user) == "new"
            clustered.put_into_use()
            shards = clustered.redis_in_use()
            assert shards
            assert shards.shard_of(path_of(user).key).server.place == target.place
            assert clustered.name(user) == "new"
        finally:
            nodes.move_slots([slot], source)
            clustered.put_into_use()

    def test_drop_of_a_key_that_is_on_its_way_to_another_server_has_no_success(
        self, clustered: Service, nodes: Cluster
    ) -> None:
        """The key may come back: an interrupted move is undone by moving its keys back."""
        source, target = nodes.nodes[0], nodes.nodes[1]
        user = user_at(clustered, nodes, source)
        slot = slot_of(path_of(user).key)
        nodes.open_slot(slot, source, target)
        nodes.move_keys(slot, source, target)
        try:
            clustered.users.update(user, "new")
            assert clustered.redis_in_use() is None
            source.cluster("SETSLOT", slot, "STABLE")
            nodes.move_keys(slot, target, source)
            assert b"old" in source.command("HGET", path_of(user).key, "body:")
            assert clustered.name(user) == "new"
        finally:
            for node in (source, target):
                node.cluster("SETSLOT", slot, "STABLE")
        clustered.put_into_use()
        assert clustered.name(user) == "new"

    def test_relay_takes_redis_out_of_use_as_long_as_a_slot_is_open(self, clustered: Service, nodes: Cluster) -> None:
        source, target = nodes.nodes[0], nodes.nodes[2]
        nodes.open_slot(0, source, target)
        try:
            for _ in range(2):
                clustered.janitor.look_after_redis()
                assert clustered.redis_in_use() is None
        finally:
            for node in (source, target):
                node.cluster("SETSLOT", 0, "STABLE")
        clustered.put_into_use()


@pytest.mark.scale
def test_cluster_with_a_password_and_few_rights_is_used(stack: Stack) -> None:
    rights = "~* -@all +@read +@write +@connection +@scripting -@dangerous +time +info +flushdb"
    cluster_rights = "+cluster|slots +cluster|nodes +cluster|info"
    with cluster(2, password="p@ss") as nodes:
        for node in nodes.nodes:
            node.command("ACL", "SETUSER", "low", "on", ">p/w", *rights.split(), *cluster_rights.split())
        with service(stack, nodes.url.replace(":p@ss@", "low:p%2Fw@")) as running:
            user = running.user()
            running.users.update(user, "new")
            assert running.name(user) == "new"


@pytest.mark.scale
def test_entry_that_a_promoted_replica_has_kept_is_never_read(stack: Stack) -> None:
    with cluster(3, 1) as nodes, service(stack, nodes.url) as running:
        user = running.user()
        key = path_of(user).key
        killed = nodes.owner(slot_of(key))
        old = killed.command("DUMP", key)
        running.users.update(user, "new")
        killed.kill()
        promoted = wait_until(lambda: nodes.owner_if_any(slot_of(key)))
        assert promoted
        promoted.command("RESTORE", key, 60_000, old, "REPLACE")
        assert running.name(user) == "new"
        running.users.update(user, "newer")
        assert running.name(user) == "newer"
        running.put_into_use()
        shards = running.redis_in_use()
        assert shards
        assert shards.shard_of(key).server.place == promoted.place
        assert running.name(user) == "newer"


@pytest.mark.scale
def test_nodes_that_announce_names_are_used_by_their_names(stack: Stack) -> None:
    names = ["--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname"]
    with cluster(2, options=names) as nodes, service(stack, f"redis://{nodes.nodes[0].place}/0") as running:
        shards = running.redis_in_use()
        assert shards
        assert {it.place.partition(":")[0] for it in shards.servers} == {"localhost"}
        user = running.user()
        running.users.update(user, "new")
        assert running.name(user) == "new"


def test_first_of_several_hosts_that_is_a_primary_is_in_use(stack: Stack) -> None:
    with redis_server() as port, redis_server() as replica, Redis(port=replica) as client:
        client.replicaof("127.0.0.1", str(port))
        with service(stack, f"redis://127.0.0.1:1,127.0.0.1:{replica},127.0.0.1:{port}/2") as running:
            shards = running.redis_in_use()
            assert shards
            assert shards.address == f"127.0.0.1:{port}/2"


def test_primary_that_was_a_replica_in_between_serves_no_entry_on_open_connections(stack: Stack) -> None:
    """Its data came from a server that has missed a drop. No request has noticed the change."""
    with (
        redis_server() as port,
        redis_server() as other,
        Redis(port=port) as primary,
        Redis(port=other) as late,
        service(stack, f"redis://127.0.0.1:{port}/0") as running,
    ):
        user = running.user()
        key = path_of(user).key
        late.config_set("repl-diskless-sync-delay", 0)
        late.restore(key, 60_000, primary.dump(key))
        running.users.update(user, "new")
        assert running.is_read_by_the_edge(user)
        assert running.gate.redis_tier.read(path_of(user), "")
        primary.replicaof("127.0.0.1", str(other))
        wait_until(lambda: b"old" in (primary.hget(key, "body:") or b""))
        primary.replicaof("NO", "ONE")
        assert running.gate.redis_tier.read(path_of(user), "") is None
        assert not running.is_read_by_the_edge(user)
        assert running.name(user) == "new"


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "redis://:p%2Cw@a:1,b:2,[::1]:3/0",
            "rediss://u:p@a,b/2?ssl_ca_certs=/etc/ca.pem",
            "redis+sentinel://a,b:26380/main",
            "redis+sentinel://:pw@a/main/3?sentinel_password=x&socket_keepalive=true",
        ],
    )
    def test_address_with_several_hosts_or_sentinels_is_accepted(self, address: str) -> None:
        assert load(Settings, None, redis_url=address, database_url="postgresql://x", edge_secret="e" * 16)

    @pytest.mark.parametrize(
        "address",
        ["redis://a,,b/0", "redis://a:x,b/0", "redis+sentinel://a", "redis+sentinel://a/main/x", "redis://a,b/x"],
    )
    def test_address_that_lacks_a_part_is_refused(self, address: str) -> None:
        with pytest.raises(BadSetting, match="REDIS_URL"):
            load(Settings, None, redis_url=address, database_url="postgresql://x", edge_secret="e" * 16)

    def test_launcher_accepts_a_cluster_and_names_its_only_database(self, nodes: Cluster) -> None:
        check_redis(nodes.url)
        with pytest.raises(Refusal, match="has only the database number 0"):
            check_redis(f"redis://{nodes.nodes[0].place}/1")

    @pytest.mark.scale
    def test_launcher_names_mistakes_in_the_address_of_sentinels(self) -> None:
        with replicas(1) as nodes, sentinels(nodes[0], "main") as watchers:
            address = f"redis+sentinel://{watchers[0].place}"
            check_redis(f"{address}/main/3")
            for wrong, cause in (
                (f"{address}/other", "has no primary of this name"),
                (f"redis://{watchers[0].place}", "is a Sentinel"),
            ):
                with pytest.raises(Refusal, match=cause):
                    check_redis(wrong)

    def test_node_that_is_away_does_not_matter_if_another_host_is_named(self, nodes: Cluster) -> None:
        found = RedisServers(f"redis://127.0.0.1:1,{nodes.nodes[2].place}/0", 1).discover()
        assert sorted(it.place for it in found.servers) == sorted(node.place for node in nodes.nodes)
