"""`./run`: starting, stopping, and what can go wrong with either."""

import dataclasses
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests.running import (
    ROOT,
    Stack,
    children_of,
    clean_environment,
    folder,
    free_ports,
    run,
    running,
    status_of,
    wait_until,
)
from velikiy.stack.plan import Plan
from velikiy.stack.spawn import leftovers
from velikiy.stack.start import ready

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


def refused(*arguments: str, **environment: str) -> str:
    """The one sentence in which `./run` says why not."""
    answer = run(*arguments, **environment)
    assert answer.returncode == 1, (answer.stdout, answer.stderr)
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    said = answer.stderr.strip()
    assert said.startswith("./run: ")
    return said


@contextmanager
def listening(port: int) -> Iterator[None]:
    with closing(socket.create_server(("127.0.0.1", port))):
        yield


@pytest.fixture(scope="module")
def sturdy() -> Iterator[Stack]:
    """One whose processes are killed."""
    with running("--edges", "2") as stack:
        yield stack


class TestStarting:
    def test_a_new_stack_has_three_users_and_gives_the_next_one_id_4(self) -> None:
        with running() as stack:
            names = [user["name"] for user in requests.get(f"{stack.edge}/users", timeout=5).json()]
            assert names == ["Alice", "Bob", "Charlie"]
            created = requests.post(f"{stack.edge}/users", json={"name": "D", "email": "d@example.com"}, timeout=5)
            assert created.json() == {"id": 4, "message": "Created"}

    def test_status_describes_it_for_programs(self, stack: Stack) -> None:
        answer = run("status", "--json", "--data", str(stack.data))
        assert answer.returncode == 0
        state = json.loads(answer.stdout)
        assert state["ready"] is True
        assert len(state["edges"]) == len(state["apps"]) == 2
        assert state["data"] == str(stack.data)
        names = [process["name"] for process in state["processes"]]
        assert sorted(names) == ["app1", "app2", "edge1", "edge2", "postgres", "redis", "relay"]
        for process in state["processes"]:
            assert process["state"] == "RUNNING"
            assert Path(f"/proc/{process['pid']}").exists()
        first, second = (int(edge.rpartition(":")[2]) for edge in state["edges"])
        assert second == first + 1
        for url in (*state["edges"], *state["apps"]):
            assert status_of(f"{url}/health") == 200

    def test_starting_it_again_changes_nothing_and_says_so(self, stack: Stack) -> None:
        before = stack.pids()
        again = run("up", "--detach", "--data", str(stack.data))
        assert again.returncode == 0
        assert "running already" in again.stderr
        assert stack.edge in again.stderr
        assert stack.pids() == before

    def test_a_running_stack_takes_on_other_settings_and_keeps_its_data(self) -> None:
        with running() as stack:
            place = requests.post(f"{stack.edge}/users", json={"name": "K", "email": "k@example.com"}, timeout=5)
            changed = run("up", "--detach", "--edges", "2", "--data", str(stack.data), EDGE_TTL="7")
            assert changed.returncode == 0, changed.stderr
            before = stack.edge
            stack.refresh()
            assert len(stack.edges) == 2
            assert stack.edge == before
            answer = requests.get(stack.edges[1] + place.headers["Location"], timeout=5)
            assert answer.json()["name"] == "K"

    def test_two_stacks_run_side_by_side(self, stack: Stack) -> None:
        with running() as other:
            created = requests.post(
                f"{other.edge}/users", json={"name": "O", "email": "only.here@example.com"}, timeout=5
            )
            assert created.json()["id"] == 4
            assert "only.here" not in requests.get(f"{stack.app}/users", timeout=5).text

    def test_servers_of_ones_own_are_used_and_none_are_started(self, stack: Stack) -> None:
        from tests.test_migrations import drop_database, make_database

        name, address = make_database(stack)
        database = stack.redis_url.rsplit("/", 1)[0] + "/5"
        try:
            with running(DATABASE_URL=address, REDIS_URL=database) as guest:
                assert sorted(guest.pids()) == ["app1", "app2", "edge1", "relay"]
                assert requests.get(f"{guest.edge}/users/1", timeout=5).json()["name"] == "Alice"
                assert guest.redis().exists("user:1")
                assert guest.postgres == address
        finally:
            drop_database(stack, name)

    def test_in_the_foreground_it_shows_the_logs_and_ctrl_c_stops_everything(self) -> None:
        with folder() as place, (place / "out").open("w") as out:
            data, port = place / "data", free_ports(1)
            process = subprocess.Popen(
                [str(ROOT / "run"), "up", "--data", str(data), "--port", str(port)],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                wait_until(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, within=60)
                request_id = requests.get(f"http://127.0.0.1:{port}/health", timeout=5).headers["X-Request-Id"]
                wait_until(lambda: request_id in (place / "out").read_text())
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=60) == 0
                assert leftovers(data) == []
                assert status_of(f"http://127.0.0.1:{port}/health") == 0
            finally:
                process.kill()
                run("down", "--wipe", "--data", str(data))

    def test_down_elsewhere_ends_the_one_that_shows_the_logs(self) -> None:
        with folder() as place:
            data, port = place / "data", free_ports(1)
            command = [str(ROOT / "run"), "up", "--data", str(data), "--port", str(port)]
            process = subprocess.Popen(
                command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                wait_until(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, within=60)
                assert run("down", "--data", str(data)).returncode == 0
                said = process.communicate(timeout=30)[1]
                assert process.returncode == 0
                assert said.strip().endswith("stopped from elsewhere")
            finally:
                process.kill()
                run("down", "--wipe", "--data", str(data))

    def test_broken_off_twice_in_a_row_it_leaves_nothing(self) -> None:
        with folder() as place:
            data = place / "data"
            command = [str(ROOT / "run"), "up", "--data", str(data), "--port", str(free_ports(1))]
            process = subprocess.Popen(
                command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                wait_until(lambda: (data / "run" / "supervisor.sock").exists(), within=60, every=0.01)
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)  # a person's second Ctrl-C
                process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=60)[1]
                assert process.returncode == 130
                assert "nothing is left running" in said
                assert leftovers(data) == []
            finally:
                process.kill()
                run("down", "--wipe", "--data", str(data))

    def test_the_app_restarts_when_its_code_changes(self) -> None:
        with folder() as place:
            checkout = place / "checkout"
            shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", "*_cache", "__pycache__"))
            command = [str(checkout / "run"), "up", "--detach", "--reload", "--data", str(place / "data")]
            subprocess.run(
                [*command, "--port", str(free_ports(1))], env=clean_environment(), check=True, capture_output=True
            )
            try:
                stack = Stack(place / "data")
                assert requests.get(f"{stack.app}/livez", timeout=5).json() == {"status": "alive"}
                health = checkout / "velikiy" / "health.py"
                health.write_text(health.read_text().replace('"alive"', '"changed"'))
                wait_until(
                    lambda: (
                        status_of(f"{stack.app}/livez") == 200
                        and "changed" in requests.get(f"{stack.app}/livez", timeout=5).text
                    )
                )
            finally:
                run("down", "--wipe", "--data", str(place / "data"))

    @root_only
    def test_everything_runs_unprivileged(self, stack: Stack) -> None:
        account = pwd.getpwnam("velikiy")
        processes = leftovers(stack.data)
        assert len(processes) >= 10
        for pid in processes:
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(rf"^Uid:\s+{account.pw_uid}\s+{account.pw_uid}\s", status, re.MULTILINE)
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)

    @root_only
    def test_a_low_port_gives_its_edge_that_one_capability_and_nobody_else_any(self) -> None:
        port = next(number for number in range(600, 1023) if not status_of(f"http://127.0.0.1:{number}/"))
        with running("--port", str(port)) as stack:
            edge = stack.pids()["edge1"]
            for name, pid in stack.pids().items():
                status = Path(f"/proc/{pid}/status").read_text()
                capabilities = int(re.findall(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)[0], 16)
                assert capabilities == (1 << 10 if pid == edge else 0), name  # CAP_NET_BIND_SERVICE is number 10

    def test_passwords_are_for_the_services_alone(self, stack: Stack) -> None:
        assert stack.data.joinpath("secrets").stat().st_mode & 0o077 == 0
        for secret in (stack.data / "secrets").iterdir():
            assert secret.stat().st_mode & 0o077 == 0, secret.name


