"""List the processes of a stack: their commands and environments."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from velikiy.settings import ServiceSettings
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
    stop_signal: str = "TERM"
    needs_low_port: bool = False


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
        _relay(plan, environment),
        *_apps(plan, settings, environment),
        *_edges(plan, settings),
    ]


def _postgres(plan: Plan, binaries: Path) -> Program:
    return Program(
        "postgres",
        [
            *[str(binaries / "postgres"), "-D", str(plan.cluster), "-p", str(plan.postgres_port)],
            *["-c", f"config_file={code_folder()}/deploy/postgres/postgresql.conf"],
            *["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="],
        ],
        stop_signal="INT",  # fast shutdown: disconnect all clients, then stop cleanly
    )


def _redis(plan: Plan) -> Program:
    return Program(
        "redis",
        [
            *["redis-server", f"{code_folder()}/deploy/redis/redis.conf", "--bind", "127.0.0.1"],
            *["--port", str(plan.redis_port), "--dir", str(plan.home / "redis")],
            *["--include", str(plan.secrets_folder / "redis.conf")],
        ],
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
        "SECRETS_DIR": str(plan.secrets_folder),
    }


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
        listen = {"APP_LISTEN": f"127.0.0.1:{port}", "APP_FIRST_CPU": str(cpu)}
        yield Program(f"app{n}", command, {**environment, **listen})
        if cpu >= 0:
            cpu = (cpu + settings.app_workers) % (os.cpu_count() or 1)


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
                "EDGE_CONTROL": f"127.0.0.1:{control}",
                "EDGE_APPS": ",".join(f"127.0.0.1:{app_port}" for app_port in plan.app_ports),
                "EDGE_TTL": str(settings.edge_ttl),
                "EDGE_MEMORY": str(settings.edge_memory),
                "EDGE_WORKERS": str(settings.edge_workers),
                "PATH_PREFIX": settings.path_prefix,
                "TRUSTED_PROXIES": settings.trusted_proxies,
                "REDIS_TIMEOUT": str(settings.redis_timeout),
                "SECRETS_DIR": str(plan.secrets_folder),
                "DATABASE_TIMEOUT": str(settings.database_timeout),
            },
            stop_signal="QUIT",  # graceful: Nginx finishes its responses
            needs_low_port=port < FIRST_UNPRIVILEGED_PORT,
        )
