"""The result of one fault, as the table and the files have it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Result:
    faults: list[str]
    """One name, or two of a pair."""

    begin: int = 0
    end: int = 0
    until: int = 0
    """Times of the run (monotonic ns): the beginning of the fault, its end, and when all was well again."""

    wrong_reads: int = 0
    lost_writes: int = 0
    judged: int = 0
    """Reads that were judged meanwhile."""

    reads: float = 1.0
    writes: float = 1.0
    """Availability, from 0 to 1."""

    hit_s: float = 0.0
    miss_s: float = 0.0
    write_s: float = 0.0
    """The slowest request, answered or not."""

    recovery_s: float | None = None
    """Time from the end of the fault until all edges answered again; None if they did not."""

    named: str = ""
    """The finding that named it, or an empty string."""

    named_s: float | None = None
    errors: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why the run fails because of it."""

    @property
    def name(self) -> str:
        return " + ".join(self.faults)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
