"""Start a stack: choose its ports, create its files, start its programs, and wait until it is ready."""

import contextlib
import hashlib
import os
import shlex
import shutil
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from velikiy import secret_files
from velikiy.settings import ServiceSettings, StackSettings, auth_mode, load
from velikiy.stack import (
    Refusal,
    certificate,
    change,
    cluster,
    code_copy,
    options,
    preflight,
    recovery,
    rolling,
    service,
    versions,
)
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import COMPATIBILITY, Plan
from velikiy.stack.programs import Program, authentication, copy_configurations, programs
from velikiy.stack.readiness import findings_at, is_ready
from velikiy.stack.supervisor import Supervisor


def start(home: Path, given: dict[str, Any], *, reload: bool, forget_options: bool) -> Plan | None:
    """Start the stack. If it runs with other settings or other code, replace its programs while it serves, or restart
    it if that is impossible.

    Args:
        home: The data folder.
        given: The options of this command; None for options that were not given.
        reload: Run the code from the checkout.
        forget_options: Forget the options of earlier commands.

    Returns:
        The plan of the stack that runs now, or None if it was running already.

    Raises:
        Refusal: The stack cannot start. If it was running, it still runs; else no process is left running.
    """
    from velikiy.stack import servers  # at the top it would delay each command: it needs the whole protocol

    began = time.monotonic()
    settings = load(ServiceSettings, None)
    previous = Plan.load(home)
    running = previous if previous and Supervisor(previous).pid() is not None else None
    remembered = options.remember(given, load(StackSettings, None), previous, forget=forget_options)
    if (settings.tls_cert or settings.tls_key) and not given.get("tls_self_signed"):
        remembered.pop("tls_self_signed", None)  # a certificate was set later
    chosen = {name: it["value"] for name, it in remembered.items() if name in options.SETTINGS}
    wanted = load(StackSettings, None, **chosen)
    preflight.check_address(wanted.bind)
    monitoring = _has_prometheus(bool(options.value(remembered, "monitoring")), bool(given.get("monitoring")), settings)
    plan = _make_plan(home, wanted, reload, monitoring, settings, running)
    plan.options = remembered
    preflight.check_inner_port("METRICS_PORT", wanted.metrics_port or 0, running)
    preflight.check_inner_port("PROMETHEUS_PORT", plan.prometheus_port, running)
    _choose_certificate(plan, wanted, settings, running, bool(options.value(remembered, "tls_self_signed")))
    auth_mode(settings.auth, plan.bind)  # a running stack keeps its address
    if running and _is_unchanged(running, plan, wanted) and is_ready(running):
        running.options = remembered
        running.save()
        report(f"Velikiy Flask is already running: {display_url(running.edge_urls[0])}")
        _show_hints(running)
        _show_warnings(running)
        return None

    if wanted.wal_archive:
        if wanted.database_url:
            raise Refusal("WAL_ARCHIVE is for the stack's own PostgreSQL. Remove it, and archive at your own server.")
        service.refuse_closed_archive(running, wanted.wal_archive)
        recovery.check_archive(wanted.wal_archive)
    os.environ.update(authentication(plan))  # for the launcher's own connections
    binaries = cluster.binaries(plan.cluster) if plan.own_postgres else None
    if binaries:
        recovery.check_cluster(plan)
    if wanted.database_url:
        servers.check_postgres(wanted.database_direct_url or wanted.database_url, wanted.migration_database_url)
        if wanted.database_direct_url:
            servers.check_pooler(wanted.database_url)
    if wanted.redis_url:
        servers.check_redis(wanted.redis_url)
    obstacle = ""
    if running:
        _refuse_older_code(running)
        obstacle = _obstacle(running, plan, wanted)
        if obstacle:
            service.refuse_restart(running, obstacle)
    elif previous:
        Supervisor(previous).stop()  # processes that outlived their supervisor may hold ports
    reusable = running.client_ports if running else []  # its edges will release them
    defaults = (443, 8443) if plan.tls_cert else (80, 8080)
    plan.port = preflight.choose_port(plan.port or None, plan.bind, plan.edges, reusable, defaults)
    if plan.tls_cert:
        plan.http_port = preflight.choose_http_port(wanted.http_port, plan, reusable)
    if running:
        plan.keep_ports(running)
        if not obstacle:
            plan.identity = running.identity

    def prepare(with_secrets: bool) -> list[Program]:
        _create_files(plan)
        if with_secrets:
            _write_secrets(plan, wanted)
        return programs(plan, settings, binaries)

    def before_start() -> None:
        # Import the module for `_update_database` while PostgreSQL starts: with SQLAlchemy that takes half a second.
        threading.Thread(target=import_module, args=["velikiy.postgres.migrate"], daemon=True).start()
        plan.choose_ports(previous)
        if binaries and not plan.cluster.exists():
            _create_files(plan)
            _write_secrets(plan, wanted)
            with step("creating the database cluster"):
                cluster.create(plan, binaries)

    change.change(plan, running, obstacle, prepare, lambda: _update_database(plan, binaries), before_start)
    servers.warn_of_few_connections(plan, settings)
    if plan.own_redis:
        rolling.await_redis(plan)  # the relay registers it; until then `up` would warn of it
    rolling.await_reached_apps(plan)
    _show_addresses(plan, time.monotonic() - began, port_was_chosen=not running and wanted.port is None)
    _show_warnings(plan)
    return plan


