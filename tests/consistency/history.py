"""A history: the operations of clients, each with the times of its request and its response, stored in files.

Times are nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns`), which all processes of a machine share, so histories of
several processes can be merged. The interval of an operation is closed: if one operation returns in the nanosecond in
which another is invoked, the two count as concurrent.
"""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import orjson

Kind = Literal["read", "list", "create", "update", "delete", "initial"]
"""`initial` is no operation: it records state that is known at the start, such as the users of a new database."""

Outcome = Literal["ok", "failed", "unknown"]
"""`failed`: the operation certainly had no effect (4xx, or it was never sent). `unknown`: no response, or 5xx; the
operation may take effect at any time after its invocation, even long after the client gave up."""

FOREVER = 1 << 62
"""A time that never comes."""

OUTSIDE = "sql"
"""The `edge` of an operation that bypasses the app and goes straight to PostgreSQL."""


class Row(NamedTuple):
    """One user in the response to a read. The name identifies the write, the version is the number of writes so far."""

    user: int
    version: int
    name: str


class Operation(NamedTuple):
    invoke: int
    returned: int
    """If the outcome is unknown: the time at which the client gave up, which bounds nothing."""
    kind: Kind
    path: str
    outcome: Outcome
    status: int = 0
    edge: str = ""
    tier: str = ""
    """X-Cache-Status."""
    cache_status: str = ""
    """Cache-Status, which also names the other tiers."""
    worker: str = ""
    user: int | None = None
    """The user that was read or written; None for a list, and for a create without a response."""
    name: str = ""
    """The name that was written, unique in its history."""
    rows: tuple[Row, ...] = ()
    """The users in the response to a read; empty for a 404."""
    after: int = 0
    until: int | None = None
    """The range of ids that a list covers: above `after`, up to and including `until`."""
    problem: str = ""
    """The kind of problem in the response to a request that failed (RFC 9457)."""

    @property
    def happened(self) -> bool:
        """True unless it is certain that the operation had no effect."""
        return self.outcome != "failed"


def save(operations: Iterable[Operation], file: Path) -> None:
    """Write gzipped NDJSON, one operation a line, in the order of their invocations."""
    with gzip.open(file, "wb", compresslevel=1) as out:  # fast, because a run waits for it
        for operation in sorted(operations, key=lambda o: o.invoke):
            out.write(orjson.dumps(operation._asdict(), default=list) + b"\n")


def load(file: Path) -> Iterator[Operation]:
    with gzip.open(file, "rb") as lines:
        for line in lines:
            members = orjson.loads(line)
            members["rows"] = tuple(Row(*row) for row in members["rows"])
            yield Operation(**members)
