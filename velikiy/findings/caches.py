"""Findings about the caches: Redis, the edges, and the right to use them."""

import time
from datetime import datetime
from typing import NamedTuple

import psycopg

from velikiy.coherence import RedisTier
from velikiy.coherence.membership import RECORD, REDIS, Record
from velikiy.coherence.redis_connections import CANNOT_SAVE, NO_MEMORY, NO_RIGHTS
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.coherence.shards import ShardMap
from velikiy.coherence.timing import LEASE_S
from velikiy.findings import Finding
from velikiy.findings.machine import clock_differs
from velikiy.postgres import Connection

ROWS = """
SELECT
    name, address, epoch, extract(epoch FROM fenced_at), excluded,
    extract(epoch FROM renewed_at), extract(epoch FROM clock_timestamp() - renewed_at), kind
FROM caches ORDER BY address
"""

UNKNOWN_TABLE = (psycopg.ProgrammingError, psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)
"""The table `caches` is missing, may not be read, or is locked: findings about PostgreSQL name that."""

NO_ROW = "user:0"
"""A key of the form that the keys of rows have, for Redis users who are limited to these. No row has the id 0."""

SLOW_TRIAL_S = 0.3
"""A trial is some five short exchanges. A drop that takes half of that is slow (velikiy/coherence/timing.py:SLOW_S)."""

FULL_SHARE = 1.1
"""Redis may exceed its limit for a moment while it evicts."""

REDIS_COSTS = "reads that miss at the edge go to PostgreSQL."


class Row(NamedTuple):
    """A row of the table `caches`, for people."""

    name: str
    address: str
    epoch: str
    fenced_at: float | None
    excluded: bool
    renewed_at: float
    silent_s: float

    @property
    def state(self) -> str:
        return "excluded" if self.excluded else "fenced" if self.fenced_at else "registered"

    @property
    def shards(self) -> ShardMap | None:
        return ShardMap.parse(self.address) if self.address else None


class Table(NamedTuple):
    """The table `caches`."""

    redis: Row | None
    edges: list[Row]
    announced: list[ShardMap]
    """The servers that processes reach as Redis and that are not registered."""

    records: dict[str, Record]
    """How often writers have fenced a cache, by its name."""


def table(connection: Connection) -> Table:
    redis, found, announced, records = None, [], [], {}
    for name, address, epoch, fenced, excluded, renewed, silent, kind in connection.execute(ROWS).fetchall():
        row = Row(name, address, epoch, fenced and float(fenced), excluded, float(renewed), float(silent))
        if name == REDIS:
            redis = row
        elif name.startswith(RECORD):
            records[name.removeprefix(RECORD)] = Record(int(epoch), float(silent))
        elif kind == "edge":
            found.append(row)
        else:
            announced.append(ShardMap.parse(address))
    return Table(redis, found, announced, records)


def redis(tier: RedisTier, caches: Table) -> list[Finding]:
    """Return why Redis is not in use, or what will keep it out of use after an outage."""
    row = caches.redis
    since = row.fenced_at if row else None
    try:
        ours = tier.identify()
    except DoesNotAnswer as error:
        return [redis_unusable(str(error), since)]
    if row is None:
        return [
            Finding(
                "redis.row_missing",
                f"The row of Redis is missing in the table `caches`, so no process uses Redis: {REDIS_COSTS}",
                "The relay inserts it and readmits Redis within seconds, if it runs. Do not delete rows of that table.",
            )
        ]
    rivals = [it.address for it in caches.announced if not it.overlaps(ours)]
    if rivals:
        return [
            Finding(
                "redis.contested",
                "Processes on this database reach different servers as Redis"
                f" ({', '.join([ours.address, *rivals])}), so none of them uses Redis: {REDIS_COSTS}",
                "Give all the same REDIS_URL.",
                since=since,
            )
        ]
    lacking = tier.lacking_rights()
    if lacking:
        return [_refused(lacking, out_of_use=bool(row.fenced_at) or not row.address, since=since)]
    began = time.monotonic()
    if reason := tier.trial(NO_ROW):
        return [redis_unusable(reason, since)]
    found = _use_of_redis(row, ours, caches) + _slow(time.monotonic() - began)
    try:
        usage = tier.usage(ours)
    except DoesNotAnswer:
        return found
    return found + _full(usage) + clock_differs("Redis", "this machine", usage["clock_ahead_ms"] / 1000)


def _slow(seconds: float) -> list[Finding]:
    """Return whether Redis answers slowly. `seconds`: the time that a trial has taken."""
    if seconds < SLOW_TRIAL_S:
        return []
    return [
        Finding(
            "redis.slow",
            f"Redis answers slowly: a few short commands took {seconds * 1000:.0f} ms. Each write waits for it.",
            "Look at the CPU time and memory of its machine, and at the commands of other programs: redis-cli SLOWLOG"
            " GET. Writers take it out of use if that goes on.",
            wrong=False,
        )
    ]


