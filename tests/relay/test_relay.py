"""SQL from outside is seen through every edge, and writes of the app send no notification."""

import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import quantiles

import psycopg
import pytest
import requests

from testkit.api import is_hit
from testkit.databases import superuser_dsn
from testkit.outages import hanging, refusing
from testkit.stack import Stack, running, wait_until
from velikiy.stack.cluster import binaries


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack for this module, whose tests truncate the table and take servers away.

    Entries of the edges outlive the time that each test waits, so no test passes because of a TTL.
    """
    with running("--edges", "2", EDGE_TTL="60") as stack:
        yield stack


@pytest.fixture
def listening(stack: Stack) -> Iterator[psycopg.Connection]:
    """A connection that listens as the relay does."""
    with psycopg.connect(stack.postgres, autocommit=True) as connection:
        connection.execute("LISTEN velikiy")
        yield connection


def payloads(connection: psycopg.Connection) -> list[str]:
    return [notification.payload for notification in connection.notifies(timeout=0.3)]


def name_at(edge: str, user: int) -> str | None:
    """Return the user's name, None for a 404."""
    response = requests.get(f"{edge}/users/{user}", timeout=5)
    return str(response.json()["name"]) if response.status_code == 200 else None


def listed_ids(edge: str) -> list[int]:
    return [row["id"] for row in requests.get(f"{edge}/users", timeout=5).json()]


def warm(stack: Stack, *users: int) -> None:
    """Have every edge cache the list and these users."""
    for edge in stack.edges:
        for path in ("/users", *(f"/users/{user}" for user in users)):
            wait_until(lambda path=path, edge=edge: is_hit(edge + path))  # type: ignore[misc]


def expect_name(stack: Stack, user: int, name: str | None) -> None:
    """Wait until every edge returns this name; None stands for a deleted user."""
    for edge in stack.edges:
        wait_until(lambda edge=edge: name_at(edge, user) == name, within=1, every=0.002)  # type: ignore[misc]
        wait_until(lambda edge=edge: (user in listed_ids(edge)) == (name is not None), within=1, every=0.002)  # type: ignore[misc]


def test_insert_update_and_delete_by_sql_are_seen_through_every_edge(stack: Stack) -> None:
    warm(stack, 2, 901)
    stack.sql("UPDATE users SET name = 'Outside' WHERE id = 2")
    expect_name(stack, 2, "Outside")
    warm(stack, 2, 901)
    stack.sql("INSERT INTO users (id, name, email) VALUES (901, 'New', 'new901@example.com')")
    expect_name(stack, 901, "New")
    warm(stack, 2, 901)
    stack.sql("UPDATE users SET id = 902 WHERE id = 901")
    expect_name(stack, 901, None)
    expect_name(stack, 902, "New")
    warm(stack, 902)
    stack.sql("DELETE FROM users WHERE id = 902")
    expect_name(stack, 902, None)


@pytest.mark.exclusive
def test_update_of_one_row_by_sql_is_seen_within_100_ms(stack: Stack) -> None:
    """The promise is the 99th percentile. The test asserts the 90th, because other programs run on this machine."""
    durations = []
    for number in range(100):
        warm(stack, 2)
        stack.sql("UPDATE users SET name = %s WHERE id = 2", f"Number {number}")
        began = time.monotonic()
        for edge in stack.edges:
            while name_at(edge, 2) != f"Number {number}":
                assert time.monotonic() - began < 2
        durations.append(time.monotonic() - began)
    median_ms, p99_ms = sorted(durations)[50] * 1000, quantiles(durations, n=100)[98] * 1000
    print(f"median {median_ms:.1f} ms, 99th percentile {p99_ms:.1f} ms")
    assert sorted(durations)[90] < 0.1


def test_notification_of_more_than_1000_rows_stands_for_every_path(stack: Stack, listening: psycopg.Connection) -> None:
    with (
        psycopg.connect(stack.postgres) as connection,
        connection.cursor().copy("COPY users (name, email) FROM STDIN") as copy,
    ):
        for number in range(3000):
            copy.write_row((f"Copied {number}", f"copied{number}@example.com"))
    assert payloads(listening) == ["users *"]
    last = wait_until(lambda: stack.sql("SELECT max(id) FROM users WHERE name LIKE 'Copied %%'"))[0][0]
    assert [name_at(edge, last) for edge in stack.edges] == ["Copied 2999"] * 2
    warm(stack, last)
    stack.sql("DELETE FROM users WHERE name LIKE 'Copied %%'")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name_at(edge, last) is None, within=1)  # type: ignore[misc]


