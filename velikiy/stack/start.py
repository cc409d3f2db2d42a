"""Start a stack: choose its ports, create its files, start its programs, and wait until it is ready."""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

from velikiy import secret_files
from velikiy.settings import ServiceSettings, StackSettings, auth_mode, load
from velikiy.stack import (
    Refusal,
    certificate,
    cluster,
    code_copy,
    local_http,
    log_files,
    preflight,
    privileges,
    rolling,
    servers,
    service,
)
from velikiy.stack.messages import report, step
from velikiy.stack.plan import COMPATIBILITY, Plan
from velikiy.stack.programs import authentication, copy_configurations, programs
from velikiy.stack.supervisor import DATA_SERVERS, Supervisor


def start(home: Path, wanted: StackSettings, reload: bool, self_signed: bool, monitoring: bool) -> Plan | None:
    """Start the stack. If it runs with other settings or other code, replace its programs while it serves, or restart
    it if that is impossible.

    Returns:
        The plan of the stack that runs now, or None if it was running already.

    Raises:
        Refusal: The stack cannot start. If it was running, it still runs; else no process is left running.
    """
    began = time.monotonic()
    settings = load(ServiceSettings, None)
    previous = Plan.load(home)
    running = previous if previous and Supervisor(previous).pid() is not None else None
    plan = _make_plan(home, wanted, reload, monitoring, settings, running)
    if plan.monitoring and settings.metrics == "off":
        raise Refusal("Prometheus (--monitoring) needs metrics. Remove METRICS=off, or stop the stack first.")
    preflight.check_inner_port("METRICS_PORT", wanted.metrics_port or 0, running)
    preflight.check_inner_port("PROMETHEUS_PORT", plan.prometheus_port, running)
    _choose_certificate(plan, wanted, settings, running, self_signed)
    auth_mode(settings.auth, plan.bind)  # a running stack keeps its address
    if running and _is_unchanged(running, plan, wanted) and is_ready(running):
        report(f"Velikiy Flask is already running: {display_url(running.edge_urls[0])}")
        _show_hints(running)
        _show_warnings(running)
        return None

    os.environ.update(authentication(plan))  # for the launcher's own connections
    binaries = cluster.binaries(plan.cluster) if plan.own_postgres else None
    if wanted.database_url:
        servers.check_postgres(wanted.database_direct_url or wanted.database_url, wanted.migration_database_url)
        if wanted.database_direct_url:
            servers.check_pooler(wanted.database_url)
    if wanted.redis_url:
        servers.check_redis(wanted.redis_url)
    obstacle = ""
    if running:
        _refuse_older_code(running)
        obstacle = "it is not healthy"
        if is_ready(running):
            obstacle = _replace_programs(plan, running, wanted, settings, binaries)
        if obstacle:
            service.refuse_restart(running, obstacle)
        else:
            servers.warn_of_few_connections(plan, settings)
            _show_addresses(plan, time.monotonic() - began, port_was_chosen=False)
            _show_warnings(plan)
            return plan
    if previous and not running:
        Supervisor(previous).stop()  # processes that outlived their supervisor may hold ports
    reusable = _reusable_ports(running, plan)
    defaults = (443, 8443) if plan.tls_cert else (80, 8080)
    plan.port = preflight.choose_port(plan.port or None, plan.bind, plan.edges, reusable, defaults)
    if plan.tls_cert:
        plan.http_port = preflight.choose_http_port(wanted.http_port, plan, reusable)
    if running:
        with step(f"stopping the stack, because {obstacle}"):
            Supervisor(running).stop()
    plan.choose_ports(previous)
    _create_files(plan, wanted)
    _launch_or_stop(plan, settings, binaries)
    servers.warn_of_few_connections(plan, settings)
    _show_addresses(plan, time.monotonic() - began, port_was_chosen=wanted.port is None)
    _show_warnings(plan)
    return plan


