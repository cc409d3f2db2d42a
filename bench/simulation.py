"""Simulate the latency of a write, and how often it waits for an exclusion, beyond the sizes that one machine can run.

bench/scaling.py puts the table and the plots into docs/scaling.md.

A write sends its drops one after the other and waits for all replies at once, so it takes as long as the slowest reply.
The model has the measured times of `velikiy capacity`, a round trip with an exponential delay beside it, and packets
that are lost: TCP sends again after 200 ms, then after 400 ms more. A reply after DROP_TIMEOUT_S fences the edge, and
the write waits for its exclusion.
"""

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench import plots
from bench.report import ROOT
from velikiy.cli.capacity import FIGURES
from velikiy.coherence.timing import DROP_TIMEOUT_S, EXCLUSION_S

PICTURE = ROOT / "docs/scaling/writes.svg"

RETRANSMISSION_MS = 200.0
"""The shortest time after which Linux sends a lost packet again."""

JITTER = 0.2
"""The mean of the delay beside the round trip, as a share of it."""

WRITES = 4000
"""Writes of one point."""


@dataclass(frozen=True)
class Network:
    rtt_ms: float = 0.3
    loss: float = 0.0
    """The share of packets that are lost, in each direction."""

    base_ms: float = 2.66
    """A write without its drops."""

    send_ms: float = 0.067
    """CPU time of the writer for one drop."""

    far_ms: float = 0.0
    """The round trip to the edges of another region; 0 without one."""

    far_edges: int = 2

    def reply_ms(self, dice: random.Random, rtt_ms: float) -> float:
        """Return the time from a drop to its acknowledgement."""
        total = rtt_ms + dice.expovariate(1 / (JITTER * rtt_ms))
        wait = max(RETRANSMISSION_MS, 2 * rtt_ms)
        while dice.random() < 1 - (1 - self.loss) ** 2:
            total += wait
            wait *= 2
        return total


def flat(network: Network, edges: int, dice: random.Random) -> float:
    """Return the milliseconds of a write that sends a drop to each edge by itself."""
    drops_ms = _slowest(network, edges, network.rtt_ms, dice)
    if network.far_ms:
        drops_ms = max(drops_ms, _slowest(network, network.far_edges, network.far_ms, dice))
    return network.base_ms + _with_exclusion(drops_ms)


def tree(network: Network, edges: int, dice: random.Random) -> float:
    """Return the milliseconds of a write through fan-out relays: the writer sends to some, and each sends to its share
    of the edges and answers when all have."""
    relays = max(1, round(edges**0.5))
    share = -(-edges // relays)
    slowest = 0.0
    for number in range(relays):
        below = _slowest(network, share, network.rtt_ms, dice)
        slowest = max(slowest, (number + 1) * network.send_ms + network.reply_ms(dice, network.rtt_ms) + below)
    return network.base_ms + _with_exclusion(slowest)


def _slowest(network: Network, edges: int, rtt_ms: float, dice: random.Random) -> float:
    return max((number + 1) * network.send_ms + network.reply_ms(dice, rtt_ms) for number in range(edges))


def _with_exclusion(drops_ms: float) -> float:
    timeout_ms = 1000 * DROP_TIMEOUT_S
    return drops_ms if drops_ms <= timeout_ms else timeout_ms + 1000 * EXCLUSION_S


Write = Callable[[Network, int, random.Random], float]


def sample(write: Write, network: Network, edges: int, writes: int = WRITES, seed: int = 1) -> list[float]:
    dice = random.Random(seed)  # noqa: S311  # the same figures each time
    return sorted(write(network, edges, dice) for _ in range(writes))


def quantile(times: Sequence[float], share: float) -> float:
    return times[min(len(times) - 1, int(share * len(times)))]


def delayed_by_losses(edges: int, days_between: float) -> float:
    """Return the share of time in which writes wait because an edge was lost without leaving: each loss delays the
    writes of 3 s, and each edge is lost once in so many days."""
    return edges * (DROP_TIMEOUT_S + EXCLUSION_S) / (days_between * 86_400)


def network() -> Network:
    figures = json.loads(FIGURES.read_text())
    return Network(base_ms=figures["write_ms"], send_ms=figures["edge_ms"]["app"])


def table(near: Network) -> Iterator[str]:
    yield "| edges | p50, flat | p99, flat | p50, tree | p99, tree | p99.9 with 0.01 % loss | CPU of the writer, flat |"
    yield "|---|---|---|---|---|---|---|"
    for edges in (1, 8, 16, 64, 256, 1024):
        direct, by_tree = (sample(write, near, edges, 1000) for write in (flat, tree))
        lossy = sample(flat, replace(near, loss=0.0001), edges, 1000)
        times = (
            *(quantile(direct, it) for it in (0.5, 0.99)),
            *(quantile(by_tree, it) for it in (0.5, 0.99)),
            quantile(lossy, 0.999),
        )
        yield f"| {edges} | {' | '.join(f'{it:.1f} ms' for it in times)} | {edges * near.send_ms:.1f} ms |"


def draw(near: Network) -> None:
    counts = [2**n for n in range(11)]
    style: Any = plots.STYLE
    with mpl.rc_context(style):
        _, grid = plt.subplots(2, 2, figsize=(8.5, 6))
        (by_edges, by_loss), (by_region, by_crash) = grid
        for name, write, color in (("flat", flat, plots.ORANGE), ("tree", tree, plots.OTHERS[0])):
            times = [sample(write, near, count, 400) for count in counts]
            by_edges.plot(counts, [quantile(it, 0.5) for it in times], color=color, label=f"{name}, p50")
            by_edges.plot(
                counts, [quantile(it, 0.99) for it in times], color=color, linestyle=":", label=f"{name}, p99"
            )
        _finish(by_edges, "edges", "ms", "A write, 0.3 ms round trip")
        for loss, color in zip((0.00001, 0.0001, 0.001), plots.OTHERS, strict=False):
            times = [sample(flat, replace(near, loss=loss), count, 1000) for count in counts]
            shares = [max(1e-4, statistics.fmean(it > 100 for it in found)) for found in times]
            by_loss.plot(counts, shares, color=color, label=f"{100 * loss:g} % lost")
        _finish(by_loss, "edges", "share", "Writes of more than 100 ms, by lost packets")
        trips = [1, 10, 20, 50, 100, 150, 200, 300]
        for share, style_ in ((0.5, "-"), (0.99, ":")):
            slower = [quantile(sample(flat, replace(near, far_ms=trip), 8, 1000), share) for trip in trips]
            by_region.plot(trips, slower, color=plots.ORANGE, linestyle=style_, label=f"exact, p{100 * share:g}")
        home = quantile(sample(flat, near, 8, 1000), 0.5)
        by_region.plot(trips, [home] * len(trips), color=plots.OTHERS[0], label="bounded, p50")
        _finish(by_region, "round trip to the other region, ms", "ms", "A write, 8 edges here and 2 there")
        for days, color in zip((7, 30, 180), plots.OTHERS, strict=False):
            shares = [delayed_by_losses(count, days) for count in counts]
            by_crash.plot(counts, shares, color=color, label=f"an edge is lost every {days} days")
        _finish(by_crash, "edges", "share", "Writes that wait for an exclusion")
        plt.tight_layout()
        PICTURE.parent.mkdir(exist_ok=True)
        plots.save(PICTURE)


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, color=plots.GREY, fontsize=9)
    axes.legend(fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
