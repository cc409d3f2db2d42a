"""Tier 2: one Redis hash for each path, with a field for each variant and a field for each fill lease. Redis may be one
server or the servers of a cluster (shards.py).

Losing data in Redis costs speed only: a missing entry is read from PostgreSQL, and a missing fill lease refuses its
fill.
"""

import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import redis
import structlog

from velikiy import metrics
from velikiy.coherence.entry import CachePath, Entry
from velikiy.coherence.redis_connections import DROP, FILL, MOVING, READ, Argument, OtherServer, refusal
from velikiy.coherence.redis_lease import NOTHING, RedisLease
from velikiy.coherence.redis_servers import AWAY, RedisServers, SlotsMove
from velikiy.coherence.shards import UNREGISTERED, Server, ShardMap
from velikiy.coherence.timing import DROP_TIMEOUT_S, FILL_LEASE_S
from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()

NO_ANSWER = "does not answer"

REDIRECTED = (
    redis.exceptions.AskError,  # and MovedError
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
"""A node of a cluster does not hold the key, or not at this moment: the registered map is no longer true."""

LACKING_RIGHTS = """
local lacking = {}
for _, command in ipairs(ARGV) do
    if redis.acl_check_cmd and not redis.acl_check_cmd(command) then lacking[#lacking + 1] = command end
end
return lacking
"""
"""Finds out what Redis' user may run, without running it."""

MAX_TRIAL_KEYS = 1000
"""Enough that nearly every server of a cluster holds one of them."""

OTHER_DATA = "OTHERDATA"
"""The error of read.lua."""


OTHER_ADVICE = "give every process on this database the same REDIS_URL; until then none of them uses Redis"


class FillLease(str):
    """A fill lease: the right to fill one variant of a path until a write drops the path. A token that was never used
    before (as in Nishtala et al., Scaling Memcache at Facebook, NSDI 2013)."""


class Hit(NamedTuple):
    entry: Entry
    ttl: int
    """Seconds that Redis keeps it."""


READ_RESULTS = {
    Hit: metrics.REDIS_READS.labels("hit"),
    FillLease: metrics.REDIS_READS.labels("miss"),
    type(None): metrics.REDIS_READS.labels("not used"),
}


class NewFillLease:
    """A fill lease that is requested with another token at each attempt.

    A request whose reply was lost may reach Redis late, from a buffer on the way. With the same token it would grant a
    lease again that a write has taken away, and a row that was read before that write would be stored after it.
    """

    given = FillLease("")

    def __call__(self) -> FillLease:
        self.given = new_fill_lease()
        return self.given


class DoesNotAnswer(Exception):
    """Redis may or may not have executed a drop. The entries that were to be dropped may still be found. The text names
    the reason, as the rest of a sentence about Redis."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(refusal(error) or NO_ANSWER)
        self.slots_move = isinstance(error, SlotsMove)
        """The servers of a cluster answer, and do not agree about the slots."""


class RedisTier:
    """Reads and fills skip Redis while it is fenced (`RedisLease`), and for a second after a failure (a breaker):
    otherwise a hanging Redis would cost every read its timeout.

    An edge opens its breaker only if Redis has sent no other reply meanwhile (edge/lua/redis.lua). The edge can wait,
    because waiting holds no thread and the apps could take only a tenth of its load. In an app each waiting thread is
    one of a few, and PostgreSQL can take the load: if one request of twenty to Redis were lost, waiting would cost the
    app most of its throughput.
    """

    BREAKER_S = 1.0
    """Seconds for which the breaker stays open."""

    def __init__(
        self,
        url: str,
        in_use: Callable[[], ShardMap | None],
        *,
        ttl: int,
        timeout: float,
        direct: bool = False,
    ) -> None:
        """
        Args:
            in_use: Queries PostgreSQL for the servers that are in use as Redis; None while Redis is fenced.
            ttl: Seconds that a hash lives, from the first fill of its path.
            timeout: Seconds to connect, and seconds to wait for a reply.
            direct: Only Redis itself can refuse a connection at this address.
        """
        self.ttl = ttl
        self.redis_lease = RedisLease(in_use)
        self._read_servers = RedisServers(url, timeout, direct=direct)
        # A write waits longer, because going on without Redis costs it a fence.
        self._drop_servers = RedisServers(url, DROP_TIMEOUT_S, direct=direct)
        self._skip_until = 0.0
        metrics.watch(lambda: metrics.BREAKER_OPEN.set(self.breaker_open))
        self._other = ""
        """The unregistered server that the log has named already."""

    def read(self, path: CachePath, variant: str, *, patience: float = 0.02) -> Hit | FillLease | None:
        """Return the entry, or a fill lease for it, or None.

        None: Redis is fenced or does not answer, or another reader fills the entry and has not finished after
        `patience` seconds.

        Raises:
            DatabaseUnavailable: The cache lease has expired and PostgreSQL does not answer.
        """
        found = self._read(path, variant, patience)
        READ_RESULTS[type(found)].inc()
        return found

    def _read(self, path: CachePath, variant: str, patience: float) -> Hit | FillLease | None:
        if self.breaker_open:
            return None
        lease = NewFillLease()
        end = time.monotonic() + patience
        shards = UNREGISTERED
        try:
            while True:
                trust = self.redis_lease.trust()
                if (holder := trust.holder) is None:
                    return None
                shards = holder
                connections, server = self._read_servers.connections(path.key, shards)
                [(state, *found)] = connections.run(
                    READ, (path.key, variant, lease, int(FILL_LEASE_S * 1000), server.data_set), at=server.id
                )
                if not trust.holder:
                    return None  # a write may have skipped a fenced Redis meanwhile
                if state == 1:
                    entry, milliseconds = found
                    return Hit(Entry.unpack(entry), max(0, milliseconds) // 1000)
                if state == 2:
                    return lease.given
                if time.monotonic() >= end:
                    return None
                time.sleep(patience / 5)
        except REDIRECTED as error:
            self._failed("read", error)
        except (redis.exceptions.ResponseError, ValueError) as error:
            if str(error).startswith(OTHER_DATA):
                connections.close_idle()  # a new one shows which server this is now
                self._failed("read", error)
            else:
                # Another program's value under our key: a string, a list, or bytes of another form.
                self._forget(path, shards)
        except OtherServer as error:
            self._found_other(error.found, instead_of=shards)
        except AWAY as error:
            self._failed("read", error)
        return None

    def fill(self, path: CachePath, variant: str, lease: FillLease, entry: Entry | None) -> None:
        """Store the entry if the fill lease still exists. With None, give the lease up."""
        if self.breaker_open:
            return
        try:
            shards = self.redis_lease.trust().shards  # a fill needs no cache lease: its own lease decides
            if shards is None:
                return
            packed = entry.pack() if entry else b""
            connections, _ = self._read_servers.connections(path.key, shards)
            connections.run(FILL, (path.key, variant, lease, packed, self.ttl * 1000))
        except DatabaseUnavailable:
            pass
        except REDIRECTED as error:
            self._failed("fill", error)
        except redis.exceptions.ResponseError:
            pass  # Redis has no memory for it, or another program's value is under our key: a read removes that
        except AWAY as error:
            self._failed("fill", error)

    def drop(
        self, paths: Iterable[CachePath] | None, prefill: Sequence[CachePath] = (), *, shards: ShardMap
    ) -> dict[CachePath, FillLease]:
        """Drop these paths, or every path for None, and return fill leases for the paths in `prefill`; none if Redis is
        fenced.

        A Redis whose process has ended holds nothing, and neither does one that refuses a connection at its own port.
        At another address a forwarder, a balancer or a firewall may refuse for a Redis that is up.

        Args:
            shards: The registered servers. Each drops its paths, all at the same time.

        Raises:
            DoesNotAnswer: At least one server may still have an entry.
            OtherServer: This process reaches another server. Nothing was dropped.
        """
        if not shards.shards:
            raise OtherServer(self.identify())
        leases = {path: NewFillLease() for path in prefill}
        trust = NOTHING
        if prefill:
            with suppress(DatabaseUnavailable):
                trust = self.redis_lease.trust()
        drops = _by_server(shards, None if paths is None else list(paths), leases)
        try:
            self._drop_at(shards, drops)
        except OtherServer as error:
            if shards.is_cluster:  # a node has restarted, or a replica has taken over: the relay finds the new servers
                raise DoesNotAnswer(error) from error
            raise
        except AWAY as error:
            if self._has_ended(shards, error):
                return {}
            self._failed("drop", error)
            raise DoesNotAnswer(error) from error
        holder = trust.holder
        granted = holder is not None and holder.id == shards.id
        return {path: lease.given for path, lease in leases.items()} if granted else {}

    def _drop_at(self, shards: ShardMap, drops: "dict[Server, _Commands]") -> None:
        """Send every drop, then wait for the replies: for several servers as long as for one."""
        until = time.monotonic() + DROP_TIMEOUT_S if len(drops) > 1 else None
        sent = []
        try:
            for server, (others, calls) in drops.items():
                connections = self._drop_servers.connections_to(server, shards)
                sent.append((connections, connections.start(DROP, *calls, before=others, at=server.id), calls))
            while sent:
                connections, commands, calls = sent.pop()
                connections.results(commands, DROP, *calls, until=until)
        finally:
            for _, commands, _ in sent:
                commands.abandon()

    def empty(self) -> ShardMap:
        """Remove everything from the servers that this process reaches, whichever they are, and return them.

        Raises:
            DoesNotAnswer
        """
        shards = self.identify()
        try:
            for server in shards.servers:
                self._drop_servers.connections_to(server, shards).exchange(("FLUSHDB", "ASYNC"), at=server.id)
            if shards.is_cluster and self._drop_servers.discover().version != shards.version:
                raise SlotsMove(MOVING)  # keys may have moved to a server that was empty already
        except (OtherServer, *AWAY) as error:
            raise DoesNotAnswer(error) from error
        return shards

    def identify(self) -> ShardMap:
        """Return the servers that this process reaches now.

        Raises:
            DoesNotAnswer
        """
        try:
            return self._drop_servers.discover()
        except AWAY as error:
            raise DoesNotAnswer(error) from error

    def lacking_rights(self) -> list[str]:
        """Return the commands that empty and identify Redis and that its user may not run, for people.

        Redis is in use until a fence without them, and stays out of use afterwards."""
        try:
            shards = self.identify()
            lacking = {
                command.decode()
                for server in shards.servers
                for command in self._drop_servers.connections_to(server, shards).exchange(
                    ("EVAL", LACKING_RIGHTS, 0, "FLUSHDB", "INFO", "EVALSHA")
                )[0]
            }
        except redis.exceptions.NoPermissionError:
            return ["EVAL"]
        except (DoesNotAnswer, OtherServer, redis.exceptions.RedisError, OSError):
            return []
        return sorted(lacking)

    def trial(self, trial_key: str) -> str:
        """Do at each server what reads and writes do, with this key of no row. Return why Redis refuses that, as the
        rest of a sentence about Redis; an empty string if it works."""
        try:
            shards = self.identify()
            for server in shards.servers:
                keys = (trial_key, *(f"{trial_key}{number}" for number in range(MAX_TRIAL_KEYS)))
                key = next((key for key in keys if shards.shard_of(key).server == server), "")
                if key:  # a primary without slots gets no keys
                    at = self._drop_servers.connections_to(server, shards)
                    at.run(DROP, (key, "trial", 1000), before=[("UNLINK", key)], at=server.id)
                    at.run(FILL, (key, "", "trial", b"trial", 1000), at=server.id)
                    at.run(READ, (key, "other", "trial", 1000, ""), at=server.id)
                    at.exchange(("UNLINK", key), at=server.id)
        except DoesNotAnswer as error:
            return str(error)
        except OtherServer:  # it has just changed
            return ""
        except AWAY as error:
            return refusal(error) or NO_ANSWER
        return ""

    def is_surely_gone(self, registered: ShardMap, found: ShardMap) -> bool:
        """Return whether this server has ended, because another run of Redis was found at its only place."""
        return self._has_ended(registered, found.servers[0])

    def _has_ended(self, shards: ShardMap, sign: Server | BaseException) -> bool:
        """Return whether this server has surely ended. The end of a node of a cluster is not noticed."""
        fixed = self._drop_servers.fixed
        return bool(fixed and not shards.is_cluster and fixed.has_ended(shards.servers[0], sign))

    def show(self, path: CachePath) -> dict[str, Any]:
        """Return the size of each variant, the fill leases, and the seconds that the hash lives, for people.

        Raises:
            DoesNotAnswer
        """
        try:
            connections, _ = self._drop_servers.connections(path.key, self._drop_servers.discover())
            fields: Any = connections.client.hgetall(path.key)
            ttl: Any = connections.client.pttl(path.key)
        except AWAY as error:
            raise DoesNotAnswer(error) from error
        names = {name.decode(errors="replace"): len(value) for name, value in fields.items()}
        bodies = {name.removeprefix("body:"): size for name, size in names.items() if name.startswith("body:")}
        leases = [name.removeprefix("lease:") for name in names if name.startswith("lease:")]
        return {"bytes": bodies, "leases": leases, "ttl": max(0, ttl) / 1000}

    def usage(self, shards: ShardMap | None = None) -> dict[str, int]:
        """Return what the servers report of their memory (INFO), added up, the uptime of the youngest, and by how many
        milliseconds the clock of a server is ahead of this machine's: the greatest difference, 0 if it is not known.

        Args:
            shards: The servers that this process reaches now, if that is known.

        Raises:
            DoesNotAnswer
        """
        shards = shards or self.registered() or self.identify()
        total, uptimes = {"used_memory": 0, "maxmemory": 0, "evicted_keys": 0}, []
        differences = [0]
        try:
            for server in shards.servers:
                reported: Any = self._drop_servers.connections_to(server, shards).client.info("everything")
                total = {name: so_far + int(reported.get(name, 0)) for name, so_far in total.items()}
                uptimes.append(int(reported.get("uptime_in_seconds", 0)))
                if microseconds := reported.get("server_time_usec"):
                    differences.append(int(microseconds) // 1000 - int(time.time() * 1000))
        except AWAY as error:
            raise DoesNotAnswer(error) from error
        return {**total, "uptime_in_seconds": min(uptimes, default=0), "clock_ahead_ms": max(differences, key=abs)}

    def version(self) -> str:
        """Return the version of Redis, for people.

        Raises:
            DoesNotAnswer
        """
        shards = self.identify()
        try:
            facts = self._drop_servers.connections_to(shards.servers[0], shards).facts()
        except AWAY as error:
            raise DoesNotAnswer(error) from error
        return str(facts.members.get("redis_version", "of unknown version"))

    @property
    def breaker_open(self) -> bool:
        return time.monotonic() < self._skip_until

    def registered(self) -> ShardMap | None:
        """Return the servers that are surely registered and not fenced; None if that is not known."""
        try:
            return None if self.breaker_open else self.redis_lease.trust().holder
        except DatabaseUnavailable:
            return None

    def _forget(self, path: CachePath, shards: ShardMap) -> None:
        connections, _ = self._read_servers.connections(path.key, shards)
        try:
            connections.exchange(("UNLINK", path.key))
        except AWAY as error:
            self._failed("read", error)

    def _found_other(self, found: ShardMap, *, instead_of: ShardMap) -> None:
        self._skip_until = time.monotonic() + self.BREAKER_S
        # A Redis that was restarted at its own place is registered within a second, and a cluster changes by itself.
        expected = instead_of.is_cluster or self.is_surely_gone(instead_of, found)
        if found.id != self._other and not expected:
            self._other = found.id
            log.warning("redis.not_registered", address=found.address, advice=OTHER_ADVICE)

    def _failed(self, what: str, error: Exception) -> None:
        metrics.REDIS_FAILURES.labels(what).inc()
        self._skip_until = time.monotonic() + self.BREAKER_S
        log.warning("redis.unavailable", during=what, cause=type(error).__name__)


_Commands = tuple[list[tuple[Argument, ...]], list[tuple[Argument, ...]]]
"""The plain commands of a drop at one server, and the calls of the script."""


def _by_server(
    shards: ShardMap, paths: Sequence[CachePath] | None, leases: dict[CachePath, NewFillLease]
) -> dict[Server, _Commands]:
    drops: dict[Server, _Commands] = {}
    if paths is None:
        drops = {server: ([("FLUSHDB", "ASYNC")], []) for server in shards.servers}
    for path in paths or ():
        if path not in leases:
            drops.setdefault(shards.shard_of(path.key).server, ([], []))[0].append(("UNLINK", path.key))
    for path, lease in leases.items():
        calls = drops.setdefault(shards.shard_of(path.key).server, ([], []))[1]
        calls.append((path.key, lease, int(FILL_LEASE_S * 1000)))
    return drops


def new_fill_lease() -> FillLease:
    return FillLease(f"{_run(os.getpid())}.{next(_leases)}")


_leases = itertools.count()
"""Shared by threads: a call of `next` is atomic."""


@cache
def _run(process: int) -> str:
    """Return a random part that only this process uses; a forked process has another number."""
    return secrets.token_hex(8)
