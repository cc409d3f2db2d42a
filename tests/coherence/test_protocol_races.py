"""Races between a reader and a writer in one process: one of them stops at a chosen point while the other runs through."""

import math
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from threading import Timer

import psycopg
import pytest

from testkit.stack import EDGE_SECRET, Stack, wait_until
from velikiy.coherence import Answer, CachePath, Caches, Change, EdgeTier, Entry, Gate, RedisTier, redis_tier
from velikiy.coherence.locks import lock, lock_id, writer_in_flight
from velikiy.coherence.membership import Cache
from velikiy.coherence.redis_tier import FillLease, Hit
from velikiy.coherence.shards import ShardMap
from velikiy.postgres import Connection, Database, DatabaseUnavailable, Statement

_numbers = count(1)


def do_nothing() -> None:
    pass


class HookedRedisTier(RedisTier):
    """Run a hook before and after each drop."""

    before_drop: Callable[[], None] = staticmethod(do_nothing)
    after_drop: Callable[[], None] = staticmethod(do_nothing)

    def drop(
        self, paths: Iterable[CachePath] | None, prefill: Sequence[CachePath] = (), *, shards: ShardMap
    ) -> dict[CachePath, FillLease]:
        self.before_drop()
        leases = super().drop(paths, prefill, shards=shards)
        self.after_drop()
        return leases


def hooked_tier(stack: Stack, database: Database) -> HookedRedisTier:
    return HookedRedisTier(stack.redis_url, Caches(database, threads=8).in_use, ttl=60, timeout=1)


def gate_with(database: Database, tier: RedisTier) -> Gate:
    return Gate(database, Caches(database, threads=8), tier, EdgeTier(EDGE_SECRET))


class CachedRow:
    """A row behind a path of its own, with a reader and a writer."""

    def __init__(self, stack: Stack, database: Database, tier: HookedRedisTier) -> None:
        self.stack, self.database, self.tier = stack, database, tier
        self.gate = gate_with(database, tier)
        self.id = next(_numbers)
        self.path = CachePath(f"/row/{self.id}", f"row:{self.id}")
        stack.sql("INSERT INTO rows VALUES (%s, 'old')", self.id)

    def load(self, connection: Connection) -> Entry:
        row = connection.execute("SELECT value FROM rows WHERE id = %s", (self.id,)).fetchone()
        return Entry(200, row[0].encode()) if row else Entry(404, b"{}")

    def read(self, load: Callable[[Connection], Entry] | None = None) -> Answer:
        return self.gate.read(self.path, "", load or self.load)

    def value(self) -> str:
        return self.read().entry.body.decode()

    def write(self, value: str) -> None:
        """Write as another process does: through a gate and a Redis tier without hooks."""
        self._write_through(gate_with(self.database, hooked_tier(self.stack, self.database)), value)

    def write_with_hooks(self, value: str) -> None:
        self._write_through(self.gate, value)

    def _write_through(self, gate: Gate, value: str) -> None:
        def change(connection: Connection) -> Change[None]:
            connection.execute("UPDATE rows SET value = %s WHERE id = %s", (value, self.id))
            return Change(None, (self.path,))

        gate.write(change)

    def body_in_redis(self) -> bytes | None:
        body: bytes | None = self.stack.redis().hget(self.path.key, "body:")  # type: ignore[assignment]
        return body


@pytest.fixture(scope="module")
def database(stack: Stack) -> Iterator[Database]:
    stack.sql("CREATE TABLE rows (id int PRIMARY KEY, value text)")
    database = Database(stack.postgres, size=4, timeout=5)
    database.open()
    yield database
    database.close()
    stack.sql("DROP TABLE rows")


@pytest.fixture
def row(stack: Stack, database: Database) -> CachedRow:
    return CachedRow(stack, database, hooked_tier(stack, database))


def test_fill_is_refused_after_a_write_between_snapshot_and_fill(row: CachedRow) -> None:
    def load(connection: Connection) -> Entry:
        entry = row.load(connection)
        row.write("new")
        return entry

    answer = row.read(load)
    assert answer.entry.body == b"old"  # the read started before the write
    assert row.body_in_redis() is None
    assert row.value() == "new"


def test_read_returns_a_write_between_probe_and_snapshot_and_its_fill_is_refused(row: CachedRow) -> None:
    def load(connection: Connection) -> Entry:
        row.write("new")
        return row.load(connection)

    assert row.read(load).entry.body == b"new"
    assert row.body_in_redis() is None  # the write deleted the fill lease: Redis cannot know that the read returns it
    assert row.value() == "new"