def _with(fingerprint: str, *more: object) -> str:
    """Return a digest of the fingerprint and further parts."""
    return hashlib.sha256(repr((fingerprint, *more)).encode()).hexdigest()


def _obstacle(running: Plan, plan: Plan, wanted: StackSettings) -> str:
    """Return why the stack has to be stopped and started, or an empty string."""
    from velikiy.postgres import migrate

    if not is_ready(running):
        return "it is not healthy"
    plan.revision = migrate.newest_revision()
    with contextlib.suppress(migrate.CannotMigrate):  # PostgreSQL does not answer
        for migration in migrate.pending(running.direct_url, running=running.revision or None):
            if not migration.is_safe:
                return f"the migration {migration.revision} changes tables that the running version uses"
    return rolling.obstacle(running, plan, _given_secrets(wanted))


def _has_prometheus(wanted: bool, is_new: bool, settings: ServiceSettings) -> bool:
    """Return whether Prometheus is started, too.

    Args:
        wanted: By the options of this command and of earlier ones.
        is_new: This command has the option. Otherwise a Prometheus that was removed meanwhile keeps no stack down.
        settings: The settings of the services.

    Raises:
        Refusal
    """
    if wanted and settings.metrics == "off":
        raise Refusal("Prometheus (--monitoring) needs metrics. Remove METRICS=off, or add --no-monitoring.")
    if not wanted or shutil.which("prometheus"):
        return wanted
    advice = f"Install it: {command('packages', 'prometheus')}"
    if is_new:
        raise Refusal(f"Prometheus (--monitoring) is not installed. {advice}")
    report(f"warning: Prometheus (--monitoring) is not installed, so the stack runs without it. {advice}")
    return False


def _make_plan(
    home: Path,
    wanted: StackSettings,
    reload: bool,
    monitoring: bool,
    settings: ServiceSettings,
    running: Plan | None,
) -> Plan:
    """Return the plan that the user wants. A running stack keeps a port that it has chosen itself."""
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
        log_file_size=wanted.log_file_size,
        log_files=wanted.log_files,
        log_level=settings.log_level,
        redis_memory=wanted.redis_memory,
    )
    if running and running.port in options.DEFAULT_PORTS:
        plan.port = wanted.port or running.port
    plan.monitoring = monitoring
    keeps_port = running and running.monitoring and "prometheus_port" not in wanted.model_fields_set
    port = running.prometheus_port if running and keeps_port else wanted.prometheus_port
    plan.prometheus_port = port if plan.monitoring else 0
    plan.compatibility = COMPATIBILITY
    plan.wal_archive = str(wanted.wal_archive or "")
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
        plan.log_file_size,
        plan.log_files,
        plan.wal_archive,
        plan.redis_memory,
    )
    plan.fingerprint = hashlib.sha256(repr((*parts, code_copy.code_folder(), sys.executable)).encode()).hexdigest()
    return plan


