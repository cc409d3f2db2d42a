"""The janitor readmits a fenced Redis, removes edges that are gone, and deletes expired idempotency keys and
histories."""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psycopg
import structlog

from velikiy import metrics
from velikiy.coherence import Gate
from velikiy.coherence.membership import MISSING, REDIS, RIVAL_S, Renewals
from velikiy.coherence.redis_tier import OTHER_ADVICE, DoesNotAnswer
from velikiy.coherence.shards import UNREGISTERED
from velikiy.findings import Finding
from velikiy.findings.announcer import Announcer
from velikiy.findings.caches import Table, edges, redis, table, unsteady
from velikiy.findings.postgres import Diagnosis, archive, look, sessions_end
from velikiy.postgres import Database, DatabaseUnavailable
from velikiy.postgres.database import ENDED_WITHIN_S
from velikiy.resources import history, idempotency
from velikiy.resources.base import registry

log = structlog.get_logger()

ROUND_S = 1.0
"""Seconds between two rounds."""

EDGE_EXPIRY_S = 10.0
"""Seconds without a renewal after which an edge is removed. If that edge is alive, it starts again without entries."""

MAX_SETTLING_S = 8.0
"""Seconds for which the servers of a cluster have to stay the same before they are registered. The time begins with one
round and doubles with each change, so that a cluster that moves slots for hours does not fence Redis each second."""

CLEAN_UP_S = 60.0
"""Seconds between two deletions of expired idempotency keys, and of expired entries in histories."""


SERVER = """
SELECT
    extract(epoch FROM pg_postmaster_start_time()), (SELECT count(*) FROM pg_stat_activity WHERE pid IS NOT NULL),
    current_setting('max_connections')
"""


@dataclass
class Seen:
    """The state that the janitor has found in its last round, for the page Live (velikiy/relay/live.py)."""

    table: Table | None = None
    findings: list[Finding] = field(default_factory=list)
    postgres_answers: bool = False
    postgres: dict[str, float] = field(default_factory=dict)
    redis: dict[str, float] = field(default_factory=dict)
    """Empty while Redis does not answer."""


