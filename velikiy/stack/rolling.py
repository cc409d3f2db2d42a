"""Replace or restart the programs of a running stack one after the other, so that no request fails.

An app becomes its next version under its process id and keeps its listener (`velikiy/server/handover.py`). An edge is
reloaded: Nginx keeps its listeners, its memory and its cache lease, and old workers finish their requests. Every other
program is stopped and started. While Redis is away, reads go to PostgreSQL; when the relay is back it invalidates
everything. Only while PostgreSQL restarts do requests fail.
"""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from velikiy import whole_file
from velikiy.stack import Refusal, cluster, local_http, log_lines, log_view, reaper
from velikiy.stack.messages import report, step
from velikiy.stack.plan import INNER_PORTS, Plan, is_free
from velikiy.stack.programs import Program, base_environment, script
from velikiy.stack.readiness import ends_again_and_again, findings_at
from velikiy.stack.supervisor import Supervisor

START_TIMEOUT_S = 90
"""For a program that starts, or becomes its next version, on a machine with far too much work. If it ends again
and again, that is noticed within seconds."""

END_TIMEOUT_S = 90
"""For the last requests of old workers. An idle connection that its client keeps open ends after 75 s."""

REDIS_TIMEOUT_S = 5
"""For a Redis that was started, until it is used. Reads go to PostgreSQL meanwhile."""

REACHED_TIMEOUT_S = 3
"""For the edges, until they look again at an app that has just started."""

CLOSING_S = 2.0
"""Time for the clients of an edge to leave their connections (edge/lua/closing.lua)."""

READ = "/users/1"
"""A read with which a new version is tried. The row need not exist, and the read may need a key."""

FAILED = (0, 500)
"""The statuses of a version that does not work. Without an app, an edge answers 502 or 503."""

ADDRESS_VARIABLES = ("EDGE_LISTEN", "HTTP_LISTEN")
"""The variables with the addresses that an edge opens for clients."""


def obstacle(running: Plan, plan: Plan, addresses: dict[str, str | None]) -> str:
    """Return why the stack has to be stopped and started, or an empty string if its programs can be replaced.

    Args:
        running: The stack that runs.
        plan: The stack that the user wants, with the ports of the running stack.
        addresses: The addresses of servers that the user has set, by the name of their file.
    """
    if plan.reload or running.reload:
        return "--reload runs the code from the checkout"
    if running.compatibility != plan.compatibility:
        return "the versions cannot work side by side"
    if Supervisor(plan).needs_low_ports and not Supervisor(running).needs_low_ports:
        return "a port below 1024 needs a right that its supervisor lacks"
    # Two Redis at a time would be two caches, and each process would invalidate one of them.
    own = (running.own_postgres, running.own_redis) == (plan.own_postgres, plan.own_redis)
    if not own or any(address and not running.has_secret(name, address) for name, address in addresses.items()):
        return "it uses another PostgreSQL, Redis or EDGE_SECRET"
    return ""


# ---- trying a new version ----


def check_new_version(plan: Plan, wanted: list[Program]) -> None:
    """Start an app and an edge of the new version beside the stack, where they serve no client.

    Raises:
        Refusal: The new version cannot start.
    """
    with trial(plan, wanted):
        pass


@contextlib.contextmanager
def trial(plan: Plan, wanted: list[Program]) -> Iterator[Callable[[], None]]:
    """Start an app and an edge of the new version beside the stack, where they serve no client. The app goes on until
    the block ends.

    Yields:
        A function that checks whether the app answers reads, once the database has the tables of its version. It raises
        Refusal.

    Raises:
        Refusal: The new version cannot start.
    """
    folder = plan.home / "run" / "check"
    folder.mkdir(mode=0o700, exist_ok=True)
    reaper.reap(folder)  # a killed launcher leaves its trial behind
    by_name = {program.name: program for program in wanted}
    _try_edge(by_name["edge1"], folder)
    app = by_name["app1"]
    listener = folder / "app.sock"
    own = {"APP_LISTEN": f"unix:{listener.name}", "APP_SOCKET": "", "APP_FIRST_CPU": "-1"}
    with _beside(app, folder, **own) as (process, output):
        _within(START_TIMEOUT_S, lambda: local_http.answers_at(listener, "/livez") or process.poll() is not None)
        if process.poll() is not None or not local_http.answers_at(listener, "/livez"):
            _refuse(app, output)

        def check_reads() -> None:
            for target in ("/health", READ):
                if local_http.status_at(listener, target) in FAILED:
                    _refuse(app, output, f"GET {target} fails.")

        yield check_reads


