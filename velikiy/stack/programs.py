"""List the processes of a stack: their commands and environments.

supervisor starts each process with a script, `run/<name>` in the data folder. To run another version of a program is to
replace its script: supervisor needs no other configuration, and a crashed process comes back as the new version.
"""

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from velikiy import whole_file
from velikiy.settings import ServiceSettings
from velikiy.stack import privileges, recovery
from velikiy.stack.code_copy import code_folder
from velikiy.stack.plan import Plan, bracketed

FIRST_UNPRIVILEGED_PORT = 1024
"""Below this port a server needs a capability."""


@dataclass
class Program:
    """One supervised process. It works in a folder of its own, by which `reaper.leftovers` recognises it."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    configuration: tuple[Path, ...] = ()
    """The files that the process reads when it starts."""

    stop_signal: str = "TERM"
    needs_low_port: bool = False
    reaper: list[str] = field(
        default_factory=lambda: [sys.executable, "-S", str(code_folder() / "velikiy" / "stack" / "reaper.py")]
    )

    def version(self) -> str:
        """Return a digest of everything that the process is started with."""
        parts = (self.command, sorted(self.environment.items()), [file.read_bytes() for file in self.configuration])
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def running_version(self, plan: Plan) -> str | None:
        """Return the version in the script of the program, or None if there is no script."""
        try:
            return script(plan, self.name).read_text().splitlines()[1].removeprefix(VERSION_LINE)
        except (FileNotFoundError, IndexError):
            return None

    def write_script(self, plan: Plan) -> None:
        whole_file.replace(script(plan, self.name), self._script(), durable=False)

    def _script(self) -> str:
        command = [*self.reaper, *self.command]
        if not self.needs_low_port:
            command = privileges.WITHOUT_LOW_PORTS + command
        variables = [f"{name}={value}" for name, value in {**base_environment(), **self.environment}.items()]
        # No other variable of an older version reaches a newer one (velikiy/server/handover.py).
        passed_on = " ".join(f'${{{name}:+{name}="${name}"}}' for name in HANDOVER)
        start = f"exec env -i {shlex.join(variables)} {passed_on} {shlex.join(command)}"
        return f"#!/bin/sh\n{VERSION_LINE}{self.version()}\n{start}\n"


VERSION_LINE = "# version "

HANDOVER = ("LISTEN_FDS", "LISTEN_PID", "APP_PREDECESSORS")
"""The variables with which an app hands its listener over to its next version (velikiy/server/handover.py)."""


def script(plan: Plan, name: str) -> Path:
    return plan.home / "run" / name


def base_environment() -> dict[str, str]:
    """Return the few variables that any program needs. No other variable of a person's shell reaches the services."""
    passed_on = {name: os.environ[name] for name in ("TZ", "TMPDIR") if name in os.environ}
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **passed_on}


POSTGRES_LEVELS = {"debug": "debug1", "info": "info", "warning": "warning", "error": "error"}
REDIS_LEVELS = {"debug": "verbose", "info": "notice", "warning": "warning", "error": "warning"}
"""Redis' own "debug" reports each half second how full it is."""


def copy_configurations(plan: Plan) -> None:
    """Copy the configurations of servers to where their path is the same in each version of the code.

    The level and the rotation of the logs have files of their own, which are no part of `Program.configuration`: a
    change of them restarts no server.
    """
    texts = {
        "postgresql.level.conf": f"log_min_messages = {POSTGRES_LEVELS[plan.log_level]}\n",
        "redis.level.conf": f"loglevel {REDIS_LEVELS[plan.log_level]}\n",
        "log_rotation": f"{plan.log_file_size} {plan.log_files}\n",
    }
    for source in (
        "postgres/postgresql.conf",
        "postgres/archive-wal",
        "redis/redis.conf",
        "prometheus/native.yaml",
        "prometheus/rules.yaml",
    ):
        text = (code_folder() / "deploy" / source).read_text()
        text = text.replace("${METRICS_PORT}", str(plan.metrics_port))
        if source.endswith("postgresql.conf"):
            text += "\ninclude 'postgresql.level.conf'\n"
        texts[Path(source).name] = text
    for name, text in texts.items():  # as a whole: a server that ends meanwhile starts with the old or the new file
        whole_file.replace(_configuration(plan, name), text, durable=False)


