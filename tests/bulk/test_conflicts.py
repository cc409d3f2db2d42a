"""Rows whose e-mail is taken, dry runs, and imports of the same people at the same time."""

import json
from pathlib import Path

import pytest
import requests

from testkit.stack import Stack, wait_until
from tests.bulk.commands import (
    CSV_WITH_A_REJECTED_LINE,
    count_users,
    csv_of_people,
    names_in_order,
    read_rejects,
    run_import,
    run_users,
    start_import_and_await_progress,
    start_users,
    stderr_of,
)

ROWS = "SELECT name, email, version FROM users ORDER BY id"


def summary_of(stack: Stack, *arguments: object, code: int = 0, given: bytes = b"") -> dict[str, int]:
    """Return the numbers of the summary that are not 0."""
    completed = run_import(stack, "--json", *arguments, code=code, given=given)
    numbers = json.loads(completed.stdout)
    return {name: n for name, n in numbers.items() if name not in ("seconds", "dry_run") and isinstance(n, int) and n}


def test_row_with_a_taken_email_is_rejected_skipped_or_updates_the_existing_row(
    bulk_stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"name,email\nAlice,alice@example.com\nBob,bob@example.com\n")
    run_import(bulk_stack, file)
    file.write_bytes(b"name,email\nAlicia,ALICE@example.com\nBob,bob@example.com\nCarol,carol@example.com\n")
    assert summary_of(bulk_stack, file, code=1) == {"imported": 1, "created": 1, "rejected": 2}
    bulk_stack.sql("DELETE FROM users WHERE name = 'Carol'")
    assert summary_of(bulk_stack, file, "--on-conflict", "skip") == {"imported": 1, "created": 1, "skipped": 2}
    bulk_stack.sql("DELETE FROM users WHERE name = 'Carol'")
    completed = run_import(bulk_stack, file, "--on-conflict", "update")
    assert stderr_of(completed).endswith("imported 2 (created 1, updated 1), unchanged 1\n")
    assert bulk_stack.sql(ROWS) == [
        ("Alicia", "ALICE@example.com", 2),
        ("Bob", "bob@example.com", 1),
        ("Carol", "carol@example.com", 1),
    ]
    assert summary_of(bulk_stack, file, "--on-conflict", "update") == {"unchanged": 3}
    assert not (tmp_path / "a.csv.rejects.ndjson").exists()


@pytest.mark.parametrize("spelling", ["STRASSE@example.com", "straße@EXAMPLE.com", "ＳＴＲＡＳＳＥ@example.com"])
def test_emails_conflict_as_unicode_compares_them(bulk_stack: Stack, spelling: str) -> None:
    run_import(bulk_stack, "-", given="name,email\nAnn,Straße@example.com\n".encode())
    given = f"name,email\nBen,{spelling}\n".encode()
    assert summary_of(bulk_stack, "-", "--rejects", "/dev/null", given=given, code=1) == {"rejected": 1}
    assert summary_of(bulk_stack, "-", "--on-conflict", "skip", given=given) == {"skipped": 1}
    updated = {"imported": 1, "updated": 1}
    assert summary_of(bulk_stack, "-", "--on-conflict", "update", "--dry-run", given=given) == updated
    assert names_in_order(bulk_stack) == ["Ann"]
    assert summary_of(bulk_stack, "-", "--on-conflict", "update", given=given) == updated
    assert names_in_order(bulk_stack) == ["Ben"]


@pytest.mark.parametrize("size", [3, 12_000])
def test_last_of_several_rows_with_one_email_counts_in_an_update(bulk_stack: Stack, size: int) -> None:
    people = csv_of_people(size)
    content = people + b"First,person1@example.com\nSecond,PERSON1@example.com\nSecond,PERSON1@example.com\n"
    counts = summary_of(bulk_stack, "-", "--on-conflict", "update", given=content)
    assert counts == {"imported": size + 2, "created": size, "updated": 2, "unchanged": 1}
    assert bulk_stack.sql("SELECT name, email FROM users WHERE lower(email) = 'person1@example.com'") == [
        ("Second", "PERSON1@example.com")
    ]
    assert summary_of(bulk_stack, "-", "--on-conflict", "skip", given=content + b"\n") == {"skipped": size + 3}


