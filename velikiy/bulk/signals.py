"""Breaking a command off: with Ctrl-C, with SIGTERM, or with its terminal (SIGHUP)."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def orderly() -> Iterator[None]:
    """Raise KeyboardInterrupt, with the number of the signal, so that the command puts away what it has begun."""

    def end(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    with _heard_by(end):
        yield


@contextmanager
def to_the_end() -> Iterator[None]:
    """Let a signal wait until the block is through; the second one does not wait."""
    asked: list[int] = []

    def later(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)

    with _heard_by(later):
        yield
    if asked:
        signal.raise_signal(asked[0])


@contextmanager
def _heard_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    # A signal that nohup, or `&` in a script, has switched off stays switched off.
    before = {number: was for number in SIGNALS if (was := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
