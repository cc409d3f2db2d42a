"""`./run`: start a stack, show it, stop it."""

import dataclasses
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from testkit.machine import root_only
from testkit.stack import (
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
from velikiy.stack.readiness import is_ready
from velikiy.stack.reaper import leftovers


def cpus_of(pid: int) -> set[int]:
    """Return the CPUs that the threads of the process may use. A process that ends meanwhile has none."""
    cpus: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            cpus |= os.sched_getaffinity(int(thread.name))
    return cpus


class TestStarting:
    def test_new_stack_beside_another_has_three_users_of_its_own_and_gives_the_next_user_id_4(
        self, stack: Stack
    ) -> None:
        with running() as new:
            names = [user["name"] for user in requests.get(f"{new.edge}/users", timeout=5).json()]
            assert names == ["Alice", "Bob", "Charlie"]
            user = {"name": "O", "email": "only.here@example.com"}
            created = requests.post(f"{new.edge}/users", json=user, timeout=5)
            assert created.json() == {"id": 4, "message": "Created"}
            assert "only.here" not in requests.get(f"{stack.app}/users", timeout=5).text

    def test_status_describes_a_running_stack_as_json(self, stack: Stack) -> None:
        completed = wait_until(
            lambda: (it := run("status", "--json", "--data", str(stack.data))).returncode == 0 and it, within=10
        )
        assert isinstance(completed, subprocess.CompletedProcess)
        state = json.loads(completed.stdout)
        assert state["ready"] is True
        assert len(state["edges"]) == len(state["apps"]) == 2
        assert state["data"] == str(stack.data)
        names = [process["name"] for process in state["processes"]]
        assert sorted(names) == ["app1", "app2", "edge1", "edge2", "metrics", "postgres", "redis", "relay"]
        for process in state["processes"]:
            assert process["state"] == "RUNNING"
            assert Path(f"/proc/{process['pid']}").exists()
        first, second = (int(edge.rpartition(":")[2]) for edge in state["edges"])
        assert second == first + 1
        for url in (*state["edges"], *state["apps"]):
            assert status_of(f"{url}/health") == 200

    def test_start_of_a_running_stack_changes_nothing_and_reports_that(self, stack: Stack) -> None:
        before = stack.pids()
        again = run("up", "--detach", "--data", str(stack.data))
        assert again.returncode == 0
        assert "already running" in again.stderr
        assert stack.edge in again.stderr
        assert stack.pids() == before

    def test_running_stack_restarts_with_new_settings_and_keeps_its_data(self) -> None:
        with running() as stack:
            created = requests.post(f"{stack.edge}/users", json={"name": "K", "email": "k@example.com"}, timeout=5)
            changed = run("up", "--detach", "--edges", "2", "--data", str(stack.data), EDGE_TTL="7")
            assert changed.returncode == 0, changed.stderr
            before = stack.edge
            stack.refresh()
            assert len(stack.edges) == 2
            assert stack.edge == before
            user = requests.get(stack.edges[1] + created.headers["Location"], timeout=5).json()
            assert user["name"] == "K"

    def test_stack_uses_given_servers_and_starts_none_of_its_own(self, stack: Stack) -> None:
        from testkit.databases import create_database, drop_database

        name, address = create_database(stack)
        database = stack.redis_database(5)
        try:
            with running(DATABASE_URL=address, REDIS_URL=database) as guest:
                assert sorted(guest.pids()) == ["app1", "app2", "edge1", "metrics", "relay"]
                assert requests.get(f"{guest.edge}/users/1", timeout=5).json()["name"] == "Alice"
                assert guest.redis().exists("user:1")
                assert guest.postgres == address
        finally:
            drop_database(stack, name)

    def test_reload_restarts_the_app_when_its_code_changes(self) -> None:
        with folder() as temporary:
            checkout = temporary / "checkout"
            shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", "*_cache", "__pycache__"))
            command = [str(checkout / "run"), "up", "--detach", "--reload", "--data", str(temporary / "data")]
            subprocess.run(
                [*command, "--port", str(free_ports(1))], env=clean_environment(), check=True, capture_output=True
            )
            try:
                stack = Stack(temporary / "data")
                assert requests.get(f"{stack.app}/livez", timeout=5).json() == {"status": "alive"}
                health = checkout / "velikiy" / "http" / "health.py"
                health.write_text(health.read_text().replace('"alive"', '"changed"'))
                wait_until(
                    lambda: (
                        status_of(f"{stack.app}/livez") == 200
                        and "changed" in requests.get(f"{stack.app}/livez", timeout=5).text
                    )
                )
            finally:
                run("down", "--wipe", "--data", str(temporary / "data"))

    def test_all_modules_of_an_app_are_compiled_before_it_starts(self, stack: Stack) -> None:
        app = Path(f"/proc/{stack.pids()['app1']}")
        python, *_ = (app / "cmdline").read_text().split("\0")
        environment = dict(pair.split("=", 1) for pair in (app / "environ").read_text().split("\0") if pair)
        trace = subprocess.run(
            [python, "-v", "-P", "-c", "import flask, velikiy.http.routes, velikiy.coherence"],
            env=environment,
            user=app.stat().st_uid,  # this account can read the cache, and cannot write there
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        sources = re.findall(r"^# code object from '?(/.*?\.pyc?)'?$", trace, re.MULTILINE)
        assert any("/velikiy/coherence/" in source for source in sources)
        assert any("/pydantic/" in source for source in sources)
        assert [source for source in sources if source.endswith(".py")] == []

    def test_code_and_environments_of_former_versions_are_removed_if_unused(self) -> None:
        with folder() as cache:
            left = ["code-unused", "venv-unused", "venv-half.gone", "code-running", "venv-lately", "others"]
            for name in left:
                (cache / name).mkdir()
                if name != "venv-lately":
                    long_ago = time.time() - 31 * 24 * 3600
                    os.utime(cache / name, (long_ago, long_ago))
            service = subprocess.Popen(["sh", "-c", "read end", f"{cache}/code-running/velikiy"], stdin=subprocess.PIPE)
            try:
                environment = clean_environment(PYTHONPATH=str(ROOT), VELIKIY_CACHE=str(cache))
                status = [sys.executable, "-P", "-m", "velikiy.stack", "status", "--data", str(cache / "data")]
                subprocess.run(status, env=environment, capture_output=True, check=False)
            finally:
                service.kill()
                service.communicate()
            [copied] = {entry.name for entry in cache.iterdir()} - set(left)
            assert copied.startswith("code-")
            assert {entry.name for entry in cache.iterdir()} - {copied} == {"code-running", "venv-lately", "others"}

    @root_only
    def test_no_process_of_a_stack_has_privileges(self, stack: Stack) -> None:
        account = pwd.getpwnam("velikiy")
        processes = leftovers(stack.data)
        assert len(processes) >= 10
        for pid in processes:
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(rf"^Uid:\s+{account.pw_uid}\s+{account.pw_uid}\s", status, re.MULTILINE)
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)

    def test_app_raises_its_limit_of_descriptors_so_that_queued_writes_keep_their_connections(
        self, stack: Stack
    ) -> None:
        """Most systems have a limit of 1024 at first."""
        for worker in children_of(stack.pids()["app1"]):
            [limit] = re.findall(r"Max open files +(\d+)", Path(f"/proc/{worker}/limits").read_text())
            assert int(limit) >= 4096

    def test_app_processes_share_the_cpus_and_each_stays_on_one(self, stack: Stack) -> None:
        def used() -> list[list[int]]:
            """Return the CPUs that each worker may use. Until a worker has started, it may use all."""
            workers = [worker for app in ("app1", "app2") for worker in children_of(stack.pids()[app])]
            return sorted(sorted(cpus_of(worker)) for worker in workers)

        available = sorted(os.sched_getaffinity(0))
        expected = sorted([available[number % len(available)]] for number in range(4))
        wait_until(lambda: used() == expected)
        # A worker that replaces another takes over its CPU.
        killed = next(iter(children_of(stack.pids()["app1"])))
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in (now := children_of(stack.pids()["app1"])) and len(now) == 2)
        wait_until(lambda: used() == expected)

    @root_only
    def test_low_port_gives_its_edge_one_capability_and_other_processes_none(self) -> None:
        port = next(number for number in range(600, 1023) if not status_of(f"http://127.0.0.1:{number}/"))
        with running("--port", str(port)) as stack:
            edge = stack.pids()["edge1"]
            for name, pid in stack.pids().items():
                status = Path(f"/proc/{pid}/status").read_text()
                capabilities = int(re.findall(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)[0], 16)
                assert capabilities == (1 << 10 if pid == edge else 0), name  # CAP_NET_BIND_SERVICE is number 10

    def test_passwords_are_readable_only_by_the_services(self, stack: Stack) -> None:
        assert stack.data.joinpath("secrets").stat().st_mode & 0o077 == 0
        for secret in (stack.data / "secrets").iterdir():
            assert secret.stat().st_mode & 0o077 == 0, secret.name

    def test_edge_of_another_stack_on_the_same_port_is_not_ready(self, stack: Stack) -> None:
        plan = Plan.load(stack.data)
        assert plan is not None
        assert is_ready(plan)
        assert not is_ready(dataclasses.replace(plan, identity="another"))


