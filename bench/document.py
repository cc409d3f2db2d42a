"""docs/benchmarks.md: what lies between its marks is written anew, from a file of results."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import capacity, plots
from bench.report import ROOT, number

DOCUMENT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
BEGIN = "<!-- written by ./run bench: begin -->"
END = "<!-- written by ./run bench: end -->"

Kept = dict[str, Any]


def write(results: Kept, name: str) -> None:
    """`name`: of the file that the results are in."""
    PICTURES.mkdir(exist_ok=True)
    rows: dict[str, Kept] = results["rows"]
    plots.ratios([line for row in rows.values() for line in row["lines"]], PICTURES / "ratios.svg")
    if found := rows.get("latency", {}).get("open"):
        plots.latencies(found, PICTURES / "latencies.svg")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [part for part in sections(results, name) if part]
    DOCUMENT.write_text("\n\n".join([before + BEGIN, *parts, END + after]))


def sections(results: Kept, name: str) -> Iterator[str]:
    rows: dict[str, Kept] = results["rows"]
    yield machine(results, name)
    yield "## The table"
    yield targets(rows)
    yield "![Ratios](benchmarks/ratios.svg)"
    if "latency" in rows:
        yield "## How long answers take, in the open loop"
        yield latency(rows["latency"]["open"])
        yield "![Latencies](benchmarks/latencies.svg)"
    if "edges" in rows:
        yield "## What an edge more costs a write"
        yield edges(rows["edges"]["edges"])
    if set(capacity.KINDS.values()) <= rows.keys():
        yield "## What one core carries"
        yield from carried(capacity.cost(rows))
    yield "## CPU and memory of each"
    yield (
        "Cores in use, and megabytes, by what processes are for; medians of the rounds. *Busiest* is what the busier of"
        " the app's two workers had of their CPU time: 0.5 is even."
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


def machine(results: Kept, name: str) -> str:
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


def targets(rows: dict[str, Kept]) -> str:
    lines = [line for row in rows.values() for line in row["lines"] if line["row"][:3] != "at "]
    head = ("what", "", "ratio", "rounds", "by CPU time", "target", "")
    return table(head, map(_line, lines))


def _line(line: Kept) -> list[str]:
    median, lowest, highest = line["ratio"]
    spread = f"{number(lowest)} to {number(highest)}" if lowest != highest else ""
    by_cpu = f"{number(line['by_cpu'][0])} x" if line["by_cpu"] else ""
    goal = verdict = ""
    if line["target"] is not None:
        goal = f"{'at most' if line['at_most'] else 'at least'} {line['target']:g}"
        verdict = "met" if line["met"] else "**not met**"
    return [line["row"], line["what"], f"{number(median)} {line['unit']}".strip(), spread, by_cpu, goal, verdict]


def latency(found: Sequence[Kept]) -> str:
    rows = []
    for one in found:
        got = one["requests"] / one["seconds"]
        times = [f"{number(one[it])} ms" for it in ("p50", "p99", "p999")]
        rows.append([one["scene"], f"{one['share']} %", one["peer"], f"{one['rate']:,}/s", f"{got:,.0f}/s", *times])
    return table(("", "of its capacity", "", "asked", "answered", "p50", "p99", "p99.9"), rows)


def edges(found: dict[str, Kept]) -> str:
    groups = ("app", "postgres", "redis", "edge", "supervisor")
    rows = []
    for count, costs in found.items():
        rows.append([count, f"{costs['p50']:.2f} ms", *(f"{costs['cpu_ms'].get(it, 0):.2f} ms" for it in groups)])
    return table(("edges", "p50 of a write", *(f"CPU: {it}" for it in groups)), rows)


def carried(costs: dict[str, dict[str, float]]) -> Iterator[str]:
    head = ("requests/s by one core of", *capacity.PIECES)
    rows = []
    for kind, of in costs.items():
        rates = [capacity.carried(of[piece]) for piece in capacity.PIECES]
        rows.append([kind, *(f"{rate:,.0f}" if rate else "-" for rate in rates)])
    yield table(head, rows)
    shares = ", ".join(f"{100 * share:g} % {kind}" for kind, share in capacity.SHARES.items())
    yield (
        f"{capacity.WANTED:,} requests/s, of which 1 % write ({shares}), with cores no fuller than"
        f" {100 * capacity.FULL:g} %; a PUT is that of the table, with two edges to be told, and each edge"
        " more costs the app what stands above:"
    )
    cores = capacity.needed(costs)
    of_each = [f"{math.ceil(cores[it] / capacity.CORES[it])} x {capacity.CORES[it]}" for it in capacity.PIECES]
    lines = [["cores", *(f"{cores[it]:.1f}" for it in capacity.PIECES)], ["instances x cores of one", *of_each]]
    yield table(("", *capacity.PIECES), lines)


def processes(samples: dict[str, list[Kept]]) -> str:
    groups = list(dict.fromkeys(group for them in samples.values() for one in them for group in one["cpu"]))
    rows = []
    for name, them in samples.items():
        rate = statistics.median(one["requests"] / one["seconds"] for one in them)
        cells = []
        for group in groups:
            if group not in them[0]["cpu"]:
                cells.append("")
                continue
            cores = statistics.median(one["cpu"][group] / one["seconds"] for one in them)
            size = statistics.median(one["memory"].get(group, 0) for one in them)
            cells.append(f"{cores:.2f}" + (f" ({size:.0f} MB)" if size else ""))
        shares = [one["busiest"] for one in them if one["busiest"] is not None]
        times = [f"{number(statistics.median(one[it] for one in them))} ms" for it in ("p50", "p99")]
        busiest = f"{statistics.median(shares):.2f}" if shares else ""
        rows.append([name, f"{rate:,.0f}", *times, *cells, busiest])
    return table(("", "per second", "p50", "p99", *groups, "busiest"), rows)
