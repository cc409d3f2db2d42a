"""Bound the work of validating one request. Its cost must not grow with the number of mistakes in it, because it keeps
a process from serving other requests meanwhile. Rows that are imported have no such limit."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MAX_UNKNOWN_MEMBERS = 100
"""Unknown members of one request that become errors. The others are only counted."""

MAX_SLOW_CHECKS = 200
"""Values of one request whose check takes about a millisecond: e-mail addresses beyond ASCII (text.py)."""


class Work:
    """The work that is left for one request."""

    def __init__(self) -> None:
        self.unknown_members_left = MAX_UNKNOWN_MEMBERS
        self.slow_checks_left = MAX_SLOW_CHECKS
        self.not_listed = 0
        """Errors that were found and not listed."""


_work: ContextVar[Work | None] = ContextVar("work", default=None)


@contextmanager
def bounded() -> Iterator[Work]:
    """Bound the work of all validation in this block together."""
    work = Work()
    token = _work.set(work)
    try:
        yield work
    finally:
        _work.reset(token)


def without_surplus(members: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the members without those unknown members that are not listed any more. Others are listed already, so the
    request is refused in any case."""
    work = _work.get()
    if work is None or len(members) <= len(known):
        return members
    unknown = [name for name in members if name not in known]
    listed = set(unknown[: work.unknown_members_left])
    work.unknown_members_left -= len(listed)
    work.not_listed += len(unknown) - len(listed)
    if len(listed) == len(unknown):
        return members
    return {name: value for name, value in members.items() if name in known or name in listed}


def begin_slow_check() -> None:
    """Raises: ValueError"""
    work = _work.get()
    if work is None:
        return
    if not work.slow_checks_left:
        raise ValueError(
            f"was not checked: a request may have {MAX_SLOW_CHECKS} addresses beyond ASCII; send it in another request"
        )
    work.slow_checks_left -= 1
