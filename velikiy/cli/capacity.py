"""`velikiy capacity`: the instances that a load needs, and the limit that it meets first.

The model multiplies the CPU time of each kind of request, as the benchmark has measured it, with the load. It knows no
queues: the share of a core that may be used keeps them short. docs/scaling.md explains it.
"""

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from velikiy.settings import ServiceSettings

FIGURES = Path(__file__).with_name("measured.json")
"""Written by ./run bench (bench/scaling.py:figures_of)."""

MEASURED_EDGES = 2
"""Edges that a PUT invalidated in the benchmark's row of PUTs."""

CONNECTIONS_PER_CORE = 2 * ServiceSettings.model_fields["app_threads"].default + 2
"""Connections to PostgreSQL of one process of an app (docs/configuration.md)."""

OTHER_CONNECTIONS = 10
"""The connections of two relays, the migration and an operator."""

WIDTH = 110
"""Characters of a line of the report."""

MAX_FACTOR = 1e6
"""A limit that is not met at this multiple of the load is not shown."""


@dataclass(frozen=True)
class Load:
    reads: float
    """Per second, as writes."""

    writes: float
    edge_hits: float
    """Share of the reads."""

    redis_hits: float


@dataclass(frozen=True)
class Machines:
    edge_cores: int
    app_cores: int
    redis_nodes: int
    postgres_cores: int
    max_connections: int
    max_edges: int
    utilisation: float
    rtt_ms: float


class Plan(NamedTuple):
    cores: dict[str, float]
    """Busy cores of each part, divided by the share that may be used."""

    instances: dict[str, int]
    drop_cores: float
    """Busy cores of the one worker of each edge that receives drops."""

    write_ms: float


class Limit(NamedTuple):
    name: str
    used: Callable[[Plan, Machines], float]
    """The used share. Above 1 the load is too much."""

    remedy: str


LIMITS = (
    Limit(
        "Redis computes in one thread",
        lambda plan, machines: plan.cores["redis"] / machines.redis_nodes,
        "Use Redis Cluster (--redis-nodes), or let edges answer more reads (EDGE_MEMORY, EDGE_TTL).",
    ),
    Limit(
        "The primary of PostgreSQL has no core left",
        lambda plan, machines: plan.cores["postgres"] / machines.postgres_cores,
        "Give it more cores (--postgres-cores), then partition (docs/scaling.md).",
    ),
    Limit(
        "PostgreSQL has no connection left",
        lambda plan, machines: (
            ((plan.instances["app"] + 1) * machines.app_cores * CONNECTIONS_PER_CORE + OTHER_CONNECTIONS)
            / machines.max_connections
        ),
        "Raise max_connections (--max-connections), or put PgBouncer before it.",
    ),
    Limit(
        "More edges are needed than MAX_EDGES",
        lambda plan, machines: plan.instances["edge"] / machines.max_edges,
        "Give each edge more cores (--edge-cores, EDGE_WORKERS), then raise MAX_EDGES.",
    ),
    Limit(
        "The worker of each edge that receives drops is full",
        lambda plan, machines: plan.drop_cores,
        "Write in batches or imports, which drop many rows at once.",
    ),
)


def compute(load: Load, machines: Machines, figures: dict[str, Any]) -> Plan | None:
    """Return the plan for this load; None if no number of edges carries it, because drops alone fill each edge."""
    request, edge = figures["request_ms"], figures["edge_ms"]
    shares = {
        "edge hit": load.reads * load.edge_hits,
        "Redis hit": load.reads * load.redis_hits,
        "full miss": load.reads * (1 - load.edge_hits - load.redis_hits),
        "PUT": load.writes,
    }
    busy_ms = {part: sum(shares[kind] * request[kind][part] for kind in shares) for part in request["PUT"]}
    drops_ms = load.writes * edge["edge"]
    room_ms = machines.edge_cores * 1000 * machines.utilisation - drops_ms
    if room_ms <= 0:
        return None
    # The measured PUT contains drops at two edges.
    edges = max(2, math.ceil(max(0.0, busy_ms["edge"] - MEASURED_EDGES * drops_ms) / room_ms))
    busy_ms["edge"] += (edges - MEASURED_EDGES) * drops_ms
    for part in ("app", "redis", "postgres"):
        busy_ms[part] += (edges - MEASURED_EDGES) * load.writes * edge[part]
    busy_ms["app"] += edges * figures["renewal_ms"]
    cores = {part: spent / 1000 / machines.utilisation for part, spent in busy_ms.items()}
    apps = max(2, math.ceil(cores["app"] / machines.app_cores))
    write_ms = figures["write_ms"] + (edges - 1) * edge["app"] + machines.rtt_ms
    return Plan(
        cores,
        {"edge": edges, "app": apps, "redis": max(1, math.ceil(cores["redis"])), "postgres": 1},
        drops_ms / 1000 / machines.utilisation,
        write_ms,
    )


def breaking_points(load: Load, machines: Machines, figures: dict[str, Any]) -> list[tuple[float, Limit]]:
    """Return each limit with the multiple of the load at which it is met, the first one first."""
    found = [(_factor(limit, load, machines, figures), limit) for limit in LIMITS]
    return sorted(((factor, limit) for factor, limit in found if factor < MAX_FACTOR), key=lambda it: it[0])


