"""systemd runs the stack on a machine that boots: `./run install-service`, reload, crashes, a power cut, removal.

The machine is a container whose first process is systemd. The tests follow an operator in the order of this file.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import machine as machines
from .engine import Engine, Say, docker
from .machine import DEBIAN_12, DEBIAN_13, Machine
from .stack import wait_until

pytestmark = [pytest.mark.bare, pytest.mark.boots, pytest.mark.timeout(1200)]

CHECKOUT = "/opt/velikiy-flask"


@pytest.fixture(scope="module", params=[DEBIAN_12, DEBIAN_13])
def machine(request: pytest.FixtureRequest, engine: Engine, checkout: Path, say: Say) -> Iterator[Machine]:
    """A machine on which `./run install-service` was typed."""
    failed_before = request.session.testsfailed
    with machines.image(request.param, say, machines.SYSTEMD) as image, machines.machine(image, boots=True) as machine:
        docker("cp", f"{checkout}/.", f"{machine.name}:{CHECKOUT}")
        say(f"On a machine that boots ({request.param}): ./run install-service")
        machine.address = "http://127.0.0.1"
        typed(machine, "./run install-service", limit=900)
        yield machine
        if request.session.testsfailed > failed_before:
            say(machine.run("systemctl status velikiy; journalctl -u velikiy -n 80", check=False, folder="/"))


def typed(machine: Machine, command: str, limit: float = 300, check: bool = True) -> str:
    return machine.run(command, folder=CHECKOUT, limit=limit, check=check)


def is_ready(machine: Machine) -> bool:
    return typed(machine, "./run status", check=False).startswith("ready")


def main_pid(machine: Machine) -> int:
    return int(typed(machine, "systemctl show --property MainPID --value velikiy"))


def pid_of(machine: Machine, name: str) -> int:
    found = re.search(rf"^ +{name} +running +(\d+) ", typed(machine, "./run status", check=False), re.MULTILINE)
    return int(found[1]) if found else 0


def journal(machine: Machine) -> str:
    return typed(machine, "journalctl --unit velikiy --output cat")


def test_installed_service_is_ready_and_starts_at_boot(machine: Machine) -> None:
    assert is_ready(machine)
    assert machine.request("GET", "/health") == (200, {"status": "healthy"})
    assert typed(machine, "systemctl is-enabled velikiy") == "enabled"
    assert typed(machine, "systemctl is-active velikiy") == "active"
    assert "Velikiy Flask is ready" in journal(machine)


def test_exposure_that_systemd_computes_is_below_3(machine: Machine) -> None:
    found = re.search(
        r"exposure level for velikiy.service: ([\d.]+)", typed(machine, "systemd-analyze security velikiy")
    )
    assert found
    assert float(found[1]) < 3
    assert (
        typed(machine, "systemd-analyze verify /etc/systemd/system/velikiy*.* 2>&1 | grep velikiy", check=False) == ""
    )


def test_service_writes_to_its_data_folder_only_and_is_never_root(machine: Machine) -> None:
    pid = main_pid(machine)
    for folder in ("/etc", "/opt", "/var/cache/velikiy", "/usr"):
        assert "Read-only" in typed(machine, f"nsenter --target {pid} --mount touch {folder}/new", check=False)
    status = typed(machine, f"cat /proc/{pid}/status")
    assert re.search(r"^CapBnd:\t0{13}400$", status, re.MULTILINE)  # only CAP_NET_BIND_SERVICE
    users = typed(machine, "cat $(sed 's,.*,/proc/&/status,' /sys/fs/cgroup/system.slice/velikiy.service/cgroup.procs)")
    own = typed(machine, "id --user velikiy")
    assert set(re.findall(r"^Uid:\t(\d+)", users, re.MULTILINE)) == {own}


def test_settings_with_secrets_can_be_read_by_root_and_the_service_only(machine: Machine) -> None:
    assert typed(machine, "stat --format '%a %U %G' /run/velikiy/start") == "640 root velikiy"


def test_reload_applies_a_changed_setting_and_keeps_the_service_alive(machine: Machine) -> None:
    before = main_pid(machine)
    typed(machine, "echo EDGE_TTL=33 > .env; systemctl reload velikiy")
    assert "EDGE_TTL=33" in typed(machine, "cat /var/lib/velikiy/run/edge1")
    assert main_pid(machine) == before
    assert is_ready(machine)


def test_change_that_needs_a_restart_of_everything_is_left_to_systemd(machine: Machine) -> None:
    typed(machine, "echo EDGE_SECRET=another-secret-of-the-test >> .env")
    assert "systemctl restart velikiy.service" in typed(machine, "./run up --detach", check=False)
    assert "failed" in typed(machine, "systemctl reload velikiy", check=False)
    assert machine.request("GET", "/health")[0] == 200  # a reload that is refused changes nothing
    typed(machine, "systemctl restart velikiy")
    assert machine.request("GET", "/health")[0] == 200


def test_down_stops_the_service_and_up_starts_it(machine: Machine) -> None:
    typed(machine, "./run down")
    assert typed(machine, "systemctl is-active velikiy", check=False) == "inactive"
    typed(machine, "./run up --detach")
    assert typed(machine, "systemctl is-active velikiy") == "active"
    assert machine.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("victim", ["launcher", "supervisord"])
def test_service_is_ready_again_after_its_heart_was_killed(machine: Machine, victim: str) -> None:
    pids = {"launcher": "$(systemctl show -p MainPID --value velikiy)", "supervisord": "$(cat run/supervisord.pid)"}
    before = main_pid(machine)
    machine.run(f"kill -9 {pids[victim]}", folder="/var/lib/velikiy")
    wait_until(lambda: main_pid(machine) not in (0, before) and is_ready(machine), "the service is ready", limit=300)


def test_app_that_hangs_is_killed_and_the_journal_says_so(machine: Machine) -> None:
    pid = pid_of(machine, "app1")
    typed(machine, f"kill -STOP $(cat /proc/{pid}/task/{pid}/children) {pid}")
    wait_until(lambda: pid_of(machine, "app1") not in (0, pid), "app1 is another process", limit=300)
    assert f"app1 ({pid}) has not answered for 30 s" in journal(machine)
    wait_until(lambda: is_ready(machine), "the stack is ready", limit=300)


def test_warnings_reach_the_journal_and_requests_do_not(machine: Machine) -> None:
    machine.request("GET", "/users/1?never=journaled")
    redis = pid_of(machine, "redis")
    typed(machine, f"kill -STOP {redis}")
    machine.request("PUT", "/users/2", {"name": "Bob"})
    typed(machine, f"kill -CONT {redis}")
    wait_until(lambda: '"event":"cache.fenced"' in journal(machine).replace(" ", ""), "the warning", limit=300)
    assert '"event":"request"' not in journal(machine).replace(" ", "")
    assert "cache.fenced" in typed(machine, "journalctl --unit velikiy --priority warning")


def test_launcher_that_hangs_is_restarted_by_the_watchdog(machine: Machine) -> None:
    before = main_pid(machine)
    typed(machine, f"kill -STOP {before}")
    wait_until(lambda: main_pid(machine) not in (0, before) and is_ready(machine), "the service is ready", limit=300)
    assert "Watchdog timeout" in journal(machine)


def test_acknowledged_write_is_there_after_a_power_cut_and_a_boot(machine: Machine) -> None:
    status, user = machine.request("POST", "/users", {"name": "Вера", "email": "vera@example.com"})
    assert status == 201
    machines.reboot(machine)
    wait_until(lambda: is_ready(machine), "the service has started at boot", limit=300)
    assert machine.request("GET", f"/users/{user['id']}")[1]["name"] == "Вера"


def test_removed_service_leaves_the_data_and_does_not_start_at_boot(machine: Machine) -> None:
    typed(machine, "./run uninstall-service")
    assert typed(machine, "ls /etc/systemd/system/*velikiy* /run/velikiy 2> /dev/null", check=False) == ""
    assert not is_ready(machine)
    machines.reboot(machine)
    assert "not running" in typed(machine, "./run status", check=False)
    typed(machine, "./run up --detach")
    assert [user["name"] for user in machine.request("GET", "/users")[1]][-1] == "Вера"
    typed(machine, "./run down")
