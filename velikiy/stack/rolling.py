"""Replace the programs of a running stack one after the other, so that no request fails.

An app becomes its next version under its process id and keeps its listener (`velikiy/server/handover.py`). An edge is
reloaded: Nginx keeps its listeners, its memory and its cache lease, and old workers finish their requests. Only the
relay is restarted; when it is back it invalidates everything. PostgreSQL and Redis keep running.
"""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from velikiy.stack import Refusal, local_http, log_lines, log_view
from velikiy.stack.messages import report, step
from velikiy.stack.plan import Plan
from velikiy.stack.programs import Program, base_environment, script
from velikiy.stack.supervisor import DATA_SERVERS, Supervisor

START_TIMEOUT_S = 30
"""For a program that starts, or becomes its next version."""

END_TIMEOUT_S = 90
"""For the last requests of old workers. An idle connection that its client keeps open ends after 75 s."""

CLOSING_S = 2.0
"""Time for the clients of an edge to leave their connections (edge/lua/closing.lua)."""


def obstacle(running: Plan, plan: Plan, wanted: list[Program], addresses: dict[str, str | None]) -> str:
    """Return why the stack has to be stopped and started, or an empty string if its programs can be replaced.

    Args:
        running: The stack that runs.
        plan: The stack that the user wants, with the ports of the running stack.
        wanted: The programs of `plan`.
        addresses: The addresses of servers that the user has set, by the name of their file.
    """
    if plan.reload or running.reload:
        return "--reload runs the code from the checkout"
    if running.compatibility != plan.compatibility:
        return "the versions cannot work side by side"
    if (running.bind, running.port, running.http_port) != (plan.bind, plan.port, plan.http_port):
        return "its address changes"
    if bool(running.tls_cert) != bool(plan.tls_cert):
        return "its address changes between http and https"
    # Two Redis at a time would be two caches, and each process would invalidate one of them.
    own = (running.own_postgres, running.own_redis) == (plan.own_postgres, plan.own_redis)
    if not own or any(address and not running.has_secret(name, address) for name, address in addresses.items()):
        return "it uses another PostgreSQL, Redis or EDGE_SECRET"
    for program in wanted:
        if program.name in DATA_SERVERS and program.running_version(plan) != program.version():
            return f"the configuration of {program.name} has changed"
    return ""


def check_new_version(plan: Plan, wanted: list[Program]) -> None:
    """Start an app of the new version beside the stack, where no edge sends requests, and check the configuration of an
    edge.

    Raises:
        Refusal: The new version cannot start. Nothing was changed.
    """
    folder = plan.home / "run" / "check"
    folder.mkdir(mode=0o700, exist_ok=True)
    by_name = {program.name: program for program in wanted}
    _try_app(by_name["app1"], folder)
    _run(by_name["edge1"], ["-t"], folder, EDGE_DATA=str(folder))


