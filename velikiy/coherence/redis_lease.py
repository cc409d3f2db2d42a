"""The cache lease of this process for Redis: PostgreSQL has answered recently which servers are in use as Redis."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from velikiy.coherence.shards import ShardMap
from velikiy.coherence.timing import LEASE_S, RENEWAL_S, now
from velikiy.postgres import DatabaseUnavailable


class Trust(NamedTuple):
    """Which servers may be used, and until when."""

    shards: ShardMap | None
    until: float
    """The moment (`now`). Compare it with the time after the reply of Redis: a process may be stopped for any time in
    between."""

    @property
    def holder(self) -> ShardMap | None:
        """The servers if they may be used now."""
        return self.shards if now() < self.until else None


NOTHING = Trust(None, 0.0)


class RedisLease:
    """It is renewed at most once a second, and only when it is needed, so an idle process costs nothing."""

    def __init__(self, registered: Callable[[], ShardMap | None]) -> None:
        """`registered` queries PostgreSQL for the servers in use; None while Redis is fenced."""
        self._registered = registered
        self._renewing = threading.Lock()
        self._renewed_at = -LEASE_S
        self._trust = NOTHING

    def trust(self) -> Trust:
        """Return what is known, which may have expired.

        Raises:
            DatabaseUnavailable: The lease has expired, and PostgreSQL cannot renew it.
        """
        if now() - self._renewed_at >= RENEWAL_S and self._renewing.acquire(blocking=False):
            try:
                self._renew()
            finally:
                self._renewing.release()
        return self._trust

    def _renew(self) -> None:
        requested_at = now()
        try:
            shards = self._registered()
        except DatabaseUnavailable:
            if not self._trust.holder:
                raise
            return
        finally:
            self._renewed_at = requested_at
        self._trust = Trust(shards, requested_at + LEASE_S) if shards else NOTHING
