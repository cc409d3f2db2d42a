"""Tests, on real servers.

If several processes run them, each process gets a loopback of its own before it imports any code of the project: a
process reads only once which host it is on (velikiy/coherence/membership.py, HOST).
"""

import os

from testkit.isolation import enter_network_namespace

if "PYTEST_XDIST_WORKER" in os.environ and "VELIKIY_APART" not in os.environ:
    os.environ["VELIKIY_APART"] = "yes"  # child processes import this package too, and must stay in the namespace
    enter_network_namespace()
