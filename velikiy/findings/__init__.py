"""Findings: what is wrong with the service, since when, and what to do. Each sentence is written here, once.

`/readyz`, `./run status` and `velikiy doctor` look at different parts of the service and show findings of these
modules:

postgres        PostgreSQL as this process reaches it: its state, hazards, sessions and locks
caches          Redis and the edges, and the right to use them
processes       the processes that supervisor starts
machine         disk, memory, limits
configuration   names and values of settings
"""

import re
from collections.abc import Callable
from typing import NamedTuple

COMMAND = re.compile(r"(?<![\w/])\./run ([a-z-]+)")
"""A command in the advice of a finding. `--data` may stand directly behind its name."""


class Finding(NamedTuple):
    name: str
    """The part and its state, such as `redis.fenced`, for programs."""

    what: str
    """A sentence about the state."""

    advice: str
    """A sentence about what to do."""

    wrong: bool = True
    """False for a warning: the service works fully, and something about it is less safe than it should be."""

    since: float | None = None
    """The moment, in seconds of Unix time, if it is known."""

    where: str = ""
    """The process or the address that it is about, unless the sentence names it."""

    @property
    def sentence(self) -> str:
        return f"{self.what} {self.advice}"

    def as_json(self) -> dict[str, object]:
        return {name: value for name, value in self._asdict().items() if value not in (None, "")}

    def with_commands(self, command: Callable[[str], str]) -> "Finding":
        """Return the finding with commands that can be pasted. `command` returns them, by the word after `./run`."""
        return self._replace(advice=COMMAND.sub(lambda match: command(match[1]), self.advice))

    @classmethod
    def from_json(cls, members: dict[str, object]) -> "Finding":
        """Return the finding of another process, which may have a newer version."""
        return cls(**{name: value for name, value in members.items() if name in cls._fields})  # type: ignore[arg-type]


def merged(findings: list[Finding]) -> list[Finding]:
    """Return each finding once, what is wrong before the warnings. Without PostgreSQL, its consequences are left
    out: no edge has a lease then."""
    found = [*{(it.name, it.what, it.where): it for it in findings}.values()]
    if any(it.name in POSTGRES_AWAY for it in found):
        found = [it for it in found if it.name not in CONSEQUENCES]
    return sorted(found, key=lambda it: not it.wrong)


POSTGRES_AWAY = ("postgres.silent", "postgres.refuses", "postgres.standby")
CONSEQUENCES = ("edge.no_lease", "relay.silent")
