"""What keeps the caches and PostgreSQL from contradicting each other. It knows nothing of resources."""

from velikiy.coherence.edge_client import EdgeTier
from velikiy.coherence.entry import Entry, Path, found
from velikiy.coherence.membership import Caches
from velikiy.coherence.protocol import UNASKED, Answer, Change, Fence, TooLate, Unasked, connect
from velikiy.coherence.redis_tier import Lease, RedisTier

__all__ = [
    "UNASKED",
    "Answer",
    "Caches",
    "Change",
    "EdgeTier",
    "Entry",
    "Fence",
    "Lease",
    "Path",
    "RedisTier",
    "TooLate",
    "Unasked",
    "connect",
    "found",
]
