"""The table `caches`: which caches a writer has to reach, and which are out of use because they did not answer.

A process may use a cache only while it holds a cache lease: it has queried this table, and fewer than LEASE_S seconds
have passed since before the query (Gray and Cheriton, Leases, 1989). So the row alone puts a cache out of use. A
*fenced* cache gets no new lease, and after EXCLUSION_S no lease is left that was granted before. Then the cache is
*excluded*: writers skip it. It is readmitted as a new *epoch*, without entries from before.

One server, or the servers of one cluster, are registered as Redis (`shards.ShardMap`). A process that reaches another
server does not use it, and its writes fence Redis, because they cannot drop anything in the registered server. As long
as processes reach different servers, each is announced in a row of its own, and Redis stays out of use for all.

Clocks of different machines are never compared: the holder counts its lease from before the query, and the writer
counts the wait from when the fence is visible to all. `renewed_at` and `fenced_at` are for people. The relay cleans up:
it looks whether `renewed_at` changes, and does not compare it with a clock, because a clock may be set (`Renewals`).

A cache that writers fence again and again is readmitted after a pause that doubles (`Record`). A row of its own, which
no statement takes for a cache, counts the fences: an edge that registers again would not keep a count.
"""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from velikiy import metrics
from velikiy.coherence.host import HOST
from velikiy.coherence.shards import ShardMap
from velikiy.coherence.timing import EXCLUSION_S, FORGIVEN_AFTER_S, MAX_FENCES, PAUSE_S
from velikiy.postgres import CONFIRM, Connection, Database, DatabaseUnavailable, Statement
from velikiy.settings import is_loopback

log = structlog.get_logger()

REDIS = "redis"

EDGES = Statement(
    "SELECT name, address, epoch, fenced_at IS NOT NULL FROM caches WHERE kind = 'edge' AND NOT excluded ORDER BY name"
)


class Cache(NamedTuple):
    name: str
    """`redis`, or an edge's `instance id@address`. No two running edges share an instance id (edge/start). An edge
    that moves to another address is another cache."""

    address: str
    """An edge's control listener as the apps see it, host:port. For Redis the registered servers (`shards.ShardMap`),
    empty before the first registration."""

    epoch: str
    fenced: bool
    excluded: bool

    @property
    def shards(self) -> ShardMap | None:
        """The Redis that may be used; None while Redis is fenced or not registered."""
        return ShardMap.parse(self.address) if self.address and not self.fenced else None

    @property
    def shown(self) -> str:
        """The address, for people."""
        is_redis = self.name == REDIS and self.address
        return ShardMap.parse(self.address).address if is_redis else self.address or self.name

    @property
    def kind(self) -> str:
        return REDIS if self.name == REDIS else "edge"

    @property
    def state(self) -> str:
        return "excluded" if self.excluded else "fenced" if self.fenced else "registered"

    @property
    def instance_id(self) -> str:
        return self.name.partition("@")[0]

    @property
    def is_on_our_loopback(self) -> bool:
        """True if the edge listens on this host's loopback. Only there does "connection refused" prove that it is down:
        elsewhere the address may belong to another machine by now, or a firewall or a balancer may refuse for it."""
        host = self.address.rpartition(":")[0]
        return self.instance_id.startswith(f"{HOST}/") and is_loopback(host)


RECORD = "fences of "
"""The name of the row that counts the fences of a cache begins so. The column `epoch` has the number, and `renewed_at`
the moment of the last fence."""

COUNT_FENCE = """
WITH fenced AS (
    UPDATE caches SET fenced_at = clock_timestamp() WHERE fenced_at IS NULL
    AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[])) RETURNING name
), counted AS (
    INSERT INTO caches AS c (name, kind, address, epoch, excluded)
    SELECT %(record)s || name, 'redis', '', '1', true FROM fenced WHERE %(counts)s
    ON CONFLICT (name) DO UPDATE SET renewed_at = clock_timestamp(), epoch = least(%(most)s, 1 + greatest(0,
        c.epoch::int - floor(extract(epoch FROM clock_timestamp() - c.renewed_at) / %(forgiven)s)::int
    ))::text
)
SELECT name FROM fenced
"""


