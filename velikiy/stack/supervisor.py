"""Configure supervisor, and send it commands."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from http.client import HTTPException
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from velikiy.stack import Refusal, code_copy, privileges, reaper
from velikiy.stack.plan import Plan
from velikiy.stack.programs import FIRST_UNPRIVILEGED_PORT, Program

DATA_SERVERS = ("postgres", "redis")
"""The programs that start before the others, and stop after them."""

UNREACHABLE = (OSError, HTTPException, Fault)
"""The exceptions of a call to a supervisord that does not run or is stopping."""


class Supervisor:
    """The supervisord of one data folder. Its Unix socket takes the commands."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.socket = plan.home / "run" / "supervisor.sock"

    @property
    def rpc(self) -> Any:
        """Return a new connection. A connection that failed once cannot be used again."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return ServerProxy("http://localhost", transport=transport).supervisor

    @property
    def needs_low_ports(self) -> bool:
        """Return whether an edge needs the capability for its port. supervisord passes it on if root started it."""
        return any(port < FIRST_UNPRIVILEGED_PORT for port in self.plan.edge_ports)

    def pid(self) -> int | None:
        """Return the pid of supervisord, or None if it does not run."""
        try:
            return int(self.rpc.getPID())
        except UNREACHABLE:
            return None

    def processes(self) -> list[dict[str, Any]]:
        try:
            return [dict(process) for process in self.rpc.getAllProcessInfo()]
        except UNREACHABLE:
            return []

    def start(self, programs: list[Program], *, within: float = 15) -> None:
        """Start supervisord, which starts the data servers. `start_program` starts each other program.

        Raises:
            Refusal: supervisord does not start within this time.
        """
        configuration = self.plan.home / "run" / "supervisord.conf"
        configuration.write_text(_configuration(self.plan, programs))
        command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(configuration)]
        process = subprocess.Popen(
            command if self.needs_low_ports else privileges.WITHOUT_LOW_PORTS + command,
            cwd=self.plan.home,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # No pipe to this launcher, which will have ended: on a full disk supervisord writes to stderr, and a broken
            # pipe would end it.
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the launcher, which stops the programs in order
            umask=0o077,
        )
        deadline = time.monotonic() + within
        while self.pid() is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Refusal(f"supervisord did not start. See {self.plan.logs / 'supervisord.log'}.")
            time.sleep(0.02)

    def start_program(self, name: str) -> None:
        with contextlib.suppress(Fault):  # the program runs already
            self.rpc.startProcess(name, False)

    def stop(self, *, within: float = 40) -> None:
        """Stop all programs in order, then supervisord. Kill the processes that do not end in time."""
        pid = self.pid()
        if pid is not None:
            deadline = time.monotonic() + within
            with contextlib.suppress(*UNREACHABLE):
                # supervisord itself would stop one program after the other, a second each.
                self._stop_all_but(DATA_SERVERS, deadline)
                self._stop_all_but((), deadline)
                self.rpc.shutdown()
            while _is_alive(pid) and time.monotonic() < deadline:
                time.sleep(0.03)
        # A killed supervisord leaves its programs running.
        reaper.reap(self.plan.home, grace=10)
        self.socket.unlink(missing_ok=True)

    def _stop_all_but(self, kept: tuple[str, ...], deadline: float) -> None:
        names = [process["name"] for process in self.processes() if process["name"] not in kept]
        for name in names:
            with contextlib.suppress(Fault):  # the program does not run
                self.rpc.stopProcess(name, False)
        while time.monotonic() < deadline and any(p["pid"] for p in self.processes() if p["name"] in names):
            time.sleep(0.03)


def _is_alive(pid: int) -> bool:
    try:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # a child of this process stays a zombie until waitpid
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _environment() -> dict[str, str]:
    """Return the environment of the services: the few variables that any program needs. No other variable of a person's
    shell reaches them."""
    passed_on = {name: os.environ[name] for name in ("TZ", "TMPDIR") if name in os.environ}
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **passed_on}


def _configuration(plan: Plan, programs: list[Program]) -> str:
    home = plan.home
    sections = [
        "[supervisord]",
        f"logfile={_value(home / 'logs' / 'supervisord.log')}",
        "logfile_maxbytes=10MB",
        "logfile_backups=1",
        f"pidfile={_value(home / 'run' / 'supervisord.pid')}",
        f"childlogdir={_value(home / 'logs')}",
        "[unix_http_server]",
        f"file={_value(home / 'run' / 'supervisor.sock')}",
        "chmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    return "\n".join([*sections, *(line for program in programs for line in _section(plan, program))]) + "\n"


def _section(plan: Plan, program: Program) -> list[str]:
    reaper_script = str(code_copy.code_folder() / "velikiy" / "stack" / "reaper.py")
    command = [sys.executable, "-S", reaper_script, *program.command]
    if not program.needs_low_port:
        command = privileges.WITHOUT_LOW_PORTS + command
    return [
        f"[program:{program.name}]",
        f"command={_value(shlex.join(command))}",
        f"directory={_value(plan.home / program.name)}",
        "environment=" + ",".join(f'{k}="{_value(v)}"' for k, v in program.environment.items()),
        f"autostart={'true' if program.name in DATA_SERVERS else 'false'}",
        # Restart for ever: no start counts as failed, so no number of retries runs out. The reaper paces the restarts.
        "autorestart=true",
        "startsecs=0",
        f"stopsignal={program.stop_signal}",
        "stopwaitsecs=20",
        "killasgroup=true",
        "redirect_stderr=true",
        f"stdout_logfile={_value(plan.logs / (program.name + '.log'))}",
        "stdout_logfile_maxbytes=10MB",
        "stdout_logfile_backups=3",
    ]


def _value(text: object) -> str:
    """Escape the percent sign, since supervisor expands %(name)s in values."""
    return str(text).replace("%", "%%")
