"""Draw the plots of docs/benchmarks.md. The same figures give the same file, byte for byte."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

GREY = "#808080"
"""Readable on a white page and on a black page."""

ORANGE = "#e08a1e"
OTHERS = ("#5b8fd0", "#4ba38a", "#b07cc6", "#c96a6a")

STYLE: Any = {
    "svg.hashsalt": "velikiy",  # otherwise the ids in the file are random
    "svg.fonttype": "none",  # text stays text, which keeps the file small
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "legend.frameon": False,
}


def save(path: Path) -> None:
    plt.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close()


def ratios(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios on a logarithmic axis, with their range and their target."""
    drawn = (line for line in lines if line["ratio"] and line["unit"] == "x")
    shown = [line for line in drawn if not line["at_most"] and line["row"] != "growth"]
    with mpl.rc_context(STYLE):
        _, axes = plt.subplots(figsize=(8.5, 0.24 * len(shown) + 0.6))
        for at, line in enumerate(reversed(shown)):
            median, lowest, highest = line["ratio"]
            axes.barh(at, median - 1, left=1, color=ORANGE if median >= 1 else GREY, height=0.6)
            axes.plot([lowest, highest], [at, at], color=GREY, linewidth=1)
            if line["target"]:
                axes.plot([line["target"]] * 2, [at - 0.4, at + 0.4], color="#d04040", linewidth=2)
        axes.set_yticks(range(len(shown)), [f"{line['row']}: {line['what']}" for line in reversed(shown)])
        axes.set_xscale("log")
        ticks = [0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.axvline(1, color=GREY, linewidth=1)
        _open(axes)
        save(path)


def latencies(samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw p50, p99 and p99.9 of the open loop: a column for each load, a row for each share of the capacity."""
    scenes = list(dict.fromkeys(it["scene"] for it in samples))
    shares = sorted({it["share"] for it in samples})
    with mpl.rc_context(STYLE):
        _, grid = plt.subplots(
            len(shares), len(scenes), figsize=(3 * len(scenes), 2.4 * len(shares)), sharey=True, squeeze=False
        )
        for row, share in enumerate(shares):
            for column, scene in enumerate(scenes):
                axes = grid[row][column]
                others = iter(OTHERS)
                for sample in (it for it in samples if it["scene"] == scene and it["share"] == share):
                    is_limit = sample["peer"].startswith("return 200")
                    is_ours = sample["peer"] == "velikiy"
                    axes.plot(
                        ["p50", "p99", "p99.9"],
                        [sample["p50"], sample["p99"], sample["p999"]],
                        marker="o",
                        markersize=3,
                        linestyle=":" if is_limit else "-",
                        color=ORANGE if is_ours else GREY if is_limit else next(others),
                        label=sample["peer"],
                    )
                axes.set_yscale("log")
                axes.minorticks_off()  # each tick would be a line of the file
                axes.set_title(f"{scene}, {share} %", color=GREY, fontsize=9)
                axes.legend(fontsize=7)
                _open(axes)
            grid[row][0].set_ylabel("ms")
        plt.tight_layout()
        save(path)


def _open(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