def _make_plan(
    home: Path,
    wanted: StackSettings,
    reload: bool,
    monitoring: bool,
    settings: ServiceSettings,
    running: Plan | None,
) -> Plan:
    """Return the plan that the user wants. A running stack keeps each value that the user has not set."""
    plan = Plan(
        data=str(home),
        bind=wanted.bind,
        port=wanted.port or 0,
        edges=wanted.edges,
        apps=wanted.apps,
        reload=reload,
        own_postgres=wanted.database_url is None,
        own_redis=wanted.redis_url is None,
        metrics_port=wanted.metrics_port or 0,
    )
    if running:
        plan.port = wanted.port or running.port
        for name in ("bind", "edges", "apps"):
            if name not in wanted.model_fields_set:
                setattr(plan, name, getattr(running, name))
    plan.monitoring = monitoring or bool(running and running.monitoring)
    keeps_port = running and running.monitoring and "prometheus_port" not in wanted.model_fields_set
    port = running.prometheus_port if running and keeps_port else wanted.prometheus_port
    plan.prometheus_port = port if plan.monitoring else 0
    plan.compatibility = COMPATIBILITY
    # Without the addresses of servers: the digest stands in a file, and passwords could be guessed from it.
    parts = (
        plan.bind,
        plan.edges,
        plan.apps,
        settings,
        plan.own_postgres,
        plan.own_redis,
        plan.metrics_port,
        plan.prometheus_port,
    )
    plan.fingerprint = hashlib.sha256(repr((*parts, code_copy.code_folder(), sys.executable)).encode()).hexdigest()
    return plan


def _choose_certificate(
    plan: Plan, wanted: StackSettings, settings: ServiceSettings, running: Plan | None, self_signed: bool
) -> None:
    """Note the certificate that the user wants. A running stack keeps its own self-signed certificate.

    Raises:
        Refusal: The certificate cannot be used.
    """
    if settings.tls_cert or settings.tls_key:
        if self_signed:
            raise Refusal("--tls-self-signed and TLS_CERT exclude each other. Omit one of them.")
        plan.tls_cert, plan.tls_key = certificate.of_the_user(settings)
    elif self_signed or (running and running.tls_cert == str(running.own_certificate)):
        plan.tls_cert, plan.tls_key = certificate.self_signed(plan)
    if running and bool(running.tls_cert) != bool(plan.tls_cert):
        plan.port = wanted.port or 0  # http and https have default ports of their own
    elif running and plan.tls_cert:
        plan.http_port = running.http_port if wanted.http_port is None else wanted.http_port
    parts = (plan.fingerprint, plan.tls_cert, plan.tls_key)
    plan.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()


def _refuse_older_code(running: Plan) -> None:
    """Refuse code that does not know the schema of the database, while the newer code still runs.

    Raises:
        Refusal
    """
    from velikiy.postgres import migrate

    try:
        migrate.check(running.direct_url)
    except migrate.CannotMigrate as error:
        raise Refusal(f"{str(error)[0].upper()}{str(error)[1:]}. The stack still runs as before.") from None


def _replace_programs(
    plan: Plan, running: Plan, wanted: StackSettings, settings: ServiceSettings, binaries: Path | None
) -> str:
    """Replace the programs of the running stack. Return why that is impossible, or an empty string after it is done.

    Raises:
        Refusal: A program of the new version does not start.
    """
    plan.keep_ports(running)
    plan.identity = running.identity
    fingerprint, plan.fingerprint = plan.fingerprint, ""  # until all programs are replaced, `up` must not call it done
    copy_configurations(plan)
    replacements = programs(plan, settings, binaries)
    addresses = _given_secrets(wanted)
    if obstacle := rolling.obstacle(running, plan, replacements, addresses):
        plan.fingerprint = fingerprint
        return obstacle
    _write_secrets(plan, wanted)  # the services of an earlier version had no folders of their own
    with step("checking the new version"):
        rolling.check_new_version(plan, replacements)
    _create_files(plan, wanted)
    rolling.replace(plan, replacements, lambda: _update_database(plan, binaries))
    with step("waiting until all edges may use their caches"):
        _wait_until_ready(plan, within=60)
    plan.fingerprint = fingerprint
    plan.save()
    return ""


