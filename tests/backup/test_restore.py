"""`velikiy restore`."""

import json
from pathlib import Path

import psycopg
import pytest
import requests

from testkit.databases import create_database, drop_database
from testkit.stack import Stack
from tests.backup.commands import back_up, content, refusal, restore, velikiy
from velikiy.postgres import migrate

NEXT_ID = "SELECT last_value FROM users_id_seq"


def name_at(edge: str, user: int) -> str | None:
    response = requests.get(f"{edge}/users/{user}", timeout=5)
    return str(response.json()["name"]) if response.ok else None


def test_restore_brings_every_row_back_and_no_cache_returns_an_older_row(stack: Stack, original: Path) -> None:
    before = content(stack)
    stack.sql("UPDATE users SET name = 'Renamed' WHERE id = 1")
    stack.sql("DELETE FROM users WHERE id = 3")
    created = requests.post(
        f"{stack.edge}/users",
        json={"name": "Later", "email": "later@example.com"},
        headers={"Idempotency-Key": '"a-key-of-the-test"'},
        timeout=5,
    )
    later = created.json()["id"]
    for edge in stack.edges:
        for user in (1, 2, 3, later):
            name_at(edge, user)
        requests.get(f"{edge}/users", timeout=5)
    restored = restore(stack, original)
    for edge in stack.edges:  # without a wait
        assert [name_at(edge, user) for user in (1, 2, 3, later)] == ["Alice", "Bob", "Charlie", None]
        assert [user["name"] for user in requests.get(f"{edge}/users", timeout=5).json()] == ["Alice", "Bob", "Charlie"]
    assert content(stack) == before  # with ids, times and versions
    assert restored["tables"]["users"] == {"rows": 3, "removed": 2, "added": 2}
    assert stack.sql(NEXT_ID) == [(later,)]  # an id is not given twice


def test_restore_makes_a_backup_of_the_present_rows_first(stack: Stack, original: Path, tmp_path: Path) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")
    velikiy(stack, "restore", original, "--yes", "--save-to", tmp_path)
    assert name_at(stack.edge, 2) == "Bob"
    [saved] = tmp_path.iterdir()
    assert saved.name.startswith("before-restore-")
    restore(stack, saved)
    assert name_at(stack.edge, 2) == "Present"


def test_restore_that_cannot_save_the_present_rows_changes_nothing(stack: Stack, original: Path) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")
    assert "--no-save" in refusal(stack, "restore", original, "--yes", "--save-to", "/proc/self")


def test_revoked_keys_stay_revoked_and_keys_that_are_gone_are_named(stack: Stack, tmp_path: Path) -> None:
    for name in ("kept", "revoked"):
        velikiy(stack, "keys", "create", name, "--scope", "read")
    file = tmp_path / "velikiy.dump"
    back_up(stack, file)
    velikiy(stack, "keys", "revoke", "revoked")
    velikiy(stack, "keys", "create", "later", "--scope", "read")
    restored = restore(stack, file, "--keep-keys")
    assert "api_keys" not in restored["tables"]
    restored = restore(stack, file)
    assert restored["still_revoked"] == ["revoked"]
    assert restored["lost_keys"] == ["later"]
    assert stack.sql("SELECT name, revoked_at IS NULL FROM api_keys ORDER BY id") == [
        ("kept", True),
        ("revoked", False),
    ]


def test_restore_without_a_terminal_demands_yes(stack: Stack, original: Path) -> None:
    assert "Add --yes" in refusal(stack, "restore", original)


def test_dry_run_reads_the_whole_file_and_changes_nothing(stack: Stack, original: Path) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")
    read = velikiy(stack, "restore", original, "--dry-run", "--json")
    assert json.loads(read.stdout)["rows"]["users"] == 3
    assert name_at(stack.edge, 2) == "Present"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is empty"),
        (b"id,name,email\n", "is no backup"),
        (b"\x1f\x8b\x08\x00 of gzip", "is compressed. Unpack it first"),
        (b"--\n-- PostgreSQL database dump\n--\n", "as SQL"),
        (b"PGDMP\x01\x7f\x00", "newer pg_dump"),
    ],
    ids=["empty", "another kind", "compressed", "sql", "newer archive"],
)
def test_file_that_is_no_backup_is_refused(stack: Stack, tmp_path: Path, text: bytes, sentence: str) -> None:
    file = tmp_path / "velikiy.dump"
    file.write_bytes(text)
    assert sentence in refusal(stack, "restore", file, "--yes", "--no-save")


