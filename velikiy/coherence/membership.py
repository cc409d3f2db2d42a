"""The table `caches`: who has to be told of a write, and who is left out because it does not answer.

A cache may be used only by somebody who has asked this table, and only for LEASE seconds from before he asked (Gray and
Cheriton, Leases, 1989). So a cache that cannot be told of a write is put out of use by its row alone: it is *fenced*;
whoever asks from now on is refused, and after WAIT seconds nobody is left who was not. Then it is *left out*: writers
pass it by. It comes back as a new *epoch*, with nothing from before.

No clocks of two machines are compared: a lease is counted by the one who uses it, from before it asked; the wait by
whoever waits, from when the fence is visible to all. `renewed_at` and `fenced_at` are for people and for clearing up.
"""

import hashlib
import ipaddress
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from velikiy.postgres import Connection, Database, DatabaseUnavailable, Statement

log = structlog.get_logger()

LEASE = 2.4
"""Seconds."""

WAIT = 2.5
"""Seconds; longer than LEASE by more than two clocks drift apart meanwhile. With what it takes to notice that a
cache does not answer (PATIENCE) a write waits 3 s at most."""

PATIENCE = 0.4
"""Seconds for a cache to answer a drop."""

REDIS = "redis"

EDGES = Statement(
    "SELECT name, address, epoch, fenced_at IS NOT NULL FROM caches WHERE kind = 'edge' AND NOT left_out ORDER BY name"
)


def _host() -> str:
    """Of this boot and this network namespace; edge/start does the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(f"{boot} {Path('/proc/self/ns/net').readlink()}".encode()).hexdigest()[:16]


HOST = _host()


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Cache(NamedTuple):
    name: str
    """Of an edge: `place@address`. At a place (edge/start) there can be no second one at the same time; one that
    moves to another address is another cache."""

    address: str
    """Of an edge: host:port of its control listener, as the apps see it."""

    epoch: str
    fenced: bool
    left_out: bool

    @property
    def place(self) -> str:
        return self.name.partition("@")[0]

    @property
    def beside_us(self) -> bool:
        """On a loopback that is also ours. Only there does a refused connection show that nobody is left: elsewhere
        the address may be another machine's by now, or a firewall or a balancer may refuse for it."""
        host = self.address.rpartition(":")[0].strip("[]")
        return self.place.startswith(f"{HOST}/") and is_loopback(host)


MISSING = Cache(REDIS, "", "", fenced=True, left_out=False)
"""Redis, while somebody has deleted its row. Nobody may use it, and since processes that asked before may still do so,
a writer waits as for any fence."""


