"""Tests, on real servers. Where several processes run them each has a loopback of its own, from before anything of ours
is imported: which host it is on a process takes from there, and only once (velikiy/coherence/membership.py, HOST)."""

import os

from testkit.isolation import loopback_of_our_own

if "PYTEST_XDIST_WORKER" in os.environ and "VELIKIY_APART" not in os.environ:
    os.environ["VELIKIY_APART"] = "yes"  # for those that it starts: they share it, and import this too
    loopback_of_our_own()