def _configuration(plan: Plan, name: str) -> Path:
    return plan.home / "run" / name


def programs(plan: Plan, settings: ServiceSettings, binaries: Path | None) -> list[Program]:
    """Return the processes of the stack, in the order of their start.

    Args:
        plan: The stack.
        settings: The settings of the services.
        binaries: The folder of PostgreSQL's programs, or None if the stack uses another PostgreSQL server.
    """
    environment = _python_environment(plan, settings)
    return [
        *([_postgres(plan, binaries)] if binaries else []),
        *([_redis(plan)] if plan.own_redis else []),
        *([_metrics(plan)] if settings.metrics == "on" else []),
        *([_prometheus(plan)] if plan.monitoring else []),
        _relay(plan, environment),
        *_apps(plan, settings, environment),
        *_edges(plan, settings),
    ]


def _postgres(plan: Plan, binaries: Path) -> Program:
    return Program(
        "postgres",
        [
            *[str(binaries / "postgres"), "-D", str(plan.cluster)],
            *["-c", f"config_file={_configuration(plan, 'postgresql.conf')}", "-c", "listen_addresses="],
            # In quotation marks, because a comma would separate two folders.
            *["-c", f'unix_socket_directories="{plan.sockets}"', "-c", "unix_socket_permissions=0700"],
            *recovery.server_options(plan),
        ],
        configuration=(_configuration(plan, "postgresql.conf"),),
        stop_signal="INT",  # fast shutdown: disconnect all clients, then stop cleanly
    )


def _redis(plan: Plan) -> Program:
    return Program(
        "redis",
        [
            *["redis-server", str(_configuration(plan, "redis.conf")), "--port", "0"],
            *["--unixsocket", str(plan.redis_socket), "--unixsocketperm", "700"],
            *["--dir", str(plan.home / "redis"), "--include", str(plan.secrets_folder / "redis.conf")],
            *["--include", str(_configuration(plan, "redis.level.conf"))],
            *["--maxmemory", f"{plan.redis_memory}mb"],
        ],
        {"TZ": "UTC"},  # Redis logs local times
        configuration=(_configuration(plan, "redis.conf"), plan.secrets_folder / "redis.conf"),
    )


def _python_environment(plan: Plan, settings: ServiceSettings) -> dict[str, str]:
    return {
        "PYTHONPATH": str(code_folder()),
        "PYTHONUNBUFFERED": "1",
        # With --reload the services run from the checkout, where they must not write. A copy is compiled already.
        "PYTHONDONTWRITEBYTECODE": "1",
        **{name.upper(): str(value) for name, value in settings.model_dump(exclude_none=True).items()},
        "BIND": plan.bind,
        "REDIS_DIRECT": str(settings.redis_direct or plan.own_redis),
        "SECRETS_DIR": str(plan.secrets_folder / "app"),
        **({"PROMETHEUS_MULTIPROC_DIR": str(plan.metrics_folder)} if settings.metrics == "on" else {}),
        **authentication(plan),
    }


def authentication(plan: Plan) -> dict[str, str]:
    """Return the variable with which libpq sends no password in clear to a program on the port of PostgreSQL.

    A server of the user's own may authenticate in other ways.
    """
    return {"PGREQUIREAUTH": "scram-sha-256"} if plan.own_postgres else {}


def _metrics(plan: Plan) -> Program:
    command = [sys.executable, "-P", "-m", "velikiy.stack.scrape_target", str(plan.home), str(plan.metrics_port)]
    return Program("metrics", command, {"PYTHONPATH": str(code_folder()), "PYTHONDONTWRITEBYTECODE": "1"})


def _prometheus(plan: Plan) -> Program:
    return Program(
        "prometheus",
        [
            *["prometheus", f"--config.file={_configuration(plan, 'native.yaml')}"],
            *[f"--storage.tsdb.path={plan.home / 'prometheus' / 'data'}", "--storage.tsdb.retention.time=15d"],
            *[f"--web.listen-address=127.0.0.1:{plan.prometheus_port}", "--log.format=json"],
        ],
        configuration=(_configuration(plan, "native.yaml"), _configuration(plan, "rules.yaml")),
    )


def _relay(plan: Plan, environment: dict[str, str]) -> Program:
    command = [sys.executable, "-P", "-m", "velikiy", "relay", "--heartbeat", str(plan.heartbeat)]
    return Program("relay", command, environment)