def _choose_certificate(
    plan: Plan, wanted: StackSettings, settings: ServiceSettings, running: Plan | None, self_signed: bool
) -> None:
    """Note the certificate that the user wants.

    Raises:
        Refusal: The certificate cannot be used.
    """
    if settings.tls_cert or settings.tls_key:
        if self_signed:
            raise Refusal("--tls-self-signed and TLS_CERT exclude each other. Omit one of them.")
        plan.tls_cert, plan.tls_key = certificate.of_the_user(settings)
    elif self_signed:
        plan.tls_cert, plan.tls_key = certificate.self_signed(plan)
    if running and bool(running.tls_cert) != bool(plan.tls_cert):
        plan.port = wanted.port or 0  # http and https have default ports of their own
    elif running and plan.tls_cert:
        plan.http_port = running.http_port if wanted.http_port is None else wanted.http_port
    plan.fingerprint = _with(plan.fingerprint, plan.tls_cert, plan.tls_key)


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


def _is_unchanged(running: Plan, plan: Plan, wanted: StackSettings) -> bool:
    unchanged = (running.fingerprint, running.port, running.http_port) == (plan.fingerprint, plan.port, plan.http_port)
    secrets = {**_given_secrets(wanted), "migration_database_url": wanted.migration_database_url}
    return unchanged and all(value is None or running.has_secret(name, value) for name, value in secrets.items())


def _given_secrets(wanted: StackSettings) -> dict[str, str | None]:
    """Return the secrets that the user has set, by the names of their files."""
    return {name: getattr(wanted, name) for name in versions.ADDRESSES}


def _create_files(plan: Plan) -> None:
    """Create the folders and the configurations."""
    plan.save()
    for name in ("run", "logs", "secrets", "redis", "relay", "metrics", "prometheus", *plan.instances):
        (plan.home / name).mkdir(mode=0o700, exist_ok=True)
    copy_configurations(plan)


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


def _update_database(plan: Plan, binaries: Path | None) -> None:
    """Bring the roles of the stack's own PostgreSQL up to date, and the tables of any."""
    # An import at the top would delay each command. `_launch_or_stop` imports the module in the background.
    from velikiy.postgres import migrate

    if binaries:
        cluster.create_database(plan, within=60)
    try:
        app_role = migrate.role_of(plan.secret("database_url"))
        migrate.upgrade(plan.secret("migration_database_url"), wait=10, app_role=app_role)
        plan.revision = migrate.newest_revision()
    except migrate.CannotMigrate as error:
        raise Refusal(f"The tables could not be brought up to date: {error}") from None


def warnings(plan: Plan) -> list[str]:
    """Return the warnings of each edge and its apps at /readyz: responses are correct, but slower or less safe."""
    found: list[str] = []
    for url in plan.edge_urls:
        here = [it.with_commands(lambda word: command(word, home=plan.home)) for it in findings_at(url)]
        found += [f"{display_url(url)}: {it.sentence}" for it in here]
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
    trust = f"--cacert {shlex.quote(plan.tls_cert)} " if plan.tls_cert == str(plan.own_certificate) else ""
    report(f"  try     curl -i {trust}{display_url(plan.edge_urls[0])}/users")
    report(f"  console {display_url(plan.edge_urls[0])}/    (in a browser)")
    report(f"  docs    {display_url(plan.edge_urls[0])}/docs")
    report(f"  logs    {command('logs', '-f', home=plan.home)}    (files in {plan.logs})")
    if plan.options:
        forget = command("up", "--defaults", home=plan.home)
        report(f"  kept    {options.spelled(plan.options)}    ({forget} forgets these options)")
    if plan.monitoring:
        report(f"  alerts  http://127.0.0.1:{plan.prometheus_port}/alerts")
    report(f"  stop    {command('down', home=plan.home)}")


def display_url(url: str) -> str:
    return url.removesuffix(":443" if url.startswith("https:") else ":80")
