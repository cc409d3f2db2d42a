"""Keep what a stack ran with before its last change, so that a change that fails and `./run rollback` go back to it.

The folder `versions` has at most two of them. `before` ran before the last change. `unfinished` ran before a change
that has not ended: it goes when the change has succeeded or was undone, and stays if the launcher was killed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from velikiy import whole_file
from velikiy.stack import Refusal
from velikiy.stack.code_copy import code_folder
from velikiy.stack.plan import Plan
from velikiy.stack.programs import Program

PROGRAMS = "run/programs.json"
"""The file with the programs of the version that runs. It is written when a change has succeeded."""

NOT_COPIED = (".sock", ".lock", ".pid", ".spawned", ".new")
"""The ends of the names of files in `run` that belong to processes."""


ADDRESSES = ("database_url", "database_direct_url", "redis_url", "edge_secret")
"""The secrets that all programs of a stack share. A change of them is no change while the stack serves."""


@dataclass
class Version:
    """The code and the settings of a stack."""

    folder: Path
    plan: Plan
    programs: list[Program]
    code: Path
    """The copy of the code that the programs run."""

    def check(self) -> None:
        """
        Raises:
            Refusal: The code or its Python environment was removed.
        """
        missing = [str(path) for path in (self.code, Path(self.programs[-1].reaper[0])) if not path.exists()]
        if missing:
            raise Refusal(
                f"The version before cannot run any more: {' and '.join(missing)} was removed, as code that no command"
                " has used for a month. Check out the version that you want (git checkout), and run ./run up."
            )

    def secret(self, name: str) -> str | None:
        file = self.folder / "secrets" / name
        return file.read_text().strip() if file.is_file() else None

    @property
    def direct_url(self) -> str:
        """The address of PostgreSQL itself, without a pooler."""
        return self.secret("database_direct_url") or self.secret("database_url") or ""

    def restore(self, *, with_secrets: bool = True) -> None:
        """Put its files back, except for the scripts of programs, which are replaced together with their processes."""
        home = self.plan.home
        for file in [*(home / "secrets").rglob("*"), *self.folder.rglob("*")]:
            if not file.is_file() or ("secrets" in file.relative_to(home).parts and not with_secrets):
                continue
            relative = file.relative_to(home if file.is_relative_to(home / "secrets") else self.folder)
            saved, target = self.folder / relative, home / relative
            if not saved.is_file():
                target.unlink()
            elif not target.is_file() or target.read_bytes() != saved.read_bytes():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                new = target.with_name(f"{target.name}.new")
                new.unlink(missing_ok=True)
                shutil.copy2(saved, new)
                new.replace(target)


def save_programs(plan: Plan, programs: list[Program]) -> None:
    saved = [asdict(program) | {"configuration": list(map(str, program.configuration))} for program in programs]
    whole_file.replace(
        plan.home / PROGRAMS, json.dumps({"code": str(code_folder()), "programs": saved}, indent=1) + "\n"
    )


def _saved_programs(folder: Path) -> dict[str, Any] | None:
    """Return the content of PROGRAMS, or None if it is missing or damaged: then no version is known."""
    try:
        saved: dict[str, Any] = json.loads((folder / PROGRAMS).read_text())
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) and {"code", "programs"} <= saved.keys() else None


def begin(home: Path) -> None:
    """Keep the version that runs, unless an earlier change from it has not ended."""
    unfinished, new = home / "versions" / "unfinished", home / "versions" / "new"
    if unfinished.exists() or not (home / "stack.json").exists() or not _saved_programs(home):
        return
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(mode=0o700, exist_ok=True)
    for file in _files(home):
        copy = new / file.relative_to(home)
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy2(file, copy)
        with copy.open("rb") as copied:  # a power failure during the change must leave the way back
            os.fsync(copied.fileno())
    new.rename(unfinished)


def _files(home: Path) -> Iterator[Path]:
    """Return the files that programs are started with, except for their scripts."""
    saved = _saved_programs(home) or {"programs": []}
    programs = {program["name"] for program in saved["programs"]}
    yield home / "stack.json"
    yield from (file for file in (home / "secrets").rglob("*") if file.is_file())
    for file in (home / "run").iterdir():
        if file.is_file() and file.name not in programs and file.suffix not in NOT_COPIED:
            yield file


def finish(plan: Plan) -> None:
    """Note that the change has succeeded. A version that differs from the new one is kept as the one before."""
    home = plan.home
    unfinished, before = home / "versions" / "unfinished", home / "versions" / "before"
    if unfinished.exists() and _differs(unfinished, home):
        shutil.rmtree(before, ignore_errors=True)
        unfinished.rename(before)
    discard(home)


def _differs(version: Path, home: Path) -> bool:
    def identity(folder: Path) -> list[object]:
        plan = json.loads((folder / "stack.json").read_text())
        secrets = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in (folder / "secrets").rglob("*")
            if file.is_file()
        }
        return [plan["fingerprint"], plan["port"], plan["http_port"], secrets]

    return identity(version) != identity(home)


def discard(home: Path) -> None:
    shutil.rmtree(home / "versions" / "unfinished", ignore_errors=True)


def unfinished(home: Path) -> Version | None:
    """Return the version that ran before a change that has not ended."""
    return _load(home, "unfinished")


def before(home: Path) -> Version | None:
    """Return the version that ran before the last change."""
    return _load(home, "before")


def current(home: Path) -> Version | None:
    """Return the version of the last change that has succeeded, or None if an earlier release has started the stack."""
    return _load(home, "")


def _load(home: Path, name: str) -> Version | None:
    folder = home / "versions" / name if name else home
    plan = Plan.load(folder)
    if plan is None or (saved := _saved_programs(folder)) is None:
        return None
    plan.data = str(home)
    programs = [
        Program(**{**program, "configuration": tuple(map(Path, program["configuration"]))})
        for program in saved["programs"]
    ]
    return Version(folder, plan, programs, Path(saved["code"]))