REGISTER = r"""
INSERT INTO caches AS c (name, kind, address, epoch) VALUES (%s, 'edge', %s, %s)
ON CONFLICT (name) DO UPDATE SET address = excluded.address, epoch = excluded.epoch,
    renewed_at = excluded.renewed_at, fenced_at = NULL, excluded = false
WHERE NOT CASE WHEN c.epoch ~ '^[^.]+\.\d{1,18}$' AND excluded.epoch ~ '^[^.]+\.\d{1,18}$'
    THEN split_part(c.epoch, '.', 1) = split_part(excluded.epoch, '.', 1)
        AND split_part(excluded.epoch, '.', 2)::bigint < split_part(c.epoch, '.', 2)::bigint
    ELSE false END
"""
"""An epoch is `<run>.<number>`. A registration that arrives late must not replace a later one of the same run."""


class Record(NamedTuple):
    """The fences of a cache by writers."""

    fences: int = 0
    since_s: float = 0.0
    """Seconds since the last fence."""

    @property
    def lately(self) -> int:
        """The fences that are not forgotten."""
        return max(0, self.fences - int(self.since_s / FORGIVEN_AFTER_S))

    @property
    def pause_left_s(self) -> float:
        """Seconds until the cache may be readmitted. If PostgreSQL's clock was set back, the pause is over."""
        pause = PAUSE_S * 2 ** (self.fences - 2) if self.fences > 1 else 0.0
        return max(0.0, pause - self.since_s) if self.since_s >= 0 else 0.0


class Grant(NamedTuple):
    """A cache lease that an edge gets."""

    redis: str
    """The servers that the edge may use as Redis (`shards.ShardMap.for_edges`); empty while it must use none."""


MISSING = Cache(REDIS, "", "", fenced=True, excluded=False)
"""Redis while its row is missing. No process gets a cache lease for it, and a writer waits as for any fenced cache,
because leases that were granted before may still be valid."""

RIVAL_S = 10.0
"""Seconds for which an announced server counts as in use. A relay announces its own each second while Redis is fenced,
any other process when one of its writes finds Redis in use and reaches another server."""


class Renewals:
    """Tells the rows that are renewed from the rows that are not, by the clock of this process."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the time after which a row that has not changed has lapsed."""
        self._seconds = seconds
        self._seen: dict[tuple[str, str], tuple[str, float]] = {}

    def lapsed(self, rows: Sequence[tuple[str, str, str]]) -> set[str]:
        """Look at all rows: their names, epochs and renewals. Return the names of the rows that have lapsed."""
        at = time.monotonic()
        before, self._seen = self._seen, {}
        for name, epoch, renewal in rows:
            known = before.get((name, epoch))
            self._seen[name, epoch] = known if known and known[0] == renewal else (renewal, at)
        return {name for (name, _), (_, since) in self._seen.items() if at - since > self._seconds}

    def forget(self) -> None:
        """Begin again: in an outage of PostgreSQL nothing is renewed."""
        self._seen.clear()


