"""The rows of the table: which subjects are compared under which load, and with which target."""

from collections.abc import Callable

from bench.measure import Result
from bench.rows import console
from bench.rows.base import Bench
from bench.rows.edges import edges, start
from bench.rows.growth import growth, memory
from bench.rows.guarded import crowd, keys
from bench.rows.mixed import latency, long_mix, mix
from bench.rows.paths import paths
from bench.rows.reads import hit, metrics, miss, redis_hit
from bench.rows.writes import after_write, hot, put

__all__ = ["ONLY_FOR_REPORT", "ROWS", "Bench"]

ONLY_FOR_REPORT = ("growth", "latency", "crowd", "memory", "flames", "metrics", "edges", "console", "console-work")
"""Rows that `--quick` leaves out: they compare the service with itself, and would take two minutes of the five."""

ROWS: dict[str, Callable[[Bench], Result]] = {
    "growth": growth,
    "hit": hit,
    "hot": hot,
    "redis": redis_hit,
    "mix": mix,
    "long-mix": long_mix,
    "latency": latency,
    "miss": miss,
    "put": put,
    "after-write": after_write,
    "keys": keys,
    "crowd": crowd,
    "memory": memory,
    "flames": paths,
    "metrics": metrics,
    "console": console.load,
    "console-work": console.work,
    "edges": edges,
    "up": start,
}
"""In the order in which they run.

- growth fills the table.
- hot counts statements in PostgreSQL; hit, which runs before it, sends none.
- redis fills Redis, and the next three rows need it filled.
- latency needs the capacities that the rows before it have measured.
- edges restarts the stack, so no later row may need the old stack.
"""
