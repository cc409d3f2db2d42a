"""Regenerate the figures of `velikiy capacity`, and what follows from them in docs/scaling.md.

./run bench does this after a complete run. After `./run bench --only edges --json > FILE`, `./run bench --scaling FILE`
brings the figures of edges up to date and leaves the others.
"""

import json
import re
import shlex
import statistics
from collections.abc import Iterator
from typing import Any

from click.testing import CliRunner

from bench import capacity, simulation
from bench.report import ROOT, number
from velikiy.cli import velikiy
from velikiy.cli.capacity import FIGURES

DOCUMENT = ROOT / "docs/scaling.md"
PLAN = re.compile(r"^\$ \./run velikiy (capacity [^\n]*)\n(.*?)```", re.DOTALL | re.MULTILINE)

Json = dict[str, Any]


def write(results: Json) -> None:
    rows = results["rows"]
    figures = json.loads(FIGURES.read_text()) | figures_of(results)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    text = PLAN.sub(lambda block: f"$ ./run velikiy {block[1]}\n{plan(block[1])}```", DOCUMENT.read_text())
    if "edges_shared" in rows.get("edges", {}):
        text = replace_part(text, "edges", "\n".join(edges(rows["edges"])))
    near = simulation.network()
    simulation.draw(near)
    DOCUMENT.write_text(replace_part(text, "simulation", "\n".join(simulation.table(near))))


def figures_of(results: Json) -> Json:
    """Return the figures for `velikiy capacity` that these results have: the CPU time of each part for one request of
    each kind, for one more edge that a write invalidates, and for the renewals of one edge in a second.

    Sixteen writers share their drops, as in a service under load.
    """
    rows, facts, when = results["rows"], results["machine"], results["when"][:10]
    found: Json = {}
    if set(capacity.KINDS.values()) <= rows.keys():
        costs = capacity.cost_ms(rows)
        found |= {
            "when": when,
            "machine": f"{facts['cores']} cores of {facts['cpu']}",
            "request_ms": {kind: {it: round(spent, 4) for it, spent in cost.items()} for kind, cost in costs.items()},
            "write_ms": round(statistics.median(it["p50"] for it in rows["edges"]["samples"]["edges: 1"]), 3),
        }
    if "edges_shared" in rows.get("edges", {}):
        shared = rows["edges"]["edges_shared"]
        [renewal] = [line["ratio"][0] for line in rows["edges"]["lines"] if "without writes" in line["what"]]
        found |= {
            "edges_when": when,
            "edge_ms": {piece: round(max(0.0, _slope(shared, piece)), 4) for piece in capacity.PIECES},
            "renewal_ms": round(max(0.0, renewal), 2),
        }
    return found


def _slope(costs_by_count: Json, piece: str) -> float:
    counts = [int(count) for count in costs_by_count]
    return statistics.linear_regression(counts, [it["cpu_ms"][piece] for it in costs_by_count.values()]).slope


def plan(command: str) -> str:
    return CliRunner().invoke(velikiy, shlex.split(command), catch_exceptions=False).output


def edges(row: Json) -> Iterator[str]:
    """Return the table of writes by the number of edges, and the cost of one more edge."""
    yield (
        "| edges | p50, 1 writer | CPU at the app's side | CPU of all edges | CPU at the app's side, 16 writers"
        " | CPU of all edges, 16 writers |"
    )
    yield "|---|---|---|---|---|---|"
    for count, alone in row["edges"].items():
        shared = row["edges_shared"][count]
        times = [alone["p50"], *(spent for it in (alone, shared) for spent in (_app_ms(it), it["cpu_ms"]["edge"]))]
        yield f"| {count} | {' | '.join(f'{number(it)} ms' for it in times)} |"
    yield ""
    yield "| one more edge costs | median of the rounds | range |"
    yield "|---|---|---|"
    for line in row["lines"]:
        if line["what"].endswith("per edge") or "additional edge" in line["what"]:
            median, lowest, highest = (f"{number(it)} ms" for it in line["ratio"])
            yield f"| {line['what'].partition(', per')[0]} | {median} | {lowest} to {highest} |"


def _app_ms(split: Json) -> float:
    return sum(float(split["cpu_ms"][it]) for it in ("app", "postgres", "redis"))


def replace_part(text: str, name: str, part: str) -> str:
    begin, end = (f"<!-- written by ./run bench, {name}: {it} -->" for it in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    assert after, f"docs/scaling.md has no marks of {name}"
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"
