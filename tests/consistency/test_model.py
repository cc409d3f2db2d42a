"""The protocol is right in every history of the model, and every element of the protocol is needed."""

from __future__ import annotations

import pytest

from tests.consistency.model import ELEMENTS, SCENARIO_OF, SCENARIOS, Protocol, explore, main, without

MAX_STATES = 22_000  # most scenarios are complete within it; `python -m tests.consistency.model` explores all states


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_read_is_wrong_and_no_path_stays_uncached(scenario: str) -> None:
    result = explore(Protocol(), SCENARIOS[scenario], MAX_STATES)

    assert not result.wrong, f"{scenario}: {result}"
    assert result.complete or result.states >= MAX_STATES


@pytest.mark.parametrize("element", ELEMENTS)
def test_model_goes_wrong_without_each_element(element: str) -> None:
    scenario, result = without(element, 3 * MAX_STATES)

    assert result.wrong, f"{scenario} without {element}: {result}"


def test_every_element_and_scenario_in_the_table_exists() -> None:
    assert set(SCENARIO_OF) <= set(ELEMENTS)
    assert set(SCENARIO_OF.values()) <= set(SCENARIOS)


def test_model_prints_the_shortest_wrong_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--without", "probe"]) == 0

    output = capsys.readouterr().out
    assert output.startswith("without probe, one row written twice: WRONG after ")
    steps = ["W1 locks the path", "W1 drops in Redis", "W1 drops at E1", "W1: COMMIT is visible", "W1 is acknowledged"]
    assert [output.index(step) for step in steps] == sorted(output.index(step) for step in steps)
    assert "=> r2 returned no write, but must contain W1" in output
