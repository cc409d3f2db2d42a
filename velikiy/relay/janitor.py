"""The janitor readmits a fenced Redis, removes edges that are gone, and deletes expired idempotency keys."""

import time

import psycopg
import structlog

from velikiy.coherence import Gate
from velikiy.coherence.membership import MISSING
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.postgres import Database, DatabaseUnavailable
from velikiy.resources import idempotency

log = structlog.get_logger()

ROUND_S = 1.0
"""Seconds between two rounds."""

EDGE_EXPIRY_S = 10.0
"""Seconds without a renewal after which an edge is removed. If that edge is alive, it starts again without entries."""

CLEAN_UP_S = 60.0
"""Seconds between two deletions of expired idempotency keys."""


class Janitor:
    def __init__(self, database: Database, gate: Gate) -> None:
        self.database = database
        self.gate = gate

    def run(self) -> None:
        """Run for ever."""
        reachable_since = time.monotonic()
        cleaned_up_at = 0.0
        while True:
            time.sleep(ROUND_S)
            try:
                self.readmit_redis()
                # During an outage of PostgreSQL no edge could renew its lease: edges get the time to do so.
                if time.monotonic() - reachable_since > EDGE_EXPIRY_S:
                    self.remove_expired_edges()
                if time.monotonic() - cleaned_up_at > CLEAN_UP_S:
                    with self.database.autocommit() as connection:
                        more = idempotency.clean_up(connection)
                    cleaned_up_at = 0.0 if more else time.monotonic()
            except (psycopg.Error, DatabaseUnavailable):
                reachable_since = time.monotonic()
            except Exception:
                # The end of this thread would go unnoticed, and Redis would stay out of use.
                log.exception("relay.cannot_look_after_caches")

    def readmit_redis(self) -> None:
        """Empty a fenced Redis and put it back into use.

        Redis is emptied only after its exclusion. A fill lease that was granted between emptying and the end of the
        fence would outlive the writes that skipped Redis.
        """
        caches = self.gate.caches
        with self.database.autocommit() as connection:
            redis = caches.redis(connection)
        if redis == MISSING:
            caches.insert_redis()  # as a fenced cache: the next round readmits it
            return
        if not redis.fenced:
            return
        caches.await_exclusion([redis])  # the writer that fenced it may have died before the wait was over
        try:
            self.gate.redis_tier.drop(None)
        except DoesNotAnswer:
            return
        # The edges as well: SQL from outside was dropped there at once, and until the end of the fence an edge could
        # copy the old entry from Redis once more.
        with self.database.autocommit() as connection:
            self.gate.drop(connection, None)
        caches.readmit_redis(redis)
        log.warning("redis.back")

    def remove_expired_edges(self) -> None:
        """Remove edges that are gone, so that no write waits for them and the list does not grow."""
        caches = self.gate.caches
        expired = caches.expired_edges(EDGE_EXPIRY_S)
        if expired:
            caches.fence(expired)
            caches.await_exclusion(expired)
        for edge in expired:
            caches.forget(edge)
            log.warning("edge.forgotten", address=edge.address)
