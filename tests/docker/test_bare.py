"""A new user types the commands of the README on a bare Debian machine.

The machine is a container with only the base system and Debian's python3. The tests follow the new user in the order of
this file: up, use, status, down, up again, wipe.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from . import machine as machines
from .engine import Engine, Say, docker
from .machine import BARE, DEBIAN_12, DEBIAN_13, Machine
from .stack import wait_until

pytestmark = [pytest.mark.bare, pytest.mark.timeout(1200)]

NET_BIND_SERVICE = 1 << 10


def image_of(machine: Machine) -> str:
    return docker("inspect", "--format", "{{.Config.Image}}", machine.name)


def processes_of(machine: Machine) -> list[dict[str, Any]]:
    # From a container beside the machine: inside, even root may not inspect the sockets of other users' processes.
    beside = [f"--{what}=container:{machine.name}" for what in ("pid", "network")]
    script = (BARE / "processes.py").read_text()
    command = ("run", "--rm", *beside, "--cap-add=SYS_PTRACE", image_of(machine), "python3", "-c", script)
    return list(json.loads(docker(*command)))


@pytest.fixture(scope="module", params=[DEBIAN_12, DEBIAN_13])
def image(request: pytest.FixtureRequest, engine: Engine, say: Say) -> Iterator[str]:
    with machines.image(request.param, say) as name:
        yield name


@pytest.fixture(scope="module")
def machine(image: str, checkout: Path, say: Say, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine on which the README's commands were typed."""
    failed_before = request.session.testsfailed
    with machines.machine(image) as machine:
        docker("cp", f"{checkout}/.", f"{machine.name}:{machines.HOME}")
        [up] = first_commands(checkout / "README.md")
        assert up == "./run up --detach"
        say(f"On a bare machine: {up}")
        machine.address = address_in(machine.run(up, limit=900))
        yield machine
        if request.session.testsfailed > failed_before:
            say(machine.run("./run status; ./run logs | tail -n 40; tail -n 40 /var/lib/velikiy/logs/*", check=False))