def _factor(limit: Limit, load: Load, machines: Machines, figures: dict[str, Any]) -> float:
    def is_met(factor: float) -> bool:
        plan = compute(replace(load, reads=load.reads * factor, writes=load.writes * factor), machines, figures)
        return plan is None or limit.used(plan, machines) > 1

    low, high = 0.0, 1e-3
    while not is_met(high) and high < MAX_FACTOR:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def report(load: Load, machines: Machines, figures: dict[str, Any]) -> dict[str, Any]:
    plan = compute(load, machines, figures)
    breaking = breaking_points(load, machines, figures)
    return {
        "load": asdict(load),
        "machines": asdict(machines),
        "figures": figures["when"],
        "possible": plan is not None and all(factor >= 1 for factor, _ in breaking),
        "cores": {part: round(cores, 2) for part, cores in plan.cores.items()} if plan else {},
        "instances": plan.instances if plan else {},
        "write_ms": round(plan.write_ms, 2) if plan else None,
        "limits": [{"at": round(factor, 3), "limit": limit.name, "remedy": limit.remedy} for factor, limit in breaking],
    }


def text(found: dict[str, Any], figures: dict[str, Any]) -> str:
    load, machines = found["load"], found["machines"]
    lines = [f"{load['reads']:,.0f} reads/s and {load['writes']:,.0f} writes/s", ""]
    sizes = {"edge": machines["edge_cores"], "app": machines["app_cores"], "redis": 1}
    if found["instances"]:
        lines.append("part      busy cores  instances")
    for part, count in found["instances"].items():
        cores = found["cores"][part]
        size = sizes.get(part, max(1, math.ceil(cores)))
        lines.append(f"{part:8}  {cores:10.1f}  {count} x {size} core{'' if size == 1 else 's'}")
    if found["write_ms"] is not None:
        edges = found["instances"]["edge"]
        lines += ["", f"A write invalidates {edges} edges and takes about {found['write_ms']:.1f} ms."]
    lines += ["", "What breaks first:" if found["possible"] else "This load is too much. What breaks first:"]
    for it in found["limits"][:3]:
        line = f"{_multiple(it['at']):>6} x this load: {it['limit']}. {it['remedy']}"
        lines.append(textwrap.fill(line, WIDTH, subsequent_indent=" " * 9))
    lines += [
        "",
        textwrap.fill(_assumptions(found, figures), WIDTH),
    ]
    return "\n".join(lines)


def _assumptions(found: dict[str, Any], figures: dict[str, Any]) -> str:
    load, machines = found["load"], found["machines"]
    misses = 1 - load["edge_hits"] - load["redis_hits"]
    return (
        f"Assumptions: {100 * load['edge_hits']:.3g} % of the reads are answered by an edge,"
        f" {100 * load['redis_hits']:.3g} % by Redis and {100 * misses:.2g} % by PostgreSQL; a core is used to"
        f" {100 * machines['utilisation']:.3g} %; writes change one row each, and no row takes more than some 200"
        f" writes/s; {machines['rtt_ms']:g} ms between an app and the edges; two instances at least. Figures:"
        f" {figures['when']}, {figures['machine']}."
    )


def _multiple(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"


@click.command()
@click.option("--reads", type=click.FloatRange(0, 1e9), required=True, help="Reads per second.")
@click.option("--writes", type=click.FloatRange(0, 1e9), required=True, help="Writes per second.")
@click.option(
    "--edge-hits", type=click.FloatRange(0, 1), default=0.909, show_default=True, help="Share of reads from an edge."
)
@click.option(
    "--redis-hits", type=click.FloatRange(0, 1), default=0.09, show_default=True, help="Share of reads from Redis."
)
@click.option("--edge-cores", type=click.IntRange(1, 64), default=2, show_default=True, help="Cores of one edge.")
@click.option("--app-cores", type=click.IntRange(1, 64), default=2, show_default=True, help="Cores of one app.")
@click.option("--redis-nodes", type=click.IntRange(1, 64), default=1, show_default=True, help="Primaries of Redis.")
@click.option(
    "--postgres-cores", type=click.IntRange(1, 512), default=8, show_default=True, help="Cores of PostgreSQL."
)
@click.option(
    "--max-connections", type=click.IntRange(50), default=200, show_default=True, help="Connections of PostgreSQL."
)
@click.option(
    "--max-edges",
    type=click.IntRange(1, 1024),
    default=ServiceSettings.model_fields["max_edges"].default,
    show_default=True,
    help="The setting MAX_EDGES.",
)
@click.option(
    "--utilisation", type=click.FloatRange(0.1, 1), default=0.7, show_default=True, help="Share of a core to be used."
)
@click.option(
    "--rtt",
    type=click.FloatRange(0, 1000),
    default=0.3,
    show_default=True,
    help="Milliseconds of a round trip from an app to the most distant edge.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def capacity(
    reads: float,
    writes: float,
    edge_hits: float,
    redis_hits: float,
    edge_cores: int,
    app_cores: int,
    redis_nodes: int,
    postgres_cores: int,
    max_connections: int,
    max_edges: int,
    utilisation: float,
    rtt: float,
    as_json: bool,
) -> None:
    """Compute the instances that a load needs, and the limit that it meets first.

    The figures are those of one machine (docs/benchmarks.md). Measure on yours with ./run bench.
    """
    if edge_hits + redis_hits > 1 + 1e-9:
        raise click.UsageError("--edge-hits and --redis-hits are shares of the reads: together at most 1")
    figures = json.loads(FIGURES.read_text())
    load = Load(reads, writes, edge_hits, min(redis_hits, 1 - edge_hits))
    machines = Machines(
        edge_cores, app_cores, redis_nodes, postgres_cores, max_connections, max_edges, utilisation, rtt
    )
    found = report(load, machines, figures)
    click.echo(json.dumps(found, indent=2) if as_json else text(found, figures))
