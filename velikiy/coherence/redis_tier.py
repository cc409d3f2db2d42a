"""Tier 2: one Redis hash for each path, with a field for each variant and a field for each fill lease.

Losing data in Redis costs speed only: a missing entry is read from PostgreSQL, and a missing fill lease refuses its
fill.
"""

import itertools
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import redis
import structlog

from velikiy.coherence.entry import CachePath, Entry
from velikiy.coherence.redis_connections import DROP, FILL, READ, Argument, Connections, refusal, refused
from velikiy.coherence.redis_lease import RedisLease
from velikiy.coherence.timing import DROP_TIMEOUT_S, FILL_LEASE_S, now
from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()

AWAY = (redis.exceptions.RedisError, OSError)


class FillLease(str):
    """A fill lease: the right to fill one variant of a path until a write drops the path. A token that was never used
    before (as in Nishtala et al., Scaling Memcache at Facebook, NSDI 2013)."""


class Hit(NamedTuple):
    entry: Entry
    ttl: int
    """Seconds that Redis keeps it."""


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
    """Redis may or may not have executed a drop. The entries that were to be dropped may still be found."""


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

    def __init__(self, url: str, redis_lease: RedisLease, *, ttl: int, timeout: float, direct: bool = False) -> None:
        """
        Args:
            ttl: Seconds that a hash lives, from the first fill of its path.
            timeout: Seconds to connect, and seconds to wait for a reply.
            direct: Only Redis itself can refuse a connection at this address.
        """
        self.ttl = ttl
        self.direct = direct
        self.redis_lease = redis_lease
        self._read_connections = Connections(url, timeout)
        # A write waits longer, because going on without Redis costs it a fence.
        self._drop_connections = Connections(url, DROP_TIMEOUT_S)
        self._skip_until = 0.0

    def read(self, path: CachePath, variant: str, *, patience: float = 0.02) -> Hit | FillLease | None:
        """Return the entry, or a fill lease for it, or None.

        None: Redis is fenced or does not answer, or another reader fills the entry and has not finished after
        `patience` seconds.

        Raises:
            DatabaseUnavailable: The cache lease has expired and PostgreSQL does not answer.
        """
        if self.breaker_open:
            return None
        lease = NewFillLease()
        end = time.monotonic() + patience
        try:
            while True:
                trusted_until = self.redis_lease.trusted_until()
                if now() >= trusted_until:
                    return None
                [(state, *found)] = self._read_connections.run(
                    READ, (path.key, variant, lease, int(FILL_LEASE_S * 1000))
                )
                if now() >= trusted_until:
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

    def drop(self, paths: Iterable[CachePath] | None, prefill: Sequence[CachePath] = ()) -> dict[CachePath, FillLease]:
        """Drop these paths, or every path for None, and return fill leases for the paths in `prefill`; none if Redis is
        fenced.

        A Redis that refuses a connection at its own socket is down and holds nothing. At another address a forwarder, a
        balancer or a firewall may refuse for a Redis that is up.

        Raises:
            DoesNotAnswer
        """
        leases = {path: NewFillLease() for path in prefill}
        trusted_until = 0.0
        if prefill:
            with suppress(DatabaseUnavailable):
                trusted_until = self.redis_lease.trusted_until()
        others: list[tuple[Argument, ...]] = [("FLUSHDB", "ASYNC")]
        if paths is not None:
            others = [("UNLINK", path.key) for path in paths if path not in leases]
        calls = [(path.key, lease, int(FILL_LEASE_S * 1000)) for path, lease in leases.items()]
        try:
            self._drop_connections.run(DROP, *calls, before=others)
        except AWAY as error:
            if self.direct and refused(error):
                return {}
            self._failed("drop", error)
            raise DoesNotAnswer from error
        return {path: lease.given for path, lease in leases.items()} if now() < trusted_until else {}

    def show(self, path: CachePath) -> dict[str, Any]:
        """Return the size of each variant, the fill leases, and the seconds that the hash lives, for people.

        Raises:
            DoesNotAnswer
        """
        try:
            fields: Any = self._drop_connections.client.hgetall(path.key)
            ttl: Any = self._drop_connections.client.pttl(path.key)
        except AWAY as error:
            raise DoesNotAnswer from error
        names = {name.decode(errors="replace"): len(value) for name, value in fields.items()}
        bodies = {name.removeprefix("body:"): size for name, size in names.items() if name.startswith("body:")}
        leases = [name.removeprefix("lease:") for name in names if name.startswith("lease:")]
        return {"bytes": bodies, "leases": leases, "ttl": max(0, ttl) / 1000}

    def keeps_over_a_restart(self) -> list[str]:
        """Return the settings with which Redis would hold old entries after a restart. Nothing would tell them from
        valid ones. Empty if Redis does not answer."""
        try:
            settings: Any = self._drop_connections.client.config_get("save", "appendonly")
        except AWAY:
            return []
        text = {name: value.decode() if isinstance(value, bytes) else value for name, value in settings.items()}
        return [
            f"{name} {text[name]}" for name, off in (("save", ""), ("appendonly", "no")) if text.get(name, off) != off
        ]

    def obstacle(self) -> str:
        """Return why Redis cannot be used, as the rest of a sentence about it, or an empty string."""
        try:
            self._read_connections.client.ping()
        except AWAY as error:
            return refusal(error) or "does not answer"
        return ""

    @property
    def breaker_open(self) -> bool:
        return time.monotonic() < self._skip_until

    @property
    def may_be_fenced(self) -> bool:
        """True unless this process can exclude that Redis is fenced."""
        try:
            return self.breaker_open or now() >= self.redis_lease.trusted_until()
        except DatabaseUnavailable:
            return True

    def _forget(self, path: CachePath) -> None:
        try:
            self._read_connections.exchange(("UNLINK", path.key))
        except AWAY as error:
            self._failed("read", error)

    def _failed(self, what: str, error: Exception) -> None:
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
