"""The cache lease of this process for Redis: PostgreSQL has answered recently that Redis is not fenced."""

import threading
from collections.abc import Callable

from velikiy.coherence.timing import LEASE_S, RENEWAL_S, now
from velikiy.postgres import DatabaseUnavailable


class RedisLease:
    """The cache lease of this process for Redis.

    It is renewed at most once a second, and only when it is needed, so an idle process costs nothing.
    """

    def __init__(self, redis_is_fenced: Callable[[], bool]) -> None:
        """`redis_is_fenced` asks PostgreSQL."""
        self._redis_is_fenced = redis_is_fenced
        self._asking = threading.Lock()
        self._asked = -LEASE_S
        self._until = 0.0

    def trusted_until(self) -> float:
        """The moment (`now`) until which Redis may be used. Compare with it after Redis has answered: a process may be
        stopped for any time between question and answer.

        Raises:
            DatabaseUnavailable: The lease has expired, and PostgreSQL cannot renew it.
        """
        if now() - self._asked >= RENEWAL_S and self._asking.acquire(blocking=False):
            try:
                self._ask()
            finally:
                self._asking.release()
        return self._until

    def _ask(self) -> None:
        asked = now()
        try:
            fenced = self._redis_is_fenced()
        except DatabaseUnavailable:
            if now() >= self._until:
                raise
            return
        finally:
            self._asked = asked
        self._until = 0.0 if fenced else asked + LEASE_S
