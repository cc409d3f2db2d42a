"""All faults."""

from tests.chaos import clients, clocks, disks, names, network, postgres, processes, redis
from tests.chaos.fault import Fault

MODULES = (processes, postgres, redis, disks, clocks, network, names, clients)


def faults() -> dict[str, Fault]:
    """Return each fault by its name, in the order of the modules."""
    found: dict[str, Fault] = {}
    for fault in (fault for module in MODULES for fault in module.FAULTS):
        assert fault.name not in found, f"two faults are called {fault.name}"
        found[fault.name] = fault
    return found