def first_commands(readme: Path) -> list[str]:
    block = re.search(r"^```sh\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    assert block, "README.md has no ```sh block"
    return [line for line in block[1].splitlines() if line and not line.startswith("#")][:2]


def address_in(output: str) -> str:
    found = re.search(r"http://[\w.]+(:\d+)?", output)
    assert found, f"no address was printed:\n{output}"
    return found[0]


def test_bare_machine_has_none_of_the_programs_that_the_stack_needs(image: str) -> None:
    lookup = "bash -c 'type -P curl git gcc nginx pip pip3 psql redis-server supervisord uv; true'"
    assert docker("run", "--rm", image, "sh", "-c", lookup) == ""
    packages = docker("run", "--rm", image, "dpkg-query", "--show", "--showformat", "${Package}\n").split()
    foreign = ("curl", "git", "nginx", "postgresql", "redis", "python3-pip", "python3-venv", "lua")
    assert not [package for package in packages if package.startswith(foreign)]


def test_up_without_root_names_the_missing_packages_and_stops(image: str, checkout: Path) -> None:
    with machines.machine(image) as machine:
        home = "/home/stranger/velikiy-flask"
        machine.run("useradd --create-home stranger", folder="/")
        docker("cp", f"{checkout}/.", f"{machine.name}:{home}")
        machine.run(f"chown -R stranger: {home}", folder="/")
        output = machine.run("runuser -u stranger -- ./run up --detach; echo exit status $?", folder=home)
        assert "apt-get install" in output
        assert "exit status 0" not in output


def test_address_that_up_prints_answers(machine: Machine) -> None:
    assert machine.request("GET", "/health") == (200, {"status": "healthy"})
    status, users = machine.request("GET", "/users")
    assert status == 200
    assert [user["name"] for user in users] == ["Alice", "Bob", "Charlie"]


def test_status_lists_the_processes_and_addresses(machine: Machine) -> None:
    status = machine.status()
    assert status["ready"] is True
    assert len(status["edges"]) == 1
    assert status["apps"]
    assert status["data"] == "/var/lib/velikiy"
    kinds = {re.match(r"[a-z]+", process["name"])[0] for process in status["processes"]}  # type: ignore[index]
    assert kinds >= {"edge", "app", "relay", "redis", "postgres"}
    running = {process["pid"] for process in processes_of(machine)}
    assert {process["pid"] for process in status["processes"]} <= running


def test_only_processes_of_the_stack_listen_after_the_packages_were_installed(machine: Machine) -> None:
    processes = {process["pid"]: process for process in processes_of(machine)}
    services = {process["pid"] for process in machine.status()["processes"]}

    def is_of_stack(pid: int) -> bool:
        return pid in services or (pid in processes and is_of_stack(processes[pid]["parent"]))

    listeners = [process for process in processes.values() if process["ports"]]
    assert listeners
    assert [process for process in listeners if not is_of_stack(process["pid"])] == []
    masters = [process for process in processes.values() if process["command"].startswith("nginx: master")]
    assert len(masters) == 1
    assert masters[0]["pid"] in services
    assert 80 in masters[0]["ports"]


def test_no_process_of_the_service_is_root_or_has_more_than_the_right_to_port_80(machine: Machine) -> None:
    processes = {process["pid"]: process for process in processes_of(machine)}
    assert {process["pid"] for process in machine.status()["processes"]} <= processes.keys()
    for process in processes.values():
        if 0 in process["uids"]:  # only the first processes of the container, and the process that runs this script
            assert re.search(r"sleep infinity$|^python3 -c", process["command"]), process
        else:
            # Nginx binds the port, and inherits the right from its supervisor.
            may_bind = re.match(r"nginx|.* -m velikiy\.stack\.supervisord", process["command"])
            allowed = NET_BIND_SERVICE if may_bind else 0
            assert process["capabilities"] & ~allowed == 0, process


def test_write_is_seen_by_the_next_read_on_a_bare_machine(machine: Machine) -> None:
    for name in ("Robert", "Bob"):
        for _ in range(2):
            assert machine.request("GET", "/users/2")[0] == 200
        assert machine.request("PUT", "/users/2", {"name": name})[0] == 200
        assert machine.request("GET", "/users/2")[1]["name"] == name


def test_sql_from_outside_is_seen_within_two_seconds_on_a_bare_machine(machine: Machine) -> None:
    def is_seen(name: str) -> bool:
        return bool(machine.request("GET", "/users/2")[1]["name"] == name)

    for name in ("Robert", "Bob"):
        assert not is_seen(name)
        statement = f"UPDATE users SET name = '{name}' WHERE id = 2"
        machine.run(f'psql "$(cat /var/lib/velikiy/secrets/database_url)" -c "{statement}"')
        wait_until(partial(is_seen, name), "the new name is read", limit=2)


def test_bare_machine_passes_all_checks_of_test_app(machine: Machine) -> None:
    # test_app.sh needs curl, and the service does not.
    machine.run("command -v curl || apt-get install --yes --no-install-recommends curl")
    machine.run(f"./test_app.sh {machine.address}")
    machine.run("./test_app.sh")


def test_down_ends_all_processes_and_up_finds_the_data_again(machine: Machine) -> None:
    user = {"name": "Вера", "email": "vera@example.com"}
    status, created = machine.request("POST", "/users", user)
    assert status == 201

    machine.run("./run down")
    assert machine.status()["ready"] is False
    assert not [process for process in processes_of(machine) if process["ports"]]

    machine.address = address_in(machine.run("./run up --detach"))
    status, found = machine.request("GET", f"/users/{created['id']}")
    assert status == 200
    assert found["name"] == "Вера"


def test_up_cleans_up_after_a_supervisor_that_was_killed(machine: Machine) -> None:
    before = {process["pid"] for process in machine.status()["processes"]}
    machine.run("kill -9 $(cat /var/lib/velikiy/run/supervisord.pid)")
    machine.address = address_in(machine.run("./run up --detach"))
    assert machine.status()["ready"] is True
    assert not before & {process["pid"] for process in processes_of(machine)}


def test_wipe_deletes_the_data(machine: Machine) -> None:
    machine.run("./run down --wipe")
    assert machine.run("ls -A /var/lib/velikiy 2>/dev/null || true") == ""
    machine.address = address_in(machine.run("./run up --detach"))
    status, users = machine.request("GET", "/users")
    assert status == 200
    assert [user["name"] for user in users] == ["Alice", "Bob", "Charlie"]
