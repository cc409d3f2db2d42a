"""Races between a reader and a writer, each stepped: one is stopped at a place while the other runs through."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count

import psycopg
import pytest

from testkit.stack import Stack, wait_until
from velikiy.coherence import Answer, CachePath, Caches, Change, EdgeTier, Entry, Gate, RedisTier, redis_tier
from velikiy.coherence.locks import lock, lock_id, writer_in_flight
from velikiy.coherence.membership import Cache
from velikiy.coherence.redis_lease import RedisLease
from velikiy.coherence.redis_tier import Hit, Lease
from velikiy.postgres import Connection, Database, DatabaseUnavailable, Statement

_numbers = count(1)


def nothing() -> None:
    pass


class Stepped(RedisTier):
    """Stops a writer before and after its drop."""

    before_drop: Callable[[], None] = staticmethod(nothing)
    after_drop: Callable[[], None] = staticmethod(nothing)

    def drop(self, paths: Iterable[CachePath] | None, mine: Sequence[CachePath] = ()) -> dict[CachePath, Lease]:
        self.before_drop()
        leases = super().drop(paths, mine)
        self.after_drop()
        return leases


def stepped(stack: Stack, database: Database) -> Stepped:
    return Stepped(stack.redis_url, RedisLease(Caches(database, threads=8).redis_is_fenced), ttl=60, timeout=1)


def fenced(database: Database, tier: RedisTier) -> Gate:
    return Gate(database, Caches(database, threads=8), tier, EdgeTier())


class Row:
    """One row behind one path, with a reader and a writer of it."""

    def __init__(self, stack: Stack, database: Database, tier: Stepped) -> None:
        self.stack, self.database, self.tier = stack, database, tier
        self.gate = fenced(database, tier)
        self.lock_id = next(_numbers)
        self.path = CachePath(f"/row/{self.lock_id}", f"row:{self.lock_id}")
        stack.sql("INSERT INTO rows VALUES (%s, 'old')", self.lock_id)

    def load(self, connection: Connection) -> Entry:
        row = connection.execute("SELECT value FROM rows WHERE id = %s", (self.lock_id,)).fetchone()
        return Entry(200, row[0].encode()) if row else Entry(404, b"{}")

    def read(self, load: Callable[[Connection], Entry] | None = None) -> Answer:
        return self.gate.read(self.path, "", load or self.load)

    def value(self) -> str:
        return self.read().entry.body.decode()

    def write(self, value: str) -> None:
        # Another writer is another process: with a tier of its own, which is not stepped.
        self.write_through(fenced(self.database, stepped(self.stack, self.database)), value)

    def write_stepped(self, value: str) -> None:
        self.write_through(self.gate, value)

    def write_through(self, gate: Gate, value: str) -> None:
        def change(connection: Connection) -> Change[None]:
            connection.execute("UPDATE rows SET value = %s WHERE id = %s", (value, self.lock_id))
            return Change(None, (self.path,))

        gate.write(change)

    def stored(self) -> bytes | None:
        stored: bytes | None = self.stack.redis().hget(self.path.key, "body:")  # type: ignore[assignment]
        return stored


@pytest.fixture(scope="module")
def database(stack: Stack) -> Iterator[Database]:
    stack.sql("CREATE TABLE rows (id int PRIMARY KEY, value text)")
    database = Database(stack.postgres, size=4, timeout=5)
    database.open()
    yield database
    database.close()
    stack.sql("DROP TABLE rows")


@pytest.fixture
def row(stack: Stack, database: Database) -> Row:
    return Row(stack, database, stepped(stack, database))


def test_a_fill_that_a_write_overtook_between_read_and_store_is_refused(row: Row) -> None:
    def load(connection: Connection) -> Entry:
        entry = row.load(connection)
        row.write("new")
        return entry

    answer = row.read(load)
    assert answer.entry.body == b"old"  # its read began before the write
    assert row.stored() is None
    assert row.value() == "new"


def test_a_write_between_check_and_snapshot_is_seen_by_both(row: Row) -> None:
    def load(connection: Connection) -> Entry:
        row.write("new")
        return row.load(connection)

    assert row.read(load).entry.body == b"new"
    assert row.stored() is None  # the write took the reader's lease: nobody can tell that it saw it
    assert row.value() == "new"


@pytest.mark.parametrize("place", ["before_drop", "after_drop"])
def test_what_is_read_while_a_writer_is_on_its_way_is_stored_nowhere(row: Row, place: str) -> None:
    seen: list[Answer] = []
    assert row.value() == "old"  # and it is in Redis now
    setattr(row.tier, place, lambda: seen.append(row.read()))
    row.write_stepped("new")
    [answer] = seen
    assert answer.entry.body == b"old"  # not committed yet
    if place == "after_drop":
        assert not answer.storable
        assert answer.cache_status == "redis; fwd=uri-miss; detail=write-in-flight"
    assert row.stored() is None
    assert row.value() == "new"


def test_a_second_writer_of_the_path_that_passes_the_first_hides_nothing(row: Row) -> None:
    other = row.lock_id + 1_000_000
    row.stack.sql("INSERT INTO rows VALUES (%s, 'old')", other)

    def load(connection: Connection) -> Entry:
        rows = connection.execute(
            "SELECT string_agg(value, ',' ORDER BY id) FROM rows WHERE id IN (%s, %s)", (row.lock_id, other)
        ).fetchone()
        assert rows
        return Entry(200, rows[0].encode())

    def second() -> None:
        def change(connection: Connection) -> Change[None]:
            connection.execute("UPDATE rows SET value = 'second' WHERE id = %s", (other,))
            return Change(None, (row.path,))

        fenced(row.database, stepped(row.stack, row.database)).write(change)
        answer = row.read(load)
        assert answer.entry.body == b"old,second"
        assert not answer.storable  # the first is still on its way

    row.tier.after_drop = second
    row.write_stepped("first")
    assert row.read(load).entry.body == b"first,second"


def test_at_the_drop_the_lock_is_held_and_the_change_not_yet_visible(row: Row) -> None:
    seen: list[tuple[bool, str]] = []

    def look() -> None:
        with row.database.autocommit() as connection:
            seen.append((writer_in_flight(connection, row.path), row.load(connection).body.decode()))

    row.tier.before_drop = look
    row.write_stepped("new")
    assert seen == [(True, "old")]
    with row.database.autocommit() as connection:
        assert not writer_in_flight(connection, row.path)


def test_a_writer_that_dies_leaves_the_path_to_be_cached_again(row: Row) -> None:
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


def test_a_write_that_fails_drops_nothing_and_holds_nothing(row: Row) -> None:
    assert row.value() == "old"

    def change(connection: Connection) -> Change[None]:
        raise KeyError("nobody")

    with pytest.raises(KeyError):
        row.gate.write(change)
    assert row.read().cache_status.startswith("redis; hit; ttl=")
    with row.database.autocommit() as connection:
        assert not writer_in_flight(connection, row.path)


def test_paths_that_are_foreseen_are_locked_before_the_row_is_changed_and_others_after_it(row: Row) -> None:
    other = CachePath(f"/other/{row.lock_id}", f"other:{row.lock_id}")
    seen = []

    def locked() -> tuple[bool, bool]:
        with row.database.autocommit() as connection:
            return writer_in_flight(connection, row.path), writer_in_flight(connection, other)

    def change(connection: Connection) -> Change[None]:
        connection.query(Statement("SELECT 1"))
        seen.append(locked())
        return Change(None, (row.path, other))

    row.tier.before_drop = lambda: seen.append(locked())
    row.gate.write(change, lock_first=[row.path])
    seen.append(locked())
    row.gate.write(lambda connection: Change(None, ()), lock_first=[row.path])  # which had not to be written after all
    seen.append(locked())
    assert seen == [(True, False), (True, True), (False, False), (False, False)]


def test_a_change_that_asks_for_nothing_is_locked_before_the_drop_all_the_same(row: Row) -> None:
    seen = []

    def look() -> None:
        with row.database.autocommit() as connection:
            seen.append(writer_in_flight(connection, row.path))

    row.tier.before_drop = look
    row.gate.write(lambda connection: Change(None, (row.path,)), lock_first=[row.path])
    assert seen == [True]


def test_writers_of_one_path_do_not_wait_for_each_other(row: Row) -> None:
    dsn = row.stack.postgres
    with Connection.connect(dsn, autocommit=True) as first, Connection.connect(dsn, autocommit=True) as second:
        first.execute("BEGIN")
        second.execute("BEGIN")
        lock(first, [row.path])
        lock(second, [row.path])  # would wait here, and run into the connection's deadline


class TestWritersWhoMeet:
    """Those who come while the first is at its drop go together (velikiy/coherence/group_commit.py)."""

    @pytest.fixture
    def rows(self, stack: Stack, database: Database) -> list[Row]:
        """Of one app: one fence, and one tier."""
        tier = stepped(stack, database)
        rows = [Row(stack, database, tier) for _ in range(3)]
        for row in rows:
            row.gate = rows[0].gate
        return rows

    def write(
        self, rows: list[Row], *also: CachePath, at_the_second: Callable[[], object] = nothing
    ) -> list[Future[None]]:
        """To each; the second and the third come while the first is at its drop, and the second goes for both. The
        third drops these paths `also`."""

        def write(row: Row) -> None:
            def change(connection: Connection) -> Change[None]:
                connection.execute("UPDATE rows SET value = 'new' WHERE id = %s", (row.lock_id,))
                invalidates = (row.path, *(also if row is rows[2] else ()))
                return Change(None, invalidates, (row.path, Entry(200, b"new")))

            row.gate.write(change)

        def others_come() -> None:
            tier.before_drop = second_goes
            for row in rows[1:]:
                written.append(threads.submit(write, row))
                wait_until(partial(waiting, len(written)))

        def waiting(writers: int) -> bool:
            return len(rows[0].gate._group._waiting) == writers

        def second_goes() -> None:
            tier.before_drop = nothing
            at_the_second()

        tier = rows[0].tier
        written: list[Future[None]] = []
        tier.before_drop = others_come
        with ThreadPoolExecutor() as threads:
            first = threads.submit(write, rows[0])
            first.result(10)
        return [first, *written]

    def test_are_dropped_together_and_each_fills_its_own(self, rows: list[Row]) -> None:
        assert [row.value() for row in rows] == ["old"] * 3
        drops: list[None] = []
        rows[0].tier.after_drop = lambda: drops.append(None)
        for written in self.write(rows):
            written.result()
        assert len(drops) == 2
        wait_until(lambda: all(row.stored() for row in rows))  # nobody waits for a fill
        assert all(row.read().cache_status.startswith("redis; hit") for row in rows)
        assert [row.value() for row in rows] == ["new"] * 3

    def test_do_not_fail_with_the_one_that_goes_for_them(self, rows: list[Row], stack: Stack) -> None:
        def end_it() -> None:
            stack.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
                " AND (classid::bigint << 32) | objid::bigint = %s",
                lock_id(rows[1].path),
            )

        first, second, third = self.write(rows, at_the_second=end_it)
        assert isinstance(second.exception(), DatabaseUnavailable)
        assert [first.exception(), third.exception()] == [None, None]
        assert [row.value() for row in rows] == ["new", "old", "new"]

    def test_what_two_have_dropped_neither_fills(self, rows: list[Row]) -> None:
        for written in self.write(rows, rows[1].path):
            written.result()
        wait_until(lambda: rows[0].stored() and rows[2].stored())
        assert rows[1].stored() is None
        assert rows[1].value() == "new"


def test_a_redis_that_is_back_before_its_writer_has_noticed_is_not_waited_for_again(
    stack: Stack, database: Database
) -> None:
    """The relay, which reaches it, may put it back again and again while this app does not."""

    class Slow(Caches):
        def await_exclusion(self, caches: Sequence[Cache]) -> None:
            super().await_exclusion(caches)
            wait_until(lambda: not self.redis_is_fenced())

    caches = Slow(database, threads=8)
    with socket.create_server(("127.0.0.1", 0)) as hole:  # takes connections and never says a word
        url = f"redis://127.0.0.1:{hole.getsockname()[1]}"
        tier = Stepped(url, RedisLease(caches.redis_is_fenced), ttl=60, timeout=1)
        drops: list[None] = []
        tier.before_drop = lambda: drops.append(None)
        row = Row(stack, database, tier)
        row.gate = Gate(database, caches, tier, EdgeTier())
        row.write_stepped("new")
    assert len(drops) == 1
    assert stack.sql("SELECT value FROM rows WHERE id = %s", row.lock_id) == [("new",)]


def kept(row: Row, patience: float = 0) -> Entry:
    hit = row.tier.read(row.path, "", patience=patience)
    assert isinstance(hit, Hit)
    assert 0 < hit.ttl <= 60
    return hit.entry


class TestLeases:
    def test_one_fills_and_others_are_told(self, row: Row) -> None:
        lease = row.tier.read(row.path, "")
        assert isinstance(lease, Lease)
        assert row.tier.read(row.path, "", patience=0) is None
        assert isinstance(row.tier.read(row.path, "limit=1"), Lease)  # another variant
        row.tier.fill(row.path, "", lease, Entry(200, b"x"))
        assert kept(row) == Entry(200, b"x")
        row.tier.fill(row.path, "", lease, Entry(200, b"y"))  # it is used up
        assert kept(row) == Entry(200, b"x")

    def test_who_waits_gets_what_the_other_filled(self, row: Row) -> None:
        from threading import Timer

        lease = row.tier.read(row.path, "")
        assert isinstance(lease, Lease)
        timer = Timer(0.05, row.tier.fill, (row.path, "", lease, Entry(200, b"x")))
        timer.start()
        assert kept(row, patience=5) == Entry(200, b"x")
        timer.join()

    @pytest.mark.parametrize("lost", ["dropped", "flushed", "evicted"])
    def test_a_lease_that_is_lost_fills_nothing(self, row: Row, lost: str) -> None:
        lease = row.tier.read(row.path, "")
        assert isinstance(lease, Lease)
        if lost == "dropped":
            row.tier.drop([row.path])
        elif lost == "flushed":
            row.stack.redis().flushdb()
        else:
            row.stack.redis().delete(row.path.key)
        row.tier.fill(row.path, "", lease, Entry(200, b"x"))
        assert isinstance(row.tier.read(row.path, ""), Lease)

    def test_a_lease_ends_by_itself_and_its_late_fill_is_refused(
        self, row: Row, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_tier, "FILL_LEASE_S", 0.05)
        late = row.tier.read(row.path, "")
        assert isinstance(late, Lease)
        other = wait_until(lambda: row.tier.read(row.path, "", patience=0))
        assert isinstance(other, Lease)
        row.tier.fill(row.path, "", late, Entry(200, b"late"))
        assert isinstance(wait_until(lambda: row.tier.read(row.path, "", patience=0)), Lease)

    def test_the_hash_lives_from_its_first_fill(self, row: Row) -> None:
        for variant in ("", "limit=1"):
            lease = row.tier.read(row.path, variant)
            assert isinstance(lease, Lease)
            row.tier.fill(row.path, variant, lease, Entry(200, b"x"))
            assert isinstance(row.tier.read(row.path, variant), Hit)
            if variant == "":
                row.stack.redis().pexpire(row.path.key, 5000)
        assert 0 < row.stack.redis().pttl(row.path.key) <= 5000


def test_check_and_read_have_two_snapshots_whatever_the_roles_default(row: Row) -> None:
    row.stack.sql("ALTER ROLE velikiy SET default_transaction_isolation = 'repeatable read'")
    try:
        database = Database(row.stack.postgres, size=1, timeout=5)
        database.open()
        with database.autocommit() as connection:
            assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        database.close()
    finally:
        row.stack.sql("ALTER ROLE velikiy RESET default_transaction_isolation")


def test_two_paths_have_two_locks() -> None:
    assert lock_id(CachePath("/users/1", "user:1")) != lock_id(CachePath("/users", "all_users"))
    assert -(2**63) <= lock_id(CachePath("/users/1", "")) < 2**63