class Caches:
    """Each method is one statement, or a few that commit by themselves: a writer that waits holds no lock here."""

    def __init__(self, database: Database, *, threads: int) -> None:
        """`threads`: that this process has for requests. Not all of them may wait for a fence: reads have to be
        answered meanwhile, and the leases of other edges to be renewed."""
        self.database = database
        self._waiting = threading.BoundedSemaphore(max(1, threads * 3 // 4))

    def edges(self, connection: Connection) -> list[Cache]:
        """Those that have to be told; as of now, whatever the transaction has read before."""
        (rows,) = connection.ask(EDGES)
        return [
            Cache(name.decode(), address.decode(), epoch.decode(), fenced=fenced == b"t", left_out=False)
            for name, address, epoch, fenced in rows
        ]

    def all(self, connection: Connection) -> list[Cache]:
        """Redis first, its row missing or not; those that are left out too."""
        rows = connection.execute(
            "SELECT name, address, epoch, fenced_at IS NOT NULL, left_out FROM caches ORDER BY kind DESC, address"
        )
        found = [Cache(*row) for row in rows.fetchall()]
        return found if found and found[0].name == REDIS else [MISSING, *found]

    def redis(self, connection: Connection) -> Cache:
        row = connection.execute(
            "SELECT name, address, epoch, fenced_at IS NOT NULL, left_out FROM caches WHERE name = %s", (REDIS,)
        ).fetchone()
        return Cache(*row) if row else MISSING

    def redis_is_fenced(self) -> bool:
        """
        Raises:
            DatabaseUnavailable
        """
        with self.database.autocommit() as connection:
            return self.redis(connection).fenced

    def fence(self, caches: Sequence[Cache]) -> None:
        """Refuse them to all who ask from now on. Visible to all when this returns, and not before.

        Raises:
            DatabaseUnavailable
        """
        if not caches:
            return
        with self.database.autocommit() as connection:
            connection.execute(
                "UPDATE caches SET fenced_at = clock_timestamp() WHERE fenced_at IS NULL"
                " AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[]))",
                _which(caches),
            )
        log.warning("cache.fenced", caches=[cache.address or cache.name for cache in caches])

    def wait_out(self, caches: Sequence[Cache]) -> None:
        """Until nobody uses these fenced caches any more; not where somebody else has waited already.

        A row that is not there any more says nothing: an app that was stopped may carry out an old registration late,
        while the edge goes on under the lease of a newer one.

        Raises:
            DatabaseUnavailable: too many wait already, or PostgreSQL does not answer.
        """
        if not caches:
            return
        if not self._waiting.acquire(blocking=False):
            raise DatabaseUnavailable("too many writes wait for a cache that does not answer")
        try:
            self._wait_out(caches)
        finally:
            self._waiting.release()

    def _wait_out(self, caches: Sequence[Cache]) -> None:
        which = _which(caches)
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            with self.database.autocommit() as connection:
                left_out = connection.execute(
                    "SELECT FROM caches WHERE left_out"
                    " AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[]))",
                    which,
                )
                if left_out.rowcount == len(caches):
                    return
            time.sleep(0.02)
        with self.database.autocommit() as connection:
            connection.execute(
                "UPDATE caches SET left_out = true WHERE fenced_at IS NOT NULL"
                " AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[]))",
                which,
            )
        log.warning("cache.left_out", caches=[cache.address or cache.name for cache in caches])

    def renew(self, place: str, epoch: str) -> bool | None:
        """For an edge that wants to go on: whether Redis is fenced, as it is while its row is missing. None: the edge
        itself is, or nobody knows of it.

        By its epoch, which is its alone, and not by the address that it is seen under: of several apps each may see
        another one. One that has moved is found out by the first writer.
        """
        with self.database.reserved() as connection:
            renewed = connection.execute(
                "UPDATE caches SET renewed_at = clock_timestamp()"
                " WHERE kind = 'edge' AND starts_with(name, %s) AND epoch = %s AND fenced_at IS NULL"
                " RETURNING coalesce((SELECT r.fenced_at IS NOT NULL FROM caches r WHERE r.kind = 'redis'), true)",
                (f"{place}@", epoch),
            ).fetchone()
            return renewed[0] if renewed else None

    def register(self, place: str, address: str, epoch: str) -> bool:
        """An edge that is new, or comes back; it holds nothing from before this epoch, which was never used. Whether
        Redis is fenced.

        Somebody else who was at this address may live on elsewhere: he is fenced, and forgotten by the relay.
        """
        with self.database.reserved() as connection:
            connection.execute(
                "UPDATE caches SET fenced_at = clock_timestamp()"
                " WHERE address = %s AND name <> %s AND fenced_at IS NULL",
                (address, f"{place}@{address}"),
            )
            connection.execute(
                "INSERT INTO caches (name, kind, address, epoch) VALUES (%s, 'edge', %s, %s)"
                " ON CONFLICT (name) DO UPDATE SET address = excluded.address, epoch = excluded.epoch,"
                " renewed_at = excluded.renewed_at, fenced_at = NULL, left_out = false",
                (f"{place}@{address}", address, epoch),
            )
            fenced = self.redis(connection).fenced
        log.info("edge.registered", place=place, address=address, epoch=epoch)
        return fenced

    def insert_redis(self) -> None:
        """Insert the row that is missing, as a fenced one: writers have passed Redis by, and so it has to be emptied
        before it is used again."""
        with self.database.autocommit() as connection:
            inserted = connection.execute(
                "INSERT INTO caches (name, kind, address, epoch, fenced_at)"
                " VALUES (%s, 'redis', '', gen_random_uuid()::text, clock_timestamp()) ON CONFLICT (name) DO NOTHING",
                (REDIS,),
            )
        if inserted.rowcount:  # else another relay was faster
            log.warning("redis.row_inserted")

    def put_redis_back(self, cache: Cache) -> None:
        """After it was emptied while it was left out. By its epoch: a relay that was slow lifts no later fence."""
        with self.database.autocommit() as connection:
            connection.execute(
                "UPDATE caches SET epoch = gen_random_uuid()::text, fenced_at = NULL, left_out = false"
                " WHERE name = %s AND epoch = %s AND left_out",
                (REDIS, cache.epoch),
            )

    def lost_edges(self, seconds: float) -> list[Cache]:
        """Those that are fenced, or have not renewed for so long by PostgreSQL's clock: to be forgotten."""
        with self.database.autocommit() as connection:
            rows = connection.execute(
                "SELECT name, address, epoch, fenced_at IS NOT NULL, left_out FROM caches"
                " WHERE kind = 'edge'"
                " AND (fenced_at IS NOT NULL OR renewed_at < clock_timestamp() - make_interval(secs => %s))",
                (seconds,),
            )
            return [Cache(*row) for row in rows.fetchall()]

    def forget(self, cache: Cache) -> None:
        """A cache that nobody is told of any more may as well not be there; should it live, it registers anew."""
        with self.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM caches WHERE name = %s AND epoch = %s AND left_out", (cache.name, cache.epoch)
            )


def _which(caches: Sequence[Cache]) -> dict[str, list[str]]:
    return {"names": [cache.name for cache in caches], "epochs": [cache.epoch for cache in caches]}


class Trust:
    """What this process believes of Redis: not fenced, for LEASE seconds from before it asked.

    It asks at most once a second, and only when somebody wants to know, so a process that is idle costs nothing.
    """

    AGAIN = 1.0
    """Seconds."""

    def __init__(self, redis_is_fenced: Callable[[], bool]) -> None:
        """`redis_is_fenced` asks PostgreSQL."""
        self._redis_is_fenced = redis_is_fenced
        self._asking = threading.Lock()
        self._asked = -LEASE
        self._until = 0.0

    def until(self) -> float:
        """The moment (`now`) until which Redis may be used. Compare with it after Redis has answered: a process may be
        stopped for any time between question and answer.

        Raises:
            DatabaseUnavailable: what was promised has run out, and nobody can promise more.
        """
        if now() - self._asked >= self.AGAIN and self._asking.acquire(blocking=False):
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
        self._until = 0.0 if fenced else asked + LEASE


def now() -> float:
    """Seconds, of a clock that goes on while the machine sleeps, as the leases of others do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
