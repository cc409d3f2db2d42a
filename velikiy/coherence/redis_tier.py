"""Tier 2: one Redis hash for each path, with a field for each variant and a field for each fill lease.

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
from velikiy.coherence.redis_connections import (
    DROP,
    FILL,
    READ,
    Argument,
    Connections,
    OtherServer,
    Server,
    refusal,
    refused,
)
from velikiy.coherence.redis_lease import NOTHING, RedisLease
from velikiy.coherence.timing import DROP_TIMEOUT_S, FILL_LEASE_S
from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()

AWAY = (redis.exceptions.RedisError, OSError)

NO_ANSWER = "does not answer"


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
        in_use: Callable[[], Server | None],
        *,
        ttl: int,
        timeout: float,
        direct: bool = False,
    ) -> None:
        """
        Args:
            in_use: Queries PostgreSQL for the server that is in use as Redis; None while Redis is fenced.
            ttl: Seconds that a hash lives, from the first fill of its path.
            timeout: Seconds to connect, and seconds to wait for a reply.
            direct: Only Redis itself can refuse a connection at this address.
        """
        self.ttl = ttl
        self.redis_lease = RedisLease(in_use)
        self._read_connections = Connections(url, timeout, direct=direct)
        # A write waits longer, because going on without Redis costs it a fence.
        self._drop_connections = Connections(url, DROP_TIMEOUT_S, direct=direct)
        self._skip_until = 0.0
        metrics.watch(lambda: metrics.BREAKER_OPEN.set(self.breaker_open))
        self._other: Server | None = None
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
        try:
            while True:
                trust = self.redis_lease.trust()
                server = trust.holder
                if server is None:
                    return None
                [(state, *found)] = self._read_connections.run(
                    READ, (path.key, variant, lease, int(FILL_LEASE_S * 1000)), at=server.id
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
        except (redis.exceptions.ResponseError, ValueError):
            # Another program's value under our key: a string, a list, or bytes of another form.
            self._forget(path)
        except OtherServer as error:
            self._found_other(error.found, instead_of=server)
        except AWAY as error:
            self._failed("read", error)
        return None

    def fill(self, path: CachePath, variant: str, lease: FillLease, entry: Entry | None) -> None:
        """Store the entry if the fill lease still exists. With None, give the lease up."""
        if self.breaker_open:
            return
        try:
            packed = entry.pack() if entry else b""
            self._read_connections.run(FILL, (path.key, variant, lease, packed, self.ttl * 1000))
        except redis.exceptions.ResponseError:
            pass  # Redis has no memory for it, or another program's value is under our key: a read removes that
        except AWAY as error:
            self._failed("fill", error)

    def drop(
        self, paths: Iterable[CachePath] | None, prefill: Sequence[CachePath] = (), *, server: Server
    ) -> dict[CachePath, FillLease]:
        """Drop these paths, or every path for None, and return fill leases for the paths in `prefill`; none if Redis is
        fenced.

        A Redis that refuses a connection at its own socket is down and holds nothing. At another address a forwarder, a
        balancer or a firewall may refuse for a Redis that is up.

        Args:
            server: The registered server.

        Raises:
            DoesNotAnswer
            OtherServer: This process reaches another server. Nothing was dropped.
        """
        leases = {path: NewFillLease() for path in prefill}
        trust = NOTHING
        if prefill:
            with suppress(DatabaseUnavailable):
                trust = self.redis_lease.trust()
        others: list[tuple[Argument, ...]] = [("FLUSHDB", "ASYNC")]
        if paths is not None:
            others = [("UNLINK", path.key) for path in paths if path not in leases]
        calls = [(path.key, lease, int(FILL_LEASE_S * 1000)) for path, lease in leases.items()]
        try:
            self._drop_connections.run(DROP, *calls, before=others, at=server.id)
        except AWAY as error:
            if self.is_only_at_our_place(server) and refused(error):
                return {}
            self._failed("drop", error)
            raise DoesNotAnswer(error) from error
        holder = trust.holder
        granted = holder is not None and holder.id == server.id
        return {path: lease.given for path, lease in leases.items()} if granted else {}

    def empty(self) -> Server:
        """Remove everything from the server that this process reaches, whichever it is, and return it.

        Raises:
            DoesNotAnswer
        """
        try:
            server = self._drop_connections.identify()
            self._drop_connections.exchange(("FLUSHDB", "ASYNC"), at=server.id)
        except (OtherServer, *AWAY) as error:
            raise DoesNotAnswer(error) from error
        return server

    def identify(self) -> Server:
        """Return the server that this process reaches now.

        Raises:
            DoesNotAnswer
        """
        try:
            return self._drop_connections.identify()
        except AWAY as error:
            raise DoesNotAnswer(error) from error

    def is_only_at_our_place(self, server: Server) -> bool:
        """Return whether no other place than ours can lead to this server. It is gone if nothing listens there."""
        return self._drop_connections.is_only_place and server.place == self._drop_connections.place

    def is_surely_gone(self, server: Server, found: Server) -> bool:
        """Return whether this server has ended, because another run of Redis was found at its only place. The databases
        of one run have different servers and live together."""
        return self.is_only_at_our_place(server) and server.run != found.run

    def show(self, path: CachePath) -> dict[str, Any]:
        """Return the size of each variant, the fill leases, and the seconds that the hash lives, for people.

        Raises:
            DoesNotAnswer
        """
        try:
            fields: Any = self._drop_connections.client.hgetall(path.key)
            ttl: Any = self._drop_connections.client.pttl(path.key)
        except AWAY as error:
            raise DoesNotAnswer(error) from error
        names = {name.decode(errors="replace"): len(value) for name, value in fields.items()}
        bodies = {name.removeprefix("body:"): size for name, size in names.items() if name.startswith("body:")}
        leases = [name.removeprefix("lease:") for name in names if name.startswith("lease:")]
        return {"bytes": bodies, "leases": leases, "ttl": max(0, ttl) / 1000}

    def usage(self) -> dict[str, Any]:
        """Return what Redis reports of its memory (INFO), for people.

        Raises:
            DoesNotAnswer
        """
        try:
            usage: dict[str, Any] = self._drop_connections.client.info("memory", "stats")
        except AWAY as error:
            raise DoesNotAnswer(error) from error
        return usage

    @property
    def breaker_open(self) -> bool:
        return time.monotonic() < self._skip_until

    def registered(self) -> Server | None:
        """Return the server that is surely registered and not fenced; None if that is not known."""
        try:
            return None if self.breaker_open else self.redis_lease.trust().holder
        except DatabaseUnavailable:
            return None

    def _forget(self, path: CachePath) -> None:
        try:
            self._read_connections.exchange(("UNLINK", path.key))
        except AWAY as error:
            self._failed("read", error)

    def _found_other(self, found: Server, *, instead_of: Server | None) -> None:
        self._skip_until = time.monotonic() + self.BREAKER_S
        # A Redis that was restarted at its own place is registered within a second.
        if found != self._other and not (instead_of and self.is_surely_gone(instead_of, found)):
            self._other = found
            log.warning("redis.not_registered", address=found.address, advice=OTHER_ADVICE)

    def _failed(self, what: str, error: Exception) -> None:
        metrics.REDIS_FAILURES.labels(what).inc()
        self._skip_until = time.monotonic() + self.BREAKER_S
        log.warning("redis.unavailable", during=what, cause=type(error).__name__)


def new_fill_lease() -> FillLease:
    return FillLease(f"{_run(os.getpid())}.{next(_leases)}")


_leases = itertools.count()
"""Shared by threads: a call of `next` is atomic."""


@cache
def _run(process: int) -> str:
    """Return a random part that only this process uses; a forked process has another number."""
    return secrets.token_hex(8)
