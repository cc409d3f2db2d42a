"""Create made-up rows."""

import itertools
from collections.abc import Iterator
from functools import partial

from psycopg import sql

from velikiy.bulk.importer import CHUNK_ROWS
from velikiy.bulk.insert import VACUUM_AFTER_ROWS, vacuum, write
from velikiy.bulk.prefetch import prefetch
from velikiy.bulk.progress import print_message, progress_bar
from velikiy.bulk.readers import Row, validated_row
from velikiy.bulk.signals import defer_signals
from velikiy.coherence import Gate
from velikiy.resources.base import Resource


def seed_with(resource: Resource, gate: Gate, count: int) -> None:
    """Create this many rows, each different from all others.

    Raises:
        DatabaseUnavailable
    """
    with gate.database.autocommit() as connection:
        # The number of a made-up row is at most its id. So numbers after the last id were never used.
        first_free = sql.SQL("SELECT coalesce(max(id), 0) + 1 FROM {}").format(sql.Identifier(resource.name))
        [(first,)] = connection.execute(first_free).fetchall()
    created = 0
    try:
        with progress_bar(f"creating {resource.name}", count) as report:
            while created < count:
                numbers = iter(range(first, first := first + count - created))
                for rows in prefetch(_seed_chunks(resource, numbers)):
                    with defer_signals():
                        created += write(resource, gate, rows, "skip", lambda _, outcome: outcome.created, "seed")
                    report(created, created)
    except BaseException:
        if created:
            print_message(f"{created:,} rows were created and stay")
        raise
    if created >= VACUUM_AFTER_ROWS:
        vacuum(resource, gate)


def _seed_chunks(resource: Resource, numbers: Iterator[int]) -> Iterator[list[Row]]:
    def row(n: int) -> Row:
        given = resource.seed_row(n)
        return validated_row(resource, n, given, partial(resource.create_model.model_validate, given))

    while rows := [row(n) for n in itertools.islice(numbers, CHUNK_ROWS)]:
        yield rows
