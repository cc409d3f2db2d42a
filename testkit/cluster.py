"""Several machines on one machine: network namespaces on a bridge, whose links a test cuts, slows and makes lossy.

    with cluster(nodes=3) as machines:
        first, second, third = machines.hosts
        first.start("redis", "redis-server", "--bind", first.address)
        machines.cut(first, second)

Only root can do this. Each host has an address of its own, and the processes of a host share nothing with another host
but the disk. `outside` is the test's own end of the bridge, for clients outside all hosts. A process enters a host by
`nsenter --net=/run/netns/NAME`: `ip netns exec` would hide the cgroups, without which no Docker Engine starts.

A second process, `sweep`, ends every process of the hosts and removes them when this process lets go of it, also if
this process was killed. A test that follows would remove what a killed `sweep` has left.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from testkit.stack import folder, wait_until

NETWORK = "198.18"
"""The networks 198.18.0.0/15 are set aside for measurements (RFC 2544), so no machine has an address in them."""

OUTSIDE_HOST = 254

NAMESPACES = Path("/run/netns")

MAX_CLUSTERS = 200

PACKETS_QUEUE = 7
"""The number of the first queue through which the packets of slow links pass. Each delay of a host has a queue."""


@dataclass(frozen=True)
class Link:
    """How packets travel in one direction."""

    loss: float = 0.0
    """The share of packets that are lost; 1 is a cut."""
    delay_s: float = 0.0


INTACT, CUT = Link(), Link(loss=1)


@dataclass(eq=False)
class Host:
    name: str
    """The name of its network namespace."""
    address: str
    folder: Path
    """A folder that every user may enter and write, for the data and logs of this host."""
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    """The links on which packets arrive, by the address of the sender and, if only some packets are meant, the ports
    of these packets, as iptables selects them."""
    links_out: dict[tuple[str, str], Link] = field(default_factory=dict)
    """The links to the outside, which is no host that could drop packets itself."""
    _delays: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *command: str, user: str = "") -> list[str]:
        """Return the command that runs this command in the host."""
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return ["nsenter", f"--net={NAMESPACES / self.name}", "--", *as_user, *command]

    def start(self, name: str, *command: str, user: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """Start a process, whose output goes to `log(name)`. It leads a process group."""
        with self._log_file(name).open("ab") as output:
            return subprocess.Popen(
                self.command(*command, user=user),
                env={**os.environ, **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, *command: str, user: str = "", **environment: str) -> str:
        """Run a command to its end, and return its output."""
        completed = subprocess.run(
            self.command(*command, user=user),
            env={**os.environ, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, f"{command}: {completed.stderr}"
        return completed.stdout

    def log(self, name: str) -> str:
        return self._log_file(name).read_text(errors="replace")

    def _log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def processes(self, *words: str) -> dict[int, str]:
        """Return the pid and the command line of each process of this host whose command line has one of the words; of
        every process without words."""
        found = {}
        for pid in _pids([self.name]):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if not words or any(word in line for word in words):
                    found[pid] = line
        return found

    def signal(self, number: signal.Signals, *words: str) -> None:
        """Send a signal to the processes of this host whose command line has one of the words."""
        for pid in self.processes(*words):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, *words: str) -> None:
        """Kill these processes, or all: as if the host had lost its power."""

        def are_gone() -> bool:
            self.signal(signal.SIGKILL, *words)
            return not self.processes(*words)

        wait_until(are_gone)

    def apply_links(self) -> None:
        """Give the kernel the rules of these links, all at once."""
        delays = sorted({it.delay_s for it in (*self.links.values(), *self.links_out.values()) if it.delay_s})
        queues = {delay: PACKETS_QUEUE + n for n, delay in enumerate(delays)}
        rules = ["*raw"]
        for (address, ports), link in self.links.items():
            rules += _rules(f"-A PREROUTING -s {address}{ports}", link, queues)
        for (address, ports), link in self.links_out.items():
            rules += _rules(f"-A OUTPUT -d {address}{ports}", link, queues)
        subprocess.run(
            self.command("iptables-restore", "--wait"), input="\n".join([*rules, "COMMIT\n"]), text=True, check=True
        )
        while self._delays:
            self._delays.pop().kill()
        for delay, queue in queues.items():  # packets are lost for some milliseconds, until the process has begun
            self._delays.append(self.start("delay", sys.executable, "-P", str(Path(__file__).with_name("delay.py")),
                                           str(queue), str(delay)))  # fmt: skip


def _rules(of: str, link: Link, queues: dict[float, int]) -> list[str]:
    rules = []
    if link.loss >= 1:
        rules.append(f"{of} -j DROP")
    elif link.loss:
        rules.append(f"{of} -m statistic --mode random --probability {link.loss} -j DROP")
    if link.delay_s:
        rules.append(f"{of} -j NFQUEUE --queue-num {queues[link.delay_s]}")
    return rules


@dataclass
class Cluster:
    hosts: list[Host]
    outside: str
    """The address of this process on the network of the hosts."""
    _cable: str
    """The network device of this process that leads to the hosts."""

    def add_outside_address(self) -> str:
        """Give this process a second address, and return it. Links to it are separate from those to `outside`."""
        address = f"{self.outside.rpartition('.')[0]}.{OUTSIDE_HOST - 1}"
        _ip("address", "add", f"{address}/24", "dev", self._cable)
        return address

    def cut(self, sender: Host | str, *receivers: Host | str, both_ways: bool = True) -> None:
        """Lose every packet from the sender to the receivers, and also back unless `both_ways` is false."""
        self.change(CUT, sender, receivers, both_ways=both_ways)

    def slow(self, sender: Host | str, *receivers: Host | str, delay_s: float, both_ways: bool = True) -> None:
        self.change(Link(delay_s=delay_s), sender, receivers, both_ways=both_ways)

    def lose(self, sender: Host | str, *receivers: Host | str, share: float, both_ways: bool = True) -> None:
        self.change(Link(loss=share), sender, receivers, both_ways=both_ways)

    def isolate(self, host: Host) -> None:
        """Cut a host off from all other hosts, and not from the outside."""
        self.cut(host, *(other for other in self.hosts if other is not host))

    def mend(self) -> None:
        """Make all links intact."""
        for host in self.hosts:
            if host.links or host.links_out:
                host.links, host.links_out = {}, {}
                host.apply_links()

    def change(
        self, link: Link, sender: Host | str, receivers: Sequence[Host | str], *, both_ways: bool, port: int = 0
    ) -> None:
        """Change how packets travel from the sender to the receivers. `outside` may be one of them.

        Args:
            both_ways: Change the way back as well.
            port: Change only connections to this port of the receivers.
        """
        there, back = (f" -p tcp --dport {port}", f" -p tcp --sport {port}") if port else ("", "")
        ways = [(sender, receiver, there) for receiver in receivers]
        if both_ways:
            ways += [(receiver, sender, back) for receiver in receivers]
        self._apply(link, ways)

    def change_back(self, link: Link, sender: Host | str, receivers: Sequence[Host | str], *, port: int = 0) -> None:
        """Change how packets travel back from the receivers to the sender: of connections to this port, if given."""
        back = f" -p tcp --sport {port}" if port else ""
        self._apply(link, [(receiver, sender, back) for receiver in receivers])

    def _apply(self, link: Link, ways: Sequence[tuple[Host | str, Host | str, str]]) -> None:
        changed: dict[Host, None] = {}
        for source, target, ports in ways:
            if isinstance(target, Host):
                target.links[source.address if isinstance(source, Host) else source, ports] = link
                changed[target] = None
            else:
                assert isinstance(source, Host), "the outside is one place"
                source.links_out[target, ports] = link
                changed[source] = None
        for host in changed:
            host.apply_links()


@contextmanager
def cluster(nodes: int = 3) -> Iterator[Cluster]:
    """Make hosts that this process and each other reach, and remove them with all their processes at the end."""
    slot, lock = _slot()
    with lock, folder() as data:
        _remove(slot)
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "testkit.cluster", str(slot), str(data)],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,  # its end is the end of this process
            pass_fds=[lock.fileno()],  # the slot stays taken until the sweep is over
            start_new_session=True,
        ) as sweep:
            try:
                yield _make(slot, nodes, data)
            finally:
                assert sweep.stdin
                sweep.stdin.close()


def _make(slot: int, nodes: int, data: Path) -> Cluster:
    hosts = []
    switch = f"velikiy-{slot}-switch"
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for number in range(1, nodes + 1):
        name = f"velikiy-{slot}-{number}"
        host = Host(name, f"{NETWORK}.{slot}.{number}", data / f"host{number}")
        host.folder.mkdir()
        host.folder.chmod(0o777)
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", switch)
        _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        _plug_in(switch, f"port{number}")
        hosts.append(host)
    outside = f"{NETWORK}.{slot}.{OUTSIDE_HOST}"
    _ip("link", "add", f"velikiy{slot}", "type", "veth", "peer", "name", "outside", "netns", switch)
    _ip("address", "add", f"{outside}/24", "dev", f"velikiy{slot}")
    _ip("link", "set", f"velikiy{slot}", "up")
    _plug_in(switch, "outside")
    return Cluster(hosts, outside, f"velikiy{slot}")


def _plug_in(switch: str, port: str) -> None:
    _ip("-n", switch, "link", "set", port, "master", "bridge")
    _ip("-n", switch, "link", "set", port, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _slot() -> tuple[int, IO[Any]]:
    """Take a number that no other cluster of this machine has, whichever checkout its test runs in. It is taken until
    the file is closed."""
    for slot in range(MAX_CLUSTERS):
        lock = Path(f"/run/lock/velikiy-cluster-{slot}").open("a")  # noqa: SIM115  # the caller closes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return slot, lock
    raise AssertionError("no slot for a cluster is free")


def _remove(slot: int) -> None:
    """End every process of the hosts, and remove the hosts."""
    names = [path.name for path in NAMESPACES.glob(f"velikiy-{slot}-*")]
    deadline = time.monotonic() + 20
    while (pids := _pids(names)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    # The kernel removes a namespace's cables only after the command that deletes it has ended, and the next cluster needs
    # the same name.
    subprocess.run(["ip", "link", "delete", f"velikiy{slot}"], check=False, stderr=subprocess.DEVNULL)
    for name in names:  # the switch takes the cables with it
        subprocess.run(["ip", "netns", "delete", name], check=False)


def _pids(namespaces: Sequence[str]) -> list[int]:
    """Return the processes in these network namespaces, whatever their process groups."""
    wanted = set()
    for name in namespaces:
        with suppress(FileNotFoundError):
            wanted.add((NAMESPACES / name).stat().st_ino)
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "ns/net").stat().st_ino in wanted:
                pids.append(int(process.name))
    return pids


def sweep(slot: int, data: Path) -> None:
    """Wait for the end of the test, and remove its hosts and their folders."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    _remove(slot)
    shutil.rmtree(data, ignore_errors=True)


if __name__ == "__main__":
    sweep(int(sys.argv[1]), Path(sys.argv[2]))
