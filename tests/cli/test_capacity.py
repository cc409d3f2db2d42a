"""`velikiy capacity`: more load needs more instances, its figures are the measured ones, and the document shows its output."""

import json
import shlex
from typing import Any

import pytest
from click.testing import CliRunner

from bench import scaling
from bench.report import ROOT
from bench.simulation import Network, flat, quantile, sample, tree
from velikiy.cli import velikiy
from velikiy.cli.capacity import FIGURES

FIGURES_OF_BENCH = json.loads(FIGURES.read_text())
SHOWN = scaling.PLAN.findall(scaling.DOCUMENT.read_text())


def output(*arguments: str) -> str:
    result = CliRunner().invoke(velikiy, ["capacity", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def computed(reads: int, writes: int, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output("--reads", str(reads), "--writes", str(writes), "--json", *more))
    return found


def test_document_shows_the_output_of_the_command() -> None:
    assert len(SHOWN) == 4
    for command, shown in SHOWN:
        assert output(*shlex.split(command)[1:]).strip() == shown.strip(), command


def test_figures_are_those_of_the_benchmark() -> None:
    results = json.loads((ROOT / f"bench/results/{FIGURES_OF_BENCH['when']}.json").read_text())
    assert scaling.figures_of(results)["request_ms"] == FIGURES_OF_BENCH["request_ms"]


def test_busy_cores_are_the_measured_times_of_the_load() -> None:
    # Reads that Redis answers, and no write: the edges' part is the measured time of one such read.
    found = computed(10_000, 0, "--edge-hits", "0", "--redis-hits", "1", "--utilisation", "1")
    assert found["cores"]["edge"] == pytest.approx(10 * FIGURES_OF_BENCH["request_ms"]["Redis hit"]["edge"], abs=0.01)


def test_each_edge_costs_each_write() -> None:
    small = computed(400_000, 1_000, "--edge-cores", "2")
    large = computed(400_000, 1_000, "--edge-cores", "16")
    assert small["instances"]["edge"] > 3 * large["instances"]["edge"]
    assert small["cores"]["app"] > large["cores"]["app"]
    assert small["write_ms"] > large["write_ms"]


def test_limit_is_met_where_it_says() -> None:
    found = json.loads(output("--reads", "50000", "--writes", "500", "--json"))
    first = found["limits"][0]
    assert found["possible"]
    for factor, possible in ((0.98, True), (1.02, False)):
        reads, writes = (str(rate * first["at"] * factor) for rate in (50_000, 500))
        at_limit = json.loads(output("--reads", reads, "--writes", writes, "--json"))
        assert at_limit["possible"] is possible
        assert at_limit["limits"][0]["limit"] == first["limit"]


def test_load_that_no_number_of_edges_carries_is_named() -> None:
    text = output("--reads", "1000", "--writes", "100000")
    assert "This load is too much" in text
    assert "instances" not in text.splitlines()[2]


def test_shares_above_one_are_refused() -> None:
    result = CliRunner().invoke(velikiy, ["capacity", "--reads", "1", "--writes", "1", "--edge-hits", "0.95"])
    assert result.exit_code == 2
    assert "together at most 1" in result.output


def median(network: Network, edges: int, write: object = flat) -> float:
    return quantile(sample(write, network, edges, 300), 0.5)  # type: ignore[arg-type]


def test_simulated_write_costs_a_round_trip_of_the_most_distant_region() -> None:
    near = Network()
    assert 100 <= median(Network(far_ms=100), 8) - median(near, 8) < 200
    assert median(near, 64) - median(near, 1) == pytest.approx(63 * near.send_ms, rel=0.2)


def test_simulated_tree_pays_only_above_some_edges() -> None:
    near = Network()
    assert median(near, 4, tree) > median(near, 4)
    assert median(near, 256, tree) < median(near, 256) / 2


def test_simulated_lost_reply_waits_for_an_exclusion() -> None:
    slowest = sample(flat, Network(loss=0.3), 8, 300)[-1]
    assert slowest > 2900
