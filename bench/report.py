"""Report results: on the terminal, and as JSON."""

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import Line, Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("nginx", "libnginx-mod-http-lua", "redis-server", "postgresql-15", "wrk")
PEER_PACKAGES = ("varnish", "haproxy", "nodejs", "golang-go")


def show(result: Result) -> None:
    for line in result.lines:
        print(text(line), flush=True)


def text(line: Line) -> str:
    if line.ratio is None:
        return f"{line.row:<17} {line.what:<50} {line.skipped}"
    low, high = number(line.ratio.lowest), number(line.ratio.highest)
    spread = f"({low} to {high})" if low != high else ""
    value = f"{number(line.ratio.median)} {line.unit}".strip()
    by_cpu = f"{number(line.by_cpu.median)} x" if line.by_cpu else ""
    return f"{line.row:<17} {line.what:<50} {value:<17} {spread:<18} {by_cpu:<12} {goal(line)}".rstrip()


def head() -> str:
    return f"{'row':<17} {'comparison':<50} {'ratio':<17} {'rounds':<18} {'by CPU time':<12} target"


def goal(line: Line) -> str:
    if line.target is None:
        return ""
    verdict = "met" if line.met else "NOT MET"
    return f"{verdict} ({'at most' if line.at_most else 'at least'} {line.target:g})"


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def summary(results: dict[str, Result], seconds: float) -> str:
    goals = [line for result in results.values() for line in result.lines if line.met is not None]
    return f"{sum(bool(line.met) for line in goals)} of {len(goals)} targets met, in {seconds:.0f} s"


def as_json(results: dict[str, Result], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "quick": options.quick,
        "machine": machine(),
        "rows": {name: result.as_json() for name, result in results.items()},
    }


def save(results: dict[str, Any]) -> Path:
    """Write the results, small enough for the repository: one line for each sample."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{results['when'][:10]}.json"
    path.write_text(compact(results) + "\n")
    return path


def compact(value: Any, depth: int = 0) -> str:
    """Return JSON that is indented down to the samples, each of which is one line."""
    if not value or depth > 4 or not isinstance(value, dict | list):
        return json.dumps(value)
    pad = "\n" + " " * (depth + 1)
    if isinstance(value, list):
        return "[" + ",".join(pad + json.dumps(it) for it in value) + "\n" + " " * depth + "]"
    inside = ",".join(f"{pad}{json.dumps(name)}: {compact(it, depth + 1)}" for name, it in value.items())
    return "{" + inside + "\n" + " " * depth + "}"


def machine() -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e6, 1),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (*PACKAGES, *PEER_PACKAGES)},
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _version(package: str) -> str:
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