def test_cut_or_damaged_file_is_refused_or_changes_no_row(stack: Stack, original: Path, tmp_path: Path) -> None:
    """A changed byte in a part of the file that is not used has no effect."""
    good, file, before = original.read_bytes(), tmp_path / "velikiy.dump", content(stack)
    for size in (100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        assert "damaged" in refusal(stack, "restore", file, "--yes", "--no-save")
    refused = 0
    for place in range(len(good) // 48, len(good), len(good) // 24):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        read = velikiy(stack, "restore", file, "--yes", "--no-save", code=None)
        refused += read.exit_code == 1
        assert content(stack) == before
    assert refused


def test_dump_of_another_database_is_refused(stack: Stack, tmp_path: Path) -> None:
    name, address = create_database(stack)
    try:
        file = tmp_path / "other.dump"
        velikiy(stack, "backup", file, code=1, DATABASE_URL=address)
        assert not file.exists()
    finally:
        drop_database(stack, name)


def test_backup_of_a_newer_version_is_refused(stack: Stack, tmp_path: Path) -> None:
    name, address = create_database(stack)
    try:
        migrate.upgrade(address, wait=5)
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("UPDATE velikiy_version SET version_num = '9999_of_the_future'")
        velikiy(stack, "backup", tmp_path / "newer.dump", DATABASE_URL=address)
    finally:
        drop_database(stack, name)
    assert "newer version of this service" in refusal(stack, "restore", tmp_path / "newer.dump", "--yes", "--no-save")


def test_backup_of_an_older_version_is_migrated(stack: Stack, tmp_path: Path) -> None:
    """Revision 0001_baseline has no API keys, and idempotency keys without an owner. A column was added by hand."""
    name, address = create_database(stack)
    file = tmp_path / "older.dump"
    try:
        migrate.upgrade(address, wait=5, to="0001_baseline")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("UPDATE users SET name = 'Ǵleb ' || id; DELETE FROM users WHERE id = 1")
            connection.execute(
                r"INSERT INTO users (id, name, email) VALUES (70, E'Tab\tand \\ \\.', 'tab@example.com')"
            )
            connection.execute("INSERT INTO idempotency_keys VALUES ('deploy k', 'r', '{}')")
            connection.execute("ALTER TABLE users ADD note int DEFAULT 5")
        velikiy(stack, "backup", file, DATABASE_URL=address)
    finally:
        drop_database(stack, name)
    assert "columns that the table users lacks: note" in refusal(stack, "restore", file, "--yes", "--no-save")
    velikiy(stack, "keys", "create", "present", "--scope", "read")
    keys = stack.sql("SELECT id, revoked_at FROM api_keys")
    stack.sql("ALTER TABLE users ADD note int")
    try:
        restored = restore(stack, file)
        assert stack.sql("SELECT DISTINCT note FROM users") == [(5,)]
    finally:
        stack.sql("ALTER TABLE users DROP note")
    assert restored["kept"] == ["api_keys"]
    assert stack.sql("SELECT id, revoked_at FROM api_keys") == keys
    assert stack.sql("SELECT id, name, version FROM users ORDER BY id") == [
        (2, "Ǵleb 2", 2),
        (3, "Ǵleb 3", 2),
        (70, "Tab\tand \\ \\.", 1),
    ]
    assert stack.sql("SELECT owner FROM idempotency_keys") == [("deploy",)]
    assert name_at(stack.edge, 70) == "Tab\tand \\ \\."
    assert requests.get(f"{stack.edge}/users?q=gleb", timeout=5).json()  # the words of the search are computed
    assert stack.sql("SELECT datname FROM pg_database WHERE datname LIKE 'velikiy_scratch%%'") == []


def test_older_backup_is_migrated_in_a_given_database(stack: Stack, tmp_path: Path) -> None:
    name, address = create_database(stack)
    file = tmp_path / "older.dump"
    try:
        migrate.upgrade(address, wait=5, to="0005_keys")
        velikiy(stack, "backup", file, DATABASE_URL=address)
        used = refusal(stack, "restore", file, "--yes", "--no-save", "--scratch", name)
        assert "is not empty" in used
    finally:
        drop_database(stack, name)
    name, address = create_database(stack)
    try:
        restore(stack, file, "--scratch", name)
        with psycopg.connect(address) as connection:  # personal data does not stay there
            assert connection.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace").fetchone() == (0,)  # fmt: skip
    finally:
        drop_database(stack, name)


def test_restore_refuses_rows_that_tables_of_other_programs_refer_to(stack: Stack, original: Path) -> None:
    stack.sql("CREATE TABLE orders_of_others (buyer bigint REFERENCES users ON DELETE CASCADE)")
    try:
        stack.sql("INSERT INTO orders_of_others VALUES (1)")
        assert "orders_of_others" in refusal(stack, "restore", original, "--yes", "--no-save")
        assert stack.sql("SELECT * FROM orders_of_others") == [(1,)]
    finally:
        stack.sql("DROP TABLE orders_of_others")


def test_restore_that_fails_half_way_changes_nothing(stack: Stack, original: Path) -> None:
    stack.sql("UPDATE users SET name = 'Present' WHERE id IN (1, 2)")
    stack.sql("ALTER TABLE users ADD CONSTRAINT no_bob CHECK (name <> 'Bob')")
    try:
        assert "constraint" in refusal(stack, "restore", original, "--yes", "--no-save")
        assert [name_at(edge, 1) for edge in stack.edges] == ["Present"] * 2
    finally:
        stack.sql("ALTER TABLE users DROP CONSTRAINT no_bob")


def test_restore_into_a_new_server_keeps_ids_and_the_position_of_the_sequence(stack: Stack, tmp_path: Path) -> None:
    """The last user was deleted before the backup: its id is not given again."""
    stack.sql("INSERT INTO users (name, email) VALUES ('Last', 'last@example.com')")
    stack.sql("DELETE FROM users WHERE name = 'Last'")
    file = tmp_path / "velikiy.dump"
    back_up(stack, file)
    [(latest,)] = stack.sql(NEXT_ID)
    rows = content(stack)
    stack.sql("UPDATE users SET name = 'Sample'; ALTER SEQUENCE users_id_seq RESTART WITH 4")
    restore(stack, file)
    assert stack.sql("SELECT nextval('users_id_seq')") == [(latest + 1,)]
    assert content(stack) == rows


def test_role_of_the_apps_can_back_up_and_restore(stack: Stack, tmp_path: Path) -> None:
    """With Docker the secrets of the app are all that the container has."""
    url = stack.secret("database_url")
    velikiy(stack, "backup", tmp_path / "velikiy.dump", DATABASE_URL=url)
    stack.sql("UPDATE users SET name = 'Present' WHERE id = 2")
    velikiy(stack, "restore", tmp_path / "velikiy.dump", "--yes", "--no-save", DATABASE_URL=url)
    assert name_at(stack.edge, 2) == "Bob"
