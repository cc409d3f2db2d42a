"""Which PostgreSQL leads? A server that was a leader may believe that it still is.

A failover manager such as Patroni promotes a standby when it no longer hears from the leader. The old leader may live
on, cut off or without its manager, and answer reads with rows that the new leader has changed since. But it cannot
commit synchronously: that takes the acknowledgement of a synchronous standby, and a standby acknowledges nothing once
it was promoted. So a synchronous commit proves, at the moment of the acknowledgement, that this server leads, and
that everything committed here before, also a commit whose wait was interrupted, is on the standby.

CONFIRM makes a transaction that writes nothing commit synchronously. A read counts only if it is confirmed.
Without synchronous standbys CONFIRM does nothing: then no other server may be promoted (docs/scaling-postgresql.md).
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from velikiy.postgres.pipeline import Connection, Statement

CONFIRMED = (
    "CASE WHEN current_setting('synchronous_standby_names') <> ''"
    " THEN pg_logical_emit_message(true, 'velikiy', '') END IS NOT NULL"
)
"""An expression for a statement that commits by itself, or with its exchange. The message gives the transaction a
record in the log, without which it would commit without a wait. No replication slot has to exist for it."""

CONFIRM = Statement(f"SELECT {CONFIRMED}")

FOUND_FOR_S = 0.2
"""Seconds for which a found leader counts: the connections of a pool that fills up need one search."""

SEARCH_S = 2.0
"""Seconds of a search. During a failover no server leads."""

RETRY_S = 0.2
"""Seconds between two attempts at one host."""


class Leader:
    """The leader among the hosts of a DSN. With one host this class does nothing."""

    def __init__(self, dsn: str, connect_options: dict[str, Any], configure: Callable[[Connection], None]) -> None:
        """`configure` raises psycopg.Error if the server of the connection does not lead."""
        self.dsn = dsn
        self._options, self._configure = connect_options, configure
        self._each = _one_for_each_host(dsn)
        self._searching = threading.Lock()
        self._found, self._found_at = dsn, -FOUND_FOR_S

    def conninfo(self) -> str:
        """Return where to connect.

        All hosts are tried at once, because one that is cut off takes up seconds, and an old leader that still takes
        connections may come first in the list.

        Raises:
            psycopg.OperationalError: No host leads.
        """
        if len(self._each) == 1:
            return self.dsn
        with self._searching:  # the connections of all pools wait for one search
            if time.monotonic() - self._found_at > FOUND_FOR_S:
                self._found, self._found_at = self._search(), time.monotonic()
            return self._found

    def doubt(self, connection: psycopg.Connection, if_moved: Callable[[], None]) -> None:
        """Look for the leader in the background, after a connection has not answered in time, and call `if_moved` if it
        is another server. At most one search runs at a time."""
        if len(self._each) == 1 or self._searching.locked():
            return
        before = (connection.info.host, connection.info.port) if not connection.closed else None

        def look() -> None:
            try:
                found = conninfo_to_dict(self.conninfo())
            except psycopg.Error:
                return
            if before != (found.get("host"), int(found.get("port") or 5432)):
                if_moved()

        threading.Thread(target=look, daemon=True).start()

    def believers(self) -> list[str]:
        """Return the hosts that believe to be the leader. With more than one, each of them takes writes, unless
        synchronous replication prevents it."""
        found: list[str] = []

        def ask(conninfo: str) -> None:
            with suppress(psycopg.Error), Connection.connect(conninfo, **self._options) as connection:
                found.append(f"{connection.info.host}:{connection.info.port}")

        threads = [threading.Thread(target=ask, args=(conninfo,), daemon=True) for conninfo in self._each]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(found)

    def _search(self) -> str:
        found: queue.SimpleQueue[str] = queue.SimpleQueue()
        over = threading.Event()
        until = time.monotonic() + SEARCH_S

        def attempt(conninfo: str) -> None:
            while not over.is_set() and time.monotonic() < until:
                try:
                    with Connection.connect(conninfo, **self._options, autocommit=True) as connection:
                        self._configure(connection)
                        found.put(conninfo)
                        return
                except psycopg.Error:
                    over.wait(RETRY_S)

        for conninfo in self._each:
            threading.Thread(target=attempt, args=(conninfo,), daemon=True).start()
        try:
            return found.get(timeout=SEARCH_S)
        except queue.Empty:
            raise psycopg.OperationalError(
                "no host of DATABASE_URL is a leader that its standby acknowledges"
            ) from None
        finally:
            over.set()


def _one_for_each_host(dsn: str) -> list[str]:
    """Return the DSN of each host of this DSN."""
    given = {name: str(value).split(",") for name, value in conninfo_to_dict(dsn).items() if value is not None}
    count = max(len(given.get(name, [])) for name in ("host", "hostaddr"))
    if count < 2:
        return [dsn]
    hosts = []
    for n in range(count):
        own = {name: given[name][n] for name in ("host", "hostaddr") if n < len(given.get(name, []))}
        ports = given.get("port", ["5432"])
        hosts.append(make_conninfo(dsn, **own, port=ports[n] if n < len(ports) else ports[0]))
    return hosts
