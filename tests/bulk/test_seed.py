"""`velikiy users seed`: made-up users."""

import requests

from testkit.stack import Stack
from tests.bulk.commands import count_users, run_users


def test_seed_creates_rows_beside_existing_rows(bulk_stack: Stack) -> None:
    bulk_stack.sql(
        "INSERT INTO users (name, email) SELECT 'Other', 'user' || n || '@example.com' FROM generate_series(1, 9) n"
    )
    for total in (309, 609):
        assert run_users(bulk_stack, "seed", "--count", 300).returncode == 0
        assert count_users(bulk_stack) == total
        assert requests.get(f"{bulk_stack.edge}/users/count", timeout=5).json() == {"count": total}
