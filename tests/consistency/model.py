"""A model of "lock, drop, commit", explored exhaustively: every interleaving of a few writers, reads, caches and faults.

    python -m tests.consistency.model                      the whole protocol, then without each element
    python -m tests.consistency.model --without probe      the shortest history that goes wrong without it

One path is modelled, because linearizability is local. The content of a cache is the set of writes that its body
contains, as a bit mask. A read is wrong if its response lacks a write that was acknowledged, or shown by a finished read,
before the read started. There is no clock: every step may be delayed for ever, a COMMIT included, and a lease ends at any
moment. "3 s after a fence" is the moment at which every lease from before that fence has expired.

Group commit (velikiy/coherence/group_commit.py) is covered: the steps of its writers happen to fall on the same moments.

Names are not part of the state: a read does not store a lease token or a generation, but whether its own is still
current. A read responds as soon as it knows its value, before it fills or stores, which is the harshest order.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar


@dataclass(frozen=True)
class Protocol:
    """The elements of the protocol. Each comment names what goes wrong without it; the tests show that it does."""

    # a write
    lock_before_drop: bool = True  # else a read starts after the drop, finds no lock, and stores the old row
    drop_before_commit: bool = True  # else the new row is readable in one place and the old one in another
    redis_before_edges: bool = True  # else an edge copies the old body from Redis after its own drop
    list_after_redis: bool = True  # else an edge that registers in between copies the old body from Redis, unlisted
    drop_changes_generation: bool = True  # else entries of an edge, and entries on their way, are found after COMMIT
    drop_takes_leases: bool = True  # else a fill that the write overtook lands after the drop
    visible_before_unlock: bool = True  # PostgreSQL's promise; else a probe passes while the snapshot lacks the write
    prefill_of_own_row_only: bool = True  # a writer knows its row, but a list may lack another row's write
    prefill_after_commit: bool = True  # else Redis shows a row that PostgreSQL does not show yet, or never will
    lock_ends_with_transaction: bool = True  # else a killed writer leaves its path uncached for ever
    deadline_at_commit: bool = True  # else a process that was stopped commits after its client got an error
    # a read
    probe: bool = True  # else a read between drop and COMMIT stores the old row under the new lease and generation
    probe_before_snapshot: bool = True  # else COMMIT fits between snapshot and probe (also: REPEATABLE READ)
    lease_before_probe: bool = True  # else lock and drop fit between the two and the lease survives them
    fill_needs_lease: bool = True  # else a fill that a write overtook lands after the drop
    leases_are_random: bool = True  # numbers counted in Redis repeat after a loss of keys, and an old lease fits again
    leases_end: bool = True  # else a reader that dies keeps its path out of Redis for ever
    key_fixed_at_start: bool = True  # else a late response is stored under the generation that outdated it
    # an edge
    fresh_generation: bool = True  # a missing generation gets a new one; a default would find older entries again
    new_epoch_at_start: bool = True  # else a restarted edge repeats old generations and finds its old files
    edge_lease: bool = True  # else an edge that no writer can reach serves its cache for ever
    no_store_without_lease_at_start: bool = True  # else a read older than the registration stores after it, unlisted
    # a cache that does not acknowledge
    fence: bool = True  # else a write goes on while the cache still serves
    fence_waits: bool = True  # else the cache serves under a lease from before the fence
    wait_counts_from_visible: bool = True  # a fence may commit late, and leases are granted until it is visible
    wait_outlasts_registrations: bool = True  # a late registration unfences the row while the old lease goes on
    refusal_on_loopback_only: bool = True  # elsewhere another machine may refuse at the address of an edge that lives
    redis_lease_ends: bool = True  # else a process that did not see the fence reads a Redis that writers skip
    redis_lease_covers_reply: bool = True  # else a process paused before its request gets a fill lease writers skip
    emptied_on_return: bool = True  # else entries that writers could not drop are served again
    lease_ends_before_emptied: bool = True  # else the edge stores an entry that writers skip, before it returns
    lease_ends_before_resigning: bool = True  # else an edge serves its cache when writers no longer know it
    lease_ends_before_exclusion: bool = True  # else a refused edge serves its cache while no writer waits for it
    flush_after_wait: bool = (
        True  # else a fill lease is granted between FLUSHDB and the end of the fence: writers skip it
    )
    # several servers that could be Redis
    reads_check_server: bool = True  # else a read finds an entry in a server where writers do not drop
    writes_check_server: bool = True  # else a write drops in one server, and reads use another
    data_set_compared: bool = True  # a connection outlives a change of roles, and then leads to other data


@dataclass(frozen=True)
class Scenario:
    """The number of actors, and the faults: each fault happens at most once, at any moment."""

    rows: tuple[int, ...] = (7,)  # a writer each; one row serialises its writers, different rows share only the path
    reads: int = 2
    edges: int = 1
    faults: tuple[str, ...] = ()
    fenced: int | None = None  # this cache was fenced a moment ago (0: Redis) and answers again
    unlisted: int | None = None  # this edge has not registered yet


SCENARIOS = {
    "one row, three reads": Scenario(reads=3),
    "one row written twice": Scenario(rows=(7, 7)),
    "two rows of one list": Scenario(rows=(7, 8)),
    "two edges": Scenario(edges=2),
    "an edge registers": Scenario(edges=2, unlisted=2),
    "a write is late": Scenario(rows=(7, 7), reads=1, faults=("write is late",)),
    "writers are killed": Scenario(rows=(7, 7), faults=("killed",)),
    "Redis loses keys": Scenario(reads=3, faults=("redis wiped",)),
    "Redis dies, a writer too": Scenario(faults=("redis dies", "killed")),
    "an edge dies, its files stay": Scenario(faults=("edge dies", "redis wiped")),
    "a generation is evicted": Scenario(faults=("generation evicted", "edge dies")),
    "a read is retried": Scenario(reads=3, faults=("retry",)),
    "an edge hangs": Scenario(faults=("edge hangs",)),
    "an edge hangs, two writers": Scenario(rows=(7, 8), faults=("edge hangs",)),
    "an edge comes back": Scenario(fenced=1),
    "an edge comes back after a pause": Scenario(fenced=1, faults=("edge is refused",)),
    "an edge hangs, a registration is late": Scenario(faults=("edge hangs", "registration is late")),
    "an edge leaves": Scenario(faults=("edge leaves",)),
    "an edge moves": Scenario(faults=("edge moves",)),
    "an edge is slow": Scenario(faults=("edge is slow",)),
    "Redis is slow": Scenario(faults=("redis is slow",)),
    "Redis hangs": Scenario(faults=("redis hangs",)),
    "Redis hangs, two writers": Scenario(rows=(7, 8), faults=("redis hangs",)),
    "Redis comes back": Scenario(fenced=0),
    "Redis is exchanged": Scenario(rows=(7, 7), faults=("redis is exchanged",)),
    "Redis was a replica for a while": Scenario(rows=(7, 7), faults=("redis was a replica",)),
}

UP, HUNG, DEAD, MOVED, LEAVING, GONE = range(6)
# UP: it responds. HUNG: it does not respond to the app, but may respond to its clients. DEAD: it refuses connections.
# MOVED: it responds to its clients, and another machine refuses at the address that writers use.
# LEAVING: it has given its lease up for good, and is still listed. GONE: its row is deleted, and it still responds.
NO_FENCE, UNCOMMITTED, FENCED, EMPTIED, OVERWRITTEN, EXCLUDED = range(6)
# UNCOMMITTED: the fence is written and not yet committed. OVERWRITTEN: an old registration was carried out late, so the
# row is not fenced, and no renewal fits it. EXCLUDED: an edge that was fenced again and again has given its lease up and
# wants to register; it is refused for a while, and no writer waits for it.
NO_LEASE, LEASED, LEASED_BEFORE_FENCE = range(3)
NO_OTHER = -2


class Cache(NamedTuple):
    """Redis, or an edge."""

    state: int = UP
    body: int = -1  # the body that a read finds now; -1: none
    fill_lease: bool = False  # Redis: a fill lease exists
    gen: int = 0  # an edge: 0 its first generation, 1 a later one; matters only if generations can return
    first: int = -1  # an edge: the body on its disk under generation 0 while its generation is 1
    fence: int = NO_FENCE
    cache_lease: int = LEASED  # an edge's lease for its own memory, or the processes' lease for Redis
    other: int = NO_OTHER  # Redis: the body in another server, to which new connections lead
    is_reached: bool = True  # Redis: connections that were kept lead to the registered server


class Writer(NamedTuple):
    step: int = 0
    alive: bool = True
    open: bool = False  # its transaction, row lock included
    late: bool = False  # its client got an error, because the deadline has passed
    lock: bool = False
    todo: int = 0  # bits of the edges where it still has to drop
    waits: int = 0  # bits of the caches that it has found fenced
    fill_lease: int = 0  # 2: its fill lease is current, 1: it had one, 0: none
    body: int = 0  # the body of its path, as far as it knows


class Read(NamedTuple):
    step: int = 0
    floor: int = 0  # the writes that its response must contain
    edge: int = 0  # -1: no edge waits for it any longer
    gen: int = -1  # the generation in its key; -1: a generation that never returns
    fill_lease: int = 0
    body: int = 0
    store: bool = True
    leased_at_start: bool = False  # only without redis_lease_covers_reply: it checked the lease when it started


class World(NamedTuple):
    committed: int
    floor: int  # the writes that were acknowledged or shown
    writers: tuple[Writer, ...]
    reads: tuple[Read, ...]
    caches: tuple[Cache, ...]  # Redis, then the edges
    faults: tuple[str, ...]
    wrong: str = ""

    def put(self, kind: str, index: int, **changes: Any) -> World:
        """Return the same world with one writer, read or cache changed."""
        actors = getattr(self, kind)
        changed = (*actors[:index], actors[index]._replace(**changes), *actors[index + 1 :])
        changes_of_world: dict[str, Any] = {kind: changed}
        return self._replace(**changes_of_world)

    def spend(self, fault: str) -> World:
        return self._replace(faults=tuple(f for f in self.faults if f != fault))


Steps = Iterator[tuple[str, World]]
Actor = TypeVar("Actor", Writer, Read)


def writes_in(mask: int) -> str:
    return " and ".join(f"W{i + 1}" for i in range(mask.bit_length()) if mask >> i & 1) or "no write"


class Model:
    def __init__(self, protocol: Protocol, scenario: Scenario) -> None:
        self.p, self.s = protocol, scenario
        p = protocol
        write = ["sql", "lock", "redis", "list", "edges", "commit", "unlock", "respond", "fill"]
        read = ["start", "redis", "probe", "snapshot", "fill", "store"]

        def move(steps: list[str], what: str, before: str) -> None:
            steps.remove(what)
            steps.insert(steps.index(before), what)

        if not p.lock_before_drop:
            move(write, "lock", "commit")
        if not p.redis_before_edges:
            move(write, "redis", "commit")
        if not p.list_after_redis:
            move(write, "list", "redis")
        if not p.drop_before_commit:
            move(write, "commit", "redis")
            move(write, "unlock", "redis")
        if not p.visible_before_unlock:
            move(write, "unlock", "commit")
        if not p.prefill_after_commit:
            move(write, "fill", "commit")
        if not p.probe_before_snapshot:
            move(read, "probe", "fill")
        if not p.lease_before_probe:
            move(read, "probe", "redis")
        if not p.probe:
            read.remove("probe")
        self.write, self.read = (*write, "done"), (*read, "done")
        self.generations_return = not (p.fresh_generation and p.new_epoch_at_start)
        self.lost = 0 if p.fill_needs_lease and p.leases_are_random else 1
        self.cacheable: dict[tuple[Cache, Cache, bool], bool] = {}

    def roots(self) -> Iterator[World]:
        """Yield two worlds: all caches empty, and all caches warm."""
        for body in (-1, 0):
            caches = [Cache(body=body) for _ in range(1 + self.s.edges)]
            if self.s.fenced is not None:
                caches[self.s.fenced] = Cache(body=body, fence=FENCED, cache_lease=LEASED_BEFORE_FENCE)
            if self.s.unlisted:  # writers pass it by like a fenced edge
                caches[self.s.unlisted] = Cache(fence=FENCED, cache_lease=NO_LEASE)
            writers, reads = (Writer(),) * len(self.s.rows), (Read(),) * self.s.reads
            yield World(0, 0, writers, reads, tuple(caches), self.s.faults)

    def steps(self, w: World) -> Steps:
        for i in range(len(w.writers)):
            yield from self.writer_steps(w, i)
        for i in range(len(w.reads)):
            yield from self.read_steps(w, i)
        for i in range(len(w.caches)):
            yield from self.cache_steps(w, i)

    # a write

    def writer_steps(self, w: World, i: int) -> Steps:
        p, me, name, bit = self.p, w.writers[i], f"W{i + 1}", 1 << i
        what = self.write[me.step]

        def on(w: World, **changes: Any) -> World:
            return w.put("writers", i, step=me.step + 1, **changes)

        if me.open and me.alive and "killed" in w.faults:
            yield f"{name} is killed, PostgreSQL has not noticed", w.put("writers", i, alive=False).spend("killed")
        if me.open and me.alive and not w.committed & bit and "write is late" in w.faults:
            late = w.put("writers", i, late=True).spend("write is late")
            yield f"the deadline of {name} passes, its client gets an error", late
        if not me.alive:
            if me.open and not w.committed & bit:
                leak = me.lock and not p.lock_ends_with_transaction
                ended = Writer(step=len(self.write) - 1, alive=False, lock=leak)
                yield f"PostgreSQL rolls {name} back", w.put("writers", i, **ended._asdict())
            if what not in ("commit", "unlock"):
                return  # only a COMMIT that was already sent may still take effect
        if what == "sql":
            same_row = [x for x, row in zip(w.writers, self.s.rows, strict=True) if row == self.s.rows[i]]
            if not any(x.open for x in same_row) and all(x.step for x in w.writers[:i]):
                yield f"{name} runs its SQL (row lock)", on(w, open=True, body=w.committed | bit)
        elif what == "lock":
            yield f"{name} locks the path", on(w, lock=True)
        elif what == "redis":
            for label, after, gone in self.drop_at(w, i, 0):
                yield label, after.put("writers", i, step=me.step + 1) if gone else after
        elif what == "list":
            fenced = sum(1 << k for k, c in enumerate(w.caches) if k and c.fence >= FENCED)
            listed = sum(1 << k for k, c in enumerate(w.caches) if k and c.state != GONE)
            after = on(w, todo=listed, waits=me.waits | fenced)
            yield f"{name} reads the list of edges", after if listed else after.put("writers", i, step=me.step + 2)
        elif what == "edges":
            for k in range(1, len(w.caches)):
                for label, after, gone in self.drop_at(w, i, k) if me.todo >> k & 1 else ():
                    todo = me.todo & ~(1 << k) if gone else me.todo
                    yield label, after.put("writers", i, todo=todo, step=me.step + (not todo))
        elif what == "commit":
            if me.late and p.deadline_at_commit:
                refused = Writer(step=len(self.write) - 1)
                yield f"PostgreSQL refuses the late {name}", w.put("writers", i, **refused._asdict())
                return
            ends = self.write[me.step + 1] != "unlock"
            wrong = f"{name} is committed after its client got an error" if me.late else ""
            visible = on(w, open=not ends)._replace(committed=w.committed | bit, wrong=wrong)
            yield f"{name}: COMMIT is visible", visible
        elif what == "unlock":
            yield f"{name}: its locks are freed", on(w, lock=False, open=not w.committed & bit)
        elif what == "respond":
            yield f"{name} is acknowledged", on(w)._replace(floor=w.floor | bit)
        elif what == "fill" and me.fill_lease:
            yield from self.fill(on(w, fill_lease=0), name, me)

    def drop_at(self, w: World, i: int, k: int) -> Iterator[tuple[str, World, bool]]:
        """Drop at cache k, or find out why writer i need not. True: the writer has finished with this cache."""
        p, me, c, name = self.p, w.writers[i], w.caches[k], f"W{i + 1}"
        cache = f"E{k}" if k else "Redis"
        if c.fence == EXCLUDED:
            yield f"{name} passes {cache} by, which is excluded", w, True
        elif me.waits >> k & 1:
            ended = c.fence == OVERWRITTEN and not p.wait_outlasts_registrations
            if c.cache_lease != LEASED_BEFORE_FENCE or not p.fence_waits or ended:
                yield f"{name} continues without {cache}: 3 s after its fence", w, True
            if c.state == UP and c.fence:  # a fenced cache that acknowledges costs no wait
                yield f"{name} drops at {cache}, which is fenced", self.dropped_while_fenced(w, k), True
        elif c.state == DEAD or (c.state == MOVED and not p.refusal_on_loopback_only):
            yield f"{name}: {cache} refuses, so it holds nothing", w, True
        elif c.fence in (FENCED, EMPTIED):
            yield f"{name} sees that {cache} is fenced", w.put("writers", i, waits=me.waits | 1 << k), False
        elif c.other != NO_OTHER and c.fence == NO_FENCE:
            if p.writes_check_server:
                yield f"{name} reaches another Redis, a fence is written", w.put("caches", k, fence=UNCOMMITTED), False
            else:
                yield f"{name} drops in another Redis", w.put("caches", k, other=-1), True
            if c.is_reached:
                yield self.dropped_in_redis(w, i)
        elif c.state in (UP, LEAVING, GONE) and k:
            yield f"{name} drops at {cache}", self.new_generation(w, k) if p.drop_changes_generation else w, True
        elif c.state == UP:
            yield self.dropped_in_redis(w, i)
        elif not p.fence:
            yield f"{name}: {cache} does not respond, the writer continues", w, True
        elif c.fence in (NO_FENCE, OVERWRITTEN):
            cache_lease = c.cache_lease if p.wait_counts_from_visible or not c.cache_lease else LEASED_BEFORE_FENCE
            yield (
                f"{name}: {cache} does not respond, a fence is written",
                w.put("caches", k, fence=UNCOMMITTED if c.fence == NO_FENCE else FENCED, cache_lease=cache_lease),
                False,
            )

    def dropped_in_redis(self, w: World, i: int) -> tuple[str, World, bool]:
        own = len(set(self.s.rows)) == 1 or not self.p.prefill_of_own_row_only
        if self.p.drop_takes_leases:
            w = self.lose_leases(w).put("writers", i, fill_lease=2 * own).put("caches", 0, fill_lease=own)
        return f"W{i + 1} drops in Redis", w.put("caches", 0, body=-1), True

    def dropped_while_fenced(self, w: World, k: int) -> World:
        if k:
            return self.new_generation(w, k) if self.p.drop_changes_generation else w
        w = self.lose_leases(w) if self.p.drop_takes_leases else w
        return w.put("caches", 0, body=-1, fill_lease=w.caches[0].fill_lease and not self.p.drop_takes_leases)

    # a read

    def read_steps(self, w: World, i: int) -> Steps:
        p, me, name = self.p, w.reads[i], f"r{i + 1}"
        what, redis = self.read[me.step], w.caches[0]

        def on(w: World, **changes: Any) -> World:
            return w.put("reads", i, step=me.step + 1, **changes)

        if what == "start":
            for e in range(1, len(w.caches)) if all(x.step for x in w.reads[:i]) else ():
                edge = w.caches[e]
                leased = bool(edge.cache_lease) or not p.edge_lease
                if edge.state == DEAD:
                    continue
                if leased and edge.body >= 0:
                    done = w.put("reads", i, floor=w.floor, edge=e, store=False)
                    yield self.respond(f"{name} starts at E{e}: HIT", done, i, edge.body, "done")
                    continue
                step = self.read.index("redis")  # also without a cache lease: the app decides whether to use Redis
                store = leased or not p.no_store_without_lease_at_start
                leased_at_start = redis.cache_lease > 0 and not p.redis_lease_covers_reply
                start = Read(step, w.floor, e, edge.gen, store=store, leased_at_start=leased_at_start)
                label = "miss" if leased else "no lease, bypasses its cache"
                yield f"{name} starts at E{e}: {label}", w.put("reads", i, **start._asdict())
        elif what == "redis":
            if redis.state != UP or not (redis.cache_lease or me.leased_at_start or not p.redis_lease_ends):
                yield f"{name} bypasses Redis", on(w)
                return
            if redis.other != NO_OTHER:
                is_noticed = p.reads_check_server if redis.is_reached else p.data_set_compared
                if is_noticed or redis.other < 0:
                    yield f"{name} reaches another Redis", on(w)
                else:
                    yield self.respond(f"{name} finds a body in another Redis", w, i, redis.other, "store")
            if not redis.is_reached:
                return
            if redis.body >= 0:
                yield self.respond(f"{name} finds a body in Redis", w, i, redis.body, "store")
            else:
                if redis.fill_lease:
                    yield f"{name}: another process holds the fill lease", on(w)
                if not redis.fill_lease or p.leases_end:
                    after = self.lose_leases(w) if redis.fill_lease else w
                    yield f"{name} gets the fill lease", on(after.put("caches", 0, fill_lease=True), fill_lease=2)
        elif what == "probe":
            if any(x.lock for x in w.writers):
                yield f"{name} probes: a writer is in flight, nothing will be stored", on(w, store=False, fill_lease=0)
            else:
                yield f"{name} probes: no writer in flight", on(w)
        elif what == "snapshot":
            yield self.respond(f"{name} reads PostgreSQL", w, i, w.committed, self.read[me.step + 1])
        elif what == "fill":
            yield from self.fill(on(w, fill_lease=0), name, me)
        elif what == "store":
            edge = w.caches[me.edge]
            if not (edge.cache_lease or p.no_store_without_lease_at_start):
                return
            field = "body" if me.gen == edge.gen or not p.key_fixed_at_start else "first"
            yield (
                f"E{me.edge} stores the response to {name}: {writes_in(me.body)}",
                on(w.put("caches", me.edge, **{field: me.body})),
            )
        if "retry" in w.faults and what in self.read[2:-2] and me.edge > 0 and Read() in w.reads:
            again = Read(self.read.index("redis"), me.floor, me.edge, me.gen)
            after = w.put("reads", w.reads.index(Read()), **again._asdict())
            yield (
                f"{name} is too slow, E{me.edge} sends the request again",
                after.put("reads", i, edge=-1, store=False).spend("retry"),
            )

    def respond(self, label: str, w: World, i: int, body: int, then: str) -> tuple[str, World]:
        me = w.reads[i]
        after = w.put("reads", i, step=self.read.index(then), body=body, floor=0)
        if me.edge < 0:
            return label, after
        missing = me.floor & ~body
        wrong = f"r{i + 1} returned {writes_in(body)}, but must contain {writes_in(me.floor)}" if missing else ""
        return f"{label}, returns {writes_in(body)}", after._replace(floor=w.floor | body, wrong=wrong)

    def fill(self, w: World, name: str, actor: Writer | Read) -> Steps:
        redis = w.caches[0]
        if redis.state == UP:  # otherwise the fill is on its way, or lost; a fill for another server has no lease there
            if (actor.fill_lease == 2 and redis.fill_lease) or not self.p.fill_needs_lease:
                yield (
                    f"{name} fills Redis: {writes_in(actor.body)}",
                    self.lose_leases(w).put("caches", 0, body=actor.body, fill_lease=False),
                )
            else:
                yield f"{name} may not fill Redis: its fill lease is gone", w

    # the caches

    def cache_steps(self, w: World, k: int) -> Steps:
        p, c, name, kind = self.p, w.caches[k], f"E{k}" if k else "Redis", "edge" if k else "redis"

        def to(w: World, **changes: Any) -> World:
            return w.put("caches", k, **changes)

        if c.state == DEAD:
            if k:  # its memory is lost, its files stay
                w = self.new_generation(w, k) if p.new_epoch_at_start else self.first_generation(w, k)
            yield f"{name} starts", to(w, state=UP, fence=min(c.fence, FENCED))
            return
        if f"{kind} dies" in w.faults:
            after = to(w.spend(f"{kind} dies"), state=DEAD, cache_lease=c.cache_lease if not k else NO_LEASE)
            yield f"*** {name} dies", self.orphan(after, k) if k else self.wipe(after)
        if k == 0 and "redis wiped" in w.faults:
            yield "*** Redis loses its keys", self.wipe(w.spend("redis wiped"))
        if k == 0 and "redis is exchanged" in w.faults:
            # The harshest copy: it has none of the writes.
            yield "*** new connections lead to another Redis", to(w.spend("redis is exchanged"), other=0)
        if k == 0 and "redis was a replica" in w.faults:
            after = self.wipe(w.spend("redis was a replica"))
            yield "*** Redis was a replica for a while, and has old data", to(after, other=0, is_reached=False)
        if k and "generation evicted" in w.faults:
            after = w.spend("generation evicted")
            yield (
                f"*** {name} evicts the generation",
                self.new_generation(after, k) if p.fresh_generation else self.first_generation(after, k),
            )
        if c.state in (HUNG, MOVED):
            yield f"{name} responds again", to(w, state=UP)
        elif c.state == LEAVING:
            yield f"the row of {name} is deleted", to(w, state=GONE)
        elif k and "edge leaves" in w.faults and c.state == UP and not c.fence:
            # A new epoch is both at once: no lease, and no generation under which an entry is found.
            after = self.new_generation(w, k) if p.lease_ends_before_resigning else w
            cache_lease = NO_LEASE if p.lease_ends_before_resigning else c.cache_lease
            leaving = after.put("caches", k, state=LEAVING, cache_lease=cache_lease)
            yield f"*** {name} gives its lease up", leaving.spend("edge leaves")
        elif k and "edge moves" in w.faults:
            yield f"*** {name} moves, another machine has its old address", to(w.spend("edge moves"), state=MOVED)
        elif f"{kind} is slow" in w.faults and not c.fence:
            # A writer fences it, and need not wait: the cache has acknowledged.
            yield f"*** {name} is slow, a fence is written", to(w.spend(f"{kind} is slow"), fence=UNCOMMITTED)
        elif f"{kind} hangs" in w.faults:
            yield f"*** {name} stops responding to the app", to(w.spend(f"{kind} hangs"), state=HUNG)
        lease = f"{name}'s cache lease" if k else "the cache lease for Redis"
        if c.fence == UNCOMMITTED:
            cache_lease = LEASED_BEFORE_FENCE if c.cache_lease and p.wait_counts_from_visible else c.cache_lease
            yield f"the fence of {name} is visible", to(w, fence=FENCED, cache_lease=cache_lease)
        if k and c.fence == FENCED and "registration is late" in w.faults:
            yield (
                f"*** an old registration of {name} is carried out",
                to(w.spend("registration is late"), fence=OVERWRITTEN),
            )
        if c.cache_lease and (c.fence or c.state != UP):
            yield f"{lease} expires", to(w, cache_lease=NO_LEASE)
        if c.cache_lease != LEASED and c.fence < FENCED and c.state not in (LEAVING, GONE):
            yield f"{lease} is renewed", to(w, cache_lease=LEASED)
        if c.fence in (FENCED, OVERWRITTEN) and k:
            after = self.new_generation(w, k) if p.emptied_on_return else w
            cache_lease = NO_LEASE if p.lease_ends_before_emptied else c.cache_lease
            yield (
                f"{name} learns that it is fenced, and empties itself",
                to(after, fence=EMPTIED, cache_lease=cache_lease),
            )
        if k and c.fence == FENCED and c.state == UP and "edge is refused" in w.faults:
            # A new epoch is both at once: no lease, and no generation under which an entry is found.
            after = self.new_generation(w, k) if p.lease_ends_before_exclusion else w
            cache_lease = NO_LEASE if p.lease_ends_before_exclusion else c.cache_lease
            yield (
                f"*** {name} gives its lease up and is refused",
                to(after.spend("edge is refused"), fence=EXCLUDED, cache_lease=cache_lease),
            )
        if c.fence == EXCLUDED:
            after = self.new_generation(w, k) if p.emptied_on_return else w
            yield f"{name} registers after its pause", to(after, fence=NO_FENCE, cache_lease=LEASED)
        if c.other != NO_OTHER and c.fence == NO_FENCE:
            yield "the relay finds another Redis, a fence is written", to(w, fence=UNCOMMITTED)
        if c.fence == FENCED and not k and c.state == UP and not (c.cache_lease and p.flush_after_wait):
            after = self.wipe(w) if p.emptied_on_return else to(w, body=c.body if c.other == NO_OTHER else c.other)
            yield "the relay empties Redis", to(after, fence=EMPTIED, other=NO_OTHER, is_reached=True)
        if c.fence == EMPTIED:
            yield f"{name} is readmitted", to(w, fence=NO_FENCE, cache_lease=LEASED if k else c.cache_lease)

    def replace_leases(self, w: World, old: int, new: int) -> World:
        def changed(actors: tuple[Actor, ...]) -> tuple[Actor, ...]:
            return tuple(x._replace(fill_lease=new) if x.fill_lease == old else x for x in actors)

        return w._replace(writers=changed(w.writers), reads=changed(w.reads))

    def lose_leases(self, w: World) -> World:
        return self.replace_leases(w, 2, self.lost)

    def wipe(self, w: World) -> World:
        # Without random tokens, Redis counts from the start again and repeats old tokens.
        w = self.lose_leases(w) if self.p.leases_are_random else self.replace_leases(w, 1, 2)
        return w.put("caches", 0, body=-1, fill_lease=False)

    def new_generation(self, w: World, k: int) -> World:
        """Give the path a new generation, under which no entry is found that was stored so far or is on its way."""
        c = w.caches[k]
        reads = tuple(
            x._replace(gen=-1) if x.edge == k and (x.gen or not self.generations_return) else x for x in w.reads
        )
        first = c.first if c.gen or not self.generations_return else c.body
        return w._replace(reads=reads).put("caches", k, body=-1, gen=int(self.generations_return), first=first)

    def first_generation(self, w: World, k: int) -> World:
        c = w.caches[k]
        reads = tuple(x._replace(gen=-1) if x.edge == k and x.gen == 1 else x for x in w.reads)
        return w._replace(reads=reads).put("caches", k, gen=0, body=c.first, first=-1) if c.gen else w

    def orphan(self, w: World, k: int) -> World:
        return w._replace(reads=tuple(x._replace(edge=-1, store=False) if x.edge == k else x for x in w.reads))

    # exploring

    def tidy(self, w: World) -> World:
        """End reads that can have no effect any longer, so that fewer states differ."""
        done, fill, store = len(self.read) - 1, self.read.index("fill"), self.read.index("store")

        def tidied(r: Read) -> Read:
            if not r.step:
                return r
            if r.gen < 0 and self.p.key_fixed_at_start and r.store:
                r = r._replace(store=False)
            if r.step == fill and not r.fill_lease:
                r = r._replace(step=store)
            if (r.step == store and not r.store) or (r.edge < 0 and not r.fill_lease):
                r = r._replace(step=done)
            return Read(done) if r.step == done else r

        return w._replace(reads=tuple(map(tidied, w.reads)))

    def never_cached_again(self, w: World) -> bool:
        """Return whether one more read cannot fill both tiers, although no transaction is open and all else stands
        still."""
        if any(x.open for x in w.writers):
            return False
        locked = any(x.lock for x in w.writers)
        for edge in w.caches[1:]:
            if edge.state in (LEAVING, GONE):
                continue
            key = (w.caches[0], edge._replace(body=-1), locked)
            if key not in self.cacheable:
                idle = (Writer(step=len(self.write) - 1, lock=locked),)
                queue = [World(w.committed, 0, idle, (Read(),), key[:2], ())]
                seen = set(queue)
                while queue and not all(c.body >= 0 for c in queue[-1].caches):
                    fresh = {self.tidy(after) for _, after in self.steps(queue.pop())} - seen
                    seen |= fresh
                    queue.extend(fresh)
                self.cacheable[key] = bool(queue)
            if not self.cacheable[key]:
                return True
        return False


@dataclass(frozen=True)
class Result:
    wrong: str  # empty if nothing was found
    trace: tuple[str, ...]  # the shortest history that leads there
    states: int
    complete: bool
    seconds: float

    def __str__(self) -> str:
        size = f"{self.states} states, {self.seconds:.1f} s"
        if not self.wrong:
            return f"right ({size}, {'all states' if self.complete else 'bounded'})"
        return f"WRONG after {len(self.trace)} steps ({size})\n" + "\n".join(
            f"    {s}" for s in (*self.trace, "=> " + self.wrong)
        )


def explore(protocol: Protocol, scenario: Scenario, limit: int) -> Result:
    """Explore breadth first, so that the first wrong history is the shortest."""
    model, began = Model(protocol, scenario), time.monotonic()
    queue: deque[tuple[World, int]] = deque()
    parents: list[tuple[int, str]] = []  # by number of the state
    seen: set[int] = set()

    def result(wrong: str, complete: bool) -> Result:
        trace, at = [], len(parents) - 1
        while wrong and at >= 0:
            at, label = parents[at]
            trace.append(label)
        return Result(wrong, tuple(reversed(trace)), len(parents), complete, time.monotonic() - began)

    def visit(label: str, w: World, parent: int) -> str:
        w = model.tidy(w)
        key = hash(w._replace(reads=tuple(sorted(w.reads))))  # reads are interchangeable; the world keeps their names
        if key in seen:
            return ""
        seen.add(key)
        parents.append((parent, label))
        queue.append((w, len(parents) - 1))
        return w.wrong or (
            "no transaction is open, and no read can fill both tiers" if model.never_cached_again(w) else ""
        )

    for root in model.roots():
        visit("at first no cache has an entry" if root.caches[0].body < 0 else "at first both tiers are warm", root, -1)
    while queue and len(parents) < limit:
        w, number = queue.popleft()
        for label, after in model.steps(w):
            if wrong := visit(label, after, number):
                return result(wrong, complete=False)
    return result("", complete=not queue)


ELEMENTS = tuple(f.name for f in fields(Protocol))
SCENARIO_OF = {  # the scenario that needs the element; "one row written twice" for all others
    "list_after_redis": "an edge registers",
    "prefill_of_own_row_only": "two rows of one list",
    "prefill_after_commit": "Redis dies, a writer too",
    "lock_ends_with_transaction": "writers are killed",
    "leases_are_random": "Redis loses keys",
    "fresh_generation": "a generation is evicted",
    "new_epoch_at_start": "an edge dies, its files stay",
    "edge_lease": "an edge hangs",
    "wait_outlasts_registrations": "an edge hangs, a registration is late",
    "refusal_on_loopback_only": "an edge moves",
    "no_store_without_lease_at_start": "an edge registers",
    "fence": "an edge hangs",
    "fence_waits": "an edge hangs",
    "wait_counts_from_visible": "an edge hangs",
    "redis_lease_ends": "Redis hangs",
    "redis_lease_covers_reply": "Redis comes back",
    "emptied_on_return": "an edge hangs",
    "lease_ends_before_emptied": "an edge comes back",
    "lease_ends_before_resigning": "an edge leaves",
    "lease_ends_before_exclusion": "an edge comes back after a pause",
    "deadline_at_commit": "a write is late",
    "flush_after_wait": "Redis comes back",
    "reads_check_server": "Redis is exchanged",
    "writes_check_server": "Redis is exchanged",
    "data_set_compared": "Redis was a replica for a while",
}


def without(element: str, limit: int) -> tuple[str, Result]:
    scenario = SCENARIO_OF.get(element, "one row written twice")
    return scenario, explore(Protocol(**{element: False}), SCENARIOS[scenario], limit)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.consistency.model")
    parser.add_argument(
        "--without", choices=ELEMENTS, metavar="ELEMENT", help=f"leave out one of: {', '.join(ELEMENTS)}"
    )
    parser.add_argument(
        "--limit", type=int, default=1_000_000, help="states to explore per scenario (default: 1000000)"
    )
    options = parser.parse_args(arguments)
    if options.without:
        scenario, result = without(options.without, options.limit)
        print(f"without {options.without}, {scenario}: {result}")
        return 0 if result.wrong else 1
    unexpected = 0
    for name, scenario_ in SCENARIOS.items():
        result = explore(Protocol(), scenario_, options.limit)
        unexpected += bool(result.wrong)
        print(f"{name}: {result}", flush=True)
    for element in ELEMENTS:
        name, result = without(element, options.limit)
        unexpected += not result.wrong
        print(f"without {element}, {name}: {str(result).splitlines()[0]}", flush=True)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
