"""Tests on real servers.

When several processes run the tests, each process has a network namespace of its own. It is created before any module
of `velikiy` is imported, because such a module determines its host once, at import (velikiy/coherence/membership.py, HOST).
"""

import os

from testkit.isolation import enter_network_namespace

if "PYTEST_XDIST_WORKER" in os.environ and "VELIKIY_APART" not in os.environ:
    # A process that a test starts imports this module as well, and shares the namespace of its parent.
    os.environ["VELIKIY_APART"] = "yes"
    enter_network_namespace()