class TestOddCircumstances:
    def test_a_refused_start_does_not_stand_in_the_way_of_the_next(self) -> None:
        port = free_ports(2)
        with folder() as place:
            with listening(port + 1):
                refused("up", "--detach", "--data", str(place / "data"), "--port", str(port), "--edges", "2")
            with running("--port", str(port), "--edges", "2", data=place / "data") as stack:
                assert stack.healthy()

    def test_a_folder_with_a_space_behind_a_link_under_a_strict_umask(self) -> None:
        with folder() as place:
            (place / "real place").mkdir()
            (place / "link").symlink_to("real place")
            data = place / "link" / "data"
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
            assert leftovers(place / "real place" / "data") == []
            assert status_of(f"http://127.0.0.1:{port}/health") == 0

    def test_a_persons_settings_for_psql_are_not_ours(self) -> None:
        with running(PGSSLMODE="require", PGHOSTADDR="203.0.113.7", PGOPTIONS="-c nonsense=1") as stack:
            assert stack.healthy()

    def test_a_copy_of_a_data_folder_does_not_speak_for_the_original(self, stack: Stack) -> None:
        with folder() as place:
            shutil.copy(stack.data / "stack.json", place)
            for entry in (place, place / "stack.json"):
                shutil.chown(entry, stack.data.stat().st_uid, stack.data.stat().st_gid)
            assert run("status", "--data", str(place)).returncode == 3
            assert run("down", "--data", str(place)).returncode == 0
            assert stack.healthy()

    def test_a_broken_description_is_named_and_can_be_deleted(self) -> None:
        with running() as stack:
            port = stack.edge.rpartition(":")[2]
            run("down", "--data", str(stack.data))
            description = stack.data / "stack.json"
            description.write_text("")
            said = refused("up", "--detach", "--data", str(stack.data), "--port", port)
            assert f"{description} cannot be read" in said
            description.unlink()
            assert run("up", "--detach", "--data", str(stack.data), "--port", port).returncode == 0

    def test_an_edge_of_another_stack_on_our_port_is_not_taken_for_ours(self, stack: Stack) -> None:
        plan = Plan.load(stack.data)
        assert plan is not None
        assert ready(plan)
        assert not ready(dataclasses.replace(plan, identity="another"))

    @root_only
    def test_the_services_cannot_make_root_follow_a_link(self) -> None:
        with folder() as place:
            data, precious = place / "data", place / "precious"
            precious.write_text("root's")
            precious.chmod(0o600)
            with running(data=data) as stack:
                port = stack.edge.rpartition(":")[2]
                run("down", "--data", str(data))
                for name in ("stack.json.new", "lock", "run/supervisord.conf"):
                    (data / name).unlink(missing_ok=True)
                    (data / name).symlink_to(precious)
                run("up", "--detach", "--data", str(data), "--port", port)
                assert precious.read_text() == "root's"
                assert precious.stat().st_uid == 0
                for name in ("stack.json.new", "lock", "run/supervisord.conf"):
                    (data / name).unlink(missing_ok=True)

    @root_only
    def test_a_disk_that_fills_up_while_it_runs_ends_no_process(self) -> None:
        with folder() as place, mounted(place, "tmpfs", "-o", "size=700m,mode=755", "none"):  # noqa: SIM117
            with running(data=place / "data") as stack:
                supervisor = stack.supervisor.pid()
                fill(place / "filler")
                for _ in range(200):
                    status_of(f"{stack.edge}/users/1")  # Nginx drops what it cannot store
                    assert requests.get(f"{stack.app}/users/2", timeout=5).status_code == 200
                assert stack.supervisor.pid() == supervisor
                (place / "filler").unlink()
                wait_until(lambda: status_of(f"{stack.edge}/users/1") == 200)
                assert stack.healthy()

    def test_without_its_supervisor_the_service_goes_on(self, sturdy: Stack) -> None:
        supervisor = sturdy.supervisor.pid()
        assert supervisor
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: sturdy.supervisor.pid() is None)
        for app in sturdy.apps:
            assert requests.get(f"{app}/users/1", timeout=5).status_code == 200
        port = sturdy.edge.rpartition(":")[2]
        assert run("up", "--detach", "--edges", "2", "--data", str(sturdy.data), "--port", port).returncode == 0


