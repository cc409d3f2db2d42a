"""Run wrk with the scripts in bench/load, and parse its output."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOAD = Path(__file__).parent / "load"

RequestKind = tuple[str | int | float, ...]
"""The name of a maker in bench/load/requests.lua, and its arguments."""


@dataclass(frozen=True)
class LoadResult:
    requests: int
    seconds: float
    failed: int
    """Requests without a response, or with a status of 400 or above."""

    p50: float
    """Milliseconds, as the fields below."""

    p90: float
    p99: float
    p999: float
    max: float
    cpu: float = 0.0
    """CPU seconds of the load generator itself."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def closed_loop(
    url: str,
    kind: RequestKind,
    seconds: int,
    *,
    connections: int = 64,
    threads: int = 2,
    cores: list[int] | None = None,
) -> LoadResult:
    """Send the next request on each connection as soon as the last response arrives. wrk accepts whole seconds only."""
    arguments = ["-t", threads, "-c", connections, "-d", f"{seconds}s", "-s", LOAD / "closed.lua", url, "--", threads]
    return _run([*map(str, arguments), *map(str, kind)], cores)


def open_loop(
    url: str,
    kind: RequestKind,
    seconds: int,
    *,
    rate: float,
    warmup: int,
    connections: int = 64,
    cores: list[int] | None = None,
) -> LoadResult:
    """Send `rate` requests per second, however long the responses take. The warm-up is not counted."""
    options = ["-t", connections, "-c", connections, "-d", f"{seconds + warmup}s", "-s", LOAD / "open.lua"]
    arguments = [*options, url, "--", connections, *kind, rate, warmup]
    return _run([*map(str, arguments)], cores)


def _run(arguments: list[str], cores: list[int] | None) -> LoadResult:
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    process = subprocess.Popen(
        [*pinned, "wrk", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"wrk {' '.join(arguments)}: {text.strip()}")
    result = parse(text, usage.ru_utime + usage.ru_stime)
    if result.failed > result.requests / 2:  # refusals are fast, and would be counted as speed
        raise RuntimeError(f"wrk {' '.join(arguments)}: {result.failed} of {result.requests} requests failed")
    return result


def parse(text: str, cpu: float = 0.0) -> LoadResult:
    """Parse the last line of wrk's output, which the scripts in bench/load write as JSON."""
    members: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return LoadResult(**{name: value for name, value in members.items() if name != "recorded"}, cpu=cpu)