def test_notifications_of_several_hundred_rows_name_each_row(stack: Stack, listening: psycopg.Connection) -> None:
    stack.sql(
        "INSERT INTO users (name, email) SELECT 'Some', 'some' || n || '@example.com' FROM generate_series(1, 700) n"
    )
    received = payloads(listening)
    assert len(received) == 3
    assert sum(len(payload.split()) - 1 for payload in received) == 700
    stack.sql("DELETE FROM users WHERE name = 'Some'")


def test_truncate_by_sql_is_seen_through_every_edge(stack: Stack) -> None:
    rows = stack.sql("SELECT id, name, email FROM users")
    warm(stack, 1)
    stack.sql("TRUNCATE users")
    for edge in stack.edges:
        wait_until(lambda edge=edge: listed_ids(edge) == [], within=1)  # type: ignore[misc]
        assert name_at(edge, 1) is None
    for row in rows:
        stack.sql("INSERT INTO users (id, name, email) VALUES (%s, %s, %s)", *row)
    expect_name(stack, 1, "Alice")


def test_writes_of_the_app_send_no_notification(stack: Stack, listening: psycopg.Connection) -> None:
    created = requests.post(f"{stack.edge}/users", json={"name": "A", "email": "quiet@example.com"}, timeout=5)
    url = stack.edge + created.headers["Location"]
    requests.put(url, json={"name": "B"}, timeout=5)
    requests.delete(url, timeout=5)
    assert payloads(listening) == []
    stack.sql("UPDATE users SET name = name WHERE id = 3")
    assert payloads(listening) == ["users 3"]


def test_sql_during_an_outage_of_the_relay_is_seen_once_the_relay_is_back(stack: Stack) -> None:
    warm(stack, 2)
    with refusing(stack, "relay"):
        stack.sql("UPDATE users SET name = 'Unnoticed' WHERE id = 2")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name_at(edge, 2) == "Unnoticed", within=3)  # type: ignore[misc]


def test_relay_invalidates_everything_after_its_connection_was_closed(stack: Stack) -> None:
    warm(stack, 3)
    # This session sends no notification, as if the relay's connection had closed before the notification.
    with psycopg.connect(stack.postgres, autocommit=True, options="-c velikiy.passes_gate=on") as connection:
        connection.execute("UPDATE users SET name = 'Unnoticed' WHERE id = 3")
    assert name_at(stack.edge, 3) != "Unnoticed"
    stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'velikiy relay'")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name_at(edge, 3) == "Unnoticed", within=3)  # type: ignore[misc]


def test_hanging_cache_does_not_delay_invalidations_at_other_caches(stack: Stack) -> None:
    wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE fenced_at IS NULL AND NOT excluded") == [(3,)])
    for server in ("edge2", "redis"):
        warm(stack, 2)
        with hanging(stack, server):
            for number in range(3):
                stack.sql("UPDATE users SET name = %s WHERE id = 2", f"{server} {number}")
                wait_until(lambda name=f"{server} {number}": name_at(stack.edge, 2) == name, within=1.5)  # type: ignore[misc]
        for edge in stack.edges:
            wait_until(lambda edge=edge, name=f"{server} 2": name_at(edge, 2) == name, within=3)  # type: ignore[misc]
        wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE fenced_at IS NULL AND NOT excluded") == [(3,)])