def _is_unchanged(running: Plan, plan: Plan, wanted: StackSettings) -> bool:
    unchanged = (running.fingerprint, running.port, running.http_port) == (plan.fingerprint, plan.port, plan.http_port)
    secrets = {**_given_secrets(wanted), "migration_database_url": wanted.migration_database_url}
    return unchanged and all(value is None or running.has_secret(name, value) for name, value in secrets.items())


GIVEN_SECRETS = ("database_url", "database_direct_url", "redis_url", "edge_secret")


def _given_secrets(wanted: StackSettings) -> dict[str, str | None]:
    """Return the secrets that the user has set, by the names of their files."""
    return {name: getattr(wanted, name) for name in GIVEN_SECRETS}


def _reusable_ports(running: Plan | None, plan: Plan) -> list[int]:
    """Return the ports that the running edges hold and will release."""
    return running.client_ports if running and running.bind == plan.bind else []


def _create_files(plan: Plan, wanted: StackSettings) -> None:
    """Create the folders, the passwords and the files with addresses."""
    plan.save()
    servers = [
        "redis",
        "relay",
        "metrics",
        "prometheus",
        *(f"app{n + 1}" for n in range(plan.apps)),
        *(f"edge{n + 1}" for n in range(plan.edges)),
    ]
    for name in ("run", "logs", "secrets", *servers):
        (plan.home / name).mkdir(mode=0o700, exist_ok=True)
    copy_configurations(plan)
    _write_secrets(plan, wanted)


def _write_secrets(plan: Plan, wanted: StackSettings) -> None:
    secret_files.write(
        plan.secrets_folder,
        postgres=str(plan.sockets),
        redis=str(plan.redis_socket),
        database_url=wanted.database_url,
        database_direct_url=wanted.database_direct_url,
        redis_url=wanted.redis_url,
        edge_secret=wanted.edge_secret,
        migration_database_url=wanted.migration_database_url,
    )
    secret_files.share(plan.secrets_folder, plan.secrets_folder, ("app", "edge"), {})


def _launch_or_stop(plan: Plan, settings: ServiceSettings, binaries: Path | None) -> None:
    """Start all programs. If that fails or is interrupted, stop all of them again."""
    # Import the module for `_update_database` while PostgreSQL starts: with SQLAlchemy the import takes half a second.
    threading.Thread(target=import_module, args=["velikiy.postgres.migrate"], daemon=True).start()
    supervisor = Supervisor(plan)
    try:
        if binaries and not plan.cluster.exists():
            with step("creating the database cluster"):
                cluster.create(plan, binaries)
        _launch(plan, settings, binaries, supervisor)
    except BaseException:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not interrupt the stop
            signal.signal(number, signal.SIG_IGN)
        supervisor.stop()
        raise


def _launch(plan: Plan, settings: ServiceSettings, binaries: Path | None, supervisor: Supervisor) -> None:
    plan.heartbeat.unlink(missing_ok=True)
    wanted = programs(plan, settings, binaries)
    data_servers = " and ".join(program.name for program in wanted if program.name in DATA_SERVERS)
    with step(f"starting {data_servers or 'the supervisor'}"):
        supervisor.start(wanted)
        if binaries:
            cluster.await_server(plan, within=60)
    with step("bringing the tables up to date"):
        _update_database(plan, binaries)
    others = [program.name for program in wanted if program.name not in DATA_SERVERS]
    with step(f"starting {', '.join(others)}"):
        for name in others:
            supervisor.start_program(name)
        _wait_until_ready(plan, within=60)


