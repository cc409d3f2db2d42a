"""The protocol is right in every history that the model can make, and every element of it is needed."""

from __future__ import annotations

import pytest

from tests.consistency.model import ELEMENTS, SCENARIOS, SHOWN_BY, Protocol, explore, main, without

STATES = 22_000  # most scenarios are complete with that; `python -m tests.consistency.model` looks at all of them


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_read_is_wrong_and_no_path_uncached_for_ever(scenario: str) -> None:
    result = explore(Protocol(), SCENARIOS[scenario], STATES)

    assert not result.wrong, f"{scenario}: {result}"
    assert result.complete or result.states >= STATES


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element_is_needed(element: str) -> None:
    scenario, result = without(element, 3 * STATES)

    assert result.wrong, f"{scenario} without {element}: {result}"


def test_scenarios_are_named_for_elements_that_exist() -> None:
    assert set(SHOWN_BY) <= set(ELEMENTS)
    assert set(SHOWN_BY.values()) <= set(SCENARIOS)


def test_the_history_that_goes_wrong_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--without", "check"]) == 0

    story = capsys.readouterr().out
    assert story.startswith("without check, one row written twice: WRONG after ")
    told = ["W1 locks the path", "W1 drops in Redis", "W1 drops at E1", "W1: COMMIT is visible", "W1 is acknowledged"]
    assert [story.index(step) for step in told] == sorted(story.index(step) for step in told)
    assert "=> r2 got no write, W1 had to be in it" in story
