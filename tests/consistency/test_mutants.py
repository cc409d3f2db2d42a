"""Check without a stack that the patches of `./run soak --mutants`, which takes minutes, fit the code."""

from pathlib import Path

import pytest

from tests.consistency.mutants import BUGS, KEY_BUGS, MUTANTS, Mutant, PatchDoesNotFit, Replacement, copy, mutate


@pytest.mark.parametrize("mutant", [*MUTANTS, *KEY_BUGS], ids=lambda mutant: mutant.name)
def test_patch_of_each_mutant_fits_the_code(mutant: Mutant, tmp_path: Path) -> None:
    copy(tmp_path)
    mutate(mutant, tmp_path)
    for file in {replacement.file for replacement in mutant.replacements}:
        if file.endswith(".py"):
            compile((tmp_path / file).read_text(), file, "exec")


def test_patch_that_does_not_fit_is_refused_with_its_name(tmp_path: Path) -> None:
    copy(tmp_path)
    unfit = Mutant("unfit", "", (Replacement("run", "text that the file does not contain", ""),))
    with pytest.raises(PatchDoesNotFit, match=r"unfit: this text occurs 0 times in run"):
        mutate(unfit, tmp_path)


def test_mutants_have_unique_names() -> None:
    assert len({bug.name for bug in (*BUGS, *KEY_BUGS)}) == len(BUGS) + len(KEY_BUGS)
