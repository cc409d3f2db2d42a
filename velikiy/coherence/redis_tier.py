"""Tier 2: one Redis hash for each path, one field for each variant of it.

Lost, evicted or flushed, Redis only ever loses speed: nothing is kept there that PostgreSQL does not have.
"""

import time
from collections.abc import Iterable

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from velikiy.coherence.entry import Entry, Path

log = structlog.get_logger()

AWAY = (redis.exceptions.RedisError, OSError)


class RedisTier:
    """Reads and fills skip Redis for a second after it failed to answer (a breaker): a Redis that hangs would
    otherwise cost every read its timeout. Drops always try."""

    REST = 1.0
    """Seconds."""

    def __init__(self, url: str, *, ttl: int, timeout: float) -> None:
        """`ttl`: seconds from the first fill of a path; `timeout`: seconds to connect, and to be answered."""
        self.ttl = ttl
        self._redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the default tries for up to a minute: PostgreSQL is faster
        )
        self._skip_until = 0.0

    def get(self, path: Path, variant: str) -> Entry | None:
        if time.monotonic() < self._skip_until:
            return None
        try:
            stored = self._redis.hget(path.key, "body:" + variant)
            return Entry.unpack(stored) if isinstance(stored, bytes) else None
        except (redis.exceptions.ResponseError, ValueError):
            # Somebody else's, under our key: a string, a list, bytes that are no entry.
            self.drop([path])
        except AWAY as error:
            self._failed("read", error)
        return None

    def fill(self, path: Path, variant: str, entry: Entry) -> bool:
        """Store it; False where Redis could not be asked."""
        if time.monotonic() < self._skip_until:
            return False
        try:
            with self._redis.pipeline() as pipeline:
                pipeline.hset(path.key, "body:" + variant, entry.pack())
                pipeline.expire(path.key, self.ttl, nx=True)  # a hot path must not live for ever by its fills
                pipeline.execute()
        except AWAY as error:
            self._failed("fill", error)
            return False
        return True

    def drop(self, paths: Iterable[Path]) -> None:
        try:
            self._redis.unlink(*[path.key for path in paths])
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
