"""The service of systemd, as far as a machine without systemd shows it. tests/docker/test_service.py boots a machine."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from testkit.stack import ROOT, folder, refused, run
from velikiy import __version__
from velikiy.stack import Refusal, service, service_watch

has_systemd = Path("/run/systemd/system").exists()


def unit(destination: Path, archive: Path | None = None) -> Path:
    """Write the unit as `./run install-service` does."""
    template = (ROOT / "deploy/systemd/velikiy.service").read_text()
    file = destination / "velikiy.service"
    file.write_text(service.filled(template, Path("/var/lib/velikiy"), archive))
    return file


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_unit_is_valid_and_its_exposure_is_below_3(tmp_path: Path) -> None:
    file = unit(tmp_path)
    assert "@" not in re.sub(r"SystemCallFilter=@system-service", "", file.read_text())
    analysed = subprocess.check_output(["systemd-analyze", "security", "--offline=yes", str(file)], text=True)
    found = re.search(r"exposure level for velikiy.service: ([\d.]+)", analysed)
    assert found
    assert float(found[1]) < 3


def test_service_may_write_to_the_archive_of_the_log_or_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path("/srv/archive")
    monkeypatch.setattr(service, "UNIT_FOLDER", tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))  # of the main process
    unit(tmp_path)
    with pytest.raises(Refusal, match=r"may not write to WAL_ARCHIVE=/srv/archive\. Run .*install-service"):
        service.refuse_closed_archive(None, archive)
    unit(tmp_path, archive)
    service.refuse_closed_archive(None, archive)
    assert service._installed_for() == Path("/var/lib/velikiy")
    monkeypatch.delenv("NOTIFY_SOCKET")
    service.refuse_closed_archive(None, Path("/srv/other"))  # a stack that was started by hand


@pytest.mark.skipif(has_systemd, reason="this machine has systemd, and the command would install a service")
def test_machine_without_systemd_gets_no_service() -> None:
    with folder() as temporary:
        assert "not booted with systemd" in refused("install-service", "--data", str(temporary / "data"))


def test_journal_gets_warnings_with_their_priority_and_no_requests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "app1.log"
    log.write_text('{"event":"old","level":"error"}\n')
    journal = service_watch.Journal(tmp_path)
    with log.open("a") as stream:
        stream.write('{"event":"request","level":"info"}\n{"event":"cache.fenced","level":"warning"}\n{"event":"half')
    journal.copy()
    with log.open("a") as stream:
        stream.write('","level":"error"}\n')
    (tmp_path / "supervisord.log").write_text("2026-11-28 INFO exited: app1\n")
    journal.copy()
    journal.copy()
    assert capfd.readouterr().out.splitlines() == [
        '<4>app1: {"event":"cache.fenced","level":"warning"}',
        '<3>app1: {"event":"half","level":"error"}',
        "supervisord: 2026-11-28 INFO exited: app1",
    ]


def test_journal_follows_a_log_through_its_rotation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "edge1.log"
    log.write_text('{"level":"info"}\n' * 9)
    journal = service_watch.Journal(tmp_path)
    log.rename(tmp_path / "edge1.log.1")
    log.write_text('{"level":"alert","event":"new"}\n')
    journal.copy()
    assert capfd.readouterr().out == '<1>edge1: {"level":"alert","event":"new"}\n'


def test_systemd_receives_messages_at_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        service.notify("READY=1", "STATUS=serving")
        assert receiver.recv(100) == b"READY=1\nSTATUS=serving"


def test_uninstall_without_a_terminal_shows_what_is_left_and_removes_nothing() -> None:
    with folder() as temporary:
        shown = run("uninstall", "--data", str(temporary / "data"))
    assert shown.returncode == 1
    assert "environments and code" in shown.stderr
    assert "Add --yes, and --delete-data to delete the data too" in shown.stderr
    assert Path(sys.executable).exists()


def test_version_is_the_same_everywhere() -> None:
    shown = run("--version").stdout.strip()
    assert re.fullmatch(rf"Velikiy Flask {re.escape(__version__)}( \([0-9a-f]{{7,}}(-dirty)?\))?", shown)
    own = subprocess.check_output([sys.executable, "-P", "-m", "velikiy", "--version"], text=True, env=os.environ)
    assert own == f"velikiy {__version__}\n"