class TestStopping:
    def test_down_keeps_the_data_and_wipe_deletes_it(self) -> None:
        with folder() as place:
            data = place / "data"
            with running(data=data) as stack:
                place_of = requests.post(f"{stack.edge}/users", json={"name": "S", "email": "s@example.com"}, timeout=5)
                assert run("down", "--data", str(data)).returncode == 0
                assert leftovers(data) == []
                assert status_of(f"{stack.edge}/health") == 0
                assert run("status", "--data", str(data)).returncode == 3
                began = time.monotonic()
                assert (
                    run("up", "--detach", "--data", str(data), "--port", stack.edge.rpartition(":")[2]).returncode == 0
                )
                print(f"warm start: {time.monotonic() - began:.1f} s")
                answer = requests.get(stack.edge + place_of.headers["Location"], timeout=5)
                assert answer.json()["name"] == "S"
                mine = {"mine.txt", "postgres_backup.sql", "edge-cases.md", "package.json"}
                for name in mine:
                    (data / name).write_text("not theirs")
                assert run("down", "--wipe", "--data", str(data)).returncode == 0
                assert {entry.name for entry in data.iterdir()} == mine

    def test_what_does_not_run_is_no_error_to_stop(self) -> None:
        with folder() as place:
            assert run("down", "--data", str(place / "nothing")).returncode == 0
            assert not (place / "nothing").exists()

    def test_status_of_what_does_not_run(self) -> None:
        with folder() as place:
            answer = run("status", "--json", "--data", str(place / "nothing"))
            assert answer.returncode == 3
            assert json.loads(answer.stdout)["ready"] is False


