"""A database of the development versions becomes one of the baseline without a loss, or is refused."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.databases import create_database, drop_database, execute, fetch_rows
from testkit.stack import Stack
from velikiy.postgres.migrate import CannotMigrate, upgrade

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
    assert upgrade(old, wait=5) == ["0001_baseline", "0002_import_counts"]
    assert upgrade(new, wait=5) == ["0001_baseline", "0002_import_counts"]
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
    assert triggers == [("products", 4), ("users", 4)]


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
