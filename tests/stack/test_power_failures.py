"""A power failure, a full disk or a kill between two steps leaves files and locks with which the next command goes on."""

import fcntl
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from testkit.machine import root_only, small_disk
from testkit.stack import folder, refused, wait_until
from velikiy import secret_files, whole_file
from velikiy.stack import Refusal, reaper, recovery, versions
from velikiy.stack.commands.folder import exclusive
from velikiy.stack.plan import Plan


def plan_in(home: Path) -> Plan:
    return Plan(str(home), "127.0.0.1", 80, 1, 2, reload=False, own_postgres=True, own_redis=True)


def test_file_that_cannot_be_written_completely_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "postgresql.conf"
    whole_file.replace(file, "old\n", mode=0o400)
    with pytest.raises(UnicodeEncodeError):
        whole_file.replace(file, "half of the new text \udc80")
    assert file.read_text() == "old\n"
    whole_file.replace(file, "new\n", mode=0o440)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new\n", 0o440)


def test_password_that_a_power_failure_has_emptied_is_made_anew(tmp_path: Path) -> None:
    for _ in range(2):
        secret_files.write(tmp_path, postgres="db:5432", redis="cache:6379")
        password = (tmp_path / "redis_password").read_text()
        assert f">{password.strip()} " in (tmp_path / "redis.conf").read_text()
        (tmp_path / "redis_password").unlink()
        (tmp_path / "redis_password").touch()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_list_of_programs_that_is_damaged_counts_as_missing(tmp_path: Path, content: str) -> None:
    plan = plan_in(tmp_path)
    (tmp_path / "run").mkdir()
    plan.save()
    (tmp_path / versions.PROGRAMS).write_text(content)
    versions.begin(tmp_path)
    assert (versions.current(tmp_path), versions.unfinished(tmp_path)) == (None, None)


def test_recovery_exchanges_both_clusters_or_none(tmp_path: Path) -> None:
    present, new, previous = tmp_path / "postgres", tmp_path / "postgres.new", tmp_path / "postgres.before-1"
    present.mkdir()
    with pytest.raises(FileNotFoundError):
        recovery._exchange(present, new, previous)
    assert [entry.name for entry in tmp_path.iterdir()] == ["postgres"]


def test_start_makes_no_empty_cluster_in_the_place_of_one_that_a_recovery_has_moved_away() -> None:
    with folder() as data:
        (data / "postgres.before-20261128T145900Z").mkdir()
        message = refused("up", "--detach", "--data", str(data))
        assert f"mv {data}/postgres.before-20261128T145900Z {data}/postgres" in message
        assert not (data / "postgres").exists()


def test_second_base_backup_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with (
        recovery._alone(tmp_path),
        pytest.raises(Refusal, match="Another base backup is being made"),
        recovery._alone(tmp_path),
    ):
        pass
    with recovery._alone(tmp_path):
        pass


def test_lock_that_was_deleted_while_others_waited_keeps_them_apart(tmp_path: Path) -> None:
    is_inside, may_leave = threading.Event(), threading.Event()

    def wait_and_stay() -> None:
        with exclusive(tmp_path):
            is_inside.set()
            may_leave.wait(20)

    waiting = threading.Thread(target=wait_and_stay)
    with exclusive(tmp_path):
        waiting.start()
        waits = re.compile(rf"-> FLOCK .*:{(tmp_path / 'lock').stat().st_ino} ")
        wait_until(lambda: waits.search(Path("/proc/locks").read_text()))
        (tmp_path / "lock").unlink()  # as `./run down --wipe` does
    assert is_inside.wait(20)
    with (tmp_path / "lock").open("w") as third, pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    may_leave.set()
    waiting.join()


def test_command_that_waited_for_a_folder_that_was_deleted_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="was deleted by another"), exclusive(tmp_path / "gone"):
        pass


@root_only
def test_stack_on_a_disk_that_turned_read_only_can_still_be_locked_to_stop_it() -> None:
    with small_disk(2) as disk:
        (disk.folder / "lock").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
        with exclusive(disk.folder), (disk.folder / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clock_that_was_set_back_makes_no_crash_loop_of_old_restarts() -> None:
    now = time.time()
    assert len(reaper.crash_loop(9, [now - 4, now - 3, now - 2])) == 3
    assert reaper.crash_loop(9, [now + 3600, now + 3601, now + 3602]) == []
