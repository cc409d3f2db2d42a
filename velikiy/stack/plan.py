"""Describe one stack: its folder, its ports and its size."""

import contextlib
import hashlib
import json
import random
import re
import secrets
import shlex
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from velikiy import whole_file
from velikiy.stack import Refusal
from velikiy.stack.messages import command

DATA_FOLDER_ENTRIES = re.compile(
    r"(run|logs|secrets|postgres|postgres\.new|postgres\.before-\w+|redis|relay|metrics|prometheus|tls|versions|app\d+|edge\d+|lock"
    r"|stack\.json(\.new)?)"
)
"""The names that a stack creates in its data folder. Other files there belong to other programs or people."""

INNER_PORTS = range(20_000, 30_000)
"""Below the range from which Linux gives ports to clients. A client must not take a port while its server restarts."""


COMPATIBILITY = 3
"""Raise this number if processes of the version before and of this version cannot work side by side: on one schema of
the database, one Redis, the same edges. `up` then stops the old version before it starts the new one."""


@dataclass
class Plan:
    """A stack as its user wants it. The data folder keeps it as stack.json."""

    data: str
    bind: str
    port: int
    edges: int
    apps: int
    reload: bool
    own_postgres: bool
    own_redis: bool
    tls_cert: str = ""
    """The file with the certificate of the edges, or "" for plain HTTP."""

    tls_key: str = ""
    http_port: int = 0
    """The port where the first edge redirects plain HTTP to TLS, or 0."""

    app_ports: list[int] = field(default_factory=list)
    """The ports of the apps for people and tests. The edges reach the apps at `app_socket`."""

    control_ports: list[int] = field(default_factory=list)
    """The ports of the edges' control listeners, where writers reach them."""

    metrics_port: int = 0
    """Where Prometheus reads the metrics of the whole stack, 0 without metrics."""

    monitoring: bool = False
    """The stack has a Prometheus of its own."""

    prometheus_port: int = 0
    log_file_size: int = 10
    log_files: int = 4
    log_level: str = "info"

    redis_memory: int = 256
    """Megabytes for the entries in the stack's own Redis."""

    wal_archive: str = ""
    """The folder where PostgreSQL archives its log, or "" (velikiy/stack/recovery.py)."""

    fingerprint: str = ""
    """A digest of the code and the settings. `up` restarts a stack whose fingerprint is another."""

    compatibility: int = 0
    """COMPATIBILITY of the code that runs."""

    revision: str = ""
    """The newest migration of the code that runs."""

    options: dict[str, dict[str, Any]] | None = None
    """The options of `./run up` that later commands keep (velikiy/stack/options.py). None in a stack of an earlier
    release."""

    identity: str = field(default_factory=lambda: secrets.token_hex(8))
    """The name that this stack's edges return. A foreign edge, which may have taken the port first, has another."""

    # ---- paths and addresses ----

    @property
    def home(self) -> Path:
        return Path(self.data)

    @property
    def file(self) -> Path:
        return self.file_in(self.home)

    @staticmethod
    def file_in(data: Path) -> Path:
        return data / "stack.json"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def heartbeat(self) -> Path:
        """The file that the relay touches while it listens."""
        return self.home / "relay" / "heartbeat"

    @property
    def metrics_folder(self) -> Path:
        """The folder where the apps and the relay count. It is in memory: on a full disk, a process that counts in a
        file would be killed. A copy of the data folder has the same identity and another path."""
        return Path("/dev/shm") / f"velikiy-{self.identity}-{self._digest_of_home}"  # noqa: S108

    @property
    def metrics_folders(self) -> list[Path]:
        """All such folders of this data folder: also one of an identity that is lost."""
        return list(Path("/dev/shm").glob(f"velikiy-*-{self._digest_of_home}"))  # noqa: S108

    @property
    def _digest_of_home(self) -> str:
        return hashlib.sha256(str(self.home).encode()).hexdigest()[:16]

    @property
    def secrets_folder(self) -> Path:
        return self.home / "secrets"

    def secret(self, name: str) -> str:
        return (self.secrets_folder / name).read_text().strip()

    def has_secret(self, name: str, value: str) -> bool:
        return (self.secrets_folder / name).is_file() and self.secret(name) == value

    @property
    def direct_url(self) -> str:
        """The address of PostgreSQL itself, without a pooler."""
        direct = (self.secrets_folder / "database_direct_url").is_file()
        return self.secret("database_direct_url" if direct else "database_url")

    @property
    def cluster(self) -> Path:
        return self.home / "postgres"

    @property
    def sockets(self) -> Path:
        """The folder of the Unix sockets, which no other user may enter. PostgreSQL names its socket itself."""
        return self.home / "run"

    @property
    def redis_socket(self) -> Path:
        return self.sockets / "redis.sock"

    def app_socket(self, number: int) -> Path:
        return self.sockets / f"app{number}.sock"

    @property
    def edge_urls(self) -> list[str]:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.bind, bracketed(self.bind))  # noqa: S104
        scheme = "https" if self.tls_cert else "http"
        return [f"{scheme}://{host}:{port}" for port in self.edge_ports]

    @property
    def own_certificate(self) -> Path:
        """The certificate that signs itself, for trying (velikiy/stack/certificate.py)."""
        return self.home / "tls" / "cert.pem"

    @property
    def client_ports(self) -> list[int]:
        """All ports that the edges open for clients."""
        return [*self.edge_ports, *([self.http_port] if self.http_port else [])]

    @property
    def edge_ports(self) -> list[int]:
        return [self.port + n for n in range(self.edges)]

    @property
    def app_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.app_ports]

    @property
    def instances(self) -> list[str]:
        """The names of the apps and the edges."""
        return [*(f"app{n + 1}" for n in range(self.apps)), *(f"edge{n + 1}" for n in range(self.edges))]

    # ---- stack.json ----

    def save(self) -> None:
        saved = {name: value for name, value in asdict(self).items() if name != "data"}
        whole_file.replace(self.file, json.dumps(saved, indent=2) + "\n")

    @classmethod
    def load(cls, data: Path) -> "Plan | None":
        """Return the plan of the data folder, or None if there is no stack.

        Raises:
            Refusal: stack.json is damaged.
        """
        file = cls.file_in(data)
        try:
            saved = json.loads(file.read_text())
            # A newer version may have saved more.
            known = {name: value for name, value in saved.items() if name in cls.__dataclass_fields__}
            # The location of the file decides which folder it describes: a copy must not act for the original.
            plan = TypeAdapter(cls).validate_python({**known, "data": str(data)})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, AttributeError, RecursionError, IsADirectoryError):
            plan = None
        if plan is None or not plan._is_possible():
            raise Refusal(
                f"{file} cannot be read: its content is damaged. Stop the stack if it runs, delete this file and start"
                f" again; the data stays: {command('down', home=data)} && rm -r {shlex.quote(str(file))}"
            )
        return plan

    def _is_possible(self) -> bool:
        ports = (self.port, self.http_port, self.metrics_port, self.prometheus_port)
        numbers = (*ports, *self.app_ports, *self.control_ports)
        return all(0 <= number <= 65_535 for number in numbers) and min(self.edges, self.apps) > 0

    @classmethod
    def of_a_folder(cls, data: Path) -> "Plan":
        """Return a plan that is enough to stop what runs in the folder, if its own plan is lost."""
        return cls(str(data), "", 0, 0, 0, reload=False, own_postgres=True, own_redis=True)

    # ---- ports ----

    def keep_ports(self, running: "Plan") -> None:
        """Keep the inner ports of the running stack, and choose ports for further apps and edges."""
        self.metrics_port = self.metrics_port or running.metrics_port
        self.choose_ports(None)
        self.app_ports = [*running.app_ports, *self.app_ports[running.apps :]][: self.apps]
        self.control_ports = [*running.control_ports, *self.control_ports[running.edges :]][: self.edges]

    def choose_ports(self, previous: "Plan | None") -> None:
        """Choose the inner ports: the ports of the previous plan if they are free, else other free ports."""
        preferred = [previous.metrics_port, *previous.app_ports, *previous.control_ports] if previous else []
        taken: set[int] = set()

        def next_port() -> int:
            candidates = [preferred.pop(0)] if preferred else []
            for candidate in [*candidates, *random.sample(INNER_PORTS, 500)]:
                if candidate and candidate not in taken and is_free("127.0.0.1", candidate):
                    taken.add(candidate)
                    return candidate
            raise OSError("no free port between 20000 and 30000")

        free_port = next_port()
        self.metrics_port = self.metrics_port or free_port
        self.app_ports = [next_port() for _ in range(self.apps)]
        self.control_ports = [next_port() for _ in range(self.edges)]


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_free(host: str, port: int) -> bool:
    """Return whether a server could listen on the port.

    Raises:
        PermissionError: This user may not open the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # servers set it too: TIME_WAIT does not count
        try:
            probe.bind((host, port))
            probe.listen()
        except PermissionError:
            raise
        except OSError:
            return False
    return True