@pytest.mark.parametrize("size", [3, 1500])
def test_reads_return_updated_rows_as_soon_as_the_import_ends(bulk_stack: Stack, size: int) -> None:
    run_import(bulk_stack, "-", given=csv_of_people(size))
    [(first,)] = bulk_stack.sql("SELECT min(id) FROM users")
    before = {}
    for edge in bulk_stack.edges:
        for path in (f"/users/{first}", "/users?limit=1"):
            wait_until(lambda: requests.get(edge + path, timeout=5).headers["X-Cache-Status"] == "HIT")  # noqa: B023
            before[edge + path] = requests.get(edge + path, timeout=5)
    changed = csv_of_people(size).replace(b"Person", b"Someone")
    assert summary_of(bulk_stack, "-", "--on-conflict", "update", given=changed) == {"imported": size, "updated": size}
    for edge in bulk_stack.edges:
        row = requests.get(f"{edge}/users/{first}", timeout=5)
        assert row.json()["name"] == "Someone 0"
        assert row.headers["ETag"] != before[f"{edge}/users/{first}"].headers["ETag"]
        assert requests.get(f"{edge}/users?limit=1", timeout=5).json()[0]["name"] == "Someone 0"


def cache_status_under_lease(address: str) -> str:
    """Return the X-Cache-Status. While a busy machine costs an edge its cache lease, it neither uses nor loses its
    entries."""

    def status() -> str:
        found = requests.get(address, timeout=5).headers["X-Cache-Status"]
        return "" if found == "BYPASS" else found

    return wait_until(status)


def test_update_that_changes_nothing_leaves_the_caches_and_the_versions(bulk_stack: Stack) -> None:
    run_import(bulk_stack, "-", given=csv_of_people(1500))
    address = f"{bulk_stack.edge}/users?limit=1"
    wait_until(lambda: requests.get(address, timeout=5).headers["X-Cache-Status"] == "HIT")
    assert summary_of(bulk_stack, "-", "--on-conflict", "update", given=csv_of_people(1500)) == {"unchanged": 1500}
    assert cache_status_under_lease(address) == "HIT"
    assert bulk_stack.sql("SELECT DISTINCT version FROM users") == [(1,)]


def test_row_that_postgresql_refuses_in_an_update_is_rejected(bulk_stack: Stack, tmp_path: Path) -> None:
    run_import(bulk_stack, "-", given=csv_of_people(100))
    bulk_stack.sql("ALTER TABLE users ADD CONSTRAINT no_7 CHECK (name NOT LIKE 'Someone 7')")
    try:
        (tmp_path / "a.csv").write_bytes(csv_of_people(100, "Someone"))
        counts = summary_of(bulk_stack, tmp_path / "a.csv", "--on-conflict", "update", code=1)
    finally:
        bulk_stack.sql("ALTER TABLE users DROP CONSTRAINT no_7")
    assert counts == {"imported": 99, "updated": 99, "rejected": 1}
    assert [reject["line"] for reject in read_rejects(tmp_path / "a.csv.rejects.ndjson")] == [9]


def test_interrupted_update_continues_and_counts_from_the_first_line(bulk_stack: Stack, tmp_path: Path) -> None:
    run_import(
        bulk_stack, "-", given=csv_of_people(15_000, "A person with quite a long name so that it takes a mebibyte")
    )
    content = csv_of_people(35_000, "A person with quite a long name so that it takes a mebibyte").replace(
        b" 7,", b" VII,"
    )
    process = start_import_and_await_progress(bulk_stack, content[:2_400_000], "--on-conflict", "update")
    process.kill()
    process.wait()
    (tmp_path / "a.csv").write_bytes(content)
    counts = summary_of(bulk_stack, tmp_path / "a.csv", "--on-conflict", "update")
    assert counts.pop("continued_after") == 20_001
    assert counts == {"imported": 20_001, "created": 20_000, "updated": 1, "unchanged": 14_999}