def _try_app(program: Program, folder: Path) -> None:
    listener = folder / "app.sock"
    own = {"APP_LISTEN": f"unix:{listener.name}", "APP_SOCKET": "", "APP_FIRST_CPU": "-1"}
    output = folder / "app.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            program.command,
            cwd=folder,
            env={**base_environment(), **program.environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _within(START_TIMEOUT_S, lambda: local_http.answers_at(listener, "/livez") or process.poll() is not None)
        if process.poll() is not None or not local_http.answers_at(listener, "/livez"):
            _refuse(program, output.read_text())
    finally:
        process.send_signal(signal.SIGINT)  # which is quick; without effect if the process has ended
        process.wait()


def replace(plan: Plan, wanted: list[Program], migrate: Callable[[], None]) -> None:
    """Replace each program that has changed, start the new programs and stop the superfluous programs.

    Raises:
        Refusal: A program did not start as its new version. Programs that come after it were not changed.
    """
    supervisor = Supervisor(plan)
    existing = {process["name"] for process in supervisor.processes()}
    changed = [program for program in wanted if program.running_version(plan) != program.version()]
    with step("bringing the tables up to date"):
        migrate()
    for program in wanted:
        if program.name not in existing or program not in changed:
            program.write_script(plan)  # also of an unchanged program: its reaper may be newer
    supervisor.add(wanted)
    supervisor.send("postgres", "HUP")  # another level of its log; Redis takes it when it is started again
    for program in changed:
        if program.name in existing:
            with step(f"replacing {program.name}"):
                _replace(plan, supervisor, program)
        else:
            with step(f"starting {program.name}"):
                supervisor.start_program(program.name)
                _await_start(plan, program)
    # After the edges were reloaded, no edge sends requests to a superfluous app.
    for name in existing - {program.name for program in wanted}:
        with step(f"stopping {name}"):
            supervisor.remove(name)


def _replace(plan: Plan, supervisor: Supervisor, program: Program) -> None:
    file = script(plan, program.name)
    before = file.read_text()
    program.write_script(plan)
    try:
        if program.name.startswith("app") and supervisor.pid_of(program.name):
            _hand_over(plan, supervisor, program)
        elif program.name.startswith("edge") and supervisor.pid_of(program.name) and _may_reload(before, program):
            _reload(plan, supervisor, program)
        else:
            supervisor.stop_program(program.name)
            if program.name == "relay":
                plan.heartbeat.unlink(missing_ok=True)  # the new relay makes it when it listens
            supervisor.start_program(program.name)
            _await_start(plan, program)
    except Refusal:
        file.write_text(before)  # when the new version ends, supervisor starts the version before
        raise


def _hand_over(plan: Plan, supervisor: Supervisor, program: Program) -> None:
    master = supervisor.pid_of(program.name)
    old = set(children(master))
    supervisor.send(program.name, "HUP")
    _within(START_TIMEOUT_S, lambda: set(children(master)) - old)
    # The old workers end when the new workers have loaded the app, and also if the new master has failed.
    _within(END_TIMEOUT_S, lambda: not old & set(children(master)))
    if not set(children(master)) - old:
        raise Refusal(_failed(plan, program))
    _await_start(plan, program)


def _may_reload(before: str, program: Program) -> bool:
    """Return whether the edge keeps its memory. With another size, old and new workers would have two memories for a
    moment, and an invalidation would reach only one of them."""
    return re.findall(r" EDGE_MEMORY=(\d+)", before) == [program.environment["EDGE_MEMORY"]]


def _reload(plan: Plan, supervisor: Supervisor, program: Program) -> None:
    master = supervisor.pid_of(program.name)
    old = set(children(master))
    with contextlib.suppress(*local_http.UNANSWERED):  # without it, the reload is less gentle to idle connections
        local_http.get_signed(
            f"http://{program.environment['EDGE_CONTROL']}/close_connections", plan.secret("edge_secret")
        )
        time.sleep(CLOSING_S)
    _run(program, ["-s", "reload"], plan.home / program.name)
    if not _within(START_TIMEOUT_S, lambda: set(children(master)) - old):
        raise Refusal(_failed(plan, program))
    _within(END_TIMEOUT_S, lambda: not old & set(children(master)))
    _await_start(plan, program)


def _await_start(plan: Plan, program: Program) -> None:
    def is_started() -> bool:
        if listener := program.environment.get("APP_SOCKET"):
            return local_http.answers_at(plan.home / program.name / listener, "/livez")
        if listener := program.environment.get("EDGE_CONTROL"):
            return local_http.answers(f"http://{listener}/show", plan.secret("edge_secret"))
        return True

    if not _within(START_TIMEOUT_S, is_started):
        raise Refusal(_failed(plan, program))


def _failed(plan: Plan, program: Program) -> str:
    return (
        f"{program.name} did not start with the new version. See {plan.logs / (program.name + '.log')}. Programs that "
        "come after it still run the version before. Correct the new version, or return to the version before, and run "
        "./run up again."
    )


def _run(program: Program, arguments: list[str], folder: Path, **environment: str) -> None:
    """Run the command of the program with further arguments.

    Raises:
        Refusal: The command failed.
    """
    completed = subprocess.run(
        [*program.command, *arguments],
        cwd=folder,
        env={**base_environment(), **program.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode != 0:
        _refuse(program, completed.stdout + completed.stderr)


def _refuse(program: Program, output: str) -> NoReturn:
    report("")
    for entry in list(log_lines.entries(program.name, output.encode().splitlines()))[-15:]:
        report(log_view.for_people(entry))
    raise Refusal(
        f"{program.name} cannot start with the new version; the reason is above. The stack still runs as before."
    )


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # the process has ended
        return []


def _within(seconds: float, condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
