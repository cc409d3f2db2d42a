"""Print the processes of the bare machine and their TCP ports as JSON. Runs beside the machine, in its namespaces."""

import json
from pathlib import Path

LISTEN = "0A"


def status(folder: Path) -> dict[str, str]:
    lines = (folder / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def sockets(folder: Path) -> set[str]:
    links = {str(link.readlink()) for link in (folder / "fd").iterdir() if link.is_symlink()}
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def listening() -> dict[str, int]:
    """Return the TCP port of each listening socket."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                if state == LISTEN:
                    found[inode] = int(local.rsplit(":", 1)[1], 16)
    return found


def processes() -> list[dict[str, object]]:
    ports = listening()
    found: list[dict[str, object]] = []
    for folder in sorted(Path("/proc").glob("[0-9]*")):
        try:
            fields, open_sockets = status(folder), sockets(folder)
            command = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # the process has ended meanwhile
            continue
        found.append(
            {
                "pid": int(folder.name),
                "parent": int(fields["PPid"]),
                "command": command,
                "uids": [int(uid) for uid in fields["Uid"].split()],
                "capabilities": int(fields["CapEff"], 16),
                "ports": sorted({ports[socket] for socket in open_sockets & ports.keys()}),
            }
        )
    return found


print(json.dumps(processes()))
