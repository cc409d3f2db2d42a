"""`./run soak --planted` is for people and takes minutes. That its patches fit the code is known without a stack."""

from pathlib import Path

import pytest

from tests.consistency.planted import BUGS, PLANTED, Moved, Planted, Replacement, copy, plant


@pytest.mark.parametrize("planted", PLANTED, ids=[planted.name for planted in PLANTED])
def test_each_patch_fits_the_code(planted: Planted, tmp_path: Path) -> None:
    copy(tmp_path)
    plant(planted, tmp_path)
    for file in {replacement.file for replacement in planted.replacements}:
        if file.endswith(".py"):
            compile((tmp_path / file).read_text(), file, "exec")


def test_a_patch_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    copy(tmp_path)
    moved = Planted("moved", "", (Replacement("run", "a piece that is not there", ""),))
    with pytest.raises(Moved, match=r"moved: this occurs 0 times in run"):
        plant(moved, tmp_path)


def test_no_two_bugs_have_one_name() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
