"""What runs where: one stack's folder, ports, and the table of its processes."""

import contextlib
import json
import os
import random
import re
import secrets
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from velikiy.settings import Knobs
from velikiy.stack import Refusal, privileges

OURS = re.compile(r"(run|logs|secrets|postgres|postgres\.new|redis|relay|app\d+|edge\d+|lock|stack\.json(\.new)?)")
"""What a data folder holds; anything else in it is somebody else's."""

INNER_PORTS = range(20_000, 30_000)
"""Below the range from which Linux gives ports to clients: one of those must not be taken while we restart."""


@dataclass
class Program:
    """One supervised process. It works in a folder of its own, by which its leftovers are recognised."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    stop_signal: str = "TERM"
    low_ports: bool = False


@dataclass
class Plan:
    """A stack as it was asked for; it is kept in the data folder as stack.json."""

    data: str
    bind: str
    port: int
    edges: int
    apps: int
    reload: bool
    own_postgres: bool
    own_redis: bool
    postgres_port: int = 0
    redis_port: int = 0
    app_ports: list[int] = field(default_factory=list)
    control_ports: list[int] = field(default_factory=list)
    """Of the edges, where writers reach them."""

    fingerprint: str = ""
    """Of code and settings: a stack that runs with others is started anew by `up`."""

    identity: str = field(default_factory=lambda: secrets.token_hex(8))
    """What its edges answer to tell themselves from others that may have got the port first."""

    # ---- where ----

    @property
    def home(self) -> Path:
        return Path(self.data)

    @property
    def file(self) -> Path:
        return self.home / "stack.json"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def heartbeat(self) -> Path:
        """Touched by the relay while it listens."""
        return self.home / "relay" / "heartbeat"

    @property
    def passwords(self) -> Path:
        return self.home / "secrets"

    def secret(self, name: str) -> str:
        return (self.passwords / name).read_text().strip()

    @property
    def cluster(self) -> Path:
        return self.home / "postgres"

    @property
    def edge_urls(self) -> list[str]:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.bind, bracketed(self.bind))  # noqa: S104
        return [f"http://{host}:{port}" for port in self.edge_ports]

    @property
    def edge_ports(self) -> list[int]:
        return [self.port + n for n in range(self.edges)]

    @property
    def app_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.app_ports]

    # ---- kept ----

    def save(self) -> None:
        new = self.home / "stack.json.new"
        kept = {name: value for name, value in asdict(self).items() if name != "data"}
        with new.open("w") as file:
            file.write(json.dumps(kept, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file)

    @classmethod
    def load(cls, data: Path) -> "Plan | None":
        file = data / "stack.json"
        try:
            # Where it is found is where it is: a copy or a moved folder must not speak for the original.
            return cls(**{**json.loads(file.read_text()), "data": str(data)})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):
            raise Refusal(
                f"{file} cannot be read: its content is damaged. Delete it and start again; the data stays."
            ) from None

    # ---- made ----

    def choose_ports(self, before: "Plan | None") -> None:
        """Those of the last time where they are free."""
        wanted = [before.postgres_port, before.redis_port, *before.app_ports, *before.control_ports] if before else []
        taken: set[int] = set()

        def port() -> int:
            candidates = [wanted.pop(0)] if wanted else []
            for candidate in [*candidates, *random.sample(INNER_PORTS, 500)]:
                if candidate and candidate not in taken and is_free("127.0.0.1", candidate):
                    taken.add(candidate)
                    return candidate
            raise OSError("no free port between 20000 and 30000")

        self.postgres_port, self.redis_port = port(), port()
        self.app_ports = [port() for _ in range(self.apps)]
        self.control_ports = [port() for _ in range(self.edges)]

    def programs(self, knobs: Knobs, binaries: Path | None) -> list[Program]:
        """`binaries`: PostgreSQL's, where it is ours to run."""
        # Nothing is compiled into the checkout, which is what runs with --reload; the copy is compiled already.
        python = {"PYTHONPATH": str(privileges.code()), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        given = {name.upper(): str(value) for name, value in knobs.model_dump(exclude_none=True).items()}
        programs = []
        if binaries:
            programs.append(
                Program(
                    "postgres",
                    [
                        *[str(binaries / "postgres"), "-D", str(self.cluster), "-p", str(self.postgres_port)],
                        *["-c", f"config_file={privileges.code()}/deploy/postgres/postgresql.conf"],
                        *["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="],
                    ],
                    stop_signal="INT",  # fast: disconnect everyone, then stop cleanly
                )
            )
        if self.own_redis:
            programs.append(
                Program(
                    "redis",
                    [
                        *["redis-server", f"{privileges.code()}/deploy/redis/redis.conf", "--bind", "127.0.0.1"],
                        *["--port", str(self.redis_port), "--dir", str(self.home / "redis")],
                        *["--include", str(self.passwords / "redis.conf")],
                    ],
                )
            )
        direct = str(knobs.redis_direct or self.own_redis)
        ours = {**python, **given, "REDIS_DIRECT": direct, "SECRETS_DIR": str(self.passwords)}
        relay = [sys.executable, "-P", "-m", "velikiy", "relay", "--heartbeat", str(self.heartbeat)]
        programs.append(Program("relay", relay, ours))
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", f"{privileges.code()}/velikiy/server/gunicorn.conf.py"]
        cpu = knobs.app_first_cpu or 0
        for n, port in enumerate(self.app_ports, 1):
            programs.append(
                Program(
                    f"app{n}",
                    [*gunicorn, *(["--reload"] if self.reload else []), "velikiy:create_app()"],
                    {**ours, "APP_LISTEN": f"127.0.0.1:{port}", "APP_FIRST_CPU": str(cpu)},
                )
            )
            if cpu >= 0:
                cpu = (cpu + knobs.app_workers) % (os.cpu_count() or 1)
        for n, (port, control) in enumerate(zip(self.edge_ports, self.control_ports, strict=True), 1):
            programs.append(
                Program(
                    f"edge{n}",
                    [f"{privileges.code()}/edge/start"],
                    {
                        "EDGE_ID": self.identity,
                        "EDGE_DATA": str(self.home / f"edge{n}"),
                        "EDGE_LISTEN": f"{bracketed(self.bind)}:{port}",
                        "EDGE_CONTROL": f"127.0.0.1:{control}",
                        "EDGE_APPS": ",".join(f"127.0.0.1:{p}" for p in self.app_ports),
                        "EDGE_TTL": str(knobs.edge_ttl),
                        "EDGE_MEMORY": str(knobs.edge_memory),
                        "EDGE_WORKERS": str(knobs.edge_workers),
                        "REDIS_TIMEOUT": str(knobs.redis_timeout),
                        "SECRETS_DIR": str(self.passwords),
                        "DATABASE_TIMEOUT": str(knobs.database_timeout),
                    },
                    stop_signal="QUIT",  # finishes what it is answering
                    low_ports=port < 1024,
                )
            )
        return programs


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there.

    Raises:
        PermissionError: not as this user.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT does not count
        try:
            probe.bind((host, port))
            probe.listen()
        except PermissionError:
            raise
        except OSError:
            return False
    return True
