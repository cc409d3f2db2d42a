"""The hosts of `testkit.cluster` behave as machines: links fail in one direction, and nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.cluster import NAMESPACES, Cluster, Host, cluster
from testkit.machine import root_only
from testkit.stack import ROOT, wait_until

pytestmark = [pytest.mark.scale, root_only]

PORT = 18400

ECHO = f"""
import socket
server = socket.create_server(("0.0.0.0", {PORT}), backlog=100)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(100))
    connection.close()
"""

ASK = f"""
import socket, sys, time
began = time.monotonic()
connection = socket.create_connection((sys.argv[1], {PORT}), timeout=0.5)
connection.settimeout(5)
connection.sendall(b"hello")
assert connection.recv(100) == b"hello"
print(time.monotonic() - began)
"""


@pytest.fixture
def machines() -> Iterator[Cluster]:
    with cluster(nodes=3) as machines:
        for host in machines.hosts:
            host.start("echo", sys.executable, "-c", ECHO)
        for host in machines.hosts:
            wait_until(lambda host=host: reaches_from_outside(host))  # type: ignore[misc]
        yield machines


def reaches_from_outside(host: Host) -> bool:
    try:
        with socket.create_connection((host.address, PORT), timeout=0.5) as connection:
            connection.sendall(b"hello")
            return connection.recv(100) == b"hello"
    except OSError:
        return False


def reaches(sender: Host, receiver: Host) -> bool:
    command = sender.command(sys.executable, "-c", ASK, receiver.address)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def seconds_to(sender: Host, receiver: Host) -> float:
    return float(sender.run(sys.executable, "-c", ASK, receiver.address))


def runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_links_are_cut_one_by_one_and_mended(machines: Cluster) -> None:
    first, second, third = machines.hosts
    machines.cut(first, second)
    assert not reaches(first, second) and not reaches(second, first)
    assert reaches(first, third) and reaches(second, third) and reaches_from_outside(first)
    machines.mend()
    assert reaches(first, second) and reaches(second, first)


def test_isolated_host_is_reached_from_outside_only(machines: Cluster) -> None:
    first, second, third = machines.hosts
    machines.isolate(first)
    assert not reaches(second, first) and not reaches(first, third)
    assert reaches(second, third) and reaches_from_outside(first)
    machines.cut(first, machines.outside)
    assert not reaches_from_outside(first)


def test_link_that_is_cut_in_one_direction_delivers_the_packets_of_the_other(machines: Cluster) -> None:
    first, second, _ = machines.hosts
    receive = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 18401)); print(s.recv(9), flush=True)"
    )
    for host in (first, second):
        host.start("datagram", sys.executable, "-c", receive)
    machines.cut(first, second, both_ways=False)
    send = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(b'arrived', (sys.argv[1], 18401))"

    def arrives() -> bool:
        second.run(sys.executable, "-c", send, first.address)
        return "arrived" in first.log("datagram")

    wait_until(arrives)
    first.run(sys.executable, "-c", send, second.address)
    assert "arrived" not in second.log("datagram")


def test_slow_link_delays_each_packet(machines: Cluster) -> None:
    first, second, third = machines.hosts
    machines.slow(first, second, delay_s=0.1, both_ways=False)
    wait_until(lambda: reaches(first, second))
    # The packets of the connection's opening and of the request; the replies travel at full speed.
    assert seconds_to(first, second) > 0.2
    assert seconds_to(first, third) < 0.1


def test_lossy_link_loses_packets_and_delivers_others(machines: Cluster) -> None:
    first, second, _ = machines.hosts
    machines.lose(first, second, share=0.5)
    wait_until(lambda: reaches(first, second))
    wait_until(lambda: not reaches(first, second))


def test_killed_host_has_no_process_left(machines: Cluster) -> None:
    first, second, _ = machines.hosts
    assert first.processes("socket.create_server")
    first.kill()
    assert first.processes() == {}
    assert second.processes("socket.create_server")


def test_nothing_is_left_of_a_test_that_is_killed() -> None:
    script = (
        "import sys, time; from testkit.cluster import cluster\n"
        "with cluster(nodes=2) as machines:\n"
        "    machines.hosts[0].start('daemon', 'setsid', '--fork', 'sleep', '1000')\n"
        "    print(machines.hosts[0].name, machines.hosts[0].folder.parent, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as test:
        assert test.stdout
        name, _, path = test.stdout.readline().strip().partition(" ")
        folder = Path(path)
        assert folder.exists()
        host = Host(name, "", Path("/"))
        wait_until(lambda: host.processes("sleep"))
        pids = list(host.processes())
        test.send_signal(signal.SIGKILL)
    group = name.rpartition("-")[0]
    wait_until(lambda: not list(NAMESPACES.glob(f"{group}-*")), what="the hosts are removed")
    wait_until(lambda: not any(map(runs, pids)), what="its processes have ended")
    wait_until(lambda: not folder.exists(), what="their folders are removed")