def _apps(plan: Plan, settings: ServiceSettings, environment: dict[str, str]) -> Iterator[Program]:
    """Give each instance the CPUs after the CPUs of the instance before it. Only the launcher knows all instances."""
    configuration = f"{code_folder()}/velikiy/server/gunicorn.conf.py"
    reload = ["--reload"] if plan.reload else []
    command = [sys.executable, "-m", "gunicorn", "-c", configuration, *reload, "velikiy:create_app()"]
    cpu = settings.app_first_cpu or 0
    for n, port in enumerate(plan.app_ports, 1):
        own = {
            "APP_LISTEN": f"127.0.0.1:{port}",
            "APP_SOCKET": _beside(plan.app_socket(n)),
            "APP_FIRST_CPU": str(cpu),
            "APP_SCRIPT": str(script(plan, f"app{n}")),
        }
        # No grace: the launcher stops an app only when no edge sends requests to it any more.
        yield Program(f"app{n}", command, {**environment, **own}, stop_signal="INT")
        if cpu >= 0:
            cpu = (cpu + settings.app_workers) % (os.cpu_count() or 1)


def _beside(socket: Path) -> str:
    """Return the path of the socket from the working folder of a program, which needs no escaping."""
    return f"../{socket.parent.name}/{socket.name}"


def _edges(plan: Plan, settings: ServiceSettings) -> Iterator[Program]:
    for n, (port, control) in enumerate(zip(plan.edge_ports, plan.control_ports, strict=True), 1):
        yield Program(
            f"edge{n}",
            [f"{code_folder()}/edge/start"],
            {
                "EDGE_ID": plan.identity,
                "EDGE_DATA": str(plan.home / f"edge{n}"),
                "EDGE_LISTEN": f"{bracketed(plan.bind)}:{port}",
                "BIND": plan.bind,
                "ALLOWED_HOSTS": settings.allowed_hosts,
                "CORS_ORIGINS": settings.cors_origins,
                "AUTH": settings.auth or "",
                "EDGE_CONTROL": f"127.0.0.1:{control}",
                "EDGE_APPS": ",".join(f"unix:{_beside(plan.app_socket(n))}" for n in range(1, plan.apps + 1)),
                "EDGE_TTL": str(settings.edge_ttl),
                "EDGE_MEMORY": str(settings.edge_memory),
                "EDGE_WORKERS": str(settings.edge_workers),
                "PATH_PREFIX": settings.path_prefix,
                "TRUSTED_PROXIES": settings.trusted_proxies,
                "METRICS": settings.metrics,
                "TRACES_URL": settings.traces_url,
                "TRACES_RATIO": f"{settings.traces_ratio:.9f}",
                "LOG_LEVEL": settings.log_level,
                "TZ": "UTC",  # Nginx logs local times
                "RATE_REQUESTS": _or_default(settings.rate_requests),
                "RATE_WINDOW": str(settings.rate_window),
                "RATE_CONNECTIONS": _or_default(settings.rate_connections),
                **(_tls(plan, settings, n) if plan.tls_cert else {}),
                "REDIS_TIMEOUT": str(settings.redis_timeout),
                "SECRETS_DIR": str(plan.secrets_folder / "edge"),
                "DATABASE_TIMEOUT": str(settings.database_timeout),
            },
            stop_signal="QUIT",  # graceful: Nginx finishes its responses
            needs_low_port=min(port, (n == 1 and plan.http_port) or port) < FIRST_UNPRIVILEGED_PORT,
        )


def _or_default(value: int | None) -> str:
    """Return the value, or "" for the default of edge/start."""
    return "" if value is None else str(value)


def _tls(plan: Plan, settings: ServiceSettings, edge: int) -> dict[str, str]:
    """Return the variables of an edge with TLS. The first edge also redirects plain HTTP."""
    redirect = f"{bracketed(plan.bind)}:{plan.http_port}" if edge == 1 and plan.http_port else ""
    return {
        "TLS_CERT": plan.tls_cert,
        "TLS_KEY": plan.tls_key,
        "TLS_HSTS": str(settings.tls_hsts),
        "HTTP_LISTEN": redirect,
        "HTTPS_PORT": str(plan.edge_ports[edge - 1]),
    }
