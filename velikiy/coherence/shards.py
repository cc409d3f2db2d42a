"""Which server holds which keys: the shard map that PostgreSQL registers as Redis.

A shard is one server with the hash slots that it holds. A plain Redis is one shard, which holds every key. A key
belongs to a slot by its CRC16, and all of a path is one key, so each command concerns one shard.

Every process sends a key to the server that the registered map names, on a connection to that very run of the server.
So each key is in use at one server at a time, as if that server were the only Redis. A process never follows a
redirection of a cluster (MOVED, ASK): a server that redirects is not the registered one for this key any longer.
"""

import hashlib
import re
from binascii import crc_hqx
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

SLOTS = 16_384

MAX_TEXT_LENGTH = 4_000
"""Characters of a map that an edge stores (`state` in edge/conf/lua.conf): some 40 shards. With a longer one, edges
leave Redis to the apps."""


class Server(NamedTuple):
    """One database of one run of a Redis. A connection leads to the same server as long as it lives.

    A Redis that was restarted, a replica that was promoted, and another Redis behind the same name are other servers:
    each run has an id of its own (`run_id` in INFO), and its data set another one (`master_replid`), which changes when
    a replica takes over.
    """

    id: str
    """`<run id>.<beginning of the id of the data set>/<number of the database>`."""

    place: str
    """Where this process reaches the server, without a password. Other processes may reach it elsewhere."""

    def __str__(self) -> str:
        return f"{self.id}@{self.place}"

    @classmethod
    def parse(cls, text: str) -> "Server":
        return cls(*text.partition("@")[::2])

    @property
    def address(self) -> str:
        """The place and the number of the database, for people: without the names of machine and process."""
        place = re.sub(r"^[0-9a-f]{16} | (\d+\.\d+|\?)$", "", self.place)
        return place + "/" + self.id.partition("/")[2]

    @property
    def run(self) -> str:
        return self.id.partition("/")[0]

    @property
    def data_set(self) -> str:
        return self.run.partition(".")[2]


class Shard(NamedTuple):
    server: Server

    slots: tuple[tuple[int, int], ...] = ()
    """The first and the last slot of each range. Empty for a plain Redis, which has no slots."""

    def __str__(self) -> str:
        ranges = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.slots)
        return f"{ranges}={self.server}" if self.slots else str(self.server)

    @classmethod
    def parse(cls, text: str) -> "Shard":
        ranges, equals, server = text.partition("=")
        if not equals or "@" in ranges:
            return cls(Server.parse(text))
        ends = (part.split("-") for part in ranges.split(","))
        return cls(Server.parse(server), tuple((int(it[0]), int(it[-1])) for it in ends))


class ShardMap:
    """The servers that are together in use as Redis."""

    def __init__(
        self, shards: Iterable[Shard], *, empty_servers: Iterable[Server] = (), version: Sequence[object] = ()
    ) -> None:
        """
        Args:
            empty_servers: Further primaries of the cluster, without a slot.
            version: Differs between two discoveries if a slot has moved in between, even if it has moved back.
        """
        self.shards = tuple(shards)
        self.empty_servers = tuple(empty_servers)
        self.version = tuple(version)
        starts = sorted((first, shard) for shard in self.shards for first, _ in shard.slots)
        self._first_slots = [first for first, _ in starts]
        self._owners = [shard for _, shard in starts]
        self.id = self.shards[0].server.id if self.shards else ""
        """The same for every process that uses the same servers. Each sees a plain Redis at a place of its own, and the
        nodes of a cluster at the places that the cluster announces."""
        if self.is_cluster:
            self.id = "cluster." + hashlib.sha256(str(self).encode()).hexdigest()[:32]

    @classmethod
    def plain(cls, server: Server) -> "ShardMap":
        return cls([Shard(server)])

    @staticmethod
    @lru_cache(maxsize=4)  # each renewal of a cache lease parses the same text
    def parse(text: str) -> "ShardMap":
        """Parse what `str` returns. A Unix socket may have any name, and only a cluster has several shards."""
        is_cluster = "=" in text.partition("@")[0]
        return ShardMap(map(Shard.parse, text.split(";") if is_cluster else [text]))

    def __str__(self) -> str:
        return ";".join(map(str, self.shards))

    @property
    def is_cluster(self) -> bool:
        return bool(self._owners)

    @property
    def for_edges(self) -> str:
        """The text in a cache lease of an edge; empty if the edge has to leave Redis to the apps."""
        text = str(self)
        if not self.is_cluster and not re.fullmatch(r"[\w.\[\]:-]+:\d+", self.shards[0].server.place):
            return self.id  # the edge finds it at the address that it was given
        return text if len(text) <= MAX_TEXT_LENGTH else ""

    @property
    def address(self) -> str:
        """The places of the servers, for people."""
        return ",".join(shard.server.address for shard in self.shards)

    @property
    def servers(self) -> tuple[Server, ...]:
        """Every server that may hold entries."""
        return (*(shard.server for shard in self.shards), *self.empty_servers)

    def shard_of(self, key: str) -> Shard:
        if not self._owners:
            return self.shards[0]
        return self._owners[bisect_right(self._first_slots, slot_of(key)) - 1]

    def overlaps(self, other: "ShardMap") -> bool:
        """Return whether both contain the same run of a server: two states of one cluster, and not two clusters."""
        return not {server.id for server in self.servers}.isdisjoint(server.id for server in other.servers)


UNREGISTERED = ShardMap([])
"""No server is registered."""


def slot_of(key: str) -> int:
    """Return the hash slot of a key. If the key has a part in braces, only that part counts."""
    _, brace, rest = key.partition("{")
    tag, end, _ = rest.partition("}")
    return crc_hqx((tag if brace and end and tag else key).encode(), 0) % SLOTS