@pytest.mark.parametrize("hook", ["before_drop", "after_drop"])
def test_read_during_a_write_fills_no_cache(row: CachedRow, hook: str) -> None:
    answers: list[Answer] = []
    assert row.value() == "old"  # Redis has the entry now
    setattr(row.tier, hook, lambda: answers.append(row.read()))
    row.write_with_hooks("new")
    [answer] = answers
    assert answer.entry.body == b"old"  # the write is not committed yet
    if hook == "after_drop":
        assert not answer.storable
        assert answer.cache_status == "redis; fwd=uri-miss; detail=write-in-flight"
    assert row.body_in_redis() is None
    assert row.value() == "new"


def test_path_is_not_storable_until_its_last_writer_commits(row: CachedRow) -> None:
    other_id = row.id + 1_000_000
    row.stack.sql("INSERT INTO rows VALUES (%s, 'old')", other_id)

    def load_both(connection: Connection) -> Entry:
        rows = connection.execute(
            "SELECT string_agg(value, ',' ORDER BY id) FROM rows WHERE id IN (%s, %s)", (row.id, other_id)
        ).fetchone()
        assert rows
        return Entry(200, rows[0].encode())

    def overtake() -> None:
        def change(connection: Connection) -> Change[None]:
            connection.execute("UPDATE rows SET value = 'second' WHERE id = %s", (other_id,))
            return Change(None, (row.path,))

        gate_with(row.database, hooked_tier(row.stack, row.database)).write(change)
        answer = row.read(load_both)
        assert answer.entry.body == b"old,second"
        assert not answer.storable  # the first writer is still in flight

    row.tier.after_drop = overtake
    row.write_with_hooks("first")
    assert row.read(load_both).entry.body == b"first,second"


def test_drop_happens_with_the_lock_held_and_before_the_change_is_visible(row: CachedRow) -> None:
    observed: list[tuple[bool, str]] = []

    def observe() -> None:
        with row.database.autocommit() as connection:
            observed.append((writer_in_flight(connection, row.path), row.load(connection).body.decode()))

    row.tier.before_drop = observe
    row.write_with_hooks("new")
    assert observed == [(True, "old")]
    with row.database.autocommit() as connection:
        assert not writer_in_flight(connection, row.path)


def test_path_can_be_cached_again_after_its_writer_died(row: CachedRow) -> None:
    writer = Connection.connect(row.stack.postgres, autocommit=True)
    writer.execute("BEGIN")
    lock(writer, [row.path])
    assert not row.read().storable
    pid = writer.info.backend_pid
    row.stack.sql("SELECT pg_terminate_backend(%s)", pid)
    wait_until(lambda: not row.stack.sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid))
    assert row.read().storable
    assert row.read().cache_status.startswith("redis; hit; ttl=")
    with pytest.raises(psycopg.OperationalError):
        writer.execute("SELECT 1")


def test_failed_write_invalidates_no_path_and_releases_its_locks(row: CachedRow) -> None:
    assert row.value() == "old"

    def change(connection: Connection) -> Change[None]:
        raise KeyError("no such row")

    with pytest.raises(KeyError):
        row.gate.write(change)
    assert row.read().cache_status.startswith("redis; hit; ttl=")
    with row.database.autocommit() as connection:
        assert not writer_in_flight(connection, row.path)


def test_known_paths_are_locked_behind_the_statement_that_writes_the_row_and_other_paths_after_the_change(
    row: CachedRow,
) -> None:
    other_path = CachePath(f"/other/{row.id}", f"other:{row.id}")
    observed = []

    def locked() -> tuple[bool, bool]:
        with row.database.autocommit() as connection:
            return writer_in_flight(connection, row.path), writer_in_flight(connection, other_path)

    def change(connection: Connection) -> Change[None]:
        connection.query(Statement("SELECT 1"))
        observed.append(locked())
        connection.write(Statement("SELECT 1"))
        observed.append(locked())
        return Change(None, (row.path, other_path))

    row.tier.before_drop = lambda: observed.append(locked())
    row.gate.write(change, known_paths=[row.path])
    observed.append(locked())
    row.gate.write(lambda connection: Change(None, ()), known_paths=[row.path])  # invalidates no path
    observed.append(locked())
    assert observed == [(False, False), (True, False), (True, True), (False, False), (False, False)]


def test_change_without_any_statement_holds_its_lock_at_the_drop(row: CachedRow) -> None:
    observed = []

    def observe() -> None:
        with row.database.autocommit() as connection:
            observed.append(writer_in_flight(connection, row.path))

    row.tier.before_drop = observe
    row.gate.write(lambda connection: Change(None, (row.path,)), known_paths=[row.path])
    assert observed == [True]