def _full(usage: dict[str, int]) -> list[Finding]:
    """Return whether Redis uses more memory than it may. The scripts of the service delete before they write, and Redis
    lets such scripts go on when it has no memory left."""
    used, allowed = usage["used_memory"], usage["maxmemory"]
    if not allowed or used <= FULL_SHARE * allowed:
        return []
    return [
        Finding(
            "redis.full",
            f"Redis uses {used // 1_000_000} MB of memory and may use {allowed // 1_000_000} MB (maxmemory): it cannot"
            " evict enough entries, and grows until its machine has no memory left.",
            REDIS_ADVICE[NO_MEMORY],
            wrong=False,
        )
    ]


def _use_of_redis(row: Row, ours: ShardMap, caches: Table) -> list[Finding]:
    """Return why a Redis that works is not in use."""
    if row.fenced_at and (unsteady := _unsteady(REDIS, "Redis", caches)):
        return unsteady
    if row.fenced_at:
        return [
            Finding(
                "redis.fenced",
                f"Redis is out of use, because a write could not invalidate it: {REDIS_COSTS}",
                "The relay empties it and puts it back into use within seconds. If that lasts longer, see that the"
                " relay runs: ./run logs relay says why Redis stays out of use.",
                since=row.fenced_at,
            )
        ]
    return _another_server(row.shards, ours) or _unsteady(REDIS, "Redis", caches)


REDIS_ADVICE = {
    NO_MEMORY: "Run CONFIG SET maxmemory-policy allkeys-lru, or raise maxmemory, and do the same in its configuration.",
    CANNOT_SAVE: "See its log for the cause, such as a full disk. The service needs nothing saved: CONFIG SET save ''"
    " switches it off.",
    NO_RIGHTS: "Grant them as an administrator of Redis: ACL SETUSER NAME ~* +@all",
}


def redis_unusable(reason: str, since: float | None = None) -> Finding:
    """Return the finding about a Redis that does not answer, or refuses what reads and writes need.

    Args:
        reason: The predicate of a sentence about Redis.
    """
    advice = REDIS_ADVICE.get(reason, "Check REDIS_URL, its user and its password, and ./run logs redis.")
    return Finding("redis.unusable", f"Redis {reason}: {REDIS_COSTS}", advice, since=since)


def _refused(lacking: list[str], *, out_of_use: bool, since: float | None) -> Finding:
    commands = " ".join(f"+{command.lower()}" for command in lacking)
    return Finding(
        "redis.refused",
        f"The user of REDIS_URL may not run {', '.join(lacking)}, with which the service empties and identifies Redis:"
        + (f" Redis is not in use, and {REDIS_COSTS}" if out_of_use else " Redis stays out of use after an outage."),
        f"Grant it as an administrator of Redis: ACL SETUSER NAME {commands}",
        wrong=out_of_use,
        since=since,
    )


def _another_server(registered: ShardMap | None, ours: ShardMap) -> list[Finding]:
    if registered is None:
        return [
            Finding(
                "redis.unregistered",
                f"No server is registered as Redis yet: {REDIS_COSTS}",
                "The relay registers it within a second, if it runs (./run logs relay).",
            )
        ]
    if registered.id == ours.id:
        return []
    if registered.overlaps(ours):
        return [
            Finding(
                "redis.cluster_changed",
                f"The servers of the Redis cluster have changed, so Redis is not in use: {REDIS_COSTS}",
                "The relay empties them and puts Redis back into use once the cluster has settled, within seconds.",
            )
        ]
    if ours.address == registered.address:
        return [
            Finding(
                "redis.another",
                f"Redis ({ours.address}) was restarted or replaced, and is not in use yet: {REDIS_COSTS}",
                "The relay registers it within seconds. Otherwise several servers answer at this address: give all"
                " processes on this database the same REDIS_URL.",
            )
        ]
    return [
        Finding(
            "redis.another",
            f"This process reaches another Redis ({ours.address}) than the one that is registered"
            f" ({registered.address}), and does not use it.",
            "If Redis was restarted, that ends within seconds. Otherwise give all processes on this database the same"
            " REDIS_URL.",
        )
    ]


def edges(caches: Table) -> list[Finding]:
    """Return the edges that writers wait for, or that use no cache."""
    found = []
    for row in caches.edges:
        if row.fenced_at:
            found.append(
                Finding(
                    "edge.fenced",
                    f"The edge at {row.address} is fenced: it did not acknowledge an invalidation, so it may not use"
                    " its cache.",
                    "Check that it runs and that apps reach that address. It registers again by itself; the relay"
                    " removes it if it is gone.",
                    since=row.fenced_at,
                )
            )
        elif row.silent_s > LEASE_S:
            found.append(
                Finding(
                    "edge.silent",
                    f"The edge at {row.address} has not renewed its cache lease: it hangs, or it is gone. Until it is"
                    " removed, writes wait for it.",
                    "If it is gone, the relay removes it after 10 s. If it hangs, kill it; supervisor starts it again.",
                    since=row.renewed_at,
                )
            )
    return found


def silent_apps(number: int) -> Finding:
    apps = "An app does" if number == 1 else f"{number} apps do"
    return Finding(
        "app.silent",
        f"{apps} not answer an edge. An app that does not answer starts, hangs, or is overloaded.",
        "Run ./run logs app. Requests go to the other apps meanwhile.",
    )


