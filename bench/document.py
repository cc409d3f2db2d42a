"""Regenerate the part of docs/benchmarks.md between its two marks, from a file of results."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import capacity, plots, scaling
from bench.report import ROOT, number

DOCUMENT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
BEGIN = "<!-- written by ./run bench: begin -->"
END = "<!-- written by ./run bench: end -->"

Json = dict[str, Any]


def write(results: Json, name: str) -> None:
    """Write the document, its plots, and docs/scaling.md with the figures of `velikiy capacity`.

    Args:
        name: The name of the file that contains the results.
    """
    PICTURES.mkdir(exist_ok=True)
    rows: dict[str, Json] = results["rows"]
    plots.ratios([line for row in rows.values() for line in row["lines"]], PICTURES / "ratios.svg")
    if samples := rows.get("latency", {}).get("open"):
        plots.latencies(samples, PICTURES / "latencies.svg")
    scaling.write(results)
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [part for part in sections(results, name) if part]
    DOCUMENT.write_text("\n\n".join([before + BEGIN, *parts, END + after]))


def sections(results: Json, name: str) -> Iterator[str]:
    rows: dict[str, Json] = results["rows"]
    yield machine(results, name)
    yield "## The table"
    yield targets(rows)
    yield "![Ratios](benchmarks/ratios.svg)"
    if "latency" in rows:
        yield "## Latencies in the open loop"
        yield latency(rows["latency"]["open"])
        yield "![Latencies](benchmarks/latencies.svg)"
    if measured := {name: row["same_rate"] for name, row in rows.items() if row.get("same_rate")}:
        yield "## Latencies at the same rate"
        yield (
            "The open loop at 80 % of velikiy's capacity in each row, as medians of the rounds. Subjects that cannot"
            " carry this rate are not listed."
        )
        yield same_rate(measured)
    if "edges" in rows:
        yield "## The cost of an additional edge"
        yield edges(rows["edges"]["edges"])
        if shared := rows["edges"].get("edges_shared"):
            yield "Sixteen clients write at the same time:"
            yield edges(shared)
    if set(capacity.KINDS.values()) <= rows.keys():
        yield "## The capacity of one core"
        yield from core_capacity(capacity.cost_ms(rows))
    yield "## CPU and memory"
    yield (
        "Cores in use and megabytes, by group of processes, as medians of the rounds. *Busiest* is the share of the"
        " busiest app worker in the CPU time of all app workers: 0.5 if both share the load evenly."
    )
    for row, result in rows.items():
        if result["samples"]:
            yield f"### {row}"
            yield processes(result["samples"])
    pictures = [it for it in ("miss", "put") if (PICTURES / f"{it}.svg").exists()]
    if pictures:
        yield "## Where the app spends its time"
    for it in pictures:
        yield f"![The path of a {'miss' if it == 'miss' else 'write'}](benchmarks/{it}.svg)"


def machine(results: Json, name: str) -> str:
    facts = results["machine"]
    versions = ", ".join(f"{it} {version}" for it, version in facts["packages"].items() if version)
    return (
        f"Measured on {results['when'][:10]} in {results['seconds'] / 60:.0f} minutes on {facts['cores']} cores of"
        f" {facts['cpu']} with {facts['memory_gb']:g} GB, Linux {facts['kernel']}, {facts['system']}, Python"
        f" {facts['python']}, {versions}. All raw samples: [{name}](../bench/results/{name})."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def targets(rows: dict[str, Json]) -> str:
    lines = [line for row in rows.values() for line in row["lines"] if line["row"][:3] != "at "]
    head = ("row", "comparison", "ratio", "range of the rounds", "by CPU time", "target", "result")
    return table(head, map(_line, lines))


def _line(line: Json) -> list[str]:
    if not line["ratio"]:
        return [line["row"], line["what"], line["skipped"], "", "", "", ""]
    median, lowest, highest = line["ratio"]
    spread = f"{number(lowest)} to {number(highest)}" if lowest != highest else ""
    by_cpu = f"{number(line['by_cpu'][0])} x" if line["by_cpu"] else ""
    goal = verdict = ""
    if line["target"] is not None:
        goal = f"{'at most' if line['at_most'] else 'at least'} {line['target']:g}"
        verdict = "met" if line["met"] else "**not met**"
    return [line["row"], line["what"], f"{number(median)} {line['unit']}".strip(), spread, by_cpu, goal, verdict]


def latency(samples: Sequence[Json]) -> str:
    rows = []
    for it in samples:
        rate = it["requests"] / it["seconds"]
        times = [f"{number(it[name])} ms" for name in ("p50", "p99", "p999")]
        rows.append([it["scene"], f"{it['share']} %", it["peer"], f"{it['rate']:,}/s", f"{rate:,.0f}/s", *times])
    return table(("load", "of capacity", "subject", "sent", "answered", "p50", "p99", "p99.9"), rows)


def same_rate(rows: dict[str, dict[str, list[Json]]]) -> str:
    lines = []
    for row, subjects in rows.items():
        for name, rounds in subjects.items():
            rate = statistics.median(it["requests"] / it["seconds"] for it in rounds)
            times = [f"{number(statistics.median(it[at] for it in rounds))} ms" for at in ("p50", "p99", "p999")]
            lines.append([row, name, f"{rate:,.0f}/s", *times])
    return table(("row", "subject", "answered", "p50", "p99", "p99.9"), lines)


def edges(costs_by_count: dict[str, Json]) -> str:
    groups = ("app", "postgres", "redis", "edge", "supervisor")
    rows = []
    for count, costs in costs_by_count.items():
        rows.append([count, f"{costs['p50']:.2f} ms", *(f"{costs['cpu_ms'].get(it, 0):.2f} ms" for it in groups)])
    return table(("edges", "p50 of a write", *(f"CPU: {it}" for it in groups)), rows)


def core_capacity(costs: dict[str, dict[str, float]]) -> Iterator[str]:
    head = ("requests/s of one core", *capacity.PIECES)
    rows = []
    for kind, cost in costs.items():
        rates = [capacity.rate_per_core(cost[piece]) for piece in capacity.PIECES]
        rows.append([kind, *(f"{rate:,.0f}" if rate else "-" for rate in rates)])
    yield table(head, rows)
    shares = ", ".join(f"{100 * share:g} % {kind}" for kind, share in capacity.SHARES.items())
    yield (
        f"Cores for {capacity.TARGET_RATE:,} requests/s ({shares}), each used to {100 * capacity.MAX_UTILISATION:g} %"
        " at most. A PUT is that of the table, with two edges to invalidate; each additional edge costs the app the"
        " time in the section above:"
    )
    cores = capacity.cores_needed(costs)
    instances = [
        f"{math.ceil(cores[it] / capacity.CORES_PER_INSTANCE[it])} x {capacity.CORES_PER_INSTANCE[it]}"
        for it in capacity.PIECES
    ]
    lines = [
        ["cores", *(f"{cores[it]:.1f}" for it in capacity.PIECES)],
        ["instances x cores of an instance", *instances],
    ]
    yield table(("", *capacity.PIECES), lines)


def processes(samples: dict[str, list[Json]]) -> str:
    groups = list(dict.fromkeys(group for rounds in samples.values() for it in rounds for group in it["cpu"]))
    rows = []
    for name, rounds in samples.items():
        rate = statistics.median(it["requests"] / it["seconds"] for it in rounds)
        cells = []
        for group in groups:
            if group not in rounds[0]["cpu"]:
                cells.append("")
                continue
            cores = statistics.median(it["cpu"][group] / it["seconds"] for it in rounds)
            size = statistics.median(it["memory"].get(group, 0) for it in rounds)
            cells.append(f"{cores:.2f}" + (f" ({size:.0f} MB)" if size else ""))
        shares = [it["busiest"] for it in rounds if it["busiest"] is not None]
        times = [f"{number(statistics.median(it[name] for it in rounds))} ms" for name in ("p50", "p99")]
        busiest = f"{statistics.median(shares):.2f}" if shares else ""
        rows.append([name, f"{rate:,.0f}", *times, *cells, busiest])
    return table(("subject", "requests/s", "p50", "p99", *groups, "busiest"), rows)