class Foreground(NamedTuple):
    process: subprocess.Popen[bytes]
    data: Path
    url: str
    stdout: Path
    """The logs."""
    stderr: Path
    """The messages of the launcher."""

    def is_up(self) -> bool:
        return status_of(f"{self.url}/health") == 200


@pytest.fixture
def foreground() -> Iterator[Foreground]:
    """Run `./run up` in the foreground, and return before it is ready."""
    with folder() as temporary:
        data, port = temporary / "data", free_ports(1)
        out, err = temporary / "stdout", temporary / "stderr"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [ROOT / "run", "up", "--data", data, "--port", str(port)],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        try:
            yield Foreground(process, data, f"http://127.0.0.1:{port}", out, err)
        finally:
            process.kill()
            process.wait()
            run("down", "--wipe", "--data", str(data))


class TestInTheForeground:
    def test_up_shows_the_logs_and_ctrl_c_stops_all_processes(self, foreground: Foreground) -> None:
        wait_until(foreground.is_up, within=60)
        request_id = requests.get(f"{foreground.url}/health", timeout=5).headers["X-Request-Id"]
        wait_until(lambda: request_id in foreground.stdout.read_text())
        foreground.process.send_signal(signal.SIGINT)
        assert foreground.process.wait(timeout=60) == 0
        assert leftovers(foreground.data) == []
        assert not foreground.is_up()

    def test_down_elsewhere_ends_up_in_the_foreground(self, foreground: Foreground) -> None:
        wait_until(foreground.is_up, within=60)
        assert run("down", "--data", str(foreground.data)).returncode == 0
        assert foreground.process.wait(timeout=30) == 0
        assert foreground.stderr.read_text().strip().endswith("the stack was stopped by another command")

    def test_start_that_is_interrupted_twice_leaves_no_process(self, foreground: Foreground) -> None:
        wait_until(lambda: (foreground.data / "run" / "supervisor.sock").exists(), within=60, every=0.01)
        foreground.process.send_signal(signal.SIGINT)
        time.sleep(0.1)  # a person's second Ctrl-C
        foreground.process.send_signal(signal.SIGINT)
        assert foreground.process.wait(timeout=60) == 130
        assert "nothing is left running" in foreground.stderr.read_text()
        assert leftovers(foreground.data) == []


