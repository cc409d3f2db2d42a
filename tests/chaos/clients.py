"""Faults of clients: slow, silent, half-closing, flooding. Whatever they do, others are served."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from testkit.stack import ROOT, running
from tests.chaos.crowd import NO_ANSWER
from tests.chaos.fault import Fault, Inject, Limits
from tests.chaos.service import OWN_ROWS, Kind, Service


def crowd(kind: str, count: int, *required: str) -> Inject:
    """Return a fault of so many clients of a kind (tests/chaos/crowd.py).

    Args:
        kind: The kind of the clients.
        count: The number of the clients.
        required: Outcomes of which each has to occur: else the clients did not do what they should.
    """

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with service.row() as row:
            command = [sys.executable, "-m", "tests.chaos.crowd", kind, str(count), str(row), OWN_ROWS, *service.edges]
            clients = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                yield
            finally:
                try:
                    report, _ = clients.communicate(timeout=30)
                finally:
                    clients.kill()
                    clients.wait()
                outcomes = json.loads(report or "{}")
        service.note(", ".join(f"{number} x {outcome}" for outcome, number in sorted(outcomes.items())))
        if unanswered := outcomes.get(NO_ANSWER):
            service.violation(f"{unanswered} requests of clients that waited for a response got none")
        missing = [outcome for outcome in required if not outcomes.get(outcome)]
        assert not missing, f"no client saw: {', '.join(missing)}"

    return inject


PHASE_S = 3.0
"""Seconds of each of the two phases of an overload."""

LEAST_GOODPUT = 0.9
"""The share of the peak that is still carried out in time at twice the load."""

OWN_ROWS_AT_ONCE = 16


def overload(kind: str) -> Inject:
    """Return a fault that measures the peak of these requests, and then offers twice as many."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with ExitStack() as rows:
            users = [rows.enter_context(service.row()) for _ in range(OWN_ROWS_AT_ONCE if kind == "writes" else 0)]
            command = [sys.executable, "-m", "tests.chaos.overload", kind, str(PHASE_S), OWN_ROWS, *service.edges]
            load = subprocess.Popen([*command, "--", *map(str, users)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            try:
                yield
                report = json.loads(load.communicate(timeout=30)[0])
            finally:
                load.kill()
                load.wait()
        outcomes = ", ".join(f"{number} x {outcome}" for outcome, number in sorted(report["outcomes"].items()))
        service.note(f"goodput {report['ratio']:.0%} of {report['peak']} in a second: {outcomes}")
        if report["ratio"] < LEAST_GOODPUT:
            service.violation(f"at twice the load the goodput is {report['ratio']:.0%} of the peak")

    return inject


@contextmanager
def limited() -> Iterator[Service]:
    """Start a stack that limits each client. The clients that behave stay below the limits."""
    limits: Any = {"RATE_REQUESTS": "3000", "RATE_WINDOW": "1", "RATE_CONNECTIONS": "30"}
    with running("--edges", "2", "--apps", "2", **limits) as stack:
        yield Service(stack, stack.edges)


LIMITED = Kind("limited", limited)

OWN = "Clients hurt only themselves."

OTHERS_SERVED = Limits(writes=1.0, hit_s=1.0, miss_s=2.0, write_s=3.0, recovery_s=5.0)
"""Others are served as before, as far as the machine has time for both."""

FAULTS = (
    [
        Fault(f"clients-{kind}", what, crowd(kind, count, *required), seconds=2.5, unnamed=OWN, limits=OTHERS_SERVED)
        for kind, count, what, required in [
            ("slow-headers", 300, "300 clients send a header byte by byte.", []),
            ("slow-bodies", 300, "300 clients send the body of a PUT byte by byte.", []),
            ("slow-readers", 100, "100 clients request large responses and hardly read them.", []),
            ("silent", 500, "500 clients connect and send nothing.", []),
            ("idle", 1000, "1,000 clients keep idle connections.", ["200"]),
            (
                "half-closing",
                30,
                "30 clients close their sending side behind a read, and wait for the answer.",
                ["200"],
            ),
            (
                "resetting",
                50,
                "50 clients reset their connection in the middle of a PUT, or right behind it.",
                ["reset"],
            ),
            ("pipelining", 20, "20 clients send 50 requests at once on one connection.", ["200"]),
            ("unknown-ids", 30, "30 clients read random ids that no row has.", ["404"]),
            ("queries", 30, "30 clients read lists by 10,000 different queries.", ["200"]),
            ("searches", 30, "30 clients send searches and counts that no cache has.", []),
            ("huge-bodies", 10, "10 clients send bodies of 64 kB to 10 MB.", []),
            ("one-row", 50, "50 clients write one row under conditions.", ["412", "200"]),
            ("batches", 20, "20 clients send batches of 50 operations.", []),
            ("histories", 30, "30 clients read pages of histories.", ["200"]),
            ("streams", 60, "60 clients open the stream of the console.", ["200"]),
            ("garbage", 50, "50 clients send TLS, HTTP/2 or random bytes to a port that speaks HTTP/1.1.", []),
            ("if-none-match", 50, "50 clients ask for one row with conditions that never hold.", ["200"]),
        ]
    ]
    + [
        Fault(
            "clients-beyond-its-rate",
            "One client sends hits faster than RATE_REQUESTS allows.",
            crowd("beyond-its-rate", 4, "200", "429"),
            seconds=2.5,
            unnamed=OWN,
            limits=OTHERS_SERVED,
            kind=LIMITED,
        ),
        Fault(
            "clients-beyond-its-connections",
            "One client opens 1,500 connections where RATE_CONNECTIONS allows 30 requests.",
            crowd("beyond-its-connections", 1500, "closed by the edge"),
            seconds=4,
            unnamed=OWN,
            limits=OTHERS_SERVED,
            kind=LIMITED,
        ),
    ]
    + [
        Fault(
            f"clients-overload-{kind}",
            f"Clients send twice as many {what} as the service can carry, and give up after a second.",
            overload(kind),
            seconds=2 * PHASE_S + 1,
            unnamed="The service refuses what is too much, and counts it (velikiy_edge_requests_total).",
            limits=Limits(reads=0.0, writes=0.0, hit_s=1.0, miss_s=3.0, write_s=4.0, recovery_s=5.0),
            pairs=False,
        )
        for kind, what in (("reads", "reads that no cache answers"), ("writes", "writes"))
    ]
)
