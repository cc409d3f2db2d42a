"""`./run status` as text and as JSON."""

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from velikiy.findings import Finding, caches, machine
from velikiy.findings.processes import Process
from velikiy.stack import consoles, log_view, messages, running_settings
from velikiy.stack.log_lines import iso
from velikiy.stack.plan import Plan
from velikiy.stack.start import display_url
from velikiy.stack.status import Status, last_heartbeat

SHOWN_ERRORS = 5

TELLING_FIELDS = ("reason", "text", "what", "cause")
"""The fields of an error's line that say more than its message."""


def as_json(status: Status) -> dict[str, Any]:
    """Return the state for programs."""
    plan = status.plan
    total, available = machine.memory_bytes()
    state: dict[str, Any] = {
        "ready": status.ready,
        "serves": status.serves,
        "findings": [it.as_json() for it in findings_for_people(status)],
        "warnings": [sentence(it) for it in findings_for_people(status)],
        "edges": plan.edge_urls,
        "apps": plan.app_urls,
        "postgres": _address(plan, "database_url"),
        "redis": _address(plan, "redis_url"),
        "data": plan.data,
        "metrics": "",
        "processes": [_process(status, it) for it in status.processes],
        "caches": _caches(status),
        "servers": {"postgres": status.postgres, "redis": status.redis},
        "relay": {"answered_at": last_heartbeat(plan)},
        "versions": versions(status),
        "disk": {"free_bytes": machine.free_bytes(plan.home)},
        "memory": {"total_bytes": total, "available_bytes": available},
        "settings": running_settings.changed_settings(plan),
        "errors": last_errors(plan),
    }
    if any(it.name == "metrics" for it in status.processes):
        state["metrics"] = f"http://127.0.0.1:{plan.metrics_port}/metrics"
    if plan.monitoring:
        state["prometheus"] = f"http://127.0.0.1:{plan.prometheus_port}"
    return state


def stopped(data: Path) -> dict[str, Any]:
    """Return the state of a folder without a running stack, for programs."""
    empty: dict[str, Any] = {"edges": [], "apps": [], "processes": [], "warnings": [], "findings": [], "caches": []}
    return {"ready": False, "serves": False, **empty, "postgres": "", "redis": "", "metrics": "", "data": str(data)}


def _address(plan: Plan, name: str) -> str:
    try:
        return consoles.masked(plan.secret(name))
    except FileNotFoundError:
        return ""


def _process(status: Status, it: Process) -> dict[str, Any]:
    return {
        "name": it.name,
        "pid": it.pid,
        "state": it.state,
        "uptime_s": round(time.time() - it.started_at) if it.runs else None,
        "restarts": it.restarts,
        "memory_bytes": status.memory.get(it.name, 0),
    }


def _caches(status: Status) -> list[dict[str, Any]]:
    """Return the caches of the table, and for this stack's own edges the time that is left of their leases."""
    if status.table is None:
        return []
    names = {f"127.0.0.1:{port}": f"edge{n}" for n, port in enumerate(status.plan.control_ports, 1)}
    redis = status.table.redis
    rows = [("redis", redis)] if redis else []
    rows += [(names.get(row.address, ""), row) for row in status.table.edges]
    return [
        {
            "name": name or f"edge {row.address}",
            "address": row.shards.address if row is redis and row.shards else row.address,
            "state": row.state if row.address else "not registered",
            "epoch": row.epoch,
            "fenced_since": row.fenced_at,
            "lease_s": status.leases.get(name),
        }
        for name, row in rows
    ]


def findings_for_people(status: Status) -> list[Finding]:
    """Return the findings with commands that can be pasted: with the data folder, unless it is the default."""
    return [it.with_commands(lambda word: messages.command(word, home=status.plan.home)) for it in status.findings]


def sentence(it: Finding) -> str:
    where = f"{it.where}: " if it.where and it.where not in it.what else ""
    since = f" (since {caches.at(it.since)})" if it.since else ""
    return f"{where}{it.what}{since} {it.advice}"


