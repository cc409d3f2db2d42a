"""The protocol's times, and the clock that they are counted with.

A cache may be used for LEASE_S, counted from before its last query of PostgreSQL. A writer that has fenced a cache
waits for EXCLUSION_S from when the fence is visible; then no lease from before it is left. Each party counts with its
own clock, so EXCLUSION_S must exceed LEASE_S by more than the drift of two clocks in that time.
"""

import time

LEASE_S = 2.4
"""Seconds for which a cache lease is valid. The holder counts them from before it sent the request."""

EXCLUSION_S = 2.5
"""Seconds that a writer waits after it has fenced a cache."""

DROP_TIMEOUT_S = 0.4
"""Seconds that a cache has to acknowledge a drop. Together with EXCLUSION_S a write waits for 3 s at most."""

RENEWAL_S = 1.0
"""Seconds between two renewals by an app process. An edge renews as often (edge/lua/renewal.lua)."""

FILL_LEASE_S = 3.0
"""Seconds after which a fill lease is void and another reader may fill the entry. Only speed depends on it."""

SLOW_S = 0.15
"""A drop that takes longer is slow, if another cache has acknowledged in a third of that time."""

SLOW_WINDOW_S = 10.0
MAX_SLOW_DROPS = 3
"""A cache that is so often slow in SLOW_WINDOW_S is fenced. A cache that was fenced lately is fenced at once."""

FORGIVEN_AFTER_S = 60.0
"""Seconds of use after which one fence of a cache is forgotten."""

PAUSE_S = 4.0
MAX_FENCES = 6
"""The pause before a cache is readmitted doubles with each fence: none, 4 s, 8 s, ... 64 s."""

CLOCK_DRIFT = 0.01
"""The share by which two clocks may run apart; quartz clocks stay far below a thousandth."""

assert LEASE_S * (1 + CLOCK_DRIFT) < EXCLUSION_S * (1 - CLOCK_DRIFT), "a lease could outlive the wait for its end"
assert RENEWAL_S + DROP_TIMEOUT_S < LEASE_S, "a cache that works could lose its lease"


def now() -> float:
    """Return the seconds since the machine was booted. The clock goes on while the machine sleeps (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
