"""Starting a stack: from what was asked for to an address that answers."""

import contextlib
import hashlib
import json
import shlex
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from importlib import import_module
from pathlib import Path

from velikiy import secret_files
from velikiy.settings import Knobs, StackSettings, load
from velikiy.stack import Refusal, cluster, log_files, preflight, privileges
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import FIRST, Supervisor


def start(home: Path, wanted: StackSettings, reload: bool) -> Plan | None:
    """The plan that runs from now on; None where it did already."""
    began = time.monotonic()
    before = Plan.load(home)
    running = before is not None and Supervisor(before).pid() is not None
    plan = Plan(
        data=str(home),
        bind=wanted.bind,
        port=wanted.port or 0,
        edges=wanted.edges,
        apps=wanted.apps,
        reload=reload,
        own_postgres=wanted.database_url is None,
        own_redis=wanted.redis_url is None,
    )
    if running and before is not None:
        # What is not asked for stays as it runs.
        plan.port = wanted.port or before.port
        for name in ("bind", "edges", "apps"):
            if name not in wanted.model_fields_set:
                setattr(plan, name, getattr(before, name))
    knobs = load(Knobs, None)
    parts = (plan.bind, plan.edges, plan.apps, knobs, wanted.database_url, wanted.redis_url)
    plan.fingerprint = hashlib.sha256(repr((*parts, privileges.code(), sys.executable)).encode()).hexdigest()
    same = before is not None and (before.fingerprint, before.port) == (plan.fingerprint, plan.port)
    if before is not None and running and same and ready(before):
        say(f"Velikiy Flask is already running: {shown(before.edge_urls[0])}")
        _hint(before)
        return None

    binaries = cluster.binaries(plan.cluster) if plan.own_postgres else None
    if before is not None and not running:
        Supervisor(before).stop()  # what outlived its supervisor may hold ports
    ours = before.edge_ports if before is not None and running and before.bind == plan.bind else []
    plan.port = preflight.port(plan.port or None, plan.bind, plan.edges, ours)
    if before is not None and running:
        with step("stopping the stack, which runs with other settings"):
            Supervisor(before).stop()
    plan.choose_ports(before)
    _lay_out(plan, wanted)

    # For `_migrate`, while PostgreSQL comes up: with SQLAlchemy it takes half a second.
    threading.Thread(target=import_module, args=["velikiy.postgres.migrate"], daemon=True).start()
    supervisor = Supervisor(plan)
    try:
        if binaries and not plan.cluster.exists():
            with step("creating the database cluster"):
                cluster.create(plan, binaries)
        _launch(plan, knobs, binaries, supervisor)
    except BaseException:
        # Taken back as a whole, whoever is impatient.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        supervisor.stop()
        raise
    say(f"Velikiy Flask is ready after {time.monotonic() - began:.1f} s: {shown(plan.edge_urls[0])}")
    for n, url in enumerate(plan.edge_urls[1:], 2):
        say(f"  edge {n}  {shown(url)}")
    if plan.port != 80 and wanted.port is None:
        say("  (port 80 is in use, or this user may not open it)")
    _hint(plan)
    return plan


def _hint(plan: Plan) -> None:
    option = "" if plan.home == privileges.default_home() else f" --data {shlex.quote(plan.data)}"
    say(f"  try     curl -i {shown(plan.edge_urls[0])}/users")
    say(f"  docs    {shown(plan.edge_urls[0])}/docs")
    say(f"  logs    ./run logs -f{option}    (files in {plan.logs})")
    say(f"  stop    ./run down{option}")


def _lay_out(plan: Plan, wanted: StackSettings) -> None:
    """Folders, passwords and addresses."""
    home = plan.home
    plan.save()
    plan.heartbeat.unlink(missing_ok=True)
    servers = [
        "redis",
        "relay",
        *(f"app{n + 1}" for n in range(plan.apps)),
        *(f"edge{n + 1}" for n in range(plan.edges)),
    ]
    for name in ("run", "logs", "secrets", *servers):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    postgres, redis = f"127.0.0.1:{plan.postgres_port}", f"127.0.0.1:{plan.redis_port}"
    secret_files.write(
        plan.passwords,
        postgres=postgres,
        redis=redis,
        database_url=wanted.database_url,
        redis_url=wanted.redis_url,
        mode=0o400,
    )


def _launch(plan: Plan, knobs: Knobs, binaries: Path | None, supervisor: Supervisor) -> None:
    programs = plan.programs(knobs, binaries)
    servers = " and ".join(program.name for program in programs if program.name in FIRST)
    with step(f"starting {servers or 'the supervisor'}"):
        supervisor.start(programs)
        if binaries:
            cluster.create_database(plan, within=60)
    with step("bringing the tables up to date"):
        _migrate(plan.secret("database_url"))
    rest = [program.name for program in programs if program.name not in FIRST]
    with step(f"starting {', '.join(rest)}"):
        for name in rest:
            supervisor.start_program(name)
        _wait_until_ready(plan, within=60)


def _migrate(database_url: str) -> None:
    from velikiy.postgres import (
        migrate,  # here and not above, where it would be waited for: `start` imports it meanwhile
    )

    try:
        migrate.upgrade(database_url, wait=10)
    except migrate.CannotMigrate as error:
        raise Refusal(f"The tables could not be brought up to date: {error}") from None


def _wait_until_ready(plan: Plan, *, within: float) -> None:
    until = time.monotonic() + within
    while not ready(plan, whole=True):
        if time.monotonic() > until:
            for file in log_files.files(plan.logs):
                for line in log_files.last(file, 5):
                    say(f"{file.stem:<10} {line}")
            raise Refusal(
                f"The stack is not healthy after {within:g} s. The last lines of each log are above; "
                f"the full logs are in {plan.logs}."
            )
        time.sleep(0.05)


def ready(plan: Plan, *, whole: bool = False) -> bool:
    """Every edge is ours and answers /health; where it is asked for, edges may use their caches and the relay listens,
    without which the answers are right as well."""
    if whole and not plan.heartbeat.exists():
        return False
    for url in plan.edge_urls:
        try:
            with urllib.request.urlopen(url + "/.edge", timeout=3) as answer:  # noqa: S310
                identity, lease = answer.read().decode().split()
                if identity != plan.identity or (lease == "0" and whole):
                    return False
            with urllib.request.urlopen(url + "/health", timeout=3):  # noqa: S310
                pass
        except (OSError, ValueError, HTTPException):
            return False
    return True


def warnings(plan: Plan) -> list[str]:
    """Return what each edge and its apps report at /readyz that makes answers slower or less safe, and not wrong."""
    found: list[str] = []
    for url in plan.edge_urls:
        with (
            contextlib.suppress(OSError, ValueError, HTTPException),
            urllib.request.urlopen(url + "/readyz", timeout=3) as answer,  # noqa: S310
        ):
            found += [f"{shown(url)}: {warning}" for warning in json.load(answer).get("warnings", [])]
    return found


def shown(url: str) -> str:
    return url.removesuffix(":80")


def say(text: str) -> None:
    """To people: not into a pipe that waits for results."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Progress: what is being done, and how long it took."""
    began = time.monotonic()
    print(f"{what} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    print(f"done ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
