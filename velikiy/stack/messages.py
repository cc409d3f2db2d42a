"""Messages for people, on stderr, so that a pipe receives only results."""

import contextlib
import sys
import time
from collections.abc import Iterator


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Show the name of the step, and after its end how long it took."""
    began = time.monotonic()
    print(f"{name} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"done ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
