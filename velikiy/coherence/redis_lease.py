"""The cache lease of this process for Redis: PostgreSQL has answered recently that Redis is not fenced."""

import threading
from collections.abc import Callable

from velikiy.coherence.timing import LEASE_S, RENEWAL_S, now
from velikiy.postgres import DatabaseUnavailable


class RedisLease:
    """It is renewed at most once a second, and only when it is needed, so an idle process costs nothing."""

    def __init__(self, redis_is_fenced: Callable[[], bool]) -> None:
        """`redis_is_fenced` queries PostgreSQL."""
        self._redis_is_fenced = redis_is_fenced
        self._renewing = threading.Lock()
        self._renewed_at = -LEASE_S
        self._until = 0.0

    def trusted_until(self) -> float:
        """Return the moment (`now`) until which Redis may be used.

        Compare it with the time after the reply of Redis: a process may be stopped for any time in between.

        Raises:
            DatabaseUnavailable: The lease has expired, and PostgreSQL cannot renew it.
        """
        if now() - self._renewed_at >= RENEWAL_S and self._renewing.acquire(blocking=False):
            try:
                self._renew()
            finally:
                self._renewing.release()
        return self._until

    def _renew(self) -> None:
        requested_at = now()
        try:
            fenced = self._redis_is_fenced()
        except DatabaseUnavailable:
            if now() >= self._until:
                raise
            return
        finally:
            self._renewed_at = requested_at
        self._until = 0.0 if fenced else requested_at + LEASE_S
