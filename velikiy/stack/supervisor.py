"""supervisor: its configuration, and talking to it."""

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

from velikiy.stack import Refusal, privileges, reaper
from velikiy.stack.plan import Plan, Program

FIRST = ("postgres", "redis")
"""They start before the others, and stop after them."""

UNREACHABLE = (OSError, HTTPException, Fault)


class Supervisor:
    """The supervisord of one data folder, over its Unix socket."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.socket = plan.home / "run" / "supervisor.sock"

    @property
    def rpc(self) -> Any:
        """A connection of its own for each call: one that failed once is of no use any more."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return ServerProxy("http://localhost", transport=transport).supervisor

    @property
    def low_ports(self) -> bool:
        """Whether an edge needs the capability for its port; without root nobody has it to give."""
        return any(port < 1024 for port in self.plan.edge_ports)

    def pid(self) -> int | None:
        """None where it does not run."""
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
        """supervisord, and of the programs those that come first.

        Raises:
            Refusal: it does not come up.
        """
        configuration = self.plan.home / "run" / "supervisord.conf"
        configuration.write_text(_configuration(self.plan, programs))
        command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(configuration)]
        process = subprocess.Popen(
            command if self.low_ports else privileges.WITHOUT_LOW_PORTS + command,
            cwd=self.plan.home,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # No pipe to us, who will be gone: on a full disk it complains there, and would die of it.
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the launcher, which stops things in their order
            umask=0o077,
        )
        until = time.monotonic() + within
        while self.pid() is None:
            if process.poll() is not None or time.monotonic() > until:
                raise Refusal(f"supervisord did not start. See {self.plan.logs / 'supervisord.log'}.")
            time.sleep(0.02)

    def start_program(self, name: str) -> None:
        with contextlib.suppress(Fault):  # it runs already
            self.rpc.startProcess(name, False)

    def stop(self, *, within: float = 40) -> None:
        """Everything, in order; what does not end in time is killed."""
        pid = self.pid()
        if pid is not None:
            until = time.monotonic() + within
            with contextlib.suppress(*UNREACHABLE):
                # supervisord itself would stop one after the other, a second each.
                self._stop_all_but(FIRST, until)
                self._stop_all_but((), until)
                self.rpc.shutdown()
            while _lives(pid) and time.monotonic() < until:
                time.sleep(0.03)
        # Whatever is left without its supervisor.
        reaper.reap(self.plan.home, grace=10)
        self.socket.unlink(missing_ok=True)

    def _stop_all_but(self, kept: tuple[str, ...], until: float) -> None:
        names = [process["name"] for process in self.processes() if process["name"] not in kept]
        for name in names:
            with contextlib.suppress(Fault):  # it does not run
                self.rpc.stopProcess(name, False)
        while time.monotonic() < until and any(p["pid"] for p in self.processes() if p["name"] in names):
            time.sleep(0.03)


def _lives(pid: int) -> bool:
    try:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # where it is our own child, it stays a zombie until it is asked for
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _environment() -> dict[str, str]:
    """For the services: of ours only what any program needs, so that nothing of a person's shell leaks in."""
    kept = {name: os.environ[name] for name in ("TZ", "TMPDIR") if name in os.environ}
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **kept}


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
    for program in programs:
        command = [sys.executable, "-S", str(privileges.code() / "velikiy" / "stack" / "reaper.py"), *program.command]
        if not program.low_ports:
            command = privileges.WITHOUT_LOW_PORTS + command
        sections += [
            f"[program:{program.name}]",
            f"command={_value(shlex.join(command))}",
            f"directory={_value(home / program.name)}",
            "environment=" + ",".join(f'{k}="{_value(v)}"' for k, v in program.environment.items()),
            f"autostart={'true' if program.name in FIRST else 'false'}",
            # For ever: no start counts as failed, so no number of retries runs out; reaper.py sets the pace.
            "autorestart=true",
            "startsecs=0",
            f"stopsignal={program.stop_signal}",
            "stopwaitsecs=20",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={_value(home / 'logs' / (program.name + '.log'))}",
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=3",
        ]
    return "\n".join(sections) + "\n"


def _value(text: object) -> str:
    """supervisor expands %(name)s in values."""
    return str(text).replace("%", "%%")