def _update_database(plan: Plan, binaries: Path | None) -> None:
    """Bring the roles of the stack's own PostgreSQL up to date, and the tables of any."""
    # An import at the top would delay each command. `_launch_or_stop` imports the module in the background.
    from velikiy.postgres import migrate

    if binaries:
        cluster.create_database(plan, within=60)
    try:
        app_role = migrate.role_of(plan.secret("database_url"))
        migrate.upgrade(plan.secret("migration_database_url"), wait=10, app_role=app_role)
    except migrate.CannotMigrate as error:
        raise Refusal(f"The tables could not be brought up to date: {error}") from None


def _wait_until_ready(plan: Plan, *, within: float) -> None:
    deadline = time.monotonic() + within
    while not is_ready(plan, fully=True):
        if time.monotonic() > deadline:
            for file in log_files.files(plan.logs):
                for line in log_files.last_lines(file, 5):
                    report(f"{file.stem:<10} {line}")
            raise Refusal(
                f"The stack is not healthy after {within:g} s. The last lines of each log are above; "
                f"the full logs are in {plan.logs}."
            )
        time.sleep(0.05)


def is_ready(plan: Plan, *, fully: bool = False) -> bool:
    """Return whether each edge belongs to this stack and answers /health.

    With `fully`, also require that each edge has a cache lease and that the relay listens. Responses are correct
    without both.
    """
    if fully and not plan.heartbeat.exists():
        return False
    for url in plan.edge_urls:
        try:
            identity, lease = local_http.get_signed(url + "/.edge", plan.secret("edge_secret")).split()
            if identity != plan.identity or (lease == "0" and fully):
                return False
            local_http.get(url + "/health")
        except local_http.UNANSWERED:
            return False
    return True


def warnings(plan: Plan) -> list[str]:
    """Return the warnings of each edge and its apps at /readyz: responses are correct, but slower or less safe."""
    found: list[str] = []
    for url in plan.edge_urls:
        with contextlib.suppress(*local_http.UNANSWERED):
            state = json.loads(local_http.get(url + "/readyz"))
            found += [f"{display_url(url)}: {warning}" for warning in state.get("warnings", [])]
    return found


# ---- messages ----


def _show_warnings(plan: Plan) -> None:
    for warning in warnings(plan):
        report(f"  warning: {warning}")


def _show_addresses(plan: Plan, seconds: float, *, port_was_chosen: bool) -> None:
    report(f"Velikiy Flask is ready after {seconds:.1f} s: {display_url(plan.edge_urls[0])}")
    for n, url in enumerate(plan.edge_urls[1:], 2):
        report(f"  edge {n}  {display_url(url)}")
    default_port = 443 if plan.tls_cert else 80
    if plan.port != default_port and port_was_chosen:
        report(f"  (port {default_port} is in use, or this user may not open it)")
    if plan.http_port:
        report(f"  http on port {plan.http_port} is redirected to https")
    if plan.tls_cert == str(plan.own_certificate):
        report("  The certificate signs itself, so clients warn of it. Compare its SHA-256 fingerprint:")
        report(f"  {certificate.fingerprint(plan.own_certificate)}")
    for warning in warnings(plan) if plan.tls_cert else []:  # such as a certificate that expires soon
        report(f"warning: {warning}")
    _show_hints(plan)


def _show_hints(plan: Plan) -> None:
    option = "" if plan.home == privileges.default_home() else f" --data {shlex.quote(plan.data)}"
    trust = f"--cacert {shlex.quote(plan.tls_cert)} " if plan.tls_cert == str(plan.own_certificate) else ""
    report(f"  try     curl -i {trust}{display_url(plan.edge_urls[0])}/users")
    report(f"  docs    {display_url(plan.edge_urls[0])}/docs")
    report(f"  logs    ./run logs -f{option}    (files in {plan.logs})")
    if plan.monitoring:
        report(f"  alerts  http://127.0.0.1:{plan.prometheus_port}/alerts")
    report(f"  stop    ./run down{option}")


def display_url(url: str) -> str:
    return url.removesuffix(":443" if url.startswith("https:") else ":80")
