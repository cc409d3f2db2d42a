"""`./run` in trouble: processes are killed, disks fill up, files have changed."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest
import requests

from testkit.machine import Disk, root_only, small_disk
from testkit.stack import (
    ROOT,
    Stack,
    children_of,
    clean_environment,
    folder,
    free_ports,
    refused,
    run,
    running,
    start,
    status_of,
    wait_until,
)
from velikiy.stack.plan import Plan
from velikiy.stack.reaper import leftovers


@pytest.fixture(scope="module")
def sturdy() -> Iterator[Stack]:
    """Start a stack whose processes are killed by the tests."""
    with running("--edges", "2") as stack:
        yield stack


def kill_and_wait(stack: Stack, name: str) -> None:
    """Kill the process, and wait until another process has its name."""
    before = wait_until(lambda: stack.pids().get(name, 0))
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: stack.pids().get(name, before) != before)


class TestKilling:
    @pytest.mark.parametrize("name", ["postgres", "redis", "app1", "edge1", "edge2"])
    def test_killed_process_comes_back_each_time(self, sturdy: Stack, name: str) -> None:
        for _ in range(5):
            kill_and_wait(sturdy, name)
        wait_until(sturdy.healthy, within=30)
        assert requests.get(f"{sturdy.edges[1]}/users/1", timeout=5).status_code == 200

    def test_killed_edge_leaves_no_workers_behind(self, sturdy: Stack) -> None:
        wait_until(sturdy.healthy)
        edge_folder = sturdy.data / "edge1"
        before = set(leftovers(edge_folder))
        assert len(before) >= 3
        os.kill(sturdy.pids()["edge1"], signal.SIGKILL)
        wait_until(lambda: not before & set(leftovers(edge_folder)) and status_of(f"{sturdy.edge}/health") == 200)

    def test_killed_worker_of_an_app_comes_back(self, sturdy: Stack) -> None:
        # Another app answers an edge's /health while this one starts again after an earlier test.
        wait_until(lambda: status_of(f"{sturdy.apps[0]}/health") == 200)
        master = sturdy.pids()["app1"]
        before = children_of(master)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in (now := children_of(master)) and len(now) == len(before))

    def test_stack_serves_after_its_supervisor_is_killed_and_up_replaces_all_processes(self, sturdy: Stack) -> None:
        created = requests.post(f"{sturdy.edge}/users", json={"name": "V", "email": "v@example.com"}, timeout=5)
        supervisor = sturdy.supervisor.pid()
        assert supervisor
        before = set(leftovers(sturdy.data))
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: sturdy.supervisor.pid() is None)
        for app in sturdy.apps:
            assert requests.get(f"{app}/users/1", timeout=5).status_code == 200
        started = start(sturdy, "--edges", "2")
        assert started.returncode == 0, started.stderr
        assert not before & set(leftovers(sturdy.data))
        assert requests.get(sturdy.edge + created.headers["Location"], timeout=5).json()["name"] == "V"
        requests.delete(sturdy.edge + created.headers["Location"], timeout=5)


@pytest.fixture(scope="module")
def cramped() -> Iterator[tuple[Stack, Disk]]:
    """Start a stack on a disk that a test can fill."""
    with small_disk(700) as disk, running(data=disk.folder / "data") as stack:
        yield stack, disk


@root_only
class TestFullDisks:
    def test_disk_that_fills_up_while_the_stack_runs_ends_no_process(self, cramped: tuple[Stack, Disk]) -> None:
        stack, disk = cramped
        supervisor = stack.supervisor.pid()
        with disk.filled():
            for _ in range(200):
                status_of(f"{stack.edge}/users/1")  # Nginx drops what it cannot store
                assert requests.get(f"{stack.app}/users/2", timeout=5).status_code == 200
            assert stack.supervisor.pid() == supervisor
        wait_until(lambda: status_of(f"{stack.edge}/users/1") == 200)
        assert stack.healthy()

    def test_start_on_a_disk_that_has_filled_up_is_refused_and_keeps_the_data(
        self, cramped: tuple[Stack, Disk]
    ) -> None:
        stack, disk = cramped
        run("down", "--data", str(stack.data))
        with disk.filled():
            assert "MB left" in refused("up", "--detach", "--data", str(stack.data), "--port", stack.port)
        assert start(stack).returncode == 0
        assert requests.get(f"{stack.edge}/users/1", timeout=5).json()["name"] == "Alice"


def test_stale_pid_files_do_not_prevent_a_start(stopped_stack: Stack) -> None:
    data = stopped_stack.data
    # The pid belongs to a running process: this test.
    for stale in (data / "postgres" / "postmaster.pid", data / "run" / "supervisord.pid"):
        stale.write_text(f"{os.getpid()}\n{data}/postgres\n1\n5432\n\n127.0.0.1\n")
        shutil.chown(stale, data.stat().st_uid, data.stat().st_gid)
    started = start(stopped_stack)
    assert started.returncode == 0, started.stderr
    assert requests.get(f"{stopped_stack.edge}/users/1", timeout=5).status_code == 200


@root_only
def test_root_follows_no_link_that_the_services_created(stopped_stack: Stack) -> None:
    with folder() as temporary:
        precious = temporary / "precious"
        precious.write_text("root's")
        precious.chmod(0o600)
        links = [stopped_stack.data / name for name in ("stack.json.new", "lock", "run/supervisord.conf")]
        for link in links:
            link.unlink(missing_ok=True)
            link.symlink_to(precious)
        start(stopped_stack)
        assert precious.read_text() == "root's"
        assert precious.stat().st_uid == 0
        run("down", "--data", str(stopped_stack.data))
        for link in links:
            link.unlink(missing_ok=True)


def test_copy_of_a_data_folder_does_not_control_the_original_stack(stack: Stack) -> None:
    with folder() as temporary:
        shutil.copy(stack.data / "stack.json", temporary)
        for entry in (temporary, temporary / "stack.json"):
            shutil.chown(entry, stack.data.stat().st_uid, stack.data.stat().st_gid)
        assert run("status", "--data", str(temporary)).returncode == 3
        assert run("down", "--data", str(temporary)).returncode == 0
        assert stack.healthy()
        metrics = Plan.load(stack.data)
        assert metrics
        assert metrics.metrics_folder.is_dir()


def test_stack_starts_in_a_folder_with_a_space_behind_a_link_under_a_strict_umask() -> None:
    with folder() as temporary:
        (temporary / "real folder").mkdir()
        (temporary / "link").symlink_to("real folder")
        data = temporary / "link" / "data"
        port = free_ports(1)
        script = f"umask 077; {ROOT}/run up --detach --port {port} --data '{data}'"
        started = subprocess.run(
            ["bash", "-c", script], env=clean_environment(), capture_output=True, text=True, check=False
        )
        try:
            assert started.returncode == 0, started.stderr
            assert status_of(f"http://127.0.0.1:{port}/health") == 200
        finally:
            run("down", "--wipe", "--data", str(data))
        assert leftovers(temporary / "real folder" / "data") == []
        assert status_of(f"http://127.0.0.1:{port}/health") == 0


@pytest.mark.long
def test_personal_settings_for_psql_do_not_reach_the_stack() -> None:
    with running(PGSSLMODE="require", PGHOSTADDR="203.0.113.7", PGOPTIONS="-c nonsense=1") as stack:
        assert stack.healthy()
