"""`./run` says why not, in one sentence, and leaves everything as it was."""

import subprocess

import pytest

from testkit.machine import listening, root_only, small_disk
from testkit.stack import ROOT, Stack, folder, free_ports, refused, run, running, start
from velikiy.stack.reaper import leftovers


def test_a_port_in_use() -> None:
    port = free_ports(2)
    with folder() as place:
        with listening(port + 1):
            said = refused("up", "--detach", "--data", str(place / "data"), "--port", str(port), "--edges", "2")
        assert f"Port {port + 1} on 127.0.0.1 is in use" in said
        # And it does not stand in the way of the next start.
        with running("--port", str(port), "--edges", "2", data=place / "data") as stack:
            assert stack.healthy()


def test_an_address_that_this_machine_does_not_have() -> None:
    with folder() as place:
        assert "no address" in refused("up", "--detach", "--data", str(place / "data"), "--bind", "203.0.113.7")


def test_a_folder_with_something_else_in_it() -> None:
    with folder() as place:
        (place / "thesis.txt").write_text("mine")
        assert "contains other files" in refused("up", "--detach", "--data", str(place))
        assert [entry.name for entry in place.iterdir()] == ["thesis.txt"]


@root_only
def test_a_folder_that_the_services_cannot_enter() -> None:
    with folder() as place:
        (place / "closed").mkdir(mode=0o700)
        assert "may not enter" in refused("up", "--detach", "--data", str(place / "closed" / "data"))


def test_a_database_server_that_is_not_there() -> None:
    # Nothing listens on port 1.
    with folder() as place:
        nowhere = "postgresql://me@127.0.0.1:1/nothing"
        answer = run(
            "up", "--detach", "--data", str(place / "data"), "--port", str(free_ports(1)), DATABASE_URL=nowhere
        )
        assert answer.returncode == 1
        assert "DATABASE_URL" in answer.stderr.strip().splitlines()[-1]
        assert leftovers(place / "data") == []


def test_data_of_another_postgresql_stays_untouched(stopped_stack: Stack) -> None:
    version = stopped_stack.data / "postgres" / "PG_VERSION"
    ours = version.read_text()
    version.write_text("12\n")
    contents = {f: f.stat().st_mtime_ns for f in (stopped_stack.data / "postgres").rglob("*")}
    assert "made by PostgreSQL 12" in refused(
        "up", "--detach", "--data", str(stopped_stack.data), "--port", stopped_stack.port
    )
    assert {f: f.stat().st_mtime_ns for f in (stopped_stack.data / "postgres").rglob("*")} == contents
    version.write_text(ours)
    assert start(stopped_stack).returncode == 0


def test_a_broken_description_is_named_and_can_be_deleted(stopped_stack: Stack) -> None:
    description = stopped_stack.data / "stack.json"
    description.write_text("")
    said = refused("up", "--detach", "--data", str(stopped_stack.data), "--port", stopped_stack.port)
    assert f"{description} cannot be read" in said
    description.unlink()
    assert start(stopped_stack).returncode == 0


@root_only
def test_a_full_disk() -> None:
    with small_disk(60) as disk:
        said = refused("up", "--detach", "--data", str(disk.place / "data"), "--port", str(free_ports(1)))
        assert "MB left" in said
        assert list(disk.place.iterdir()) == []


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
def test_another_system_is_told_to_use_docker(release: str, fits: bool) -> None:
    with folder() as place:
        (place / "os-release").write_text(release + "\n")
        # `packages` gets as far as the check and finds nothing to do.
        script = f"mount --bind {place}/os-release $(readlink -f /etc/os-release) && {ROOT}/run packages"
        answer = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == (0 if fits else 1)
    assert ("docker compose up" in answer.stderr) is not fits


def test_an_unknown_command_or_option() -> None:
    assert run("fly").returncode == 1
    assert "there is no command 'fly'" in run("fly").stderr
    assert run("up", "--fast").returncode == 2
    assert run("up", "--port", "many").returncode == 2
    assert run("--help").returncode == 0


def test_a_name_that_has_no_log_gets_those_that_have(stack: Stack) -> None:
    said = refused("logs", "mysql", "--data", str(stack.data))
    assert "app1, app2, edge1, edge2, postgres, redis" in said