class TestStopping:
    def test_down_keeps_the_data_and_wipe_deletes_it(self) -> None:
        with folder() as temporary:
            data = temporary / "data"
            with running(data=data) as stack:
                created = requests.post(f"{stack.edge}/users", json={"name": "S", "email": "s@example.com"}, timeout=5)
                assert run("down", "--data", str(data)).returncode == 0
                assert leftovers(data) == []
                assert status_of(f"{stack.edge}/health") == 0
                assert run("status", "--data", str(data)).returncode == 3
                began = time.monotonic()
                assert (
                    run("up", "--detach", "--data", str(data), "--port", stack.edge.rpartition(":")[2]).returncode == 0
                )
                print(f"warm start: {time.monotonic() - began:.1f} s")
                user = requests.get(stack.edge + created.headers["Location"], timeout=5).json()
                assert user["name"] == "S"
                foreign = {"mine.txt", "postgres_backup.sql", "edge-cases.md", "package.json"}
                for name in foreign:
                    (data / name).write_text("not a file of the stack")
                assert run("down", "--wipe", "--data", str(data)).returncode == 0
                assert {entry.name for entry in data.iterdir()} == foreign

    def test_down_of_a_stack_that_does_not_exist_succeeds_and_creates_nothing(self) -> None:
        with folder() as temporary:
            assert run("down", "--data", str(temporary / "nothing")).returncode == 0
            assert not (temporary / "nothing").exists()

    def test_status_of_a_stack_that_does_not_exist_is_not_ready(self) -> None:
        with folder() as temporary:
            completed = run("status", "--json", "--data", str(temporary / "nothing"))
            assert completed.returncode == 3
            assert json.loads(completed.stdout)["ready"] is False


def test_logs_shows_only_lines_of_the_named_process_and_about_it(stack: Stack) -> None:
    logs = run("logs", "postgres", "-n", "100000", "--data", str(stack.data))
    assert logs.returncode == 0
    assert "ready to accept connections" in logs.stdout
    assert {line.split()[1] for line in logs.stdout.splitlines()} == {"postgres", "supervisor"}
    about = [line for line in logs.stdout.splitlines() if line.split()[1] == "supervisor"]
    assert all("postgres" in line for line in about)


def test_velikiy_commands_use_the_stack_of_the_data_folder(stack: Stack) -> None:
    migrated = run("velikiy", "migrate", DATA=str(stack.data))
    assert (migrated.returncode, migrated.stdout.strip()) == (0, "the tables are up to date")


def test_test_app_sh_passes_and_deletes_its_users(stack: Stack) -> None:
    before = stack.sql("SELECT count(*) FROM users")
    passed = subprocess.run([ROOT / "test_app.sh", stack.edge], capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stdout
    assert passed.stdout.strip().endswith("8 of 8 checks passed")
    assert stack.sql("SELECT count(*) FROM users") == before


@pytest.mark.long
def test_proxy_for_downloads_does_not_stand_between_the_launcher_and_its_stack() -> None:
    nowhere = "http://127.0.0.1:1"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"), nowhere)
    with running(**proxies) as stack:  # type: ignore[arg-type]
        wait_until(lambda: run("status", "--data", str(stack.data), **proxies).returncode == 0, within=60)
        passed = subprocess.run(
            [ROOT / "test_app.sh", stack.edge], env=clean_environment(**proxies), capture_output=True, check=False
        )
        assert passed.returncode == 0, passed.stdout


def test_test_app_sh_fails_without_a_stack() -> None:
    failed = subprocess.run(
        [ROOT / "test_app.sh", f"http://127.0.0.1:{free_ports(1)}"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "no response from" in failed.stderr
