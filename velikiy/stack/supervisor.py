"""Configure supervisor, and send it commands."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from velikiy import whole_file
from velikiy.stack import Refusal, privileges, reaper
from velikiy.stack.code_copy import code_folder
from velikiy.stack.plan import Plan
from velikiy.stack.programs import FIRST_UNPRIVILEGED_PORT, Program, base_environment, script

DATA_SERVERS = ("postgres", "redis")
"""The programs that start before the others, and stop after them."""

STOP_TIMEOUT_S = 20
"""After this time a program that has not ended is killed."""

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
        return any(port < FIRST_UNPRIVILEGED_PORT for port in self.plan.client_ports)

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
        for program in programs:
            program.write_script(self.plan)
        self._configure(programs)
        command = [sys.executable, "-P", "-m", "velikiy.stack.supervisord", "-n", "-c", str(self.configuration)]
        process = subprocess.Popen(
            command if self.needs_low_ports else privileges.WITHOUT_LOW_PORTS + command,
            cwd=self.plan.home,
            env={**base_environment(), "PYTHONPATH": str(code_folder())},
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

    def stop_program(self, name: str) -> None:
        with contextlib.suppress(Fault):  # the program does not run
            self.rpc.stopProcess(name, False)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.pid_of(name) and time.monotonic() < deadline:
            time.sleep(0.03)

    def pid_of(self, name: str) -> int:
        """Return the pid of the program, or 0 if it does not run."""
        return next((int(process["pid"]) for process in self.processes() if process["name"] == name), 0)

    def send(self, name: str, signal_name: str) -> None:
        with contextlib.suppress(Fault):  # the program does not run
            self.rpc.signalProcess(name, signal_name)

    def add(self, programs: list[Program]) -> None:
        """Add the programs that are not supervised yet, without starting them."""
        self._configure(programs)
        [[added, _, _]] = self.rpc.reloadConfig()
        for name in added:
            self.rpc.addProcessGroup(name)

    def remove(self, name: str) -> None:
        """Stop a program that the configuration does not contain any more."""
        self.stop_program(name)
        self.rpc.removeProcessGroup(name)
        script(self.plan, name).unlink(missing_ok=True)

    @property
    def configuration(self) -> Path:
        return self.plan.home / "run" / "supervisord.conf"

    def _configure(self, programs: list[Program]) -> None:
        whole_file.replace(self.configuration, _configuration(self.plan, programs), durable=False)

    def stop(self, *, within: float = 40) -> None:
        """Stop all programs in order, then supervisord. Kill the processes that do not end in time."""
        pid = self.pid()
        if pid is not None:
            deadline = time.monotonic() + within
            with contextlib.suppress(*UNREACHABLE):
                # supervisord itself would stop one program after the other, a second each. The edges end first, so
                # that the apps can answer their last requests.
                names = [process["name"] for process in self.processes()]
                edges = [name for name in names if name.startswith("edge")]
                self._stop_all(edges, deadline)
                self._stop_all([name for name in names if name not in (*edges, *DATA_SERVERS)], deadline)
                self._stop_all(names, deadline)
                self.rpc.shutdown()
            while _is_alive(pid) and time.monotonic() < deadline:
                time.sleep(0.03)
        # A killed supervisord leaves its programs running.
        reaper.reap(self.plan.home, grace=10)
        with contextlib.suppress(OSError):  # a disk that can only be read since it has failed
            self.socket.unlink(missing_ok=True)
            for noted in (self.plan.home / "run").glob("*.spawned"):  # restarts count from the start of the stack
                noted.unlink(missing_ok=True)
        for folder in self.plan.metrics_folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _stop_all(self, names: list[str], deadline: float) -> None:
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


def _configuration(plan: Plan, programs: list[Program]) -> str:
    home = plan.home
    sections = [
        "[supervisord]",
        f"logfile={_value(home / 'logs' / 'supervisord.log')}",
        "logfile_maxbytes=10MB",  # run/log_rotation decides (velikiy/stack/supervisord.py)
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
    return [
        f"[program:{program.name}]",
        f"command={_value(shlex.join(['/bin/sh', str(script(plan, program.name))]))}",
        f"directory={_value(plan.home / program.name)}",
        f"autostart={'true' if program.name in DATA_SERVERS else 'false'}",
        # Restart for ever: no start counts as failed, so no number of retries runs out. The reaper paces the restarts.
        "autorestart=true",
        "startsecs=0",
        f"stopsignal={program.stop_signal}",
        f"stopwaitsecs={STOP_TIMEOUT_S}",
        "killasgroup=true",
        "redirect_stderr=true",
        f"stdout_logfile={_value(plan.logs / (program.name + '.log'))}",
        "stdout_logfile_maxbytes=10MB",
    ]


def _value(text: object) -> str:
    """Escape the percent sign, since supervisor expands %(name)s in values."""
    return str(text).replace("%", "%%")
