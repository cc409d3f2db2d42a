"""Find the servers behind REDIS_URL, and keep connections to each of them.

A server that was found here is only a proposal. Processes use it after the relay has registered it in a shard map, once
all servers are empty (velikiy/relay/janitor.py).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import redis

from velikiy.coherence.redis_connections import MOVING, UNCOVERED, Connections, refusal
from velikiy.coherence.shards import SLOTS, Server, Shard, ShardMap
from velikiy.redis_address import RedisAddress

AWAY = (redis.exceptions.RedisError, OSError)

CLUSTER_COMMANDS = (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"), ("CLUSTER", "INFO"))


class NotReady(redis.exceptions.RedisError):
    """The servers of a cluster answer, and cannot be used at this moment."""


class SlotsMove(NotReady):
    """The nodes of a cluster do not agree about the slots, or keys are on their way from one to another."""


class RedisServers:
    """Each thread of a process may use it."""

    def __init__(self, address: str, timeout: float, *, direct: bool = False) -> None:
        """
        Args:
            timeout: Seconds to connect, and seconds to wait for a reply.
            direct: Only the Redis at this address can answer there or refuse a connection.
        """
        self.address = RedisAddress.parse(address)
        self._timeout = timeout
        fixed = self.address.is_fixed
        self._named = [Connections(url, timeout, direct=direct and fixed) for url in self.address.urls]
        self._by_place: dict[str, Connections] = {}
        self._map: ShardMap | None = None

    @property
    def fixed(self) -> Connections | None:
        """The connections to the only server that the address names."""
        return self._named[0] if self.address.is_fixed else None

    def connections(self, key: str, shards: ShardMap) -> tuple[Connections, Server]:
        """Return the connections for this key, and the server that they have to lead to."""
        server = shards.shard_of(key).server
        return self.connections_to(server, shards), server

    def connections_to(self, server: Server, shards: ShardMap) -> Connections:
        """Return the connections for this server of the map."""
        if self.fixed and not shards.is_cluster:
            return self.fixed
        if shards is not self._map:
            self._map = shards
            places = {server.place for server in shards.servers}
            self._by_place = {place: it for place, it in self._by_place.items() if place in places}
        return self._at(server.place)

    def discover(self) -> ShardMap:
        """Return the servers that the address leads to now.

        Raises:
            SlotsMove
            redis.exceptions.RedisError
            OSError
        """
        failures: list[Exception] = []
        for named in self._named:
            try:
                found = self._discover_from(named)
            except SlotsMove:
                raise
            except AWAY as error:
                failures.append(error)
            else:
                # The next discovery begins at the host that answered. Other threads may read the list meanwhile.
                self._named = sorted(self._named, key=lambda it: it is not named)
                return found
        raise next(filter(refusal, failures), failures[-1])

    def _discover_from(self, named: Connections) -> ShardMap:
        if self.address.primary:
            return self._discover_from_sentinel(named)
        facts = named.facts(*CLUSTER_COMMANDS)
        if facts.is_cluster:
            return self._discover_cluster(named, facts.replies)
        return ShardMap.plain(named.server(facts))

    def _discover_from_sentinel(self, sentinel: Connections) -> ShardMap:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.primary)
        [found] = sentinel.command(command)
        if not found:
            raise redis.exceptions.RedisError(f"the Sentinel knows no primary named {self.address.primary}")
        server = self._at(_place(*found))
        # For a while a Sentinel may name the old primary, which reports that it is a replica.
        return ShardMap.plain(server.server(server.facts()))

    def _discover_cluster(self, named: Connections, replies: Sequence[Any]) -> ShardMap:
        shards, empty_servers, version = [], [], []
        covered = 0
        for place in self._primaries(named, replies):
            at = self._at(place)
            facts = at.facts(*CLUSTER_COMMANDS)
            if not facts.is_cluster or facts.members.get("role") != "master":
                raise SlotsMove(MOVING)  # the nodes have yet to learn it from each other
            _, nodes, info = facts.replies
            node = next(it for it in _nodes(nodes) if it.is_myself)
            if node.has_open_slots:
                raise SlotsMove(MOVING)
            if b"cluster_state:ok" not in info:
                raise NotReady(UNCOVERED)
            server = at.server(facts)
            version.append((node.id, node.epoch))
            covered += sum(last - first + 1 for first, last in node.slots)
            if node.slots:
                shards.append(Shard(server, node.slots))
            else:
                empty_servers.append(server)
        ranges = sorted(slots for shard in shards for slots in shard.slots)
        if any(first <= last for (_, last), (first, _) in pairwise(ranges)):
            raise SlotsMove(MOVING)  # two servers hold one slot
        if covered < SLOTS:
            raise NotReady(UNCOVERED)
        return ShardMap(sorted(shards, key=lambda it: it.slots), empty_servers=empty_servers, version=sorted(version))

    def _primaries(self, named: Connections, replies: Sequence[Any]) -> list[str]:
        """Return the places of all primaries that a node knows. Those without slots as well: keys may have been left
        there, and may come back."""
        slots, text, _ = replies
        places = {}
        for _, _, (host, port, node, *more), *_ in slots:
            # The setting cluster-preferred-endpoint-type selects an address, a name, "?" for a name that is missing, or
            # nothing, which stands for the host that was contacted.
            if host == b"?":
                host = _pairs(more[0]).get(b"ip", b"") if more else b""
            places[node.decode()] = _place(host or named.host, port)
        for it in _nodes(text):
            if it.is_primary and it.id not in places and not it.slots:
                places[it.id] = it.place or f"{named.place}"
        return sorted(places.values())

    def _at(self, place: str) -> Connections:
        found = self._by_place.get(place)
        if found is None:
            found = self._by_place[place] = Connections(self.address.of(place), self._timeout)
        return found


class _Node(NamedTuple):
    """A line of CLUSTER NODES."""

    id: str
    place: str
    flags: list[str]
    epoch: str
    slots: tuple[tuple[int, int], ...]
    has_open_slots: bool

    @property
    def is_myself(self) -> bool:
        return "myself" in self.flags

    @property
    def is_primary(self) -> bool:
        return "master" in self.flags and not {"fail", "handshake", "noaddr"}.intersection(self.flags)


def _nodes(text: bytes) -> list[_Node]:
    nodes = []
    for line in text.decode(errors="replace").splitlines():
        node, address, flags, _, _, _, epoch, _, *slots = line.split(" ")
        host, _, port = address.partition("@")[0].rpartition(":")
        ranges = [part.split("-") for part in slots if part and not part.startswith("[")]
        nodes.append(
            _Node(
                node,
                _place(host, port) if host else "",
                flags.split(","),
                epoch,
                tuple(sorted((int(it[0]), int(it[-1])) for it in ranges)),
                any(part.startswith("[") for part in slots),
            )
        )
    return nodes


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """Return a map, which is a list in RESP 2."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _place(host: str | bytes, port: str | bytes | int) -> str:
    host, port = (it.decode() if isinstance(it, bytes) else str(it) for it in (host, port))
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