def kill_and_wait(stack: Stack, name: str) -> None:
    """Until another process has taken its place."""
    before = wait_until(lambda: stack.pids().get(name, 0))
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: stack.pids().get(name, before) != before)


class TestKilling:
    @pytest.mark.parametrize("name", ["postgres", "redis", "app1", "edge1", "edge2"])
    def test_a_killed_process_comes_back_however_often(self, sturdy: Stack, name: str) -> None:
        for _ in range(5):
            kill_and_wait(sturdy, name)
        wait_until(sturdy.healthy, within=30)
        assert requests.get(f"{sturdy.edges[1]}/users/1", timeout=5).status_code == 200

    def test_a_killed_edge_leaves_no_workers_behind(self, sturdy: Stack) -> None:
        wait_until(sturdy.healthy)
        place = sturdy.data / "edge1"
        before = set(leftovers(place))
        assert len(before) >= 3
        os.kill(sturdy.pids()["edge1"], signal.SIGKILL)
        wait_until(lambda: not before & set(leftovers(place)) and status_of(f"{sturdy.edge}/health") == 200)

    def test_a_killed_worker_of_an_app_comes_back(self, sturdy: Stack) -> None:
        wait_until(sturdy.healthy)
        master = sturdy.pids()["app1"]
        before = children_of(master)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in (now := children_of(master)) and len(now) == len(before))

    def test_after_its_supervisor_was_killed_up_cleans_up_and_starts(self, sturdy: Stack) -> None:
        place = requests.post(f"{sturdy.edge}/users", json={"name": "V", "email": "v@example.com"}, timeout=5)
        supervisor = sturdy.supervisor.pid()
        assert supervisor
        before = set(leftovers(sturdy.data))
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: sturdy.supervisor.pid() is None)
        started = run(
            "up", "--detach", "--edges", "2", "--data", str(sturdy.data), "--port", sturdy.edge.rpartition(":")[2]
        )
        assert started.returncode == 0, started.stderr
        assert not before & set(leftovers(sturdy.data))
        assert requests.get(sturdy.edge + place.headers["Location"], timeout=5).json()["name"] == "V"
        requests.delete(sturdy.edge + place.headers["Location"], timeout=5)


