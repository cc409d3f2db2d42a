"""Log each finding when it begins, and when it is over."""

import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime

import structlog

from velikiy.findings import Finding

log = structlog.get_logger()


class Announcer:
    """Logs each finding once. A finding counts after two looks: a fence or a lock may last for a moment.

    `after_s`: the seconds that a finding lasts at least until it counts.
    """

    def __init__(self, after_s: float = 0.0) -> None:
        self._after_s = after_s
        self._seen: dict[tuple[str, str], Finding] = {}
        self._seen_since: dict[tuple[str, str], float] = {}
        self._announced: dict[tuple[str, str], Finding] = {}

    def report(self, findings: Iterable[Finding]) -> None:
        """Log the findings that have begun, and the announced findings that are over."""
        # Numbers in a sentence, such as seconds, may change from look to look.
        now = {(it.name, re.sub(r"\d+", "", it.what)): it for it in findings}
        self._seen_since = {key: self._seen_since.get(key, time.time()) for key in now}
        for key in now.keys() & self._seen.keys() - self._announced.keys():
            if time.time() - self._seen_since[key] < self._after_s:
                continue
            self._announced[key] = it = now[key]
            write = log.error if it.wrong else log.warning
            # PostgreSQL shows the times of a session only to its own role.
            since = it.since or self._seen_since[key]
            write("finding", name=it.name, what=it.what, advice=it.advice, since=_time(since))
        for key in self._announced.keys() - now.keys():
            log.info("finding.over", name=self._announced.pop(key).name)
        self._seen = now


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
