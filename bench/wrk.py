"""wrk: what it is told, and what it says."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOAD = Path(__file__).parent / "load"

Maker = tuple[str | int | float, ...]
"""One of bench/load/requests.lua, and what it takes."""


@dataclass(frozen=True)
class Answered:
    requests: int
    seconds: float
    failed: int
    """Without an answer, or with one of status 400 and above."""

    p50: float
    """Milliseconds, as those that follow."""

    p90: float
    p99: float
    p999: float
    max: float
    cpu: float = 0.0
    """Seconds of the load generator's own."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def closed(
    url: str, maker: Maker, seconds: int, *, connections: int = 64, threads: int = 2, cores: list[int] | None = None
) -> Answered:
    """As fast as so many connections are answered; wrk knows whole seconds only."""
    arguments = ["-t", threads, "-c", connections, "-d", f"{seconds}s", "-s", LOAD / "closed.lua", url, "--", threads]
    return _run([*map(str, arguments), *map(str, maker)], cores)


def open_loop(
    url: str,
    maker: Maker,
    seconds: int,
    *,
    rate: float,
    warmup: int,
    connections: int = 64,
    cores: list[int] | None = None,
) -> Answered:
    """So many requests per second, however long their answers take; those of the warm-up are not counted."""
    arguments = ["-t", connections, "-c", connections, "-d", f"{seconds + warmup}s", "-s", LOAD / "open.lua"]
    given = [*arguments, url, "--", connections, *maker, rate, warmup]
    return _run([*map(str, given)], cores)


def _run(arguments: list[str], cores: list[int] | None) -> Answered:
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
    return parsed(text, usage.ru_utime + usage.ru_stime)


def parsed(text: str, cpu: float = 0.0) -> Answered:
    """Of what our scripts make wrk print, its last line."""
    said: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return Answered(**{name: value for name, value in said.items() if name != "recorded"}, cpu=cpu)
