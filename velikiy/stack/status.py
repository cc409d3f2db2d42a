"""Look at one stack for `./run status`: the state of each part, and findings about what is wrong.

Each part is looked at in a thread of its own, and all together have LOOK_S seconds: a server that hangs costs its own
lines and not the others. The sentences stand in velikiy/findings.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from velikiy.coherence import RedisTier
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.findings import Finding, caches, machine, merged, postgres, processes
from velikiy.findings.processes import Process
from velikiy.stack import local_http, reaper, running_settings
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import Supervisor

log = structlog.get_logger()

LOOK_S = 1.4


@dataclass
class Status:
    """The state of one stack."""

    plan: Plan
    processes: list[Process] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    serves: bool = False
    """True if each edge answers, and PostgreSQL through it."""

    silent: list[str] = field(default_factory=list)
    """The apps and edges that do not answer."""

    leases: dict[str, float] = field(default_factory=dict)
    """The seconds that are left of the lease of each edge."""

    table: caches.Table | None = None
    postgres: dict[str, object] = field(default_factory=dict)
    redis: dict[str, object] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """True if everything works: requests are answered, and both caches are in use."""
        return self.serves and not any(it.wrong for it in self.findings)


def look(plan: Plan) -> Status:
    """Look at all parts of the stack. Takes LOOK_S at most."""
    status = Status(plan)
    supervisor = Supervisor(plan)
    found: dict[str, bool] = {}
    table_is_known = threading.Event()
    parts: dict[str, Callable[[], None]] = {
        "supervisor": lambda: _look_at_processes(status, supervisor),
        "postgres": lambda: _look_at_postgres(status, table_is_known),
        "redis": lambda: _look_at_redis(status, table_is_known),
        **{f"app{n}": lambda n=n: _look_at_app(status, n) for n in range(1, plan.apps + 1)},  # type: ignore[misc]
        **{
            f"edge{n}": lambda n=n, url=url: _look_at_edge(status, n, url, found)  # type: ignore[misc]
            for n, url in enumerate(plan.edge_urls, 1)
        },
    }
    ended = _together(parts)
    silent = [name for name in parts if name not in ended]
    for name in silent:
        if name == "postgres":
            status.findings.append(postgres.silent(last_heartbeat(plan)))
        elif name == "supervisor":
            status.findings.append(processes.silent_supervisor(LOOK_S))
        elif name == "redis" and not status.redis:
            status.findings.append(caches.redis_unusable(str(DoesNotAnswer(TimeoutError()))))
        elif name != "redis":
            status.silent.append(name)
    status.serves = bool(found) and all(found.get(f"edge{n}") for n in range(1, plan.edges + 1))
    status.findings += _more_findings(status)
    down = {it.name for it in status.processes if not it.runs or it.recent_restarts}
    status.findings = [
        it for it in merged(status.findings) if not (it.name in ("process.silent", "edge.silent") and it.where in down)
    ]
    return status


def _together(parts: dict[str, Callable[[], None]]) -> set[str]:
    """Call the functions at the same time, and return which of them have ended in time."""
    ended: set[str] = set()
    left = threading.Semaphore(0)

    def call(name: str, function: Callable[[], None]) -> None:
        try:
            function()
            ended.add(name)
        except Exception:  # a part that cannot be looked at counts as silent; status itself must not fail
            log.debug("status.cannot_look", part=name, exc_info=True)
        finally:
            left.release()

    for name, function in parts.items():
        threading.Thread(target=call, args=(name, function), daemon=True).start()
    until = time.monotonic() + LOOK_S
    for _ in parts:
        if not left.acquire(timeout=max(0.0, until - time.monotonic())):
            break
    return ended.copy()


def _look_at_processes(status: Status, supervisor: Supervisor) -> None:
    for it in supervisor.processes():
        count, moments = reaper.starts(status.plan.home / "run" / f"{it['name']}.spawned")
        status.processes.append(
            Process(
                it["name"],
                int(it["pid"]),
                it["statename"],
                float(it["start"]),
                float(it["stop"]),
                max(0, count - 1),
                reaper.crash_loop(count, moments),
                reaper.crash_loop(0, reaper.starts(status.plan.home / "run" / f"{it['name']}.workers.spawned")[1]),
            )
        )
    for process in status.processes:
        status.memory[process.name] = machine.memory_of(process.pid) if process.pid else 0
    status.findings += [finding for process in status.processes for finding in processes.process(process)]


def _look_at_postgres(status: Status, table_is_known: threading.Event) -> None:
    import psycopg

    from velikiy.postgres import CONNECT_OPTIONS, Connection
    from velikiy.resources.base import registry

    tables, dsn = [*registry()], status.plan.direct_url
    began = time.monotonic()
    try:
        with Connection.connect(
            postgres.with_short_wait(dsn), **CONNECT_OPTIONS, autocommit=True, application_name="velikiy status"
        ) as connection:
            status.postgres = {
                "version": _version(connection.info.server_version),
                "answers_in_ms": round((time.monotonic() - began) * 1000, 1),
            }
            if not postgres.is_readable(connection):
                status.findings.append(postgres.unreadable())
                return
            status.findings += [*postgres.look(connection, tables), *postgres.archive(connection)]
            with suppress(*caches.UNKNOWN_TABLE):
                status.table = caches.table(connection)
    except psycopg.Error:
        away = postgres.why_away(dsn)
        since = last_heartbeat(status.plan) if away.name == "postgres.silent" else None
        status.findings.append(away._replace(since=since))
    finally:
        table_is_known.set()
    if status.table:
        status.findings += [*_edges_of_the_table(status), *caches.unsteady(status.table)]


def _edges_of_the_table(status: Status) -> list[Finding]:
    """Return the findings about registered edges, with the names of this stack's own."""
    own = {f"127.0.0.1:{port}": f"edge{n}" for n, port in enumerate(status.plan.control_ports, 1)}
    assert status.table is not None
    return [
        finding._replace(where=own.get(row.address, ""))
        for row in status.table.edges
        for finding in caches.edges(status.table._replace(edges=[row]))
    ]


