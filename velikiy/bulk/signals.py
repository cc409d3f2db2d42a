"""Interruptions of a command: Ctrl-C (SIGINT), SIGTERM, and the end of its terminal (SIGHUP)."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

REPEATED_S = 1.0
"""Seconds after a signal in which another signal counts as the same. The end of a terminal sends SIGHUP from the kernel
and from the shell, systemd sends SIGTERM and SIGHUP: the second must not interrupt the clean-up after the first."""


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt with the number of the signal, so that the command can clean up."""

    last = -REPEATED_S

    def interrupt(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() - last >= REPEATED_S:
            last = time.monotonic()
            raise KeyboardInterrupt(number)

    with _handler(interrupt):
        yield


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver a signal only at the end of the block. A later signal interrupts the block."""
    pending: list[int] = []
    first = 0.0

    def defer(number: int, _: object) -> None:
        nonlocal first
        if not pending:
            first = time.monotonic()
            pending.append(number)
        elif time.monotonic() - first >= REPEATED_S:
            raise KeyboardInterrupt(number)

    with _handler(defer):
        yield
    if pending:
        signal.raise_signal(pending[0])


@contextmanager
def _handler(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Install this handler for SIGNALS while the block runs."""
    # A signal that is ignored stays ignored: nohup, or `&` in a script, has switched it off.
    previous = {number: was for number in SIGNALS if (was := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, was in previous.items():
            signal.signal(number, was)
