"""`./run` refuses a command with one message, and changes nothing."""

import subprocess
from pathlib import Path

import pytest

from testkit.machine import port_in_use, root_only, small_disk
from testkit.stack import ROOT, Stack, clean_environment, folder, free_ports, refused, run, running, start
from velikiy.stack.reaper import leftovers


def test_start_on_a_port_in_use_is_refused_and_can_be_repeated() -> None:
    port = free_ports(2)
    with folder() as temporary:
        with port_in_use(port + 1):
            message = refused("up", "--detach", "--data", str(temporary / "data"), "--port", str(port), "--edges", "2")
        assert f"Port {port + 1} on 127.0.0.1 is in use" in message
        # The refused start does not prevent the next start.
        with running("--port", str(port), "--edges", "2", data=temporary / "data") as stack:
            assert stack.healthy()


def test_start_on_an_address_of_another_machine_is_refused() -> None:
    with folder() as temporary:
        assert "no address" in refused(
            "up", "--detach", "--data", str(temporary / "data"), "--bind", "203.0.113.7", AUTH="off"
        )


def test_start_in_a_folder_with_other_files_is_refused() -> None:
    with folder() as temporary:
        (temporary / "thesis.txt").write_text("mine")
        assert "contains other files" in refused("up", "--detach", "--data", str(temporary))
        assert [entry.name for entry in temporary.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["status", "logs", "psql", "restart", "down", "velikiy cache show /users/1"])
def test_command_for_a_folder_that_is_no_data_folder_says_so(command: str, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()  # a name that data folders have, too
    (tmp_path / "thesis.txt").write_text("mine")
    kinds = {"": "contains other files and no stack", "thesis.txt": "is not a folder", "thesis.txt/x": "is in a file"}
    for path, reason in kinds.items():
        if command == "status" or not path:
            assert f"{tmp_path / path} {reason}" in refused(*command.split(), "--data", str(tmp_path / path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["redis", "thesis.txt"]


def test_command_for_a_folder_without_a_stack_names_the_folder() -> None:
    with folder() as temporary:
        for command in ("psql", "restart", "velikiy users export"):
            assert f"There is no stack in {temporary}. Start it with" in refused(
                *command.split(), "--data", str(temporary)
            )


@root_only
def test_start_in_a_folder_that_the_services_cannot_enter_is_refused() -> None:
    with folder() as temporary:
        (temporary / "closed").mkdir(mode=0o700)
        assert "may not enter" in refused("up", "--detach", "--data", str(temporary / "closed" / "data"))


@pytest.mark.parametrize(("name", "reason"), [("é" * 40, "too long for sockets"), ("a,b", "contains ,")])
def test_start_in_a_folder_whose_path_no_socket_can_have_is_refused(name: str, reason: str) -> None:
    with folder() as temporary:
        assert reason in refused("up", "--detach", "--data", str(temporary / name))


def test_start_with_an_unreachable_database_is_refused_and_leaves_no_process() -> None:
    # Nothing listens on port 1.
    with folder() as temporary:
        nowhere = "postgresql://me@127.0.0.1:1/nothing"
        completed = run(
            "up", "--detach", "--data", str(temporary / "data"), "--port", str(free_ports(1)), DATABASE_URL=nowhere
        )
        assert completed.returncode == 1
        assert "DATABASE_URL" in completed.stderr.strip().splitlines()[-1]
        assert leftovers(temporary / "data") == []


def test_data_of_another_postgresql_version_is_refused_and_untouched(stopped_stack: Stack) -> None:
    version = stopped_stack.data / "postgres" / "PG_VERSION"
    own_version = version.read_text()
    version.write_text("12\n")
    contents = {f: f.stat().st_mtime_ns for f in (stopped_stack.data / "postgres").rglob("*")}
    assert "made by PostgreSQL 12" in refused(
        "up", "--detach", "--data", str(stopped_stack.data), "--port", stopped_stack.port
    )
    assert {f: f.stat().st_mtime_ns for f in (stopped_stack.data / "postgres").rglob("*")} == contents
    version.write_text(own_version)
    assert start(stopped_stack).returncode == 0


def test_console_of_a_stopped_stack_says_how_to_start_it(stopped_stack: Stack) -> None:
    for command, server in (("psql", "PostgreSQL"), ("redis", "Redis")):
        message = refused(command, "--data", str(stopped_stack.data))
        assert f"The {server} of the stack in {stopped_stack.data} does not run." in message
        assert f"run up --detach --data {stopped_stack.data} starts a stack" in message


def test_damaged_stack_json_is_refused_by_name_and_can_be_deleted(stopped_stack: Stack) -> None:
    description = stopped_stack.data / "stack.json"
    description.write_text("")
    message = refused("up", "--detach", "--data", str(stopped_stack.data), "--port", stopped_stack.port)
    assert f"{description} cannot be read" in message
    description.unlink()
    assert start(stopped_stack).returncode == 0


@root_only
def test_start_on_a_full_disk_is_refused_and_creates_nothing() -> None:
    with small_disk(60) as disk:
        message = refused("up", "--detach", "--data", str(disk.folder / "data"), "--port", str(free_ports(1)))
        assert "MB left" in message
        assert list(disk.folder.iterdir()) == []


def test_start_with_a_low_limit_of_open_files_is_refused_or_warns_by_name() -> None:
    with folder() as temporary:
        for limit, code, message in ((512, 1, "limit of open files is 512"), (4096, 0, "limit of open files is 4096")):
            command = f"ulimit -n {limit}; {ROOT}/run up --detach --data {temporary}/data --port {free_ports(1)}"
            started = subprocess.run(
                ["bash", "-c", command], env=clean_environment(), capture_output=True, text=True, check=False
            )
            assert started.returncode == code, started.stderr
            assert message in started.stderr
        run("down", "--wipe", "--data", str(temporary / "data"))


@root_only
@pytest.mark.parametrize(
    ("release", "is_supported"),
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
def test_unsupported_system_is_refused_with_a_hint_to_docker(release: str, is_supported: bool) -> None:
    with folder() as temporary:
        (temporary / "os-release").write_text(release + "\n")
        # `packages` runs the check, and finds nothing to install.
        script = f"mount --bind {temporary}/os-release $(readlink -f /etc/os-release) && {ROOT}/run packages"
        completed = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
        )
    assert completed.returncode == (0 if is_supported else 1)
    assert ("docker compose up" in completed.stderr) is not is_supported


def test_logs_of_an_unknown_name_are_refused_with_the_known_names(stack: Stack) -> None:
    message = refused("logs", "mysql", "--data", str(stack.data))
    assert "app1, app2, edge1, edge2, metrics, postgres, redis" in message