def test_notification_without_a_payload_invalidates_everything_and_the_relay_continues(stack: Stack) -> None:
    pid = stack.pids()["relay"]
    warm(stack, 2)
    stack.sql("NOTIFY velikiy")
    wait_until(lambda: not is_hit(f"{stack.edge}/users/2"), what="everything is invalidated")
    assert stack.pids()["relay"] == pid


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("UPDATE users SET name = 'Replicated' WHERE id = 2", "Replicated"),
        ("DELETE FROM users WHERE id = 2", None),
    ],
)
def test_write_of_a_replication_is_seen_through_every_edge(stack: Stack, change: str, name: str | None) -> None:
    """The worker of a logical replication sets session_replication_role, as some tools for bulk loads do."""
    [row] = stack.sql("SELECT id, name, email FROM users WHERE id = 2")
    warm(stack, 2)
    etag = requests.get(f"{stack.edge}/users/2", timeout=5).headers["ETag"]
    with psycopg.connect(superuser_dsn(stack), dbname="velikiy", autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(change)
        expect_name(stack, 2, name)
        if name:
            assert requests.get(f"{stack.edge}/users/2", timeout=5).headers["ETag"] != etag
        warm(stack, 2)
        connection.execute("DELETE FROM users WHERE id = 2")
        connection.execute("INSERT INTO users (id, name, email) VALUES (%s, %s, %s)", row)
    expect_name(stack, 2, row[1])


def test_replicated_change_of_a_key_stands_for_every_path(stack: Stack, listening: psycopg.Connection) -> None:
    """A key that is revoked by a logical replication must not be found in a cache."""
    with psycopg.connect(superuser_dsn(stack), dbname="velikiy") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("INSERT INTO api_keys (name, scope, digest, shown) VALUES ('n', 'read', 'd', 's')")
        connection.commit()
        assert payloads(listening) == ["api_keys *"]
        connection.execute("DELETE FROM api_keys WHERE name = 'n'")
        connection.commit()
    assert payloads(listening) == ["api_keys *"]


class TestChangesOfATable:
    """Changes of the table itself, for which no trigger fires."""

    @pytest.mark.parametrize(
        ("form", "restore"), [("custom", ("pg_restore", "--clean", "--if-exists")), ("plain", ("psql", "--quiet"))]
    )
    def test_restored_dump_is_seen_within_2_s(
        self, stack: Stack, tmp_path: Path, form: str, restore: tuple[str, ...]
    ) -> None:
        program, *options = restore
        programs, dump = binaries(stack.supervisor.plan.cluster), tmp_path / "users"
        clean = ["--clean", "--if-exists"] if form == "plain" else []
        stack.sql("UPDATE users SET name = 'Dumped' WHERE id = 2")
        run(programs / "pg_dump", stack.postgres, f"--format={form}", "--table=users", f"--file={dump}", *clean)
        stack.sql("UPDATE users SET name = 'Later' WHERE id = 2")
        stack.sql("INSERT INTO users (id, name, email) VALUES (905, 'Later', 'later905@example.com')")
        expect_name(stack, 2, "Later")
        warm(stack, 2, 905)
        file = [f"--file={dump}"] if form == "plain" else [str(dump)]
        run(programs / program, f"--dbname={stack.postgres}", *options, *file)
        expect_name_within_2_s(stack, 2, "Dumped")
        expect_name_within_2_s(stack, 905, None)
        check_writes_are_seen(stack)

    def test_table_swapped_by_renaming_is_seen_within_2_s(self, stack: Stack) -> None:
        stack.sql("UPDATE users SET name = 'Original' WHERE id = 2")
        expect_name(stack, 2, "Original")
        warm(stack, 2)
        stack.sql(
            """
            CREATE TABLE users_new (LIKE users INCLUDING ALL);
            INSERT INTO users_new (id, name, email) SELECT id, 'Swapped', email FROM users;
            SELECT setval(pg_get_serial_sequence('users_new', 'id'), max(id)) FROM users;
            CALL make_resource('users_new');
            """
        )
        swap = "ALTER TABLE users RENAME TO users_{}; ALTER TABLE users_{} RENAME TO users"
        try:
            stack.sql(swap.format("old", "new"))
            expect_name_within_2_s(stack, 2, "Swapped")
            check_writes_are_seen(stack)
            warm(stack, 2)
        finally:
            stack.sql(swap.format("new", "old") + "; DROP TABLE users_new")
        expect_name_within_2_s(stack, 2, "Original")
        check_writes_are_seen(stack)

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE users SET name = 'Silent' WHERE id = 2",
            "CREATE TEMPORARY TABLE kept AS SELECT id, email FROM users; TRUNCATE users;"
            " INSERT INTO users (id, name, email) SELECT id, 'Silent', email FROM kept; DROP TABLE kept",
        ],
        ids=["update", "truncate"],
    )
    @pytest.mark.parametrize("at_once", [True, False], ids=["one transaction", "one after the other"])
    def test_write_while_triggers_are_disabled_is_seen_within_2_s_of_their_return(
        self, stack: Stack, at_once: bool, change: str
    ) -> None:
        statements = f"ALTER TABLE users DISABLE TRIGGER USER; {change}; ALTER TABLE users ENABLE TRIGGER USER"
        warm(stack, 2)
        with psycopg.connect(stack.postgres, autocommit=True) as connection:
            for statement in [statements] if at_once else statements.split(";"):
                connection.execute(statement)
        expect_name_within_2_s(stack, 2, "Silent")
        stack.sql("UPDATE users SET name = 'Bob' WHERE id = 2")
        expect_name(stack, 2, "Bob")

    def test_write_is_seen_within_2_s_while_triggers_are_disabled(self, stack: Stack) -> None:
        stack.sql("ALTER TABLE users DISABLE TRIGGER USER")
        try:
            for name in ("First", "Second"):
                warm(stack, 2)
                stack.sql("UPDATE users SET name = %s WHERE id = 2", name)
                expect_name_within_2_s(stack, 2, name)
            warnings = requests.get(f"{stack.edge}/readyz", timeout=5).json()["warnings"]
            assert any("CALL add_triggers('users')" in it for it in warnings)
        finally:
            stack.sql("CALL add_triggers('users')")
        check_writes_are_seen(stack)

    def test_ordinary_writes_notify_as_before_once_triggers_were_disabled_and_enabled(
        self, stack: Stack, listening: psycopg.Connection
    ) -> None:
        """ENABLE TRIGGER USER also makes the triggers of a replication fire in ordinary sessions."""
        stack.sql("ALTER TABLE users DISABLE TRIGGER USER; ALTER TABLE users ENABLE TRIGGER USER")
        payloads(listening)
        stack.sql("UPDATE users SET name = name WHERE id = 3")
        assert payloads(listening) == ["users 3"]
        stack.sql("CALL add_triggers('users')")

    def test_history_swapped_by_renaming_is_seen_within_2_s(self, stack: Stack) -> None:
        swap = "ALTER TABLE row_history RENAME TO row_history_{}; ALTER TABLE row_history_{} RENAME TO row_history"
        stack.sql("UPDATE users SET name = 'Once more' WHERE id = 3")
        warm_history(stack, 3)
        stack.sql("CREATE TABLE row_history_new (LIKE row_history INCLUDING ALL)")
        try:
            stack.sql(swap.format("old", "new"))
            expect_history_within_2_s(stack, 3, [None])
            stack.sql("CALL add_triggers('row_history')")
        finally:
            stack.sql(swap.format("new", "old") + "; DROP TABLE row_history_new")
        for edge in stack.edges:
            wait_until(lambda edge=edge: "update" in history_of(edge, 3), within=2)  # type: ignore[misc]

    def test_deletion_from_the_history_while_its_triggers_are_disabled_is_seen_within_2_s(self, stack: Stack) -> None:
        stack.sql("UPDATE users SET name = 'Once more' WHERE id = 3")
        warm_history(stack, 3)
        stack.sql("ALTER TABLE row_history DISABLE TRIGGER USER; DELETE FROM row_history WHERE row_id = 3")
        try:
            expect_history_within_2_s(stack, 3, [None])
        finally:
            stack.sql("CALL add_triggers('row_history')")

    def test_renamed_and_rewritten_columns_are_seen_within_2_s(self, stack: Stack) -> None:
        def shows(edge: str, field: str, expected: str) -> bool:
            return bool(requests.get(f"{edge}/users/2", timeout=5).json()[field] == expected)

        def expect_within_2_s(field: str, expected: str) -> None:
            until = time.monotonic() + 2
            for edge in stack.edges:
                wait_until(partial(shows, edge, field, expected), within=until - time.monotonic())

        swap = (
            "ALTER TABLE users RENAME name TO other; ALTER TABLE users RENAME email TO name;"
            " ALTER TABLE users RENAME other TO email"
        )
        [(email,)] = stack.sql("SELECT email FROM users WHERE id = 2")
        warm(stack, 2)
        stack.sql(swap)
        try:
            expect_within_2_s("name", email)
            warm(stack, 2)
        finally:
            stack.sql(swap)
        expect_within_2_s("email", email)
        warm(stack, 2)
        stack.sql("ALTER TABLE users ALTER created_at TYPE timestamptz USING '2001-02-03T04:05:06Z'")
        expect_within_2_s("created_at", "2001-02-03T04:05:06+00:00")
        check_writes_are_seen(stack)

    def test_truncated_detached_or_dropped_child_table_is_seen_within_2_s(self, stack: Stack) -> None:
        stack.sql("CREATE TABLE users_more () INHERITS (users)")
        try:
            for change in ("TRUNCATE users_more", "ALTER TABLE users_more NO INHERIT users", "DROP TABLE users_more"):
                stack.sql("INSERT INTO users_more (id, name, email) VALUES (906, 'Child', 'child906@example.com')")
                stack.sql("NOTIFY velikiy, 'users 906'")
                expect_name(stack, 906, "Child")
                # The relay does not notice a child table that is attached and detached between two looks.
                await_looks(stack, 1)
                warm(stack, 906)
                stack.sql(change)
                expect_name_within_2_s(stack, 906, None)
                if "NO INHERIT" in change:
                    stack.sql("TRUNCATE users_more; ALTER TABLE users_more INHERIT users")
        finally:
            stack.sql("DROP TABLE IF EXISTS users_more")
            # The first ANALYZE records in pg_class that the table has no child any longer, which is a change as well.
            stack.sql("ANALYZE users")
            await_looks(stack, 1)

    @pytest.mark.parametrize(
        "kind", ["parent", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("child", "partition"))]
    )
    def test_write_to_a_table_of_the_same_family_is_seen_and_the_log_names_it(self, stack: Stack, kind: str) -> None:
        family = f"users_{kind}"
        if kind == "child":
            stack.sql(f"CREATE TABLE {family} () INHERITS (users)")
        elif kind == "parent":
            stack.sql(f"CREATE TABLE {family} (LIKE users); ALTER TABLE users INHERIT {family}")
        else:
            stack.sql(
                f"CREATE TABLE {family} (LIKE users) PARTITION BY RANGE (id);"
                f" ALTER TABLE {family} ATTACH PARTITION users DEFAULT"
            )
        try:
            wait_until(lambda: family in stack.log("relay"), within=3, what="the log names the table")
            warm(stack, 2)
            if kind == "child":
                stack.sql(f"INSERT INTO {family} (id, name, email) VALUES (907, 'Child', 'child907@example.com')")
                expect_name_within_2_s(stack, 907, "Child")
            else:
                stack.sql(f"UPDATE {family} SET name = 'Family' WHERE id = 2")
                expect_name_within_2_s(stack, 2, "Family")
        finally:
            if kind == "parent":
                stack.sql(f"ALTER TABLE users NO INHERIT {family}")
            elif kind == "partition":
                stack.sql(f"ALTER TABLE {family} DETACH PARTITION users")
            stack.sql(f"DROP TABLE {family}; ANALYZE users")
            await_looks(stack, 1)

    def test_change_of_a_table_is_seen_within_2_s_during_a_flood_of_notifications(self, stack: Stack) -> None:
        finished = threading.Event()

        def notify() -> None:
            with psycopg.connect(stack.postgres, autocommit=True) as connection:
                while not finished.wait(0.005):
                    connection.execute("NOTIFY velikiy, 'users 999'")

        warm(stack, 2)
        notifier = threading.Thread(target=notify)
        notifier.start()
        try:
            stack.sql(
                "ALTER TABLE users DISABLE TRIGGER USER; UPDATE users SET name = 'Among others' WHERE id = 2;"
                " ALTER TABLE users ENABLE TRIGGER USER"
            )
            expect_name_within_2_s(stack, 2, "Among others")
        finally:
            finished.set()
            notifier.join()

    def test_maintenance_and_plain_writes_invalidate_no_other_row(self, stack: Stack) -> None:
        await_looks(stack, 1)
        warm(stack, 3)
        logged = stack.log("relay")
        for statement in (
            "INSERT INTO users (name, email) SELECT 'Much', 'much' || n || '@example.com' FROM generate_series(1, 900) n",
            "ANALYZE users",
            "VACUUM users",
            "VACUUM (FREEZE, ANALYZE) users",
            "REINDEX TABLE users",
        ):
            stack.sql(statement)
        await_looks(stack, 2)
        stack.sql("DELETE FROM users WHERE name = 'Much'")
        assert [is_hit(f"{edge}/users/3") for edge in stack.edges] == [True, True]
        assert "relay.table_changed" not in stack.log("relay").removeprefix(logged)

    def test_relay_listens_and_looks_while_the_table_is_locked(self, stack: Stack) -> None:
        await_looks(stack, 1)
        warm(stack, 2)
        relay_session = "SELECT pid, backend_start FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
        before = stack.sql(relay_session)
        with psycopg.connect(stack.postgres) as restoring:
            restoring.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            await_looks(stack, 2)
            assert is_hit(f"{stack.edge}/users/2")
            stack.sql("NOTIFY velikiy, 'users 2'")
            wait_until(lambda: not is_hit(f"{stack.edge}/users/2"), within=1)
        assert stack.sql(relay_session) == before

    @pytest.mark.parametrize(
        ("table", "remove"),
        [
            ("users", "ALTER TABLE users DISABLE TRIGGER rows_deleted"),
            (
                "users",
                "DROP TRIGGER row_changed ON users; DROP TRIGGER rows_inserted ON users; DROP TRIGGER rows_updated ON users;"
                " DROP TRIGGER rows_deleted ON users; DROP TRIGGER rows_truncated ON users",
            ),
            ("users", "ALTER TABLE users DISABLE TRIGGER history_of_deleted"),
            ("users", "ALTER TABLE users DISABLE TRIGGER row_continues"),
            ("row_history", "ALTER TABLE row_history DISABLE TRIGGER USER"),
            ("api_keys", "ALTER TABLE api_keys DISABLE TRIGGER USER"),
        ],
        ids=["disabled", "dropped", "no entries", "no versions", "history", "keys"],
    )
    def test_relay_warns_once_of_a_table_without_triggers_and_logs_the_remedy(
        self, stack: Stack, table: str, remove: str
    ) -> None:
        restore = f"CALL add_triggers('{table}')"

        def warnings() -> list[str]:
            return [
                line for line in stack.log("relay").removeprefix(before).splitlines() if "relay.cannot_hear" in line
            ]

        await_looks(stack, 1)
        before = stack.log("relay")
        stack.sql(remove)
        try:
            wait_until(warnings, within=3)
            await_looks(stack, 2)
            [warning] = warnings()
            assert f'"table":"{table}"' in warning
            assert restore in warning
        finally:
            stack.sql(restore)
        check_writes_are_seen(stack)