def _unreached_apps(addresses: list[str]) -> Finding:
    apps = f"the app at {addresses[0]}" if len(addresses) == 1 else f"the apps at {', '.join(addresses)}"
    return Finding(
        "app.silent",
        f"This edge gets no response from {apps}.",
        "Check that these apps run and that this edge reaches them: ./run logs app. Requests go to other apps"
        " meanwhile, if there are any.",
    )


def unsteady(caches: Table) -> list[Finding]:
    """Return the edges that writers have fenced again and again."""
    return [
        finding
        for name in caches.records
        if name != REDIS
        for finding in _unsteady(name, f"The edge at {name.rpartition('@')[2]}", caches)
    ]


def _unsteady(name: str, shown: str, caches: Table) -> list[Finding]:
    record = caches.records.get(name, Record())
    if record.lately < 2:
        return []
    pause = record.pause_left_s
    state = f"is out of use for {pause:.0f} s more" if pause else "is in use again"
    return [
        Finding(
            "redis.unsteady" if name == REDIS else "edge.unsteady",
            f"{shown} was fenced {record.fences} times lately, because it acknowledged writes late or not at all. It"
            f" {state}.",
            "Find out what makes it slow: its log, the CPU time and memory of its machine, the network to it. Each"
            " further fence doubles the pause.",
            wrong=bool(pause),
            since=time.time() - record.since_s,
        )
    ]


def no_edges() -> Finding:
    return Finding(
        "edge.none",
        "No edge is registered: no response is cached at an edge.",
        "Start one (./run up --detach), and run ./run logs edge if one runs.",
    )


def foreign_stack(edges: list[str], relays: int) -> Finding:
    parts = [f"edges at {', '.join(edges)}"] if edges else []
    parts += [f"{relays} relays"] if relays > 1 else []
    return Finding(
        "stack.foreign",
        f"Another stack uses the same database: it has {' and '.join(parts)} beside this stack. Each of its edges costs"
        " each write a request.",
        "That is right if you started it for this database, with the same REDIS_URL and EDGE_SECRET. Else stop it.",
        wrong=False,
    )


REFUSED_LEASES = {
    "424": (
        "An app cannot reach its control listener.",
        "Check EDGE_CONTROL and EDGE_ADDRESS, and firewalls between app and edge.",
    ),
    "429": (
        "Writers have fenced it again and again, because it acknowledged writes late or not at all.",
        "It comes back after a pause of up to 64 s. Find out what makes it slow: ./run logs edge, and the CPU time and"
        " memory of its machine.",
    ),
    "403": ("MAX_EDGES edges are registered already.", "Stop edges that are not needed, or raise MAX_EDGES."),
}
"""Why an app grants an edge no lease, by the status of its response (velikiy/http/edge_leases.py)."""


def edge(state: str) -> tuple[str, list[Finding]]:
    """Return the check and the findings of an edge from its own account, the header `Edge-Lease`:
    `held; redis=another; certificate=5; clock=1700000000.123`."""
    held, *others = state.split("; ")
    members = dict(other.split("=", 1) for other in others)
    found = []
    if held == "leaving":
        found.append(Finding("edge.leaving", "This edge is about to stop.", "Send requests to another edge."))
    elif held != "held":
        found.append(no_lease(members.get("refused", ""), members.get("lost")))
    if apps := members.get("apps"):
        found.append(_unreached_apps(apps.split(",")))
    if members.get("redis") == "silent":
        found.append(
            Finding(
                "edge.redis_silent",
                "This edge gets no response from Redis in time, so an app reads Redis for it.",
                "Check the network between this edge and Redis, and REDIS_TIMEOUT.",
            )
        )
    elif "redis" in members:
        found.append(
            Finding(
                "edge.another_redis",
                "This edge reaches another Redis than the apps, so it uses none.",
                "Give it the same REDIS_URL.",
            )
        )
    if days := members.get("certificate"):
        found.append(_certificate(int(days)))
    if clock := members.get("clock"):
        found += clock_differs("this edge", "an app", float(clock) - time.time())
    return {"held": "ok", "leaving": "leaving"}.get(held, "no lease"), found


def no_lease(status: str = "", lost_at: str | None = None) -> Finding:
    reason, advice = REFUSED_LEASES.get(
        status, ("", "Run ./run logs edge: an edge gets its lease from PostgreSQL through an app.")
    )
    return Finding(
        "edge.no_lease",
        f"This edge has no cache lease, so it does not use its cache: every read goes to an app. {reason}".rstrip(),
        advice,
        since=float(lost_at) if lost_at else None,
    )


def _certificate(days: int) -> Finding:
    state = f"expires in {days} days" if days > 1 else "expires within two days" if days >= 0 else "has expired"
    return Finding(
        "edge.certificate",
        f"The certificate of this edge {state}.",
        "Replace the files of TLS_CERT and TLS_KEY: no restart is needed.",
        wrong=days < 0,
    )


def at(seconds: float) -> str:
    """Return a moment for people, in their time zone."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
