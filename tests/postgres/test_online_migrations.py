"""Migrations while others use the tables: they give up locks, can be repeated, and name the code that works after them."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from testkit.databases import create_database, drop_database, execute, fetch_rows
from testkit.stack import ROOT, Stack, wait_until
from velikiy.cli import velikiy as cli
from velikiy.postgres import migrate
from velikiy.postgres.migrate import CannotMigrate, pending, upgrade

CODE = migrate.MIGRATIONS
NEWEST = max(file.stem for file in (CODE / "versions").glob("0*.py"))
ADD_PHONE = "op.execute('ALTER TABLE users ADD COLUMN phone text')"


@pytest.fixture
def dsn(stack: Stack) -> Iterator[str]:
    """The DSN of a migrated database."""
    name, dsn = create_database(stack)
    upgrade(dsn, wait=5)
    yield dsn
    drop_database(stack, name)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the migrations of the code, for tests that add some."""
    folder = tmp_path / "migrations"
    shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrate, "MIGRATIONS", folder)
    return folder


@pytest.fixture
def add(code: Path) -> Callable[..., None]:
    """Add a migration to the code."""

    def add(revision: str, body: str, *attributes: str, after: str = NEWEST) -> None:
        lines = [
            f'"""The migration {revision}."""',
            "from alembic import op",
            "from velikiy.postgres import online",
            f"revision, down_revision = {revision!r}, {after!r}",
            *attributes,
            "def upgrade():",
            f"    {body}",
        ]
        (code / "versions" / f"{revision}.py").write_text("\n".join(lines) + "\n")

    return add


@contextmanager
def foreign_transaction(dsn: str, statement: str = "SELECT count(*) FROM users") -> Iterator[None]:
    """Keep a transaction of another program open, which has read the table."""
    with psycopg.connect(dsn, application_name="a report") as connection:
        connection.execute(statement)
        yield


@contextmanager
def slowest_read(dsn: str) -> Iterator[list[float]]:
    """Read the table all the time, and return the longest duration at the end."""
    durations, ended = [0.0], threading.Event()

    def read() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not ended.is_set():
                began = time.monotonic()
                connection.execute("SELECT name FROM users WHERE id = 1")
                durations[0] = max(durations[0], time.monotonic() - began)
                time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield durations
    finally:
        ended.set()
        reader.join()


def in_background(step: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=step)
    thread.start()
    return thread


def test_migration_behind_a_long_transaction_keeps_no_reader_waiting_and_is_applied_at_its_end(
    dsn: str, add: Callable[..., None]
) -> None:
    add("0099_phone", ADD_PHONE)
    applied: list[str] = []
    with slowest_read(dsn) as slowest:
        with foreign_transaction(dsn):
            migration = in_background(lambda: applied.extend(upgrade(dsn, wait=5)))
            time.sleep(2.5)  # two attempts
            assert applied == []
        migration.join(timeout=20)
    assert applied == ["0099_phone"]
    assert slowest[0] < 0.8
    assert fetch_rows(dsn, "SELECT phone FROM users WHERE id = 1") == [(None,)]


def test_migration_that_gets_no_lock_is_undone_and_names_the_transaction(dsn: str, add: Callable[..., None]) -> None:
    add("0098_first", "op.execute('CREATE TABLE phones (id int)')")
    add("0099_phone", ADD_PHONE, after="0098_first")
    with (
        foreign_transaction(dsn),
        pytest.raises(CannotMigrate, match=r"a report of velikiy_owner, idle in transaction"),
    ):
        upgrade(dsn, wait=5, lock_wait=1)
    assert fetch_rows(dsn, "SELECT version_num, to_regclass('phones') FROM velikiy_version") == [(NEWEST, None)]


