"""The relay: hears of SQL that was written past the app (psql, another program) and drops it in both tiers. It sees
what no trigger tells, a table that was restored, swapped or altered, and drops everything. And it looks after caches
that were left out: an emptied Redis comes back, edges that are gone are forgotten.

Any number may run; none of them is needed for what the app writes itself.
"""

import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path as File

import psycopg
import structlog

from velikiy import coherence
from velikiy.coherence import Fence, Path
from velikiy.coherence.membership import MISSING
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.postgres import OURS, Connection, Database, DatabaseUnavailable
from velikiy.postgres import database as postgres
from velikiy.resources import idempotency
from velikiy.resources.base import registry
from velikiy.settings import Settings

log = structlog.get_logger()

PathsOf = Callable[..., tuple[Path, ...]]

HEARTBEAT = 0.5
"""Seconds without a word after which the connection is tried: one that was cut off looks like a quiet one."""

LOOK_S = 1.0
"""Seconds between two looks at the tables."""

PAUSE = 0.2
"""Seconds between two tries to connect."""

SILENT = 10.0
"""Seconds without a renewal after which an edge is forgotten. It costs one that lives a start with nothing."""


CLEAN_UP = 60.0
"""Seconds between two looks for Idempotency-Keys that have expired."""

TABLES = """
WITH RECURSIVE tables AS (
    SELECT name, to_regclass(name)::oid AS id FROM unnest(%s::text[]) name
    UNION
    SELECT name, inhrelid FROM tables JOIN pg_inherits ON inhparent = id
)
SELECT
    name,
    string_agg(concat_ws(' ', id, relfilenode, pg_class.xmin, columns, triggers), ', ' ORDER BY id),
    array_agg(id::regclass::text) FILTER (WHERE pg_class.oid IS NOT NULL AND told IS DISTINCT FROM 60)
FROM tables
LEFT JOIN pg_class ON oid = id
CROSS JOIN LATERAL (
    SELECT string_agg(concat(attnum, ':', xmin), ' ' ORDER BY attnum) AS columns
    FROM pg_attribute WHERE attrelid = id AND attnum > 0
) its_columns
CROSS JOIN LATERAL (
    SELECT
        string_agg(concat(oid, ':', xmin), ' ' ORDER BY oid) AS triggers,
        bit_or(tgtype) FILTER (WHERE tgfoid = to_regproc('rows_notify') AND tgenabled IN ('O', 'A')) & 60 AS told
    FROM pg_trigger WHERE tgrelid = id
) its_triggers
GROUP BY name
"""
"""For each of these names what the catalogs say of the table and of those that inherit from it, as text; and which of
them lack a trigger that notifies of INSERT, DELETE, UPDATE or TRUNCATE (4 + 8 + 16 + 32 in pg_trigger.tgtype).

ALTER TABLE gives a catalog's row another xmin, and so triggers that were disabled and enabled again do not look as
before. TRUNCATE and whatever rewrites the table give it another file. ANALYZE and VACUUM change neither: they overwrite
the row in pg_class in place (only the first ANALYZE after the last child is gone does not). The catalogs are read
without a lock on the table, since a restore holds one for long. It takes 0.3 ms."""


def connect(settings: Settings) -> "Relay":
    """For the tables that there are."""
    database = Database(settings.database_url, size=4, timeout=settings.database_timeout)
    fence = coherence.connect(database, settings)
    database.open()
    return Relay(settings.database_url, database, fence, {name: it.touched_by for name, it in registry().items()})


