"""Change a stack to another version of its code or settings, and go back if that fails.

A stack that can serve meanwhile is changed program by program (`velikiy/stack/rolling.py`); any other is stopped and
started. A launcher that is killed leaves a stack between two versions: the next change carries on from there.
"""

import signal
from collections.abc import Callable
from pathlib import Path

from velikiy.stack import Refusal, cluster, rolling, service, versions
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import Plan
from velikiy.stack.programs import Program
from velikiy.stack.readiness import is_ready, wait_until_ready
from velikiy.stack.supervisor import DATA_SERVERS, Supervisor
from velikiy.stack.versions import Version

NOT_RESTARTED = DATA_SERVERS
"""The programs that `./run restart` restarts only by their names: without PostgreSQL requests fail, and Redis loses its
entries."""


def change(
    plan: Plan,
    running: Plan | None,
    obstacle: str,
    prepare: Callable[[bool], list[Program]],
    migrate: Callable[[], None],
    before_start: Callable[[], None] = lambda: None,
) -> None:
    """Make the stack run with this plan.

    Args:
        plan: The stack as it shall be.
        running: The stack that runs, or None.
        obstacle: Why the stack has to be stopped and started, if it runs.
        prepare: Writes the files of the programs, and the secrets if it is given True; returns the programs.
        migrate: Brings the database up to date.
        before_start: Does what has to wait until the stack is stopped.

    Raises:
        Refusal: The stack runs as before, or no process is left running.
    """
    fingerprint, plan.fingerprint = plan.fingerprint, ""  # until all programs are replaced, `up` must not call it done
    versions.begin(plan.home)
    try:
        if running and not obstacle:
            wanted = prepare(True)  # the services of an earlier version had no folders of their own
            rolling.replace(plan, wanted, migrate)
            with step("waiting until all edges may use their caches"):
                wait_until_ready(plan)
        else:
            if running:
                with step("checking the new version"):
                    # The services that run must not find the secrets of others, should they start again meanwhile.
                    rolling.check_new_version(plan, prepare(False))
                with step(f"stopping the stack, because {obstacle}"):
                    Supervisor(running).stop()
            before_start()
            wanted = prepare(True)
            _launch(plan, wanted, migrate)
    except Refusal as error:
        raise Refusal(f"{error}{_go_back(plan, running)}") from error
    except BaseException:
        report(_go_back(plan, running))
        raise
    plan.fingerprint = fingerprint
    plan.save()
    versions.save_programs(plan, wanted)
    versions.finish(plan)


def _launch(plan: Plan, wanted: list[Program], migrate: Callable[[], None]) -> None:
    """Start all programs. If that fails or is interrupted, stop all of them again."""
    supervisor = Supervisor(plan)
    try:
        plan.heartbeat.unlink(missing_ok=True)
        data_servers = " and ".join(program.name for program in wanted if program.name in DATA_SERVERS)
        with step(f"starting {data_servers or 'the supervisor'}"):
            supervisor.start(wanted)
            if plan.own_postgres:
                cluster.await_server(plan, within=60)
        with step("bringing the tables up to date"):
            migrate()
        others = [program.name for program in wanted if program.name not in DATA_SERVERS]
        with step(f"starting {', '.join(others)}"):
            for name in others:
                supervisor.start_program(name)
            wait_until_ready(plan)
    except BaseException:
        _ignore_signals()
        supervisor.stop()
        raise