class TestRefusing:
    def test_a_port_in_use(self) -> None:
        port = free_ports(2)
        with folder() as place, listening(port + 1):
            said = refused("up", "--detach", "--data", str(place / "data"), "--port", str(port), "--edges", "2")
        assert f"Port {port + 1} on 127.0.0.1 is in use" in said

    def test_an_address_that_this_machine_does_not_have(self) -> None:
        with folder() as place:
            assert "no address" in refused("up", "--detach", "--data", str(place / "data"), "--bind", "203.0.113.7")

    def test_a_folder_with_something_else_in_it(self) -> None:
        with folder() as place:
            (place / "thesis.txt").write_text("mine")
            assert "holds something else" in refused("up", "--detach", "--data", str(place))
            assert [entry.name for entry in place.iterdir()] == ["thesis.txt"]

    @root_only
    def test_a_folder_that_the_services_cannot_enter(self) -> None:
        with folder() as place:
            (place / "closed").mkdir(mode=0o700)
            assert "may not enter" in refused("up", "--detach", "--data", str(place / "closed" / "data"))

    def test_a_database_server_that_is_not_there(self) -> None:
        # Nothing listens on port 1.
        with folder() as place:
            nowhere = "postgresql://me@127.0.0.1:1/nothing"
            answer = run(
                "up", "--detach", "--data", str(place / "data"), "--port", str(free_ports(1)), DATABASE_URL=nowhere
            )
            assert answer.returncode == 1
            assert "DATABASE_URL" in answer.stderr.strip().splitlines()[-1]
            assert leftovers(place / "data") == []

    def test_a_stale_pid_file_is_no_obstacle(self) -> None:
        with folder() as place:
            data = place / "data"
            with running(data=data) as stack:
                port = stack.edge.rpartition(":")[2]
                run("down", "--data", str(data))
                # The pid of a living process: this one.
                for stale in (data / "postgres" / "postmaster.pid", data / "run" / "supervisord.pid"):
                    stale.write_text(f"{os.getpid()}\n{data}/postgres\n1\n5432\n\n127.0.0.1\n")
                    shutil.chown(stale, data.stat().st_uid, data.stat().st_gid)
                started = run("up", "--detach", "--data", str(data), "--port", port)
                assert started.returncode == 0, started.stderr
                assert requests.get(f"{stack.edge}/users/1", timeout=5).status_code == 200

    def test_data_of_another_postgresql_stays_untouched(self) -> None:
        with folder() as place:
            data = place / "data"
            with running(data=data) as stack:
                port = stack.edge.rpartition(":")[2]
                run("down", "--data", str(data))
                version = data / "postgres" / "PG_VERSION"
                ours = version.read_text()
                version.write_text("12\n")
                contents = {f: f.stat().st_mtime_ns for f in (data / "postgres").rglob("*")}
                said = refused("up", "--detach", "--data", str(data), "--port", port)
                assert "made by PostgreSQL 12" in said
                assert {f: f.stat().st_mtime_ns for f in (data / "postgres").rglob("*")} == contents
                version.write_text(ours)
                assert run("up", "--detach", "--data", str(data), "--port", port).returncode == 0

    @root_only
    def test_a_full_disk(self) -> None:
        with folder() as place, mounted(place, "tmpfs", "-o", "size=60m,mode=755", "none"):
            said = refused("up", "--detach", "--data", str(place / "data"), "--port", str(free_ports(1)))
            assert "MB left" in said
            assert list(place.iterdir()) == []

    @root_only
    def test_a_disk_that_became_full_damages_nothing(self) -> None:
        with folder() as place, mounted(place, "tmpfs", "-o", "size=700m,mode=755", "none"):  # noqa: SIM117
            with running(data=place / "data") as stack:
                port = stack.edge.rpartition(":")[2]
                run("down", "--data", str(stack.data))
                filler = place / "filler"
                fill(filler)
                assert "MB left" in refused("up", "--detach", "--data", str(stack.data), "--port", port)
                filler.unlink()
                assert run("up", "--detach", "--data", str(stack.data), "--port", port).returncode == 0
                assert requests.get(f"{stack.edge}/users/1", timeout=5).json()["name"] == "Alice"

    @root_only
    @pytest.mark.parametrize(
        ("release", "fits"),
        [
            ('ID=debian\nVERSION_ID="11"', False),
            ('ID=ubuntu\nVERSION_ID="22.04"', False),
            ("ID=fedora\nVERSION_ID=43", False),
            ("NAME=strange", False),
            ('ID=ubuntu\nVERSION_ID="24.04"', True),
            ('ID=debian\nVERSION_ID="13"', True),
            ("ID=debian\nVERSION_CODENAME=forky", True),
        ],
    )
    def test_another_system_is_told_to_use_docker(self, release: str, fits: bool) -> None:
        with folder() as place:
            (place / "os-release").write_text(release + "\n")
            # `packages` gets as far as the check and finds nothing to do.
            script = f"mount --bind {place}/os-release $(readlink -f /etc/os-release) && {ROOT}/run packages"
            answer = subprocess.run(
                ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
            )
        assert answer.returncode == (0 if fits else 1)
        assert ("docker compose up" in answer.stderr) is not fits

    def test_an_unknown_command_or_option(self) -> None:
        assert run("fly").returncode == 1
        assert "there is no command 'fly'" in run("fly").stderr
        assert run("up", "--fast").returncode == 2
        assert run("up", "--port", "many").returncode == 2
        assert run("--help").returncode == 0


