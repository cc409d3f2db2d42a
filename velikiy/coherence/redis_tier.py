"""Tier 2: one Redis hash for each path, one field for each variant of it, and leases for those who fill them.

Lost, evicted or flushed, Redis only ever loses speed: what is not there is read from PostgreSQL, and a lease that
is not there refuses its fill.
"""

import secrets
import time
from collections.abc import Iterable
from pathlib import Path as File

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from velikiy.coherence.entry import Entry, Path

log = structlog.get_logger()

AWAY = (redis.exceptions.RedisError, OSError)
HERE = File(__file__).parent


class Lease(str):
    """The right to fill one variant of a path, until a write drops it: a token that was never used before
    (Gray and Cheriton, Leases, 1989; and as in Facebook's memcache, NSDI 2013)."""


class RedisTier:
    """Reads and fills skip Redis for a second after it failed to answer (a breaker): a Redis that hangs would
    otherwise cost every read its timeout. Drops always try."""

    REST = 1.0
    """Seconds."""

    LEASE = 3.0
    """Seconds after which a lease is void, and somebody else may have it. Only speed depends on this number."""

    def __init__(self, url: str, *, ttl: int, timeout: float) -> None:
        """`ttl`: seconds from the first fill of a path; `timeout`: seconds to connect, and to be answered."""
        self.ttl = ttl
        self._redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the default tries for up to a minute: PostgreSQL is faster
        )
        self._read, self._fill, self._drop = (
            self._redis.register_script((HERE / f"{name}.lua").read_text()) for name in ("read", "fill", "drop")
        )
        self._skip_until = 0.0

    def read(self, path: Path, variant: str, *, patience: float = 0.02) -> Entry | Lease | None:
        """The entry, or the lease to fill it, or None: Redis does not answer, or somebody else is filling and was
        not done within `patience` seconds."""
        if time.monotonic() < self._skip_until:
            return None
        lease = Lease(secrets.token_hex(8))
        until = time.monotonic() + patience
        try:
            while True:
                state, *entry = self._read(keys=[path.key], args=[variant, lease, int(self.LEASE * 1000)])
                if state == 1:
                    return Entry.unpack(entry[0])
                if state == 2:
                    return lease
                if time.monotonic() >= until:
                    return None
                time.sleep(patience / 5)
        except (redis.exceptions.ResponseError, ValueError):
            # Somebody else's, under our key: a string, a list, bytes that are no entry.
            self.drop([path])
        except AWAY as error:
            self._failed("read", error)
        return None

    def fill(self, path: Path, variant: str, lease: Lease, entry: Entry | None) -> bool:
        """Store it; False where the lease is gone, or Redis could not be asked. None gives the lease back."""
        if time.monotonic() < self._skip_until:
            return False
        try:
            return bool(
                self._fill(keys=[path.key], args=[variant, lease, entry.pack() if entry else b"", self.ttl * 1000])
            )
        except AWAY as error:
            self._failed("fill", error)
            return False

    def drop(self, paths: Iterable[Path]) -> None:
        try:
            for path in paths:  # one script each: in a cluster each path has a slot of its own
                self._drop(keys=[path.key])
        except AWAY as error:
            self._failed("drop", error)

    def answers(self) -> bool:
        try:
            return bool(self._redis.ping())
        except AWAY:
            return False

    def _failed(self, what: str, error: Exception) -> None:
        self._skip_until = time.monotonic() + self.REST
        log.warning("redis.unavailable", during=what, cause=type(error).__name__)
