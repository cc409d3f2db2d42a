"""Backups in a folder, of which the newest are kept. Files that this module did not name are never deleted."""

import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

PART_EXPIRY_S = 24 * 3600
"""Seconds after which an incomplete file belongs to a backup that was killed."""


def new_path(folder: Path, prefix: str) -> Path:
    """Return the path of a new backup."""
    return folder / f"{prefix}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.dump"


def backups(folder: Path, prefix: str) -> list[Path]:
    """Return the backups with this prefix, the oldest first."""
    name = re.compile(rf"{re.escape(prefix)}-[0-9]{{8}}T[0-9]{{6}}Z\.dump")
    return sorted(file for file in folder.iterdir() if name.fullmatch(file.name) and file.is_file())


def delete_old(folder: Path, prefix: str, keep: int) -> list[Path]:
    """Delete all but the newest backups, and what killed backups have left. Return the deleted backups."""
    part = re.compile(rf"\.{re.escape(prefix)}-[0-9]{{8}}T[0-9]{{6}}Z\.dump\.\w+\.part")
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            if part.fullmatch(file.name) and time.time() - file.stat().st_mtime > PART_EXPIRY_S:
                file.unlink()
    old = backups(folder, prefix)[:-keep]
    for file in old:
        file.unlink(missing_ok=True)
    return old
