"""`velikiy backup`."""

import os
import stat
import subprocess
import threading
from pathlib import Path

import psycopg
import pytest

from testkit.databases import superuser_dsn
from testkit.stack import Stack
from tests.backup.commands import back_up, run_velikiy, velikiy
from velikiy.backup import CannotBackUp, create, retention


def test_backup_is_an_archive_of_pg_dump_that_only_its_owner_reads(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "velikiy.dump"
    made = back_up(stack, file, "--verify", "values")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [(users,)] = stack.sql("SELECT count(*) FROM users")
    assert made["rows"]["users"] == users
    assert made["size"] == file.stat().st_size
    assert subprocess.check_output(["sha256sum", file], text=True).split()[0] == made["sha256"]
    listed = subprocess.check_output(["pg_restore", "--list", file], text=True)
    assert "TABLE DATA public users" in listed
    assert "TABLE public caches" in listed
    assert "TABLE DATA public caches" not in listed  # the state of processes that run is no part of a backup
    assert list(tmp_path.iterdir()) == [file]


def test_backup_on_stdout_equals_a_file_and_is_restored_from_stdin(stack: Stack) -> None:
    before = stack.sql("SELECT name FROM users WHERE id = 2")
    written = run_velikiy(stack, "backup", "-")
    stack.sql("UPDATE users SET name = 'Changed' WHERE id = 2")
    run_velikiy(stack, "restore", "-", "--yes", "--no-save", given=written)
    assert stack.sql("SELECT name FROM users WHERE id = 2") == before


def test_failed_backup_leaves_the_existing_file_as_it_was(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "velikiy.dump"
    file.write_bytes(b"earlier")
    nowhere = "postgresql://velikiy@127.0.0.1:9/velikiy"
    with pytest.raises(CannotBackUp, match="PostgreSQL does not answer"):
        create.make(nowhere, str(file), "rows")
    # A table of another program, with a lock that does not end while pg_dump waits.
    stack.sql("CREATE TABLE foreign_table (id int)")
    monkeypatch.setattr(create, "LOCK_TIMEOUT_S", 1)
    try:
        with psycopg.connect(stack.postgres) as blocking:
            blocking.execute("LOCK TABLE foreign_table")
            with pytest.raises(CannotBackUp, match="A session changes a table"):
                create.make(stack.postgres, str(file), "rows")
    finally:
        stack.sql("DROP TABLE foreign_table")
    assert file.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [file]


def test_tables_that_the_role_may_not_read_are_left_out_by_name(stack: Stack, tmp_path: Path) -> None:
    with psycopg.connect(superuser_dsn(stack), dbname="velikiy", autocommit=True) as superuser:
        superuser.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.secret AS SELECT 1")
        try:
            made = back_up(stack, tmp_path / "velikiy.dump")
        finally:
            superuser.execute("DROP SCHEMA theirs CASCADE")
    assert made["left_out"] == ["theirs.secret"]


def test_no_process_shows_a_password_in_its_arguments(stack: Stack, tmp_path: Path) -> None:
    passwords = [stack.secret(name).encode() for name in ("owner_password", "app_password", "postgres_password")]
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(process.read_bytes())
                except OSError:
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        back_up(stack, tmp_path / "velikiy.dump")
    finally:
        done.set()
        looking.join()
    assert any(b"pg_dump" in arguments for arguments in seen)
    assert not [arguments for arguments in seen if any(password in arguments for password in passwords)]


def test_only_the_newest_backups_of_this_name_are_kept_in_a_folder(stack: Stack, tmp_path: Path) -> None:
    old = [f"velikiy-2026010{day}T000000Z.dump" for day in range(1, 5)]
    foreign = ["velikiy-20260101T000000Z.dump.bak", "velikiy.dump", "other-20260101T000000Z.dump", "note.txt"]
    killed = tmp_path / ".velikiy-20260101T000000Z.dump.abcdefgh.part"
    for name in (*old, *foreign, killed.name):
        (tmp_path / name).write_bytes(b"")
    os.utime(killed, (0, 0))
    velikiy(stack, "backup", "--to", tmp_path, "--keep", "2")
    kept = retention.backups(tmp_path, "velikiy")
    assert [file.name for file in kept[:1]] == old[-1:]
    assert len(kept) == 2
    assert kept[1].stat().st_size > 0
    assert {file.name for file in tmp_path.iterdir()} == {*foreign, *(file.name for file in kept)}


def test_failed_backup_deletes_no_older_backup(stack: Stack, tmp_path: Path) -> None:
    for day in range(1, 4):
        (tmp_path / f"velikiy-2026010{day}T000000Z.dump").write_bytes(b"")
    velikiy(
        stack, "backup", "--to", tmp_path, "--keep", "1", code=1, DATABASE_URL="postgresql://velikiy@127.0.0.1:9/none"
    )
    assert len(list(tmp_path.iterdir())) == 3
