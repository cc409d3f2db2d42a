"""Notice a cache that acknowledges drops slowly, although this process and this machine are not slow themselves."""

import time
from collections import defaultdict, deque

import structlog

from velikiy.coherence.membership import Cache
from velikiy.coherence.timing import MAX_SLOW_DROPS, SLOW_S, SLOW_WINDOW_S

log = structlog.get_logger()


class Slowness:
    """The slow drops that this process has seen. Threads share it."""

    def __init__(self) -> None:
        self._moments: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MAX_SLOW_DROPS))

    def slow(self, times: dict[Cache, float]) -> list[Cache]:
        """Return the caches that were slow in this drop, and log each once in SLOW_WINDOW_S. If all are slow, the
        writer lacks CPU time itself."""
        fastest = min(times.values(), default=0.0)
        found = [cache for cache, seconds in times.items() if seconds > SLOW_S and seconds > 3 * fastest]
        for cache in found:
            moments, now = self._moments[cache.name], time.monotonic()
            if not moments or now - moments[-1] > SLOW_WINDOW_S:
                log.warning("cache.slow", cache=cache.shown, milliseconds=round(times[cache] * 1000))
            moments.append(now)
        return found

    def is_repeated(self, cache: Cache, fences: int) -> bool:
        """Return whether the cache is slow again and again. `fences`: how often it was fenced lately."""
        moments = self._moments[cache.name]
        return bool(fences) or (len(moments) == MAX_SLOW_DROPS and moments[-1] - moments[0] < SLOW_WINDOW_S)