def _look_at_redis(status: Status, table_is_known: threading.Event) -> None:
    tier = _tier(status.plan)
    try:
        usage = tier.usage()
        status.redis = {
            "version": tier.version(),
            "memory_bytes": usage["used_memory"],
            "max_memory_bytes": usage["maxmemory"],
            "evictions": usage["evicted_keys"],
        }
    except DoesNotAnswer as error:
        status.findings.append(caches.redis_unusable(str(error)))
        return
    if table_is_known.wait(LOOK_S) and status.table:
        status.findings += caches.redis(tier, status.table)


def _tier(plan: Plan) -> RedisTier:
    return RedisTier(plan.secret("redis_url"), lambda: None, ttl=60, timeout=LOOK_S / 3)


def _look_at_app(status: Status, number: int) -> None:
    name = f"app{number}"
    try:
        text = local_http.get_at(status.plan.app_socket(number), "/readyz", timeout=LOOK_S)
        state = json.loads(text)
    except local_http.UNANSWERED:
        status.silent.append(name)
        return
    status.findings += _findings(state)


def _look_at_edge(status: Status, number: int, url: str, found: dict[str, bool]) -> None:
    name = f"edge{number}"
    try:
        identity, milliseconds = local_http.get_signed(
            f"{url}/.edge", status.plan.secret("edge_secret"), timeout=LOOK_S
        ).split()
    except ValueError:
        status.findings.append(processes.stranger(name, url))
        return
    except local_http.UNANSWERED:
        status.silent.append(name)
        return
    if identity != status.plan.identity:
        status.findings.append(processes.stranger(name, url))
        return
    status.leases[name] = int(milliseconds) / 1000
    try:
        state = json.loads(local_http.get_any(f"{url}/readyz", timeout=LOOK_S))
        found[name] = state.get("status") in ("ready", "degraded")
        status.findings += _findings(state, name)
    except local_http.UNANSWERED:
        if milliseconds == "0":
            status.findings.append(caches.no_lease()._replace(where=name))


def _findings(state: dict[str, Any], edge: str = "") -> list[Finding]:
    """Return the findings of /readyz. Those about the edge itself get its name."""
    return [
        it._replace(where=edge) if it.what.startswith("This edge") or "of this edge" in it.what else it
        for it in map(Finding.from_json, state.get("findings", []))
    ]


def _more_findings(status: Status) -> list[Finding]:
    found = [*machine.disks(_folders(status.plan)), *machine.memory(), *running_settings.unapplied(status.plan)]
    pids = {it.name: it.pid for it in status.processes}
    found += [processes.hangs(name, LOOK_S, pids.get(name, 0)) for name in status.silent]
    is_silent = any(it.name == "supervisor.silent" for it in status.findings)
    if not status.processes and not is_silent and reaper.leftovers(status.plan.home):
        found.append(processes.stopped_supervisor())
    beat = last_heartbeat(status.plan)
    relay = next((it for it in status.processes if it.name == "relay"), None)
    if relay and relay.runs and status.table and beat and time.time() - beat > postgres.RELAY_SILENT_S:
        found.append(postgres.relay_silent(beat, relay.pid))
    return found


def _folders(plan: Plan) -> list[Path]:
    """Return the folders that may lie on disks of their own. A stack without a PostgreSQL of its own has no cluster."""
    archive = [Path(plan.wal_archive)] if plan.wal_archive else []
    return [plan.home, plan.logs, plan.cluster, plan.cluster / "pg_wal", *archive]


def last_heartbeat(plan: Plan) -> float | None:
    """Return when PostgreSQL last answered the relay."""
    try:
        return plan.heartbeat.stat().st_mtime
    except OSError:
        return None


def _version(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"