def test_writers_of_one_path_do_not_wait_for_each_other(row: CachedRow) -> None:
    dsn = row.stack.postgres
    with Connection.connect(dsn, autocommit=True) as first, Connection.connect(dsn, autocommit=True) as second:
        first.execute("BEGIN")
        second.execute("BEGIN")
        lock(first, [row.path])
        lock(second, [row.path])  # an exclusive lock would wait here until the connection's deadline


class TestGroupCommit:
    """Writers that arrive while another writer drops are dropped for together (velikiy/coherence/group_commit.py)."""

    @pytest.fixture
    def rows(self, stack: Stack, database: Database) -> list[CachedRow]:
        """Three rows of one app: they share a gate and a Redis tier."""
        tier = hooked_tier(stack, database)
        rows = [CachedRow(stack, database, tier) for _ in range(3)]
        for row in rows:
            row.gate = rows[0].gate
        return rows

    def write_all(
        self, rows: list[CachedRow], *also: CachePath, in_second_round: Callable[[], object] = do_nothing
    ) -> list[Future[None]]:
        """Write each row; return the results.

        The second and the third writer arrive while the first one drops, and the second one drops for both. The third
        writer invalidates the paths `also`, too.
        """

        def write(row: CachedRow) -> None:
            def change(connection: Connection) -> Change[None]:
                connection.execute("UPDATE rows SET value = 'new' WHERE id = %s", (row.id,))
                invalidates = (row.path, *(also if row is rows[2] else ()))
                return Change(None, invalidates, (row.path, Entry(200, b"new")))

            row.gate.write(change)

        def submit_others() -> None:
            tier.before_drop = run_second_round
            for row in rows[1:]:
                others.append(threads.submit(write, row))
                wait_until(partial(has_queued, len(others)))

        def has_queued(writers: int) -> bool:
            return len(rows[0].gate._group._waiting) == writers

        def run_second_round() -> None:
            tier.before_drop = do_nothing
            in_second_round()

        tier = rows[0].tier
        others: list[Future[None]] = []
        tier.before_drop = submit_others
        with ThreadPoolExecutor() as threads:
            first = threads.submit(write, rows[0])
            first.result(10)
        return [first, *others]

    def test_contending_writers_share_a_drop_and_each_prefills_its_own_row(self, rows: list[CachedRow]) -> None:
        assert [row.value() for row in rows] == ["old"] * 3
        drops: list[None] = []
        rows[0].tier.after_drop = lambda: drops.append(None)
        for write in self.write_all(rows):
            write.result()
        assert len(drops) == 2
        wait_until(lambda: all(row.body_in_redis() for row in rows))  # a writer does not wait for its fill
        assert all(row.read().cache_status.startswith("redis; hit") for row in rows)
        assert [row.value() for row in rows] == ["new"] * 3

    def test_writer_does_not_fail_with_the_writer_that_drops_for_it(self, rows: list[CachedRow], stack: Stack) -> None:
        def end_session_of_leader() -> None:
            stack.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
                " AND objsubid = 2 AND objid = %s",
                lock_id(rows[1].path) & 0xFFFFFFFF,
            )

        first, second, third = self.write_all(rows, in_second_round=end_session_of_leader)
        assert isinstance(second.exception(), DatabaseUnavailable)
        assert [first.exception(), third.exception()] == [None, None]
        assert [row.value() for row in rows] == ["new", "old", "new"]

    def test_path_that_two_writers_of_a_round_invalidate_is_prefilled_by_neither(self, rows: list[CachedRow]) -> None:
        for write in self.write_all(rows, rows[1].path):
            write.result()
        wait_until(lambda: rows[0].body_in_redis() and rows[2].body_in_redis())
        assert rows[1].body_in_redis() is None
        assert rows[1].value() == "new"


def test_writer_drops_in_redis_once_when_redis_is_readmitted_before_the_writer_continues(
    stack: Stack, database: Database
) -> None:
    """The relay reaches Redis and may readmit it again and again, while this app does not reach it."""

    class SlowCaches(Caches):
        def await_exclusion(self, caches: Sequence[Cache]) -> None:
            super().await_exclusion(caches)
            wait_until(lambda: self.in_use() is not None)

    caches = SlowCaches(database, threads=8)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never replies
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        tier = HookedRedisTier(url, caches.in_use, ttl=60, timeout=1)
        drops: list[None] = []
        tier.before_drop = lambda: drops.append(None)
        row = CachedRow(stack, database, tier)
        row.gate = Gate(database, caches, tier, EdgeTier(EDGE_SECRET))
        row.write_with_hooks("new")
    assert len(drops) == 1
    assert stack.sql("SELECT value FROM rows WHERE id = %s", row.id) == [("new",)]


def entry_in_redis(row: CachedRow, patience: float = 0) -> Entry:
    hit = row.tier.read(row.path, "", patience=patience)
    assert isinstance(hit, Hit)
    assert 0 < hit.ttl <= 60
    return hit.entry


