"""The protocol that keeps the caches and PostgreSQL consistent. This package knows no resource.

protocol            the order of a read and of a write, on one page
locks               advisory locks on paths: is a writer in flight?
membership          the table `caches`: which caches a writer has to reach, and which are fenced
timing              the protocol's times and its clock
host                names of this machine, its network, files and clock
redis_lease         which server may this process use as Redis?
deadline            until when may a write be committed?
group_commit        writers that contend drop together
redis_tier, redis_connections, scripts/     tier 2
edge_client         tier 1 as a writer sees it
entry               a path, and what a tier stores of it
inspect             what each tier holds, for people
"""

from velikiy.coherence.edge_client import EdgeTier
from velikiy.coherence.entry import CachePath, Entry, found
from velikiy.coherence.membership import Caches
from velikiy.coherence.protocol import NOT_TRIED, Answer, Change, Gate, NotTried, connect
from velikiy.coherence.redis_tier import FillLease, RedisTier
from velikiy.postgres import TooLate

__all__ = [
    "NOT_TRIED",
    "Answer",
    "CachePath",
    "Caches",
    "Change",
    "EdgeTier",
    "Entry",
    "FillLease",
    "Gate",
    "NotTried",
    "RedisTier",
    "TooLate",
    "connect",
    "found",
]
