"""The listener invalidates what SQL from outside (psql, another program) changes, in both tiers.

Triggers notify of changed rows. A table that was restored, swapped or altered fires none: the listener compares the
identity of each table once a second, and drops everything when it has changed.
"""

import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psycopg
import structlog

from velikiy import coherence, metrics
from velikiy.coherence import CachePath, Gate
from velikiy.coherence.tables import watched_tables
from velikiy.findings.postgres import without_triggers as finding_without_triggers
from velikiy.postgres import CONFIRM, CONNECT_OPTIONS, Connection, Database, DatabaseUnavailable, forgets, patient
from velikiy.relay.janitor import Janitor
from velikiy.relay.live import Live
from velikiy.resources.base import registry
from velikiy.settings import Settings

log = structlog.get_logger()

PathsOf = Callable[..., tuple[CachePath, ...]]

HEARTBEAT_S = 0.5
"""Seconds of silence after which the connection is tested: a connection that was cut off looks like a quiet one."""

IDENTITY_CHECK_S = 1.0
"""Seconds between two comparisons of the tables' identity."""

AT_ONCE_S = 0.001
"""A `select` that takes less time has not waited: a notification had arrived before."""

RECONNECT_S = 0.2
"""Seconds between two attempts to connect."""


def connect(settings: Settings) -> "Relay":
    """Return the relay for the tables of all resources."""
    database = Database(settings.direct_url, size=4, timeout=settings.database_timeout)
    gate = coherence.connect(database, settings)
    database.open()
    paths_of = {name: it.invalidated_by for name, it in registry().items()}
    return Relay(database, gate, paths_of, settings.history_days)


class Relay:
    def __init__(self, database: Database, gate: Gate, paths_of: dict[str, PathsOf], history_days: int = 0) -> None:
        """
        Args:
            paths_of: For each table with triggers, the paths that a write to the row with this id invalidates.
            history_days: See `Janitor`.
        """
        self.history_days = history_days
        self.database = database
        self.gate = gate
        self.paths_of = paths_of
        self._without_triggers: set[str] = set()
        """The tables that the log has already named for that reason."""

        self._reason: str | None = None
        """Why PostgreSQL is lost, as logged, or None while the relay listens."""

    def run(self, heartbeat: Path | None = None) -> None:
        """Run for ever. `heartbeat`: a file that is touched each time that PostgreSQL has answered."""
        janitor = Janitor(self.database, self.gate, self.history_days)
        threading.Thread(target=janitor.run, daemon=True).start()
        threading.Thread(target=Live(self.gate, janitor.seen).run, daemon=True).start()
        threading.Thread(target=self._warn_of_two_leaders, daemon=True).start()
        while True:
            try:
                self.run_once(heartbeat)
            except (psycopg.Error, DatabaseUnavailable) as error:
                metrics.RELAYS_LISTENING.set(0)
                metrics.RELAY_DISCONNECTIONS.inc()
                self._log_once(error)
                time.sleep(RECONNECT_S)

    def _log_once(self, error: Exception) -> None:
        """Log why PostgreSQL is lost: five attempts a second would fill the log with the same line."""
        reason = " ".join(str(error).split())
        if reason != self._reason:
            log.warning("relay.disconnected", cause=type(error).__name__, reason=reason)
        self._reason = reason

    def _warn_of_two_leaders(self) -> None:
        """Warn at the start. Later, an old leader is passed over while its standby acknowledges nothing."""
        if len(hosts := self.database.believers()) > 1:
            log.warning(
                "postgres.two_leaders",
                hosts=hosts,
                advice="stop all but the leader that your failover manager names: without synchronous replication, each"
                " takes writes that the others do not have (docs/scaling-postgresql.md)",
            )

    def run_once(self, heartbeat: Path | None = None) -> None:
        """Listen on one connection until it is lost.

        Raises:
            psycopg.Error, DatabaseUnavailable
        """
        with Connection.connect(
            patient(self.database.conninfo()),
            **CONNECT_OPTIONS,
            autocommit=True,
            application_name="velikiy relay",
        ) as connection:
            received: list[str] = []
            connection.add_notify_handler(lambda notification: received.append(notification.payload))
            connection.execute("LISTEN velikiy")
            if settings := forgets(connection):
                log.warning("postgres.forgets_after_a_crash", settings=settings, advice="switch them on")
            # No notification tells of earlier changes. In this order: later changes are notified, and a later change
            # of a table's identity shows at the next comparison.
            tables = self._tables(connection)
            compare_at = time.monotonic() + IDENTITY_CHECK_S
            self._drop(None)
            metrics.RELAYS_LISTENING.set(1)
            self._reason = None
            log.info("relay.listening")
            taken_at = time.monotonic()
            while True:
                if heartbeat:
                    heartbeat.touch()
                pause = min(HEARTBEAT_S, compare_at - time.monotonic())
                asleep_at = time.monotonic()
                select.select([connection.fileno()], [], [], max(0.0, pause))
                metrics.RELAY_ANSWERED_AT.set_to_current_time()
                woken_at = time.monotonic()
                # A notification that was there already may have waited since the last were taken, while these were
                # processed.
                arrived_at = woken_at if woken_at - asleep_at > AT_ONCE_S else taken_at
                # Within a second, or the connection is lost (Connection.wait). An old leader would answer
                # a SELECT, and notify of nothing.
                connection.execute(CONFIRM.text)
                # The clock decides, however many notifications arrive. The comparison comes before their processing,
                # because it may receive further notifications, which `select` then does not report.
                if time.monotonic() >= compare_at:
                    compare_at = time.monotonic() + IDENTITY_CHECK_S
                    before, tables = tables, self._tables(connection)
                    if changed := [name for name in tables if tables[name] != before[name]]:
                        log.warning("relay.table_changed", tables=changed)
                    # Without its triggers, any row of a table may have changed since the last comparison.
                    if changed or self._without_triggers:
                        self._drop(None)
                taken_at = time.monotonic()
                if received:
                    # Together: a program that writes row by row may have sent hundreds meanwhile.
                    payloads = received.copy()
                    received.clear()
                    self._drop(self.paths(payloads))
                    metrics.RELAY_NOTIFICATIONS.inc(len(payloads))
                    metrics.RELAY_LAG.observe(time.monotonic() - arrived_at)

    def _tables(self, connection: Connection) -> dict[str, str]:
        """Return the identity of each table, and warn once of a table whose triggers do not fire."""
        tables = watched_tables(connection, list(self.paths_of))
        without_triggers = {table for it in tables for table in it.without_triggers}
        for table in sorted(without_triggers - self._without_triggers):
            log.warning("relay.cannot_hear", table=table, advice=finding_without_triggers(table).sentence)
        self._without_triggers = without_triggers
        metrics.TABLES_WITHOUT_TRIGGERS.set(len(without_triggers))
        return {it.name: it.identity for it in tables}

    def paths(self, payloads: Sequence[str]) -> list[CachePath] | None:
        """Return the paths of these notifications, `<table> <id> <id> ...`; None stands for every path."""
        paths: dict[CachePath, None] = {}
        for payload in payloads:
            table, *ids = payload.split() or [""]
            if table not in self.paths_of or not all(number.isdecimal() for number in ids):
                return None
            for number in ids:
                paths.update(dict.fromkeys(self.paths_of[table](int(number))))
        return list(paths)

    def _drop(self, paths: list[CachePath] | None) -> None:
        with self.database.autocommit() as connection:
            self.gate.drop(connection, paths, wait=False)  # the next notification must not wait for a cache
        log.debug("relay.dropped", paths=[path.path for path in paths] if paths is not None else "everything")
