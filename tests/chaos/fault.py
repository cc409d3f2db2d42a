"""A fault: what one party does wrong, how status names it, and what it may cost."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tests.chaos.service import NATIVE, Kind, Service

Inject = Callable[[Service, random.Random], AbstractContextManager[None]]
"""Begins a fault, and ends it. The end must undo it in every case: also after an error, and after Ctrl-C."""


@dataclass(frozen=True)
class Limits:
    """The most that a fault may cost the requests of probes. Requests through `Fault.victims` do not count.

    A time is exceeded only if it is longer than the limit and the slowest such request of calm together, because the
    machine may be busy.
    """

    reads: float = 1.0
    """The least availability of reads: the share of the time in which they are answered without an error."""

    writes: float = 0.0
    """The least availability of writes."""

    hit_s: float = 1.0
    miss_s: float = 2.0
    write_s: float = 5.0
    """The slowest request, answered or not."""

    recovery_s: float = 10.0
    """The time from the end of the fault until every edge answers hits, misses and writes again."""


POSTGRES_AWAY = Limits(reads=0.0, hit_s=2.0, miss_s=3.0, write_s=3.0)
"""Warm entries are answered, cold ones get 503. The first reads without an entry wait for one app and then for the other,
each for DATABASE_TIMEOUT."""

POSTGRES_CRASHES = Limits(reads=0.0, hit_s=1.0, miss_s=4.0, write_s=4.0)
"""PostgreSQL is away for a moment."""

MISSES_FAIL = Limits(reads=0.0, miss_s=2.5)
"""Reads that no cache answers get 503, as in POSTGRES_AWAY."""

WRITES_GO_ON = Limits(writes=1.0)

FEW_WRITES_WAIT = Limits(writes=0.9)
"""Redis costs speed only. One write may wait until Redis is out of use."""


@dataclass(frozen=True)
class Fault:
    name: str
    """Lower case with hyphens, the cause first: `stop-redis`. It is used for --only and in the table."""

    what: str
    """A sentence about what one party does."""

    inject: Inject
    seconds: float = 1.5
    """How long it holds at least. The run holds it longer, until status has named it, 3 s at most."""

    named: tuple[str, ...] = ()
    """The names of findings (velikiy/findings), one of which `./run status` has to show within 3 s."""

    unnamed: str = ""
    """Why status names nothing: over before status can look, harmless, the clients' own. Either this or `named`."""

    victims: tuple[str, ...] = ()
    """The edges, such as `edge1`, whose own clients are hit, because the fault is in that edge itself."""

    limits: Limits = field(default_factory=Limits)
    pairs: bool = True
    """False if it cannot run beside another fault."""

    kind: Kind = NATIVE
    """The kind of service that it needs. Faults of one kind share one service."""

    def __post_init__(self) -> None:
        assert bool(self.named) != bool(self.unnamed), f"{self.name}: either `named` or `unnamed`"