def fill(file: Path) -> None:
    """Until the disk is full."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"\0" * 1_000_000)


@contextmanager
def mounted(place: Path, kind: str, *options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", kind, *options, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class TestLogs:
    def test_they_are_shown_by_name(self, stack: Stack) -> None:
        shown = run("logs", "postgres", "-n", "100000", "--data", str(stack.data))
        assert shown.returncode == 0
        assert "ready to accept connections" in shown.stdout
        assert {line.split()[0] for line in shown.stdout.splitlines()} == {"postgres"}

    def test_a_name_that_is_not_there_gets_those_that_are(self, stack: Stack) -> None:
        said = refused("logs", "mysql", "--data", str(stack.data))
        assert "app1, app2, edge1, edge2, postgres, redis" in said


def test_the_projects_own_commands_know_the_stack(stack: Stack) -> None:
    migrated = run("velikiy", "migrate", DATA=str(stack.data))
    assert (migrated.returncode, migrated.stdout.strip()) == (0, "the tables are up to date")


def test_test_app_sh_passes_and_leaves_nobody_behind(stack: Stack) -> None:
    before = stack.sql("SELECT count(*) FROM users")
    passed = subprocess.run([ROOT / "test_app.sh", stack.edge], capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stdout
    assert passed.stdout.strip().endswith("8 of 8 checks passed")
    assert stack.sql("SELECT count(*) FROM users") == before


def test_test_app_sh_fails_where_there_is_no_stack() -> None:
    failed = subprocess.run(
        [ROOT / "test_app.sh", f"http://127.0.0.1:{free_ports(1)}"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "nobody answers there" in failed.stderr
