"""Faults of clocks: the wall clock of one server is set.

A wall clock belongs to the whole machine, so each server reads its own through a small library (clock.c). The clocks
that count from the start of the machine stay as they are: they cannot be set.
"""

import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testkit.stack import folder, running, wait_until
from tests.chaos.fault import Fault, Inject, Limits
from tests.chaos.service import Kind, Missing, Service

SOURCE = Path(__file__).parent / "clock.c"


@contextmanager
def with_own_clocks() -> Iterator[Service]:
    """Start a stack, and start each of its servers again with a clock of its own."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Missing("a C compiler is missing (Debian's package gcc)")
    with folder() as home, running("--edges", "2", "--apps", "2") as stack:
        library = home / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE)], check=True)
        supervisor, names = stack.supervisor, [*stack.pids()]
        for name in names:
            clock = clock_of(stack.data, name)
            set_clock(clock, 0)
            script = stack.data / "run" / name
            variables = f"LD_PRELOAD={library} CHAOS_CLOCK={clock}"
            script.write_text(script.read_text().replace("exec env -i ", f"exec env -i {variables} ", 1))
        supervisor.rpc.stopAllProcesses()
        supervisor.rpc.startAllProcesses()
        wait_until(stack.healthy, within=90, what="the servers run again")
        yield Service(stack, stack.edges)


OWN_CLOCKS = Kind("own clocks", with_own_clocks)


def clock_of(data: Path, name: str) -> Path:
    return data / "run" / f"{name}.clock"


def set_clock(clock: Path, seconds: int) -> None:
    """Write into the file, which the server has mapped: it must not be replaced."""
    with clock.open("r+b" if clock.exists() else "wb") as file:
        file.write(struct.pack("l", seconds))


def stepped(name: str, seconds: int) -> Inject:
    """Return a fault in which the clock of this server is set."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        clock = clock_of(service.stack.data, name)
        set_clock(clock, seconds)
        try:
            yield
        finally:
            set_clock(clock, 0)

    return inject


STEPS = {"10s-forward": 10, "10s-back": -10, "hour-forward": 3600, "hour-back": -3600}

UNTOUCHED = Limits(writes=1.0)
"""No wall clock decides."""

IN_PROGRESS_REFUSED = Limits(writes=0.9)
"""SQL has no other clock: PostgreSQL refuses the writes that are in progress when its clock steps forward."""

FAULTS = [
    Fault(
        f"clock-{party}-{step}",
        f"The clock of {shown} is set {'forward' if seconds > 0 else 'back'} by"
        f" {'an hour' if abs(seconds) == 3600 else '10 seconds'}.",
        stepped(party, seconds),
        named=("clock.differs",) if named else (),
        unnamed="" if named else "the relay compares its clock with PostgreSQL's, and its log names the difference",
        limits=IN_PROGRESS_REFUSED if party == "postgres" else UNTOUCHED,
        kind=OWN_CLOCKS,
    )
    for party, shown, steps, named in (
        ("postgres", "PostgreSQL", STEPS, True),
        ("app1", "an app", ("hour-forward", "hour-back"), True),
        ("edge1", "an edge", ("10s-forward", "hour-forward", "hour-back"), True),
        ("redis", "Redis", ("hour-forward", "hour-back"), True),
        ("relay", "the relay", ("hour-forward", "hour-back"), False),
    )
    for step in steps
    for seconds in (STEPS[step],)
]
