"""Sum up what every edge and app counts, for the console's page Live.

Each SAMPLE_S the relay sends each edge of the table `caches` the newest sample and the state of every part, and
receives the account of that edge with those of the apps that it knows (edge/lua/live.lua). One place adds everything
up, so an app or an edge that no other can reach is no gap. The edges keep the samples: a page that is opened now shows
the last 15 minutes, whatever was restarted. Several relays may run: each adds up the same, and the newest sample of a
slot counts.

Without metrics (METRICS=off) there are no samples, and the state of the parts goes on.
"""

import hashlib
import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import orjson
import structlog

from velikiy import metrics
from velikiy.coherence import Gate
from velikiy.coherence.host import HOST, started_at
from velikiy.coherence.membership import Cache
from velikiy.findings import Finding, merged
from velikiy.findings import caches as about_caches
from velikiy.findings.caches import Row
from velikiy.findings.machine import memory_of
from velikiy.metrics import DURATION_BUCKETS_S
from velikiy.relay.janitor import Seen

log = structlog.get_logger()

SAMPLE_S = 2
"""Seconds between two samples; also in edge/lua/live.lua."""

SAMPLES = 450
"""15 minutes."""

EDGE_TIMEOUT_S = 1.0

SAMPLES_PER_EXCHANGE = 150
"""A new edge gets the past in several parts: a body must fit into its buffer (client_body_buffer_size 64k)."""

ASKING_EDGES = 4
"""Edges that request the accounts of their apps in one round, in turn: with many edges, each app would answer all of
them all the time. An account costs an app 1 ms."""

GONE_S = 900.0
"""Seconds for which a part that is gone stays on the page."""

MEMORY_S = 10.0

STARTED_DIFFERENCE_S = 2.5
"""Redis reports whole seconds."""

TIERS = ("nginx", "redis", "postgres")
CLASSES = (*TIERS, "stale", "write", "failed", "other")
QUANTILES = (0.5, 0.95, 0.99)

# The order of a sample's members, also in velikiy/console/static/live.js: the moment; requests per second of each
# class; p50, p95 and p99 in milliseconds of each tier and of the drops; drops and notifications per second.


class Account(NamedTuple):
    """The report of one edge."""

    facts: dict[str, str]
    counts: dict[str, list[float]]
    """Requests of each class, by bucket of their duration."""

    apps: list[dict[str, Any]]
    samples: list[str]
    state: dict[str, Any] | None