class Caches:
    """Each method runs one statement, or a few that commit by themselves: a waiting writer holds no lock here."""

    def __init__(self, database: Database, *, threads: int, max_edges: int = 64) -> None:
        """`threads`: the number of request threads in this process. Three quarters of them may wait for a fence; the
        rest answers reads and renews the leases of other edges. `max_edges`: the setting MAX_EDGES."""
        self.database = database
        self.max_edges = max_edges
        self._waiting = threading.BoundedSemaphore(max(1, threads * 3 // 4))

    def edges(self, connection: Connection) -> list[Cache]:
        """Return the edges that a writer has to reach now, whatever its transaction has read before."""
        (rows,) = connection.query(EDGES)
        return [
            Cache(name.decode(), address.decode(), epoch.decode(), fenced=fenced == b"t", excluded=False)
            for name, address, epoch, fenced in rows
        ]

    def all(self, connection: Connection) -> list[Cache]:
        """Return every cache, Redis first, excluded ones included."""
        rows = connection.execute(
            "SELECT name, address, epoch, fenced_at IS NOT NULL, excluded FROM caches"
            " WHERE kind = 'edge' OR name = %s ORDER BY kind DESC, address",
            (REDIS,),
        )
        found = [Cache(*row) for row in rows.fetchall()]
        return found if found and found[0].name == REDIS else [MISSING, *found]

    def redis(self, connection: Connection) -> Cache:
        row = connection.execute(
            "SELECT name, address, epoch, fenced_at IS NOT NULL, excluded FROM caches WHERE name = %s", (REDIS,)
        ).fetchone()
        return Cache(*row) if row else MISSING

    def in_use(self) -> ShardMap | None:
        """Return the servers that are in use as Redis; None while Redis is fenced. The answer is a lease, so it has to
        come from the leader.

        Raises:
            DatabaseUnavailable
        """
        with self.database.autocommit() as connection:
            shards = self.redis(connection).shards
            connection.query(CONFIRM)
            return shards

    def announce(self, shards: ShardMap) -> None:
        """Tell all relays that a process reaches these servers as its Redis. The row is fenced and excluded, so no
        other statement takes it for a cache."""
        with self.database.autocommit() as connection:
            connection.execute(
                "INSERT INTO caches (name, kind, address, epoch, fenced_at, excluded)"
                " VALUES (%s, 'redis', %s, '', clock_timestamp(), true)"
                " ON CONFLICT (name) DO UPDATE SET renewed_at = clock_timestamp()",
                (shards.id, str(shards)),
            )

    def announced(self, connection: Connection, renewals: Renewals) -> list[ShardMap]:
        """Return the servers that processes announce, and delete lapsed announcements."""
        rows = connection.execute(
            "SELECT name, address, epoch, renewed_at::text FROM caches"
            " WHERE kind = 'redis' AND name <> %s AND NOT starts_with(name, %s) ORDER BY name",
            (REDIS, RECORD),
        ).fetchall()
        lapsed = renewals.lapsed([(name, epoch, renewal) for name, _, epoch, renewal in rows])
        if lapsed:
            connection.execute("DELETE FROM caches WHERE kind = 'redis' AND name = ANY (%s)", (sorted(lapsed),))
        return [ShardMap.parse(address) for name, address, _, _ in rows if name not in lapsed]

    def adopt_redis(self, redis: Cache, shards: ShardMap) -> None:
        """Register another server as Redis, without a fence. It has just been emptied, and the one that was registered
        is gone or never was: no process can hold an entry from it.

        Another process may have been faster; then nothing changes.
        """
        with self.database.autocommit() as connection:
            adopted = connection.execute(
                "UPDATE caches SET address = %s WHERE name = %s AND epoch = %s AND address = %s AND fenced_at IS NULL",
                (str(shards), REDIS, redis.epoch, redis.address),
            )
            connection.execute("DELETE FROM caches WHERE name = %s", (shards.id,))  # it may have been announced
        if adopted.rowcount:
            log.info("redis.registered", address=shards.address)

    def fence(self, caches: Sequence[Cache], *, counts: bool = False, reason: str = "") -> None:
        """Grant no further leases for these caches. The fence is visible to all once this returns, and not before.

        Args:
            counts: Whether the pause before the next readmission grows.

        Raises:
            DatabaseUnavailable
        """
        if not caches:
            return
        with self.database.autocommit() as connection:
            values = {"record": RECORD, "counts": counts, "most": MAX_FENCES, "forgiven": FORGIVEN_AFTER_S}
            fenced = connection.execute(COUNT_FENCE, {**_which(caches), **values})
        if fenced.rowcount:  # else another writer was faster
            for cache in caches:
                metrics.FENCES.labels(cache.kind).inc()
        log.warning("cache.fenced", caches=[cache.shown for cache in caches], **({"reason": reason} if reason else {}))

    def record(self, connection: Connection, name: str) -> Record:
        """Return the fences of the cache with this name."""
        row = connection.execute(
            "SELECT epoch::int, extract(epoch FROM clock_timestamp() - renewed_at)::float8 FROM caches WHERE name = %s",
            (f"{RECORD}{name}",),
        ).fetchone()
        return Record(*row) if row else Record()

    def pause_left(self, name: str, epoch: str) -> float:
        """Return the seconds until the edge with this name may register. During the pause, exclude it: an edge that
        requests a new epoch has given the earlier ones up, so no writer need wait for them. A request that comes late
        names an epoch that is not newer.

        Raises:
            DatabaseUnavailable
        """
        with self.database.reserved() as connection:
            pause = self.record(connection, name).pause_left_s
            if pause:
                fenced = connection.execute(
                    "SELECT epoch FROM caches WHERE name = %s AND fenced_at IS NOT NULL AND NOT excluded", (name,)
                ).fetchone()
                if fenced and _is_newer(epoch, fenced[0]):
                    connection.execute(
                        "UPDATE caches SET excluded = true WHERE name = %s AND epoch = %s AND fenced_at IS NOT NULL",
                        (name, fenced[0]),
                    )
            return pause

    def await_exclusion(self, caches: Sequence[Cache]) -> None:
        """Wait until no lease for these fenced caches is left, then exclude them. Return at once for caches that are
        excluded already.

        A row that has disappeared proves nothing: an app that was stopped may execute an old registration late, while
        the edge continues under the lease of a newer one.

        Raises:
            DatabaseUnavailable: Too many writes wait already, or PostgreSQL does not answer.
        """
        if not caches:
            return
        if not self._waiting.acquire(blocking=False):
            metrics.REFUSED_WAITS.inc()
            raise DatabaseUnavailable("too many writes wait for a cache that does not answer")
        try:
            with metrics.EXCLUSION_WAIT.time():
                self._await_exclusion(caches)
        finally:
            self._waiting.release()

    def _await_exclusion(self, caches: Sequence[Cache]) -> None:
        which = _which(caches)
        until = time.monotonic() + EXCLUSION_S
        while time.monotonic() < until:
            with self.database.autocommit() as connection:
                done = connection.execute(
                    "SELECT FROM caches WHERE excluded"
                    " AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[]))",
                    which,
                )
                if done.rowcount == len(caches):
                    connection.query(CONFIRM)
                    return
            time.sleep(0.02)
        with self.database.autocommit() as connection:
            connection.execute(
                "UPDATE caches SET excluded = true WHERE fenced_at IS NOT NULL"
                " AND (name, epoch) IN (SELECT * FROM unnest(%(names)s::text[], %(epochs)s::text[]))",
                which,
            )
        log.warning("cache.excluded", caches=[cache.shown for cache in caches])

    def renew(self, instance_id: str, epoch: str) -> Grant | None:
        """Renew an edge's cache lease.

        The row is found by the epoch, which no other edge has, and not by the address, because apps may see
        one edge under different addresses. The first writer notices an edge that has moved.

        Returns:
            The lease, or None if the edge itself is fenced or unknown.
        """
        with self.database.reserved() as connection:
            renewed = connection.execute(
                "UPDATE caches SET renewed_at = clock_timestamp()"
                " WHERE kind = 'edge' AND starts_with(name, %s) AND epoch = %s AND fenced_at IS NULL"
                " RETURNING (SELECT r.address FROM caches r WHERE r.name = %s AND r.fenced_at IS NULL)",
                (f"{instance_id}@", epoch, REDIS),
            ).fetchone()
            return Grant(ShardMap.parse(renewed[0]).for_edges if renewed[0] else "") if renewed else None

    def register(self, instance_id: str, address: str, epoch: str) -> Grant | None:
        """Register an edge that is new or returns, with an epoch that was never used, and return its lease; None if
        `max_edges` other edges are registered, because each edge costs each write a request, or if the edge has
        registered a later epoch: this app was stopped for a while.

        Another edge that was registered at this address may be running elsewhere: it is fenced, and the relay removes
        it.
        """
        with self.database.reserved() as connection:
            others = connection.execute(
                "SELECT FROM caches WHERE kind = 'edge' AND NOT excluded"
                " AND address <> %s AND NOT starts_with(name, %s)",
                (address, f"{instance_id}@"),
            )
            if others.rowcount >= self.max_edges:
                log.warning("edge.refused", instance_id=instance_id, address=address, max_edges=self.max_edges)
                return None
            connection.execute(
                "UPDATE caches SET fenced_at = clock_timestamp()"
                " WHERE address = %s AND name <> %s AND fenced_at IS NULL",
                (address, f"{instance_id}@{address}"),
            )
            registered = connection.execute(REGISTER, (f"{instance_id}@{address}", address, epoch))
            if not registered.rowcount:
                log.warning("edge.late_registration", instance_id=instance_id, address=address, epoch=epoch)
                return None
            shards = self.redis(connection).shards
        log.info("edge.registered", instance_id=instance_id, address=address, epoch=epoch)
        return Grant(shards.for_edges if shards else "")

    def resign(self, instance_id: str, epoch: str) -> None:
        """Delete the row of an edge that has given this epoch up: it finds no entry any more and stores none, so it
        counts as excluded, and a writer that has fenced it meanwhile need not wait. The row of any other edge would
        stay (migrations/sql/live_edges.sql)."""
        which = (f"{instance_id}@", epoch)
        with self.database.autocommit() as connection:
            connection.execute(
                "UPDATE caches SET excluded = true, fenced_at = coalesce(fenced_at, clock_timestamp())"
                " WHERE kind = 'edge' AND starts_with(name, %s) AND epoch = %s",
                which,
            )
            resigned = connection.execute(
                "DELETE FROM caches WHERE kind = 'edge' AND starts_with(name, %s) AND epoch = %s RETURNING address",
                which,
            )
        if resigned.rowcount:
            log.info("edge.resigned", instance_id=instance_id, epoch=epoch)

    def insert_redis(self) -> None:
        """Insert the missing row of Redis as a fenced cache: writers have skipped Redis, so it has to be emptied before
        it is used again."""
        with self.database.autocommit() as connection:
            inserted = connection.execute(
                "INSERT INTO caches (name, kind, address, epoch, fenced_at)"
                " VALUES (%s, 'redis', '', gen_random_uuid()::text, clock_timestamp()) ON CONFLICT (name) DO NOTHING",
                (REDIS,),
            )
        if inserted.rowcount:  # else another relay was faster
            log.warning("redis.row_inserted")

    def readmit_redis(self, redis: Cache, shards: ShardMap) -> bool:
        """Put Redis back into use as these servers, which were emptied while Redis was excluded. The epoch keeps a slow
        relay from lifting a later fence.

        Returns:
            Whether this relay did it.
        """
        with self.database.autocommit() as connection:
            readmitted = connection.execute(
                "UPDATE caches SET address = %s, epoch = gen_random_uuid()::text, fenced_at = NULL, excluded = false"
                " WHERE name = %s AND epoch = %s AND excluded",
                (str(shards), REDIS, redis.epoch),
            )
        return bool(readmitted.rowcount)

    def expired_edges(self, renewals: Renewals) -> list[Cache]:
        """Return the edges that are fenced or have lapsed."""
        with self.database.autocommit() as connection:
            rows = connection.execute(
                "SELECT name, address, epoch, fenced_at IS NOT NULL, excluded, renewed_at::text FROM caches"
                " WHERE kind = 'edge'"
            ).fetchall()
        lapsed = renewals.lapsed([(row[0], row[2], row[5]) for row in rows])
        edges = [Cache(*row[:5]) for row in rows]
        return [edge for edge in edges if edge.fenced or edge.name in lapsed]

    def forget_announced(self, shards: ShardMap) -> None:
        """Delete the announcement of these servers."""
        with self.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM caches WHERE kind = 'redis' AND name <> %s AND name = %s", (REDIS, shards.id)
            )

    def forget_old_records(self, connection: Connection) -> None:
        """Delete the records whose fences are all forgotten."""
        connection.execute(
            "DELETE FROM caches WHERE kind = 'redis' AND starts_with(name, %s)"
            " AND renewed_at < clock_timestamp() - make_interval(secs => %s)",
            (RECORD, FORGIVEN_AFTER_S * MAX_FENCES),
        )

    def forget(self, cache: Cache) -> None:
        """Delete the row of an excluded cache. If the cache is alive, it registers again."""
        with self.database.autocommit() as connection:
            connection.execute(
                "DELETE FROM caches WHERE name = %s AND epoch = %s AND excluded", (cache.name, cache.epoch)
            )


def _is_newer(epoch: str, other: str) -> bool:
    """Return whether a run of an edge has begun the epoch, `<run>.<number>`, after the other one."""
    (run, _, number), (other_run, _, other_number) = epoch.partition("."), other.partition(".")
    return run == other_run and number.isdecimal() and other_number.isdecimal() and int(number) > int(other_number)


def _which(caches: Sequence[Cache]) -> dict[str, list[str]]:
    return {"names": [cache.name for cache in caches], "epochs": [cache.epoch for cache in caches]}