def fill_lease(row: CachedRow, variant: str = "") -> FillLease:
    lease = row.tier.read(row.path, variant)
    assert isinstance(lease, FillLease)
    return lease


class TestFillLeases:
    def test_one_reader_at_a_time_gets_the_fill_lease_of_a_variant_and_fills_once(self, row: CachedRow) -> None:
        lease = fill_lease(row)
        assert row.tier.read(row.path, "", patience=0) is None
        assert isinstance(row.tier.read(row.path, "limit=1"), FillLease)  # another variant has its own fill lease
        row.tier.fill(row.path, "", lease, Entry(200, b"x"))
        assert entry_in_redis(row) == Entry(200, b"x")
        row.tier.fill(row.path, "", lease, Entry(200, b"y"))  # the fill lease is used up
        assert entry_in_redis(row) == Entry(200, b"x")

    def test_waiting_reader_gets_the_entry_that_another_reader_fills(self, row: CachedRow) -> None:
        timer = Timer(0.05, row.tier.fill, (row.path, "", fill_lease(row), Entry(200, b"x")))
        timer.start()
        assert entry_in_redis(row, patience=5) == Entry(200, b"x")
        timer.join()

    @pytest.mark.parametrize("lost", ["dropped", "flushed", "evicted"])
    def test_fill_is_refused_after_its_lease_was_lost(self, row: CachedRow, lost: str) -> None:
        lease = fill_lease(row)
        if lost == "dropped":
            row.tier.drop([row.path], shards=row.tier.identify())
        elif lost == "flushed":
            row.stack.redis().flushdb()
        else:
            row.stack.redis().delete(row.path.key)
        row.tier.fill(row.path, "", lease, Entry(200, b"x"))
        assert isinstance(row.tier.read(row.path, ""), FillLease)

    def test_fill_is_refused_after_its_lease_has_expired(self, row: CachedRow, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_tier, "FILL_LEASE_S", 0.05)
        late = fill_lease(row)
        other = wait_until(lambda: row.tier.read(row.path, "", patience=0))
        assert isinstance(other, FillLease)
        row.tier.fill(row.path, "", late, Entry(200, b"late"))
        assert isinstance(wait_until(lambda: row.tier.read(row.path, "", patience=0)), FillLease)

    def test_ttl_of_all_variants_of_a_path_counts_from_the_first_fill(self, row: CachedRow) -> None:
        for variant in ("", "limit=1"):
            row.tier.fill(row.path, variant, fill_lease(row, variant), Entry(200, b"x"))
            assert isinstance(row.tier.read(row.path, variant), Hit)
            if variant == "":
                row.stack.redis().pexpire(row.path.key, 5000)
        assert 0 < row.stack.redis().pttl(row.path.key) <= 5000


def test_probe_and_load_have_two_snapshots_whatever_the_isolation_level_of_the_role(row: CachedRow) -> None:
    row.stack.sql("ALTER ROLE velikiy_owner SET default_transaction_isolation = 'repeatable read'")
    try:
        database = Database(row.stack.postgres, size=1, timeout=5)
        database.open()
        with database.autocommit() as connection:
            assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        database.close()
    finally:
        row.stack.sql("ALTER ROLE velikiy_owner RESET default_transaction_isolation")


def test_lock_ids_of_two_paths_differ_and_fit_into_an_int() -> None:
    assert lock_id(CachePath("/users/1", "user:1")) != lock_id(CachePath("/users", "all_users"))
    assert -(2**31) <= lock_id(CachePath("/users/1", "")) < 2**31


def test_locks_of_other_programs_are_taken_for_no_writer(row: CachedRow) -> None:
    """Neither small numbers nor numbers of 64 bits collide with the locks of paths."""
    number = lock_id(row.path)
    with Connection.connect(row.stack.postgres, autocommit=True) as foreign:
        foreign.execute("SELECT pg_advisory_lock(%s::bigint), pg_advisory_lock(%s::int, 1)", (number, number))
        foreign.execute("SELECT pg_advisory_lock(n) FROM generate_series(1, 1000) n")
        assert row.value() == "old"
        assert row.read().cache_status.startswith("redis; hit")
        row.write("new")
        assert row.value() == "new"


def test_reads_are_answered_uncached_while_a_session_has_filled_the_table_of_locks(row: CachedRow) -> None:
    row.stack.redis().flushdb()
    with Connection.connect(row.stack.postgres, autocommit=True) as foreign:
        foreign.deadline = math.inf
        with pytest.raises(psycopg.errors.OutOfMemory):
            foreign.execute("SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) n")
        try:
            assert row.value() == "old"
            assert not row.read().storable
        finally:
            foreign.execute("SELECT pg_advisory_unlock_all()")
