"""What clients did and saw: operations with invoke and return, kept in files that can be checked again.

Times are nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns`), which all processes of one machine share, so
histories of several processes can be laid side by side. The interval of an operation is closed: where one returns
in the very nanosecond in which another is invoked, the two count as concurrent.
"""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import orjson

Kind = Literal["read", "list", "create", "update", "delete", "initial"]
"""`initial`: not an operation but what is known to have been there, such as the users of a new database."""

Outcome = Literal["ok", "failed", "unknown"]
"""`failed`: it certainly did not happen (4xx, or it was never sent). `unknown`: no answer, or 5xx: it may happen at any
time after its invocation, long after the client gave up too."""

FOREVER = 1 << 62
"""A moment that does not come."""

OUTSIDE = "sql"
"""The `edge` of a write that went past the app, straight to PostgreSQL."""


class Row(NamedTuple):
    """What a read showed of one user. The name says which write it was, the version how many came before."""

    user: int
    version: int
    name: str


class Operation(NamedTuple):
    invoke: int
    returned: int
    """Of an unknown outcome: when the client gave up, which bounds nothing."""
    kind: Kind
    path: str
    outcome: Outcome
    status: int = 0
    edge: str = ""
    tier: str = ""
    """X-Cache-Status."""
    cache_status: str = ""
    """Cache-Status, which names the other tiers too."""
    worker: str = ""
    user: int | None = None
    """Whom it read or wrote; None for a list, and for a create whose answer is missing."""
    name: str = ""
    """What a write wrote: unique in its history."""
    rows: tuple[Row, ...] = ()
    """What a read showed; nothing for a 404."""
    after: int = 0
    until: int | None = None
    """The ids that a list speaks of: those above `after`, up to and including `until`."""

    @property
    def happened(self) -> bool:
        """It did, or it may have."""
        return self.outcome != "failed"


def save(operations: Iterable[Operation], file: Path) -> None:
    """As packed NDJSON, one operation a line, in the order of their invocations."""
    with gzip.open(file, "wb", compresslevel=1) as out:  # a run waits for it
        for operation in sorted(operations, key=lambda o: o.invoke):
            out.write(orjson.dumps(operation._asdict(), default=list) + b"\n")


def load(file: Path) -> Iterator[Operation]:
    with gzip.open(file, "rb") as lines:
        for line in lines:
            members = orjson.loads(line)
            members["rows"] = tuple(Row(*row) for row in members["rows"])
            yield Operation(**members)
