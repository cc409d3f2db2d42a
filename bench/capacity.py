"""What one core of each piece carries, and how many of each a larger load would take."""

import statistics
from typing import Any

PIECES = ("edge", "app", "redis", "postgres")

KINDS = {"edge hit": "hit", "Redis hit": "redis", "full miss": "miss", "PUT": "put"}
"""What is asked for, and the row that has measured it."""

WANTED = 100_000
"""Requests per second."""

SHARES = {"edge hit": 0.90, "Redis hit": 0.089, "full miss": 0.001, "PUT": 0.01}
"""An assumption, and the only one: 1 % writes; of the reads nearly all of users that edges have."""

FULL = 0.7
"""Of a core; more in it, and queues grow."""

CORES = {"edge": 2, "app": 2, "redis": 1, "postgres": 1}
"""Of one: two workers of an edge, two of an app, one thread of Redis. PostgreSQL's are counted singly."""


def cost(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU that one request of a kind costs each piece, by medians of the rounds."""
    costs = {}
    for kind, row in KINDS.items():
        samples = rows[row]["samples"]["velikiy"]
        costs[kind] = {piece: statistics.median(_spent(sample, piece) for sample in samples) for piece in PIECES}
    return costs


def _spent(sample: dict[str, Any], piece: str) -> float:
    cpu: dict[str, float] = sample["cpu"]
    # An edge's log is written by the supervisor.
    seconds = cpu.get(piece, 0.0) + (cpu.get("supervisor", 0.0) if piece == "edge" else 0.0)
    return 1000 * seconds / float(sample["requests"])


def carried(milliseconds: float) -> float | None:
    """Requests per second by one core; None where it has next to nothing to do: the clock counts 10 ms."""
    return 1000 / milliseconds if milliseconds > 0.001 else None


def needed(costs: dict[str, dict[str, float]]) -> dict[str, float]:
    """Cores of each piece for the load that is assumed."""
    return {
        piece: sum(WANTED * SHARES[kind] * of[piece] / 1000 for kind, of in costs.items()) / FULL for piece in PIECES
    }