def test_migration_outside_a_transaction_fills_rows_in_batches_and_can_be_repeated(
    dsn: str, add: Callable[..., None]
) -> None:
    execute(
        dsn,
        "ALTER TABLE users ADD phone text; INSERT INTO users (name, email) SELECT 'N', i || '@example.com'"
        " FROM generate_series(1, 50) i",
    )
    fill = "UPDATE users SET phone = 'none' WHERE id IN (SELECT id FROM users WHERE phone IS NULL LIMIT 20)"
    add(
        "0099_fill",
        f"online.in_batches({fill!r}); online.index('by_phone', 'ON users (phone)'); {{}}[0]",
        "in_transaction = False",
    )
    with pytest.raises(CannotMigrate, match=r"the migration 0099_fill failed: KeyError: 0. Its finished steps stay"):
        upgrade(dsn, wait=5)
    assert fetch_rows(dsn, "SELECT count(*) FROM users WHERE phone IS NULL") == [(0,)]
    add(
        "0099_fill",
        f"online.in_batches({fill!r}); online.index('by_phone', 'ON users (phone)')",
        "in_transaction = False",
        f"usable_from = {NEWEST!r}",
    )
    assert upgrade(dsn, wait=5) == ["0099_fill"]
    assert fetch_rows(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_phone'::regclass") == [(True,)]


def test_index_is_built_while_a_transaction_is_open_and_others_write(dsn: str, add: Callable[..., None]) -> None:
    add("0099_index", "online.index('by_version', 'ON users (version)')", "in_transaction = False")
    with foreign_transaction(dsn, "UPDATE users SET name = 'Other' WHERE id = 2"):
        migration = in_background(lambda: upgrade(dsn, wait=5))
        wait_until(lambda: fetch_rows(dsn, "SELECT to_regclass('by_version') IS NOT NULL") == [(True,)])
        execute(dsn, "SET lock_timeout = '1s'; UPDATE users SET name = 'Alicia' WHERE id = 1")
        assert fetch_rows(dsn, "SELECT version_num FROM velikiy_version") == [(NEWEST,)]
    migration.join(timeout=20)
    assert fetch_rows(dsn, "SELECT version_num FROM velikiy_version") == [("0099_index",)]


def test_pending_migration_is_safe_if_it_names_the_code_that_runs_or_older_code(
    dsn: str, add: Callable[..., None]
) -> None:
    assert pending(dsn) == []
    add("0097_expand", ADD_PHONE, f"usable_from = {NEWEST!r}")
    add("0098_contract", "pass", "usable_from = '0097_expand'", after="0097_expand")
    add("0099_unknown", "pass", after="0098_contract")
    assert [(it.revision, it.is_safe) for it in pending(dsn)] == [
        ("0097_expand", True),
        ("0098_contract", False),
        ("0099_unknown", False),
    ]
    assert [it.is_safe for it in pending(dsn, running="0097_expand")] == [True, True, False]
    assert [it.is_safe for it in pending(dsn, running="0098_contract")] == [True, True, False]


def test_older_code_works_with_a_database_that_newer_code_has_only_expanded(
    dsn: str, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add("0098_expand", ADD_PHONE, f"usable_from = {NEWEST!r}")
    upgrade(dsn, wait=5)
    migrate.check(dsn, CODE)
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "MIGRATIONS", CODE)
        assert upgrade(dsn, wait=5) == []
        assert pending(dsn) == []
    add(
        "0099_contract",
        "op.execute('ALTER TABLE users DROP COLUMN phone')",
        "usable_from = '0098_expand'",
        after="0098_expand",
    )
    upgrade(dsn, wait=5)
    with pytest.raises(CannotMigrate, match="has the revision 0099_contract and works with code since 0098_expand"):
        migrate.check(dsn, CODE)


@pytest.mark.parametrize(
    ("body", "attributes", "reason"),
    [
        ("op.execute(", (), r"SyntaxError in 0099_broken\.py, line"),
        ("pass", ("usable_from = '0100_later'",), "names no revision before it"),
        ("pass", ("import a_module_that_does_not_exist",), "a_module_that_does_not_exist"),
        ("op.execute('CREATE TABLE half (id int)'); op.execute('SELECT 1 / 0')", (), "division by zero"),
        ("op.execute('CREATE TABLE half (id int)'); undefined_name", (), "NameError.*It was undone"),
    ],
)
def test_migration_that_fails_is_refused_with_the_reason_and_changes_nothing(
    dsn: str, add: Callable[..., None], body: str, attributes: tuple[str, ...], reason: str
) -> None:
    add("0099_broken", body, *attributes)
    with pytest.raises(CannotMigrate, match=reason):
        upgrade(dsn, wait=5)
    assert fetch_rows(dsn, "SELECT version_num, to_regclass('half') FROM velikiy_version") == [(NEWEST, None)]


def test_check_lists_pending_migrations_and_changes_nothing(dsn: str, add: Callable[..., None]) -> None:
    def check() -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["migrate", "--check"], env={"DATABASE_URL": dsn})
        return result.exit_code, result.output

    assert check() == (0, "the tables are up to date\n")
    add("0098_expand", ADD_PHONE, f"usable_from = {NEWEST!r}")
    assert check() == (3, "0098_expand: safe while the apps run. The migration 0098_expand.\n")
    add("0099_contract", "pass", after="0098_expand")
    code, output = check()
    assert code == 4
    assert "0099_contract: stop apps that are older than 0099_contract first." in output
    assert fetch_rows(dsn, "SELECT version_num FROM velikiy_version") == [(NEWEST,)]


def test_example_of_the_guide_expands_fills_and_contracts_while_others_read(dsn: str, code: Path) -> None:
    page = (ROOT / "docs" / "upgrading.md").read_text()
    files = re.findall(r"`migrations/(versions/(\w+)\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert [revision for _, revision, _ in files] == ["0012_phone", "0013_phone_filled", "0014_phone_required"]
    assert NEWEST in files[0][2]  # it follows the newest migration of the code
    execute(
        dsn,
        "INSERT INTO users (name, email) SELECT 'N', i || '@example.com' FROM generate_series(1, 2500) i",
    )
    older_code = "INSERT INTO users (name, email) VALUES ('Old', 'old@example.com') RETURNING id"
    with slowest_read(dsn) as slowest:
        for file, revision, text in files:
            (code / file).write_text(text)
            [found] = pending(dsn, running=NEWEST)
            assert (found.revision, found.is_safe) == (revision, revision != "0014_phone_required")
            assert upgrade(dsn, wait=5) == [revision]
            if found.is_safe:
                fetch_rows(dsn, older_code)
                execute(dsn, "DELETE FROM users WHERE name = 'Old'")
    assert slowest[0] < 0.8
    assert fetch_rows(dsn, "SELECT count(*) FROM users WHERE phone = ''") == [(2503,)]
    assert fetch_rows(dsn, "SELECT oldest_code FROM velikiy_version") == [("0012_phone",)]
    with pytest.raises(psycopg.errors.CheckViolation):
        fetch_rows(dsn, older_code)
    with pytest.raises(
        CannotMigrate, match="has the revision 0014_phone_required and works with code since 0012_phone"
    ):
        migrate.check(dsn, CODE)