def _ignore_signals() -> None:
    """A second Ctrl-C must not interrupt the way back."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _go_back(plan: Plan, running: Plan | None) -> str:
    """Go back to the version that ran before the change. Return a sentence about it, after a space.

    Raises:
        Refusal: The version before cannot run any more.
    """
    _ignore_signals()
    version = versions.unfinished(plan.home)
    if version is None:  # the first start, or the stack was started by an earlier release
        return " Programs that were not replaced yet still run the version before." if running else ""
    if not running:
        version.restore()
        versions.discard(plan.home)
        return ""
    _check_database(version)
    try:
        version.restore()
        if Supervisor(running).pid() is None or rolling.changed(version.plan, version.programs):
            report("going back to the version before")
            _run_again(version)
    except Refusal as error:
        retry = command("rollback", home=plan.home)
        raise Refusal(f"The version before could not go on: {error} To try it again: {retry}") from error
    versions.discard(plan.home)
    return " The stack still runs as before."


def _check_database(version: Version) -> None:
    """
    Raises:
        Refusal: The database is newer than the code of the version can use.
    """
    from velikiy.postgres import migrate

    try:
        migrate.check(version.direct_url, version.code / "migrations")
    except migrate.CannotMigrate as error:
        raise Refusal(
            f"The database was migrated to tables that the version before cannot use: {error}. Go on with the newer"
            " version, or restore a backup that the version before has made (docs/upgrading.md)."
        ) from None


def _run_again(version: Version) -> None:
    """Run the programs of a version whose files were put back."""
    supervisor = Supervisor(version.plan)
    if supervisor.pid() is None:
        version.plan.heartbeat.unlink(missing_ok=True)
        supervisor.start(version.programs)
        for program in version.programs:
            supervisor.start_program(program.name)
    else:
        rolling.replace_changed(version.plan, version.programs)
    wait_until_ready(version.plan)


def roll_back(home: Path) -> Plan:
    """Go back to the code and the settings that ran before the last change, or before a change that has not ended.

    Raises:
        Refusal: There is no such version, or it cannot run any more. The stack runs as before.
    """
    live = Plan.load(home)
    version = versions.unfinished(home) or versions.before(home)
    if live is None or version is None:
        raise Refusal(
            f"No earlier version of the stack in {home} is known: up keeps the version that it replaces. Check out the"
            f" version that you want (git checkout), and run {command('up', home=home)}"
        )
    version.check()
    plan = version.plan
    supervisor = Supervisor(live)
    running = live if supervisor.pid() is not None else None
    if running:
        _check_database(version)
    else:
        supervisor.stop()  # processes that outlived their supervisor
    obstacle = ""
    if running:
        addresses = {name: version.secret(name) for name in versions.ADDRESSES}
        obstacle = rolling.obstacle(running, plan, addresses) if is_ready(running) else "it is not healthy"
        if obstacle:
            service.refuse_restart(running, obstacle)

    def prepare(with_secrets: bool) -> list[Program]:
        version.restore(with_secrets=with_secrets)
        plan.save()
        return version.programs

    change(plan, running, obstacle, prepare, lambda: _check_database(version))
    return plan


def restart(home: Path, name: str | None) -> None:
    """Restart the program `name`, all programs of that kind (app, edge), or all except for the data servers.

    Raises:
        Refusal: The stack does not run, has no such program, or a program does not start.
    """
    version = versions.current(home)
    live = Plan.load(home)
    if live is None or Supervisor(live).pid() is None:
        raise Refusal(f"The stack in {home} is not running. Start it with {command('up', home=home)}")
    if version is None or not version.plan.fingerprint:
        raise Refusal(
            "An earlier release has started this stack, or its last change has not ended. First run"
            f" {command('up', home=home)}"
        )
    names = [program.name for program in version.programs]
    chosen = [
        program
        for program in version.programs
        if (name in (program.name, program.name.rstrip("0123456789")) if name else program.name not in NOT_RESTARTED)
    ]
    if not chosen:
        raise Refusal(f"There is no program '{name}'. Choose from: {', '.join(names)}.")
    rolling.restart(version.plan, chosen)
    with step("waiting until all edges may use their caches"):
        wait_until_ready(version.plan)
    kept = [it for it in names if it in NOT_RESTARTED] if name is None else []
    if kept:
        report(
            f"{' and '.join(kept)} went on; {' or '.join(command('restart', it, home=home) for it in kept)} restarts"
            " them by name"
        )