@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
def test_imports_of_the_same_people_in_opposite_orders_wait_for_each_other(
    bulk_stack: Stack, tmp_path: Path, on_conflict: str
) -> None:
    header, *people = csv_of_people(30_000).splitlines(keepends=True)
    (tmp_path / "a.csv").write_bytes(header + b"".join(people))
    (tmp_path / "b.csv").write_bytes(header + b"".join(reversed(people)))
    imports = [
        start_users(bulk_stack, "import", tmp_path / name, "--json", "--on-conflict", on_conflict)
        for name in ("a.csv", "b.csv")
    ]
    summaries = [json.loads(process.communicate(timeout=120)[0]) for process in imports]
    codes = {process.returncode for process in imports}
    assert codes == ({0, 1} if on_conflict == "reject" and 0 in codes else {1} if on_conflict == "reject" else {0})
    assert sum(summary["created"] for summary in summaries) == 30_000
    others = {"reject": "rejected", "skip": "skipped", "update": "unchanged"}[on_conflict]
    assert sum(summary[others] for summary in summaries) == 30_000
    assert bulk_stack.sql("SELECT count(*), count(DISTINCT email) FROM users") == [(30_000, 30_000)]


@pytest.mark.parametrize(
    ("on_conflict", "code", "expected"),
    [
        ("reject", 1, {"imported": 12_001, "created": 12_001, "rejected": 4}),
        ("skip", 1, {"imported": 12_001, "created": 12_001, "skipped": 3, "rejected": 1}),
        ("update", 1, {"imported": 12_003, "created": 12_001, "updated": 2, "unchanged": 1, "rejected": 1}),
    ],
)
def test_dry_run_counts_as_the_import_does_and_writes_nothing(
    bulk_stack: Stack, tmp_path: Path, on_conflict: str, code: int, expected: dict[str, int]
) -> None:
    run_import(bulk_stack, "-", given=b"name,email\nAlice,ALICE@example.com\nBob,bob@example.com\n")
    rows = (
        b"Alicia,alice@example.com\nBob,bob@example.com\n,bad@example.com\n" + csv_of_people(12_000).partition(b"\n")[2]
    )
    (tmp_path / "a.csv").write_bytes(b"name,email\n" + rows + b"Again,PERSON1@example.com\nNew,new@example.com\n")
    sequence = "SELECT last_value FROM users_id_seq"
    before = bulk_stack.sql(ROWS), bulk_stack.sql(sequence), bulk_stack.sql("SELECT * FROM imports")
    arguments = (tmp_path / "a.csv", "--on-conflict", on_conflict)
    assert summary_of(bulk_stack, *arguments, "--dry-run", code=code) == expected
    assert (bulk_stack.sql(ROWS), bulk_stack.sql(sequence), bulk_stack.sql("SELECT * FROM imports")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert summary_of(bulk_stack, *arguments, code=code) == expected


def test_dry_run_names_the_reasons_and_leaves_files_of_rejects_alone(bulk_stack: Stack, tmp_path: Path) -> None:
    file, notes = tmp_path / "a.csv", tmp_path / "a.csv.rejects.ndjson"
    file.write_bytes(CSV_WITH_A_REJECTED_LINE + b"x,bad\n" * 20)
    notes.write_bytes(b"notes\n")
    completed = run_import(bulk_stack, file, "--dry-run", code=1)
    lines = stderr_of(completed).splitlines()
    assert lines[0].startswith("line 3: name must have 1 to 100 characters; yours has 0; email ")
    assert (len(lines), lines[-2:]) == (12, ["... and more", "would import 1, rejected 21"])
    assert notes.read_bytes() == b"notes\n"
    completed = run_import(bulk_stack, file, "--dry-run", "--rejects", "-", code=1)
    assert len(completed.stdout.splitlines()) == 21
    assert count_users(bulk_stack) == 0


def test_clients_write_the_same_emails_during_a_dry_run(bulk_stack: Stack) -> None:
    process = start_users(bulk_stack, "import", "-", "--dry-run")
    assert process.stdin is not None
    name = "A person with quite a long name so that it takes a mebibyte"
    process.stdin.write(csv_of_people(35_000, name)[:2_400_000])
    process.stdin.flush()
    wait_until(lambda: bulk_stack.sql("SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'"))
    created = requests.post(f"{bulk_stack.edge}/users", json={"name": "P", "email": "person5@example.com"}, timeout=5)
    assert created.status_code == 201
    process.stdin.close()
    process.wait(timeout=60)
    assert names_in_order(bulk_stack) == ["P"]


def test_help_names_the_exit_codes(bulk_stack: Stack) -> None:
    text = run_users(bulk_stack, "import", "--help").stdout.decode()
    for code in (0, 1, 2, 3, 130, 143, 129):
        assert f" {code}" in text