class Live:
    def __init__(self, gate: Gate, seen: Seen) -> None:
        self.gate = gate
        self.seen = seen
        self._samples: deque[tuple[int, str]] = deque(maxlen=SAMPLES)
        self._counts: dict[str, list[float]] = {}
        """The counts of each source at the last sample."""

        self._parts: dict[str, dict[str, Any]] = {}
        self._newest: dict[str, int] = {}
        """The newest sample that each edge has."""

        self._names: dict[str, str] = {}
        """The last known name of each edge."""

        self._rounds = 0
        self._apps: dict[str, tuple[int, dict[str, Any]]] = {}
        """The last account of each app, with the round in which it came."""

        self._edges: list[Row] = []
        self._wants_history = True
        self._state: dict[str, Any] = {}
        self._memory = (0.0, 0)
        self._workers = ThreadPoolExecutor(16, "live")

    def run(self) -> None:
        """Run for ever."""
        while True:
            time.sleep(SAMPLE_S - time.time() % SAMPLE_S)
            try:
                self.round()
            except Exception:  # the end of this thread would go unnoticed
                log.exception("relay.cannot_sum_up")

    def round(self) -> None:
        """Exchange with every edge, and make the next sample and state."""
        if self.seen.table:
            self._edges = self.seen.table.edges
        self._rounds += 1
        asks = [number % self._turns == self._rounds % self._turns for number in range(len(self._edges))]
        shared = self._shared_lines()
        exchanges = self._workers.map(partial(self._exchange, shared), self._edges, asks)
        accounts = dict(zip(self._edges, exchanges, strict=True))
        heard = [account for account in accounts.values() if account]
        if self._wants_history and heard:
            self._take_history(heard)
        slot = int(time.time()) // SAMPLE_S
        counts_requests = metrics.folder_id() != "" and all(it.facts.get("metrics") != "off" for it in heard)
        if counts_requests:
            self._samples.append((slot, self._sample(slot, accounts)))
        self._state = self._describe(accounts, counts_requests)

    @property
    def _turns(self) -> int:
        """After so many rounds, each edge has requested the accounts of its apps."""
        return max(1, -(-len(self._edges) // ASKING_EDGES))

    # ---- the exchange ----

    def _shared_lines(self) -> list[str]:
        """Return the lines that every edge receives, made once in a round: the state, and the edges that can be read
        through each other (edge/lua/through.lua), for clients and for edges."""
        if not self._state:
            return []
        known = [it for it in self._state["parts"] if it["kind"] == "edge" and it["answers"]]
        lines = [
            f"state {_json(self._state)}",
            f"edges {_json([{'id': it['id'], 'name': it['name']} for it in known])}",
        ]
        places = [(row.name.partition("@")[0], *row.address.rpartition(":")[::2]) for row in self._edges]
        hosts = list({host for _, host, _ in places})
        resolved = dict(zip(hosts, self._workers.map(_resolved, hosts), strict=True))
        lines += [f"address {_digest(edge_id)} {edge_id} {resolved[host]}:{port}" for edge_id, host, port in places]
        return lines

    def _exchange(self, shared: list[str], edge: Row, asks_apps: bool) -> Account | None:
        cache = Cache(edge.name, edge.address, edge.epoch, fenced=False, excluded=False)
        newest = self._newest.get(edge.name, 0)
        missing = [f"sample {slot} {sample}" for slot, sample in self._samples if slot > newest][:SAMPLES_PER_EXCHANGE]
        lines = ["live", *missing, *shared]
        if asks_apps:
            lines.append("wants_apps")
        if self._wants_history:
            lines.append("wants_history")
        text = self.gate.edge_tier.exchange(cache, "\n".join(lines), EDGE_TIMEOUT_S)
        if text is None:
            self._newest.pop(edge.name, None)
            return None
        account = _parse(text)
        sent = int(missing[-1].split()[1]) if missing else 0
        self._newest[edge.name] = max(sent, int(account.facts.get("newest", 0)))
        return account

    def _take_history(self, accounts: Sequence[Account]) -> None:
        """Take the samples and the restarts that edges have kept from before this relay was started."""
        best = max(accounts, key=lambda it: len(it.samples))
        since = time.time() // SAMPLE_S - SAMPLES
        for sample in best.samples:
            slot = int(orjson.loads(sample)[0]) // SAMPLE_S
            if slot > since:
                self._samples.append((slot, sample))
        for part in (best.state or {}).get("parts", []):
            self._parts[f"{part['kind']} {part['name']}"] = part
        self._wants_history = False

    # ---- samples ----

    def _sample(self, slot: int, accounts: dict[Row, Account | None]) -> str:
        classes = {name: [0.0] * (len(DURATION_BUCKETS_S) + 1) for name in CLASSES}
        drops = [0.0] * (len(DURATION_BUCKETS_S) + 1)
        folders = {f"{HOST} {metrics.folder_id()}": metrics.drops_of_folder()}
        for row, account in accounts.items():
            for name, counts in (account.counts if account else {}).items():
                _add(classes[name], self._since_last(f"{row.name} {name}", counts))
            for app in account.apps if account else []:
                folders[app["folder"]] = app["drops"]
        for folder, counts in folders.items():
            _add(drops, self._since_last(folder, counts))
        [outside] = self._since_last("outside", [metrics.count_of(metrics.RELAY_NOTIFICATIONS)])
        members: list[float | int | None] = [slot * SAMPLE_S]
        members += [_rate(sum(classes[name])) for name in CLASSES]
        for counts in (*(classes[name] for name in TIERS), drops):
            members += [_quantile(counts, share) for share in QUANTILES]
        members += [_rate(sum(drops)), _rate(outside)]
        return _json(members)

    def _since_last(self, source: str, counts: list[float]) -> list[float]:
        """Return what was counted since the last sample. A source that is new counts from its next sample on, because
        what it has counted so far may be hours old; one that was restarted counts from 0."""
        before = self._counts.get(source)
        self._counts[source] = counts
        if before is None:
            return [0.0] * len(counts)
        if sum(counts) < sum(before):
            return counts
        return [max(0.0, now - then) for now, then in zip(counts, before, strict=True)]

    # ---- the state of the parts ----

    def _describe(self, accounts: dict[Row, Account | None], counts_requests: bool) -> dict[str, Any]:
        now = time.time()
        findings = list(self.seen.findings)
        present: list[dict[str, Any]] = []
        for row, account in accounts.items():
            if account:
                self._names[row.name] = _name(row, account.facts)
            part, found = _edge(row, self._names.get(row.name, row.address), account)
            present.append(part)
            findings += [it._replace(where=part["name"]) for it in found]
        for app in (app for account in accounts.values() if account for app in account.apps):
            self._apps[app["name"]] = (self._rounds, app)
        self._apps = {name: it for name, it in self._apps.items() if it[0] > self._rounds - self._turns}
        present += [
            {**_part("app", app["name"]), **{name: app[name] for name in ("started", "memory", "workers")}}
            for _, app in self._apps.values()
        ]
        findings += _silent_apps([account for account in accounts.values() if account])
        present += [self._redis(findings), self._relay(), self._postgres()]
        self._remember(present, now)
        gone = [it for it in self._parts.values() if not it["answers"] and it["state"] == "gone"]
        return {
            "at": round(now, 1),
            "metrics": counts_requests,
            "findings": [it.as_json() for it in merged(findings)],
            "parts": [*present, *sorted(gone, key=lambda it: str(it["name"]))],
        }

    def _remember(self, present: list[dict[str, Any]], now: float) -> None:
        """Count the restarts of each part, and keep a part that is gone for a while."""
        keys = set()
        for part in present:
            key = f"{part['kind']} {part['name']}"
            keys.add(key)
            before = self._parts.get(key, {})
            part["restarts"] = before.get("restarts", 0)
            if not part["started"]:
                part["started"] = before.get("started", 0)
            elif before.get("started") and abs(part["started"] - before["started"]) > STARTED_DIFFERENCE_S:
                part["restarts"] += 1
            part["seen"] = round(now, 1) if part["answers"] else before.get("seen", 0)
            self._parts[key] = part
        for key in self._parts.keys() - keys:
            part = self._parts[key]
            if now - part["seen"] > GONE_S:
                del self._parts[key]
            else:
                self._parts[key] = {**part, "answers": False, "state": "gone"}

    def _redis(self, findings: list[Finding]) -> dict[str, Any]:
        table = self.seen.table
        row = table.redis if table else None
        facts = self.seen.redis
        state = "silent" if not facts else row.state if row else "unknown"
        if state == "registered" and any(it.name.startswith("redis.") and it.wrong for it in findings):
            state = "unused"
        return {
            **_part("redis", "", state, answers=bool(facts)),
            **facts,
            "fenced_since": row.fenced_at if row else None,
        }

    def _relay(self) -> dict[str, Any]:
        if time.monotonic() - self._memory[0] > MEMORY_S:
            self._memory = (time.monotonic(), memory_of(os.getpid()))
        return {**_part("relay", ""), "started": started_at(os.getpid()), "memory": self._memory[1]}

    def _postgres(self) -> dict[str, Any]:
        answers = self.seen.postgres_answers
        return {
            **_part("postgres", "", "answers" if answers else "silent", answers=answers),
            **self.seen.postgres,
        }


def _part(kind: str, name: str, state: str = "answers", *, answers: bool = True) -> dict[str, Any]:
    return {"kind": kind, "name": name, "state": state, "answers": answers, "started": 0}


def _edge(row: Row, name: str, account: Account | None) -> tuple[dict[str, Any], list[Finding]]:
    facts = account.facts if account else {}
    part = {
        **_part("edge", name, row.state, answers=account is not None),
        "id": _digest(row.name.partition("@")[0]),
        "started": float(facts.get("started", 0)),
        "memory": int(facts.get("memory", 0)),
        "lease_ms": int(facts.get("lease", 0)),
        "epoch": facts.get("epoch", ""),
        "fenced_since": row.fenced_at,
    }
    if account is None:
        part["state"] = "silent" if row.state == "registered" else row.state
        return part, []
    return part, about_caches.edge(facts.get("account", "held"))[1]


def _name(row: Row, facts: dict[str, str]) -> str:
    """Return the address where clients reach the edge, unless it listens on every address."""
    listen = facts.get("listen", "")
    return row.address if not listen or listen.startswith(("0.0.0.0:", "[::]:")) else listen


def _silent_apps(accounts: Sequence[Account]) -> list[Finding]:
    silent = max((int(it.facts.get("silent_apps", 0)) for it in accounts), default=0)
    if not silent:
        return []
    return [about_caches.silent_apps(silent)]


def _parse(text: str) -> Account:
    facts: dict[str, str] = {}
    counts = {name: [0.0] * (len(DURATION_BUCKETS_S) + 1) for name in CLASSES}  # an edge names what it has counted
    apps: list[dict[str, Any]] = []
    samples: list[str] = []
    state = None
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "live":
            label, bucket, count = value.split()
            if label in counts:  # a newer edge may know more
                counts[label][int(bucket) - 1] = float(count)
        elif name == "app":
            apps.append(orjson.loads(value))
        elif name == "sample":
            samples.append(value)
        elif name == "state":
            state = orjson.loads(value)
        else:
            facts[name] = value
    return Account(facts, counts, apps, samples, state)


def _add(total: list[float], counts: Iterable[float]) -> None:
    for bucket, count in enumerate(counts):
        total[bucket] += count


def _rate(count: float) -> float:
    rate = round(count / SAMPLE_S, 1)
    return int(rate) if rate == int(rate) else rate


def _quantile(counts: Sequence[float], share: float) -> float | None:
    """Return the milliseconds within which this share of the requests ended, as Prometheus interpolates them. Beyond
    the last bound it is that bound."""
    rank = share * sum(counts)
    if not rank:
        return None
    below, lower = 0.0, 0.0
    for count, bound in zip(counts, DURATION_BUCKETS_S, strict=False):
        if below + count >= rank:
            return round((lower + (bound - lower) * (rank - below) / count) * 1000, 2)
        below, lower = below + count, bound
    return DURATION_BUCKETS_S[-1] * 1000


def _digest(instance_id: str) -> str:
    return hashlib.sha256(instance_id.encode()).hexdigest()[:8]


def _resolved(host: str) -> str:
    """Return the address of a host. Nginx cannot look names up for this request."""
    if re.fullmatch(r"[0-9.]+|\[.*\]", host):
        return host
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return host


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
