"""The rows of the table: who is compared at what, and what has to come of it."""

from collections.abc import Callable

from bench.measure import Result
from bench.rows.base import Bench
from bench.rows.edges import edges, start
from bench.rows.growth import growth, memory
from bench.rows.mixed import latency, mix
from bench.rows.paths import paths
from bench.rows.reads import hit, miss, redis_hit
from bench.rows.writes import after_write, hot, put

__all__ = ["PICTURES", "ROWS", "Bench"]

PICTURES = "flames"
"""For the report only."""

ROWS: dict[str, Callable[[Bench], Result]] = {
    "growth": growth,
    "hit": hit,
    "hot": hot,
    "redis": redis_hit,
    "mix": mix,
    "latency": latency,
    "miss": miss,
    "put": put,
    "after-write": after_write,
    "memory": memory,
    PICTURES: paths,
    "edges": edges,
    "up": start,
}
"""In the order in which they run. The first fills the table; hot counts what PostgreSQL does, which during hit is
nothing; redis fills Redis, which the two after it find so; latency needs to know what each one carries; edges starts
the stack anew, so no row comes after it that needs the old one."""
