"""All faults."""

from importlib import import_module
from importlib.util import find_spec

from tests.chaos.fault import Fault

MODULES = ("processes", "postgres", "redis", "disks", "clocks", "network", "names", "clients")


def faults() -> dict[str, Fault]:
    """Return each fault by its name, in the order of the modules."""
    found: dict[str, Fault] = {}
    for name in MODULES:
        if find_spec(f"tests.chaos.{name}"):
            for fault in import_module(f"tests.chaos.{name}").FAULTS:
                assert fault.name not in found, f"two faults are called {fault.name}"
                found[fault.name] = fault
    return found
