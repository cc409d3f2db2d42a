"""What keeps the caches and PostgreSQL from contradicting each other. It knows nothing of users."""

from velikiy.coherence.entry import Entry, Path
from velikiy.coherence.fence import Answer, Fence
from velikiy.coherence.redis_tier import RedisTier

__all__ = ["Answer", "Entry", "Fence", "Path", "RedisTier"]
