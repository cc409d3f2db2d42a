"""What keeps the caches and PostgreSQL from contradicting each other. It knows nothing of resources."""

from velikiy.coherence.caches import Caches
from velikiy.coherence.edge_tier import EdgeTier
from velikiy.coherence.entry import MISSING, Entry, Path, found
from velikiy.coherence.fence import Answer, Change, Fence, connect
from velikiy.coherence.redis_tier import RedisTier

__all__ = [
    "MISSING",
    "Answer",
    "Caches",
    "Change",
    "EdgeTier",
    "Entry",
    "Fence",
    "Path",
    "RedisTier",
    "connect",
    "found",
]