def _try_edge(program: Program, folder: Path) -> None:
    """Check the configuration of an edge, and start it where it finds no app. So it gets no cache lease, and no writer
    waits for it."""
    _run(program, ["-t"], folder, EDGE_DATA=str(folder))
    listener = folder / "edge.sock"
    listener.unlink(missing_ok=True)
    control = next(port for port in INNER_PORTS if is_free("127.0.0.1", port))
    own = {
        "EDGE_DATA": str(folder),
        "EDGE_LISTEN": f"unix:{listener}",
        "EDGE_CONTROL": f"127.0.0.1:{control}",
        "EDGE_APPS": "unix:nothing.sock",
        "EDGE_MEMORY": "8",
        **{"TLS_CERT": "", "TLS_KEY": "", "HTTP_LISTEN": ""},
    }
    with _beside(program, folder, **own) as (process, output):
        _within(START_TIMEOUT_S, lambda: local_http.status_at(listener, READ) or process.poll() is not None)
        if local_http.status_at(listener, READ) in FAILED:
            _refuse(program, output, f"GET {READ} fails.")


@contextlib.contextmanager
def _beside(program: Program, folder: Path, **own: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Run the program beside the stack. Yield the process, and the file with its output."""
    output = folder / f"{program.name}.log"
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
        yield process, output
    finally:
        process.send_signal(signal.SIGINT)  # which is quick; without effect if the process has ended
        process.wait()


# ---- replacing and restarting ----


def replace(plan: Plan, wanted: list[Program], migrate: Callable[[], None]) -> None:
    """Try the new version, and replace each program that has changed.

    Raises:
        Refusal: The new version does not start. Programs that come after the one that failed were not changed.
    """
    with contextlib.ExitStack() as ends:
        with step("checking the new version"):
            check_reads = ends.enter_context(trial(plan, wanted))
        with step("bringing the tables up to date"):
            migrate()
        with step("checking its reads"):
            check_reads()
    replace_changed(plan, wanted)


def replace_changed(plan: Plan, wanted: list[Program]) -> None:
    """Replace each program that has changed, start the new programs and stop the superfluous programs.

    Raises:
        Refusal: A program does not start. Programs that come after it were not changed.
    """
    supervisor = Supervisor(plan)
    existing = {process["name"] for process in supervisor.processes()}
    replaced = changed(plan, wanted)
    moving = [program for program in replaced if program.name in existing and _moves(plan, program)]
    for program in wanted:
        if program.name not in existing or program not in replaced:
            program.write_script(plan)  # also of an unchanged program: its reaper may be newer
    supervisor.add(wanted)
    supervisor.send("postgres", "HUP")  # another level of its log; Redis takes it when it is started again
    for program in replaced:
        if program in moving[:1]:
            with step(f"stopping {', '.join(edge.name for edge in moving)}, because the address changes"):
                for edge in moving:  # before any of them starts: an edge may get the port of another
                    supervisor.stop_program(edge.name)
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


def changed(plan: Plan, wanted: list[Program]) -> list[Program]:
    """Return the programs that run, or shall run, as another version."""
    return [program for program in wanted if program.running_version(plan) != program.version()]


def restart(plan: Plan, programs: list[Program]) -> None:
    """Restart these programs one after the other.

    Raises:
        Refusal: A program does not start. Programs that come after it were not restarted.
    """
    supervisor = Supervisor(plan)
    for program in programs:
        with step(f"restarting {program.name}"):
            _become(plan, supervisor, program, keeps_memory=True)


def _replace(plan: Plan, supervisor: Supervisor, program: Program) -> None:
    file = script(plan, program.name)
    before = file.read_text()
    # With another size of its memory, old and new workers would have two memories for a moment, and an invalidation
    # would reach only one of them.
    keeps_memory = _variable(before, "EDGE_MEMORY") == program.environment.get("EDGE_MEMORY", "")
    program.write_script(plan)
    try:
        _become(plan, supervisor, program, keeps_memory=keeps_memory)
    except Refusal:
        # When the new version ends, supervisor starts the version before.
        whole_file.replace(file, before, durable=False)
        raise


def _become(plan: Plan, supervisor: Supervisor, program: Program, *, keeps_memory: bool) -> None:
    """Let the process run its script again, in the way of its kind."""
    master = supervisor.pid_of(program.name)
    if program.name.startswith("app") and master:
        _hand_over(plan, supervisor, program)
    elif program.name.startswith("edge") and master and keeps_memory and _may_reload(plan, program, master):
        _reload(plan, supervisor, program)
    else:
        if program.name == "postgres":
            cluster.checkpoint(plan)
        supervisor.stop_program(program.name)
        if program.name == "relay":
            plan.heartbeat.unlink(missing_ok=True)  # the new relay makes it when it listens
        supervisor.start_program(program.name)
        _await_start(plan, program)


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


def _moves(plan: Plan, program: Program) -> bool:
    """Return whether the program opens other addresses for clients than its running version."""
    before = script(plan, program.name).read_text()
    return program.name.startswith("edge") and any(
        _variable(before, name) != program.environment.get(name, "") for name in ADDRESS_VARIABLES
    )


def _variable(text: str, name: str) -> str:
    """Return the value of a variable in a script, which needs no quotation marks."""
    return "".join(re.findall(rf" '?{name}=([^ ']*)", text)[:1])


def _may_reload(plan: Plan, program: Program, master: int) -> bool:
    """Return whether the edge answers and its program on the disk is the one that runs. After an upgrade of Nginx, new
    workers would go on with the old program."""
    try:
        is_current = not str(Path(f"/proc/{master}/exe").readlink()).endswith(" (deleted)")
    except OSError:
        return False
    return is_current and local_http.answers(
        f"http://{program.environment['EDGE_CONTROL']}/show", plan.secret("edge_secret")
    )


def _reload(plan: Plan, supervisor: Supervisor, program: Program) -> None:
    master = supervisor.pid_of(program.name)
    old = set(children(master))
    _run(program, ["-t"], plan.home / program.name)  # also writes the configuration, which takes a moment
    with contextlib.suppress(*local_http.UNANSWERED):  # without it, the reload is less gentle to idle connections
        local_http.get_signed(
            f"http://{program.environment['EDGE_CONTROL']}/close_connections", plan.secret("edge_secret")
        )
        time.sleep(CLOSING_S)
    supervisor.send(program.name, "HUP")
    if not _within(START_TIMEOUT_S, lambda: set(children(master)) - old):
        raise Refusal(_failed(plan, program))
    _within(END_TIMEOUT_S, lambda: not old & set(children(master)))
    _await_start(plan, program)


def _await_start(plan: Plan, program: Program) -> None:
    ports = {"metrics": plan.metrics_port, "prometheus": plan.prometheus_port}

    def is_started() -> bool:
        environment = program.environment
        if listener := environment.get("APP_SOCKET"):
            return local_http.answers_at(plan.home / program.name / listener, "/livez")
        if listener := environment.get("EDGE_CONTROL"):
            return local_http.answers(f"http://{listener}/show", plan.secret("edge_secret"))
        if program.name == "relay":
            return plan.heartbeat.exists()
        if program.name == "redis":
            return local_http.accepts(plan.redis_socket)
        if program.name in ports:
            return not is_free("127.0.0.1", ports[program.name])
        return True

    began = time.time()
    if program.name == "postgres":
        cluster.await_server(plan, within=START_TIMEOUT_S)
    _within(START_TIMEOUT_S, lambda: is_started() or ends_again_and_again(plan, program.name, began))
    if not is_started():
        raise Refusal(_failed(plan, program))
    if program.name == "redis":
        await_redis(plan)


def await_redis(plan: Plan) -> None:
    """Wait until the apps use Redis, for REDIS_TIMEOUT_S at most: else the relay or the apps are away, and status says
    so."""
    _within(REDIS_TIMEOUT_S, lambda: _is_redis_used(plan))


def _is_redis_used(plan: Plan) -> bool:
    """Return whether the apps use Redis. The relay registers a server that was restarted."""
    try:
        return bool(json.loads(local_http.get(f"{plan.app_urls[0]}/readyz"))["checks"]["redis"] == "ok")
    except (*local_http.UNANSWERED, KeyError):
        return False


def await_reached_apps(plan: Plan) -> None:
    """Wait until each edge reaches each app, for REACHED_TIMEOUT_S at most. An app that starts slowly counts as silent
    until the edge looks again, and `up` would warn of it."""
    _within(
        REACHED_TIMEOUT_S, lambda: all(it.name != "app.silent" for url in plan.edge_urls for it in findings_at(url))
    )


def _failed(plan: Plan, program: Program) -> str:
    return f"{program.name} did not start. See {plan.logs / (program.name + '.log')}."


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


def _refuse(program: Program, output: Path | str, reason: str = "") -> NoReturn:
    """
    Args:
        program: The program that failed.
        output: What it printed, or the file with it.
        reason: A sentence, if the output does not tell it.

    Raises:
        Refusal
    """
    text = output.read_text(errors="replace") if isinstance(output, Path) else output
    report("")
    for entry in list(log_lines.entries(program.name, text.encode().splitlines()))[-15:]:
        report(log_view.for_people(entry))
    kind = "app" if program.name.startswith("app") else "edge"
    raise Refusal(f"The {kind} of the new version cannot start; the reason is above.{reason and f' {reason}'}")


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
