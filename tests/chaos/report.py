"""The results as a table for people, as JSON, and as the Markdown of docs/reliability.md."""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.chaos.fault import Fault
from tests.chaos.result import Result
from tests.chaos.run import Outcome

BEGIN = "<!-- written by ./run chaos --report: begin -->"
END = "<!-- written by ./run chaos --report: end -->"


def as_json(outcome: Outcome, *, seed: int, minutes: float) -> dict[str, Any]:
    members = asdict(outcome)
    machine = f"{psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GB, {platform.release()}"
    return {"seed": seed, "minutes": minutes, "machine": machine, **members}


def load(files: Iterable[Path]) -> list[dict[str, Any]]:
    runs = [json.loads(file.read_text()) for file in files]
    for run in runs:
        run["results"] = [Result(**result) for result in run["results"]]
    return runs


def summary(outcome: Outcome) -> Iterator[str]:
    """Yield the lines that end a run."""
    singles = [result for result in outcome.results if len(result.faults) == 1]
    pairs = len(outcome.results) - len(singles)
    yield ""
    yield (
        f"faults:        {len(singles)} singly ({len({it.name for it in singles})} kinds), {pairs} pairs,"
        f" in {outcome.seconds:.0f} s"
    )
    yield f"reads:         {outcome.reads:,} judged ({outcome.lists:,} lists), {outcome.writes:,} writes acknowledged"
    yield f"wrong reads:   {outcome.wrong_reads}"
    yield f"lost writes:   {outcome.lost_writes}"
    yield f"named:         {sum(bool(it.named) for it in singles)} of {len(singles)}"
    yield from (f"  {example}" for example in outcome.examples)
    yield from (f"history saved: {file} (judge it again: ./run soak --check {file})" for file in outcome.histories)
    yield from (f"error:         {error}" for error in outcome.errors)
    for result in outcome.results:
        yield from (f"FAILED:        {result.name}: {failure}" for failure in result.failures)
    if outcome.not_reached:
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(outcome.not_reached.items()):
            reasons.setdefault(reason, []).append(name)
        yield from (f"not reached:   {', '.join(names)} ({reason})" for reason, names in reasons.items())


def markdown(runs: list[dict[str, Any]], faults: dict[str, Fault]) -> str:
    """Return the sum of several runs as Markdown."""
    results = [result for run in runs for result in run["results"]]
    singles: dict[str, list[Result]] = {}
    for result in results:
        if len(result.faults) == 1:
            singles.setdefault(result.name, []).append(result)
    pairs = [result for result in results if len(result.faults) > 1]
    injected = sum(len(result.faults) for result in results)
    reads, writes = (sum(run[what] for run in runs) for what in ("reads", "writes"))
    machines = ", ".join(dict.fromkeys(run["machine"] for run in runs))
    lines = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} ({machines}): {injected:,} faults, {reads:,} checked reads,"
        f" {writes:,} acknowledged writes, **{sum(run['wrong_reads'] for run in runs)} wrong reads, {sum(run['lost_writes'] for run in runs)} lost"
        f" writes**. {len(singles)} kinds of fault, {len(pairs)} pairs.",
        "",
        "| seed | minutes | faults | checked reads | wrong | lost | failures |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {run['seed']} | {run['seconds'] / 60:.0f} | {sum(len(it.faults) for it in run['results'])}"
            f" | {run['reads']:,} | {run['wrong_reads']} | {run['lost_writes']}"
            f" | {sum(bool(it.failures) for it in run['results'])} |"
            for run in runs
        ),
        "",
        "Times are seconds: the slowest request of all runs, and the slowest recovery.",
        "",
        "| fault | times | wrong, lost | reads | writes | hit | miss | write | recovery | status | 5xx |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            _row(f"`{name}`", singles[name], faults.get(name))
            for name in [*faults, *sorted(singles.keys() - faults.keys())]
            if name in singles
        ),
        *([_row("pairs", pairs, None)] if pairs else []),
    ]
    notes = {name: "; ".join(note for note in of_name[-1].notes if note) for name, of_name in singles.items()}
    if any(notes.values()):
        lines += ["", "Figures of single faults, from the last run:", ""]
        lines += [f"- `{name}`: {text}" for name, text in notes.items() if text]
    failures = Counter(f"`{it.name}`: {failure}" for it in results for failure in it.failures)
    if failures:
        lines += ["", "Failures:", "", *(f"- {text} ({n} x)" for text, n in failures.most_common())]
    return "\n".join(lines)


def _row(name: str, results: list[Result], fault: Fault | None) -> str:
    errors: Counter[str] = Counter()
    for result in results:
        errors.update(result.errors)
    recoveries = [it.recovery_s for it in results if it.recovery_s is not None]
    named = Counter(it.named for it in results if it.named)
    status = ", ".join(f"`{finding}`" for finding in named) if named else "-"
    if named and sum(named.values()) < len(results):
        status += f" ({sum(named.values())} of {len(results)})"
    cells = [
        name,
        str(len(results)),
        f"{sum(it.wrong_reads for it in results)}, {sum(it.lost_writes for it in results)}",
        _availability(it.reads for it in results),
        _availability(it.writes for it in results),
        *(f"{max(getattr(it, what) for it in results):.2f}" for what in ("hit_s", "miss_s", "write_s")),
        f"{max(recoveries):.1f}" if recoveries else "never",
        status,
        ", ".join(f"{n} x {error}" for error, n in errors.most_common(3)) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def _availability(shares: Iterable[float]) -> str:
    known = [share for share in shares if not math.isnan(share)]  # NaN: the fault hit every edge
    return f"{100 * median(known):.1f} %" if known else "-"


def described(faults: Iterable[Fault]) -> Iterator[str]:
    """Yield the rows of the table of all faults."""
    yield "| fault | what happens | status names it |"
    yield "|---|---|---|"
    for fault in faults:
        named = " or ".join(f"`{name}`" for name in fault.named) or f"no: {fault.unnamed}"
        yield f"| `{fault.name}` | {fault.what} | {named} |"


def write(document: Path, text: str) -> None:
    """Replace the generated part of the document."""
    head, begin, rest = document.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin and end, f"{document} has no place for the report"
    document.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
