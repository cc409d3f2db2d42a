"""The units of systemd that make a backup each night."""

import re
import subprocess
from pathlib import Path

import pytest

from testkit.stack import ROOT

UNITS = ROOT / "deploy" / "systemd"


def test_units_are_valid(tmp_path: Path) -> None:
    names = {
        "CHECKOUT": str(ROOT),
        "RUN": str(ROOT / "run"),
        "DATA": "/var/lib/velikiy",
        "BACKUPS": "/var/backups/velikiy",
    }
    units = [tmp_path / f"velikiy-backup.{kind}" for kind in ("service", "timer")]
    for unit in units:
        text = (UNITS / unit.name).read_text()
        unit.write_text(re.sub("@([A-Z]+)@", lambda found: names[found[1]], text))
    try:
        checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no systemd-analyze")
    assert "velikiy-backup" not in checked.stderr, checked.stderr


def test_next_backup_is_within_a_day() -> None:
    [calendar] = re.findall("^OnCalendar=(.*)$", (UNITS / "velikiy-backup.timer").read_text(), re.MULTILINE)
    try:
        shown = subprocess.check_output(["systemd-analyze", "calendar", calendar], text=True)
    except FileNotFoundError:
        pytest.skip("there is no systemd-analyze")
    assert "Next elapse" in shown
