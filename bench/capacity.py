"""Compute the load that one core of each part carries, and the cores that a larger load needs."""

import statistics
from typing import Any

PIECES = ("edge", "app", "redis", "postgres")

KINDS = {"edge hit": "hit", "Redis hit": "redis", "full miss": "miss", "PUT": "put"}
"""Kinds of requests, each with the row that measures it."""

TARGET_RATE = 100_000
"""Requests per second."""

SHARES = {"edge hit": 0.90, "Redis hit": 0.089, "full miss": 0.001, "PUT": 0.01}
"""The only assumption: 1 % of the requests are writes, and edges have nearly all users that are read."""

MAX_UTILISATION = 0.7
"""Share of a core. Above it, queues grow."""

CORES_PER_INSTANCE = {"edge": 2, "app": 2, "redis": 1, "postgres": 1}
"""Two workers of an edge, two workers of an app, the one thread of Redis. PostgreSQL's cores are counted singly."""


def cost_ms(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the CPU time of each part for one request of each kind, as the median of the rounds."""
    costs = {}
    for kind, row in KINDS.items():
        samples = rows[row]["samples"]["velikiy"]
        costs[kind] = {
            piece: statistics.median(_sample_cost_ms(sample, piece) for sample in samples) for piece in PIECES
        }
    return costs


def _sample_cost_ms(sample: dict[str, Any], piece: str) -> float:
    cpu: dict[str, float] = sample["cpu"]
    # The supervisor writes the edge's log.
    seconds = cpu.get(piece, 0.0) + (cpu.get("supervisor", 0.0) if piece == "edge" else 0.0)
    return 1000 * seconds / float(sample["requests"])


def rate_per_core(milliseconds: float) -> float | None:
    """Return the requests per second of one core; None if the part has next to nothing to do: the kernel counts in
    ticks of 10 ms."""
    return 1000 / milliseconds if milliseconds > 0.001 else None


def cores_needed(costs: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the cores of each part for the assumed load."""
    return {
        piece: sum(TARGET_RATE * SHARES[kind] * cost[piece] / 1000 for kind, cost in costs.items()) / MAX_UTILISATION
        for piece in PIECES
    }