def text(status: Status) -> list[str]:
    """Return the lines for people."""
    plan = status.plan
    warns = any(not it.wrong for it in status.findings)
    first = "ready, with warnings" if warns else "ready"
    if not status.ready:
        first = "something is wrong, and requests are answered" if status.serves else "not ready"
    findings = findings_for_people(status)
    lines = [first, *(f"  {'WRONG  ' if it.wrong else 'warning'}  {sentence(it)}" for it in findings)]
    lines += [f"  {display_url(url)}" for url in plan.edge_urls]
    lines.append(f"  {'process':<10} {'state':<9} {'pid':>7} {'up for':>9} {'restarts':>8} {'memory':>8}")
    for it in status.processes:
        up = _duration(time.time() - it.started_at) if it.runs else "-"
        state, memory = it.state.lower(), _megabytes(status.memory.get(it.name, 0))
        lines.append(f"  {it.name:<10} {state:<9} {it.pid or '-':>7} {up:>9} {it.restarts:>8} {memory:>8}")
    for cache in _caches(status):
        lease = f", lease {cache['lease_s']:.1f} s" if cache["lease_s"] else ""
        since = f" since {caches.at(cache['fenced_since'])}" if cache["fenced_since"] else ""
        lines.append(f"  cache {cache['name']}: {cache['state']}{since}{lease}, epoch {cache['epoch'][-12:] or '-'}")
    beat = last_heartbeat(plan)
    if beat:
        lines.append(f"  PostgreSQL answered the relay {_duration(time.time() - beat)} ago")
    lines += [f"  {name} {version}" for name, version in versions(status).items()]
    if status.redis:
        used, limit = (int(str(status.redis[name])) for name in ("memory_bytes", "max_memory_bytes"))
        lines.append(f"  Redis uses {_megabytes(used)} of {_megabytes(limit)}, {status.redis['evictions']} evictions")
    total, available = machine.memory_bytes()
    lines.append(f"  memory: {_megabytes(available)} of {_megabytes(total)} available")
    lines.append(f"  disk: {_megabytes(machine.free_bytes(plan.home))} free")
    changed = running_settings.changed_settings(plan)
    lines += [f"  setting {name}={value} (default {running_settings.default(name)})" for name, value in changed.items()]
    for error in last_errors(plan):
        lines.append(f"  error {error['time']} {error['process']}: {error['event']} {error['text']}".rstrip())
    if any(it.name == "metrics" for it in status.processes):
        lines.append(f"  metrics at http://127.0.0.1:{plan.metrics_port}/metrics")
    if plan.monitoring:
        lines.append(f"  alerts at http://127.0.0.1:{plan.prometheus_port}/alerts")
    lines.append(f"  data in {plan.data}")
    return lines


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 48 * 3600 else f"{seconds // 86_400} d"


def _megabytes(number: int) -> str:
    return f"{number // 1_000_000} MB"


def last_errors(plan: Plan) -> list[dict[str, str]]:
    """Return the last errors of all logs, the newest last."""
    return [
        {
            "time": iso(entry.time) or "",
            "process": entry.process,
            "event": entry.message[:200],
            "text": next(
                (str(entry.fields[it]) for it in ("reason", "text", "what", "cause") if it in entry.fields), ""
            )[:200],
        }
        for entry in log_view.latest_errors(plan.logs, SHOWN_ERRORS)
    ]


def versions(status: Status) -> dict[str, str]:
    found = {"code": running_settings.code(status.plan), "python": platform.python_version(), "nginx": _nginx()}
    for name, facts in (("postgres", status.postgres), ("redis", status.redis)):
        if "version" in facts:
            found[name] = str(facts["version"])
    return found


def _nginx() -> str:
    try:
        shown = subprocess.run(["nginx", "-v"], capture_output=True, text=True, timeout=1, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return "of unknown version"
    return shown.strip().rpartition("/")[2]
