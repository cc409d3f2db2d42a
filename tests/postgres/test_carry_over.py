"""A database of the development versions becomes one of the baseline without a loss, or is refused."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.databases import create_database, drop_database, execute, fetch_rows
from testkit.stack import Stack
from velikiy.postgres.migrate import CannotMigrate, upgrade

from .test_migrations import REVISIONS

BEFORE_THE_BASELINE = Path(__file__).with_name("before_the_baseline.sql").read_text()


@pytest.fixture
def databases(stack: Stack) -> Iterator[tuple[str, str]]:
    """The addresses of a database of the last development version and of an empty database."""
    old, old_address = create_database(stack)
    new, new_address = create_database(stack)
    execute(old_address, BEFORE_THE_BASELINE)
    yield old_address, new_address
    drop_database(stack, old)
    drop_database(stack, new)


def schema(address: str) -> list[str]:
    dump = subprocess.check_output(["pg_dump", address, "--schema-only", "--no-owner"], text=True)
    return [line for line in dump.splitlines() if not line.startswith("\\")]  # \restrict has a random word


def test_a_database_of_the_last_development_version_gets_the_schema_of_a_new_database(
    databases: tuple[str, str],
) -> None:
    old, new = databases
    assert upgrade(old, wait=5) == upgrade(new, wait=5) == REVISIONS
    assert schema(old) == schema(new)
    assert upgrade(old, wait=5) == []


def test_carrying_over_keeps_every_row(databases: tuple[str, str]) -> None:
    old, _ = databases
    before = fetch_rows(old, "SELECT id, name, email, created_at, updated_at, version FROM users ORDER BY id")
    upgrade(old, wait=5)
    assert fetch_rows(old, "SELECT id, name, email, created_at, updated_at, version FROM users ORDER BY id") == before
    assert [name for _, name, *_ in before] == ["Alice", "Carried", "Charlie"]
    assert fetch_rows(old, "SELECT key, response FROM idempotency_keys") == [("kept", {"status": 201})]
    assert fetch_rows(old, "SELECT resource, imported FROM imports") == [("users", 1)]
    assert fetch_rows(old, "SELECT name, excluded FROM caches") == [("redis", False)]
    assert fetch_rows(old, "INSERT INTO users (name, email) VALUES ('D', 'd@example.com') RETURNING id") == [(4,)]


def test_carrying_over_replaces_the_triggers_of_every_resource(databases: tuple[str, str]) -> None:
    old, _ = databases
    execute(old, "CREATE TABLE products (id bigint PRIMARY KEY); CALL public.make_resource('products')")
    upgrade(old, wait=5)
    triggers = fetch_rows(
        old,
        "SELECT tgrelid::regclass::text, count(*) FROM pg_trigger"
        " WHERE pg_get_triggerdef(oid) LIKE '%velikiy.passes_gate%' GROUP BY 1 ORDER BY 1",
    )
    assert triggers == [("api_keys", 1), ("products", 4), ("row_history", 1), ("users", 4)]


def test_carrying_over_computes_the_words_of_every_resource_again(databases: tuple[str, str]) -> None:
    old, _ = databases
    execute(
        old,
        """
        CREATE TABLE products (
            id bigint PRIMARY KEY, name text, "of words" text GENERATED ALWAYS AS (public.words(name)) STORED, note text
        );
        CREATE INDEX products_words ON products USING gin ("of words" public.gin_trgm_ops);
        CALL public.make_resource('products');
        INSERT INTO products VALUES (1, 'Łódź 李明', DEFAULT, 'kept');
        INSERT INTO users (name, email) VALUES ('Zoë', 'zoe@example.com');
        """,
    )
    upgrade(old, wait=5)
    words = 'SELECT name, "of words", note, version FROM products'
    assert fetch_rows(old, words) == [("Łódź 李明", " lodz 李 明", "kept", 1)]
    assert fetch_rows(old, "SELECT words, version FROM users WHERE name = 'Zoë'") == [(" zoe zoe example com", 1)]
    indexes = "SELECT count(*) FROM pg_indexes WHERE indexname IN ('products_words', 'users_words')"
    assert fetch_rows(old, indexes) == [(2,)]


def test_database_with_emails_that_are_equal_now_is_refused_by_the_ids_and_unchanged(
    databases: tuple[str, str],
) -> None:
    old, _ = databases
    execute(
        old,
        """
        INSERT INTO users (id, name, email) VALUES
            (11, 'A', 'straße@example.com'), (12, 'B', 'x@example.com'), (13, 'C', 'STRASSE@example.com'),
            (14, 'D', 'ς@example.com'), (15, 'E', 'σ@example.com'), (16, 'F', 'ı@example.com'), (17, 'G', 'i@example.com')
        """,
    )
    before, rows = schema(old), fetch_rows(old, "SELECT * FROM users ORDER BY id")
    with pytest.raises(CannotMigrate, match=r"ids 11, 13; 14, 15\. .*nothing was changed"):
        upgrade(old, wait=5)
    assert (schema(old), fetch_rows(old, "SELECT * FROM users ORDER BY id")) == (before, rows)
    execute(old, "DELETE FROM users WHERE id IN (13, 15)")
    upgrade(old, wait=5)
    assert fetch_rows(old, "SELECT id FROM users WHERE id > 10 ORDER BY id") == [(11,), (12,), (14,), (16,), (17,)]


@pytest.mark.parametrize("revision", ["0001_users", "0002_caches"])
def test_a_database_of_an_early_development_version_is_refused_unchanged(
    databases: tuple[str, str], revision: str
) -> None:
    old, _ = databases
    execute(old, f"UPDATE velikiy_version SET version_num = '{revision}'")
    before = schema(old)
    with pytest.raises(CannotMigrate, match=f"{revision}.*COPY users TO STDOUT.*nothing was changed"):
        upgrade(old, wait=5)
    assert schema(old) == before