def run(program: Path, *arguments: str) -> None:
    finished = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr


def expect_name_within_2_s(stack: Stack, user: int, name: str | None) -> None:
    until = time.monotonic() + 2
    for edge in stack.edges:
        left = until - time.monotonic()
        wait_until(lambda edge=edge: name_at(edge, user) == name, within=left, every=0.01)  # type: ignore[misc]


def history_of(edge: str, user: int) -> list[str | None]:
    """Return the changes in the user's history, newest first."""
    return [it["change"] for it in requests.get(f"{edge}/users/{user}/history", timeout=5).json()]


def warm_history(stack: Stack, user: int) -> None:
    """Have every edge cache the user's history once it has an entry."""
    for edge in stack.edges:
        wait_until(lambda edge=edge: history_of(edge, user)[0])  # type: ignore[misc]
        wait_until(lambda edge=edge: is_hit(f"{edge}/users/{user}/history"))  # type: ignore[misc]


def expect_history_within_2_s(stack: Stack, user: int, changes: list[str | None]) -> None:
    until = time.monotonic() + 2
    for edge in stack.edges:
        left = until - time.monotonic()
        wait_until(lambda edge=edge: history_of(edge, user) == changes, within=left, every=0.01)  # type: ignore[misc]


def check_writes_are_seen(stack: Stack) -> None:
    """Check that the app reads and writes, and that SQL from outside is seen."""
    response = requests.post(f"{stack.edge}/users", json={"name": "Works", "email": "works@example.com"}, timeout=5)
    assert response.status_code == 201, response.text
    location = response.headers["Location"]
    assert requests.put(stack.edge + location, json={"name": "Still works"}, timeout=5).status_code == 200
    names = [requests.get(edge + location, timeout=5).json()["name"] for edge in stack.edges]
    assert names == ["Still works"] * 2
    assert requests.delete(stack.edge + location, timeout=5).ok
    warm(stack, 2)
    stack.sql("UPDATE users SET name = 'Outside' WHERE id = 2")
    expect_name(stack, 2, "Outside")


def await_looks(stack: Stack, count: int) -> None:
    """Wait until the relay has looked at the catalogs so many times from now on."""
    looks: set[object] = set()

    def count_looks() -> int:
        looks.update(
            stack.sql(
                "SELECT query_start FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
                " AND query LIKE '%%pg_inherits%%'"
            )
        )
        return len(looks)

    wait_until(lambda: count_looks() > count, what="the relay looks at the catalogs")
