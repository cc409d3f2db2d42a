"""Interruptions of a command: Ctrl-C (SIGINT), SIGTERM, and the end of its terminal (SIGHUP)."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt with the number of the signal, so that the command can clean up."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    with _handler(interrupt):
        yield


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver a signal only at the end of the block. A second signal interrupts the block."""
    pending: list[int] = []

    def defer(number: int, _: object) -> None:
        if pending:
            raise KeyboardInterrupt(number)
        pending.append(number)

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
