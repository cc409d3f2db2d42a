"""Messages for people, on stderr, so that a pipe receives only results."""

import contextlib
import os
import pwd
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from velikiy.stack import privileges


def command(*words: str, home: Path | None = None) -> str:
    """Return a command of `./run` that can be pasted into a shell: with the path that its user has typed, and with the
    data folder unless it is the default."""
    option = ["--data", str(home)] if home and home != privileges.default_home() else []
    return f"{program()} {shlex.join([*words, *option])}"


def as_owner_of(path: str) -> str:
    """Return how the owner of the file would run the present command. Root owns the stacks of the services' account."""
    try:
        owner = pwd.getpwuid(os.lstat(path).st_uid).pw_name
    except (OSError, KeyError):  # a folder above it is closed, too
        return "Run it as its owner"
    account = [] if owner in ("root", privileges.SERVICE_USER) else ["-u", owner]
    return f"Run it as its owner: {shlex.join(['sudo', *account])} {command(*sys.argv[1:])}"


def program() -> str:
    """Return the words that have started `./run`, as they can be pasted."""
    return os.environ.get("VELIKIY_RUN") or "./run"


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
