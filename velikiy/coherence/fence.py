"""The two orders that matter: how a read passes the tiers, and when a write drops what they hold.

A write commits and then deletes its paths in Redis; Nginx's copies run out by themselves (EDGE_TTL). A reader
between the two, or one that fills Redis with what it read before the commit, is answered with the older row
until the TTL ends: ARCHITECTURE.md names each such race.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from velikiy.coherence.entry import Entry, Path
from velikiy.coherence.redis_tier import RedisTier
from velikiy.postgres import Connection, Database

T = TypeVar("T")


class Answer(NamedTuple):
    """An entry, and the RFC 9211 member that says how the Redis tier took part in it."""

    entry: Entry
    cache_status: str


class Fence:
    def __init__(self, database: Database, redis_tier: RedisTier) -> None:
        self.database = database
        self.redis_tier = redis_tier

    def read(self, path: Path, variant: str, load: Callable[[Connection], Entry]) -> Answer:
        """From Redis, else from PostgreSQL through `load`, and then into Redis.

        Raises:
            DatabaseUnavailable: where Redis does not have it either.
        """
        entry = self.redis_tier.get(path, variant)
        if entry is not None:
            return Answer(entry, "redis; hit")
        with self.database.read() as connection:
            entry = load(connection)
        stored = self.redis_tier.fill(path, variant, entry)
        return Answer(entry, "redis; fwd=uri-miss; stored" if stored else "redis; fwd=bypass")

    def write(self, change: Callable[[Connection], tuple[T, tuple[Path, ...]]]) -> T:
        """Run `change` in a transaction, commit it, then drop the paths that it says it touched.

        Raises:
            DatabaseUnavailable: the outcome is unknown.
        """
        touched: tuple[Path, ...] = ()
        try:
            with self.database.transaction() as connection:
                outcome, touched = change(connection)
        finally:
            if touched:  # also when the COMMIT was not answered: it may have happened
                self.redis_tier.drop(touched)
        return outcome
