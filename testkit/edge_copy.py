"""A copy of the edge's code that a test changes."""

import shutil
from pathlib import Path

from testkit.stack import ROOT


def copy_edge(folder: Path) -> Path:
    """Copy the edge's code into this folder, together with the Redis script that it uses. Return the copy of `edge/`."""
    script = Path("velikiy/coherence/scripts/read.lua")
    (folder / script).parent.mkdir(parents=True)
    shutil.copy(ROOT / script, folder / script)
    return shutil.copytree(ROOT / "edge", folder / "edge")


def replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} contains {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new))