class Relay:
    def __init__(self, dsn: str, database: Database, fence: Fence, paths_of: dict[str, PathsOf]) -> None:
        """`paths_of`: for each table with triggers that notify, what a write to a row of this id touches."""
        self.dsn = dsn
        self.database = database
        self.fence = fence
        self.paths_of = paths_of
        self._unheard: set[str] = set()
        """Tables of which it was said that their triggers do not fire."""

    def run(self, heartbeat: File | None = None) -> None:
        """For ever. `heartbeat`: a file that is touched each time that PostgreSQL has answered."""
        threading.Thread(target=self._look_after_caches, daemon=True).start()
        while True:
            try:
                self.run_once(heartbeat)
            except (psycopg.Error, DatabaseUnavailable) as error:
                log.warning("relay.disconnected", cause=type(error).__name__)
                time.sleep(PAUSE)

    def run_once(self, heartbeat: File | None = None) -> None:
        """From one connection to its loss.

        Raises:
            psycopg.Error, DatabaseUnavailable
        """
        with Connection.connect(self.dsn, **OURS, autocommit=True, application_name="velikiy relay") as connection:
            heard: list[str] = []
            connection.add_notify_handler(lambda notification: heard.append(notification.payload))
            connection.execute("LISTEN velikiy")
            if forgets := postgres.forgets(connection):
                log.warning("postgres.forgets_after_a_crash", settings=forgets, advice="switch them on")
            # What was written before nobody told us. In this order: what is written from here on is heard, and what
            # befalls a table is seen at the next look.
            tables = self._tables(connection)
            look_at = time.monotonic() + LOOK_S
            self._drop(None)
            log.info("relay.listening")
            if kept := self.fence.redis_tier.keeps_over_a_restart():
                log.warning(
                    "redis.keeps_over_a_restart", settings=kept, advice="switch them off: what came back is old"
                )
            while True:
                if heartbeat:
                    heartbeat.touch()
                pause = min(HEARTBEAT, look_at - time.monotonic())
                select.select([connection.fileno()], [], [], max(0.0, pause))
                connection.execute("SELECT")  # within a second, or the connection is lost (Connection.wait)
                # By the clock, however much there is to hear. And before what was heard: the look's own exchange may
                # bring notifications, of which `select` knows nothing any more.
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + LOOK_S
                    before, tables = tables, self._tables(connection)
                    if changed := [name for name in tables if tables[name] != before[name]]:
                        log.warning("relay.table_changed", tables=changed)
                        self._drop(None)
                if heard:
                    # Together: of a program that writes row by row hundreds may have come meanwhile.
                    payloads = heard.copy()
                    heard.clear()
                    self._drop(self.paths(payloads))

    def _tables(self, connection: Connection) -> dict[str, str]:
        """What the catalogs say of each table, to be compared with the next look. Warn once of those that cannot
        tell."""
        rows = connection.execute(TABLES, (list(self.paths_of),)).fetchall()
        unheard = {table for _, _, tables in rows for table in tables or ()}
        for table in sorted(unheard - self._unheard):
            log.warning(
                "relay.cannot_hear",
                table=table,
                advice=f"SQL from outside is not seen without its triggers: ALTER TABLE {table} ENABLE TRIGGER USER"
                f" where they are disabled, CALL make_resource('{table}') where there are none;"
                " until then, velikiy cache purge --all after such SQL",
            )
        self._unheard = unheard
        return {name: said for name, said, _ in rows}

    def paths(self, payloads: Sequence[str]) -> list[Path] | None:
        """What these notifications speak of, `<table> <id> <id> ...`; None is everything."""
        paths: dict[Path, None] = {}
        for payload in payloads:
            table, *ids = payload.split() or [""]
            if table not in self.paths_of or not all(number.isdecimal() for number in ids):
                return None
            for number in ids:
                paths.update(dict.fromkeys(self.paths_of[table](int(number))))
        return list(paths)

    def _drop(self, paths: list[Path] | None) -> None:
        with self.database.autocommit() as connection:
            self.fence.drop(connection, paths, wait=False)  # the next notification must not wait for a cache
        log.debug("relay.dropped", paths=[path.path for path in paths] if paths is not None else "everything")

    # ---- caches that were left out ----

    def _look_after_caches(self) -> None:
        reachable_since = time.monotonic()
        cleaned_up_at = 0.0
        while True:
            time.sleep(1)
            try:
                self.put_redis_back()
                # After an outage of PostgreSQL no edge has renewed: they get the time to do so.
                if time.monotonic() - reachable_since > SILENT:
                    self.forget_lost_edges()
                if time.monotonic() - cleaned_up_at > CLEAN_UP:
                    with self.database.autocommit() as connection:
                        more = idempotency.clean_up(connection)
                    cleaned_up_at = 0.0 if more else time.monotonic()
            except (psycopg.Error, DatabaseUnavailable):
                reachable_since = time.monotonic()
            except Exception:
                # Nobody would notice that this thread has ended: Redis would stay out of use, and that is all.
                log.exception("relay.cannot_look_after_caches")

    def put_redis_back(self) -> None:
        """Emptied, once nobody uses it any more: a lease that was given between emptying and the end of the fence
        would outlive the writes that passed it by."""
        caches = self.fence.caches
        with self.database.autocommit() as connection:
            redis = caches.redis(connection)
        if redis == MISSING:
            caches.insert_redis()  # fenced: the next look does the rest
            return
        if not redis.fenced:
            return
        caches.wait_out([redis])  # whoever fenced it may have died before the wait was over
        try:
            self.fence.redis_tier.drop(None)
        except DoesNotAnswer:
            return
        # The edges too: what was written past the app meanwhile was dropped there at once, and until the end of the
        # fence an edge could get the old body from Redis once more.
        with self.database.autocommit() as connection:
            self.fence.drop(connection, None)
        caches.put_redis_back(redis)
        log.warning("redis.back")

    def forget_lost_edges(self) -> None:
        """So that no write has to wait for one that is gone for good, and no list grows."""
        caches = self.fence.caches
        lost = caches.lost_edges(SILENT)
        if lost:
            caches.fence(lost)
            caches.wait_out(lost)
        for edge in lost:
            caches.forget(edge)
            log.warning("edge.forgotten", address=edge.address)