class Janitor:
    def __init__(self, database: Database, gate: Gate, history_days: int = 0) -> None:
        """`history_days`: days after which a version that was replaced is forgotten, 0 for never."""
        self.database = database
        self.gate = gate
        self.history_days = history_days
        self._ours = UNREGISTERED
        """The servers that this relay reached last."""

        self._changed_at = -EDGE_EXPIRY_S
        """The moment at which a cluster had other servers, or moved slots."""

        self._settling_s = ROUND_S

        self._logged = ""
        self._announcer, self._diagnosis = Announcer(), Diagnosis(database.dsn)
        self.seen = Seen()
        self._evictions = 0
        self._edges, self._announcements = Renewals(EDGE_EXPIRY_S), Renewals(RIVAL_S)

    def run(self) -> None:
        """Run for ever."""
        cleaned_up_at = 0.0
        while True:
            try:
                self.report()
                self.look_after_redis()
                self.announce()
                self.remove_expired_edges()
                if time.monotonic() - cleaned_up_at > CLEAN_UP_S:
                    cleaned_up_at = 0.0 if self.clean_up() else time.monotonic()
            except (psycopg.Error, DatabaseUnavailable) as error:
                # During an outage no edge could renew its lease: edges get the time to do so.
                self._edges.forget()
                self._announcements.forget()
                self._announce_cause(error)
            except Exception:
                # The end of this thread would go unnoticed, and Redis would stay out of use.
                log.exception("relay.cannot_look_after_caches")
            time.sleep(ROUND_S)  # after the first round: a stack that has started uses Redis at once

    def _announce_cause(self, error: Exception) -> None:
        """Log why a round has failed."""
        if isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
            with suppress(Exception):  # the next round says more
                self.announce()  # names the session that has locked the table
                return
        self.seen.findings = [self._diagnosis.finding(within=0)]
        self.seen.postgres_answers = False
        self._announcer.report(self.seen.findings)

    def clean_up(self) -> bool:
        """Delete some of what has expired. Return whether more may be left."""
        with self.database.autocommit() as connection:
            more = idempotency.clean_up(connection)
            self.gate.caches.forget_old_records(connection)
        if self.history_days:
            more = self.gate.write(partial(history.purge, days=self.history_days)) or more
        return more

    def announce(self) -> None:
        """Log whatever is wrong with PostgreSQL, its sessions and the caches, when it begins and when it is over."""
        tables = [*registry()]
        with self.database.autocommit() as connection:
            found = [*look(connection, tables), *archive(connection)]
            [(started, sessions_open, max_sessions)] = connection.execute(SERVER).fetchall()
        known = None
        # With a deadline of its own. The findings name the session that has locked the table.
        with self.database.autocommit() as connection, suppress(psycopg.errors.LockNotAvailable):
            known = table(connection)
        self.seen.table, self.seen.postgres_answers = known, True
        self.seen.postgres = {"started": float(started), "sessions": sessions_open, "max_sessions": int(max_sessions)}
        of_caches = [*redis(self.gate.redis_tier, known), *edges(known), *unsteady(known)] if known else []
        ended = sessions_end(self.database.young_ends(), ENDED_WITHIN_S)
        self.seen.findings = [*ended, *found, *of_caches]
        self._announcer.report(self.seen.findings)

    def report(self) -> None:
        """Report the state that all processes share. `pg_notification_queue_usage` grows while no relay listens."""
        with self.database.autocommit() as connection:
            found = Counter((cache.kind, cache.state) for cache in self.gate.caches.all(connection))
            [(queue,)] = connection.execute("SELECT pg_notification_queue_usage()").fetchall()
        for kind in ("edge", "redis"):
            for state in ("registered", "fenced", "excluded"):
                metrics.CACHES.labels(kind, state).set(found[kind, state])
        metrics.RELAY_QUEUE.set(queue)
        try:
            usage = self.gate.redis_tier.usage()
        except DoesNotAnswer:
            metrics.REDIS_UP.set(0)
            self.seen.redis = {}
            return
        metrics.REDIS_UP.set(1)
        self.seen.redis = {
            "memory": usage.get("used_memory", 0),
            "max_memory": usage.get("maxmemory", 0),
            "started": round(time.time() - usage.get("uptime_in_seconds", 0)),
        }
        metrics.REDIS_MEMORY.set(usage.get("used_memory", 0))
        metrics.REDIS_MAX_MEMORY.set(usage.get("maxmemory", 0))
        evictions = int(usage.get("evicted_keys", 0))
        # A Redis that was restarted counts from 0 again.
        metrics.REDIS_EVICTIONS.inc(evictions - self._evictions if evictions >= self._evictions else evictions)
        self._evictions = evictions

    def look_after_redis(self) -> None:
        """Register the servers that answer as Redis, and put a fenced Redis back into use.

        Redis is emptied only after its exclusion. A fill lease that was granted between emptying and the end of the
        fence would outlive the writes that skipped Redis.
        """
        caches = self.gate.caches
        with self.database.autocommit() as connection:
            redis = caches.redis(connection)
            caches.announced(connection, self._announcements)  # deletes old ones
        if redis == MISSING:
            caches.insert_redis()  # as a fenced cache: the next round readmits it
            return
        try:
            ours = self.gate.redis_tier.identify()
        except DoesNotAnswer as error:
            self._log_once("redis.unusable", cause=f"Redis {error}")
            if error.slots_move:
                # While keys are on their way, copies of an entry may exist, of which a drop reaches one.
                self._note_change()
                if redis.shards and redis.shards.is_cluster:
                    caches.fence([redis])
            return
        if ours.is_cluster and ours.id != self._ours.id:
            self._note_change()
        # An earlier server at our address was restarted or replaced. If other processes still use it, they announce it.
        if self._ours.id != ours.id:
            caches.forget_announced(self._ours)
        self._ours = ours
        if redis.shards and redis.shards.id == ours.id:
            self._logged = ""
            return
        if not redis.fenced:
            self.gate.adopt(ours)
            with self.database.autocommit() as connection:
                redis = caches.redis(connection)
            if redis.shards and redis.shards.id != ours.id:
                caches.fence([redis])  # writers that reach our server cannot drop anything in the registered one
            return
        caches.announce(ours)  # before the wait, in which the relays of other servers announce theirs
        caches.await_exclusion([redis])  # the writer that fenced it may have died before the wait was over
        if ours.is_cluster and time.monotonic() - self._changed_at < self._settling_s:
            return
        with self.database.autocommit() as connection:
            rivals = [it.address for it in caches.announced(connection, self._announcements) if not it.overlaps(ours)]
            pause = caches.record(connection, REDIS).pause_left_s
        if rivals:
            self._log_once("redis.contested", ours=ours.address, others=rivals, advice=OTHER_ADVICE)
            return
        if pause:  # writers have fenced it again and again
            return
        try:
            shards = self.gate.redis_tier.empty()
        except DoesNotAnswer as error:
            self._log_once("redis.unusable", cause=f"Redis {error}")
            return
        # The edges as well: SQL from outside was dropped there at once, and until the end of the fence an edge could
        # copy the old entry from Redis once more.
        with self.database.autocommit() as connection:
            self.gate.drop(connection, None)
        if caches.readmit_redis(redis, shards):
            caches.forget_announced(shards)
            log.warning("redis.back", address=shards.address)

    def _note_change(self) -> None:
        now = time.monotonic()
        recent = now - self._changed_at < 2 * MAX_SETTLING_S
        self._settling_s = min(2 * self._settling_s, MAX_SETTLING_S) if recent else ROUND_S
        self._changed_at = now

    def _log_once(self, event: str, **members: object) -> None:
        """Log a state of Redis when it begins, and not each second."""
        state = repr((event, members))
        if state != self._logged:
            log.warning(event, **members)
        self._logged = state

    def remove_expired_edges(self) -> None:
        """Remove edges that are gone, so that no write waits for them and the list does not grow."""
        caches = self.gate.caches
        expired = caches.expired_edges(self._edges)
        if expired:
            caches.fence(expired)
            caches.await_exclusion(expired)
        for edge in expired:
            caches.forget(edge)
            log.warning("edge.forgotten", address=edge.address)
