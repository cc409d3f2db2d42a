"""Serve the metrics of a whole stack at one address, for Prometheus: `python -m velikiy.stack.scrape_target HOME PORT`.

The process adds up what the apps and the relay have counted (velikiy/metrics.py), reads the metrics of each edge from
its control listener, and reports on the processes that supervisor starts. It listens on the loopback only.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from velikiy import logs, metrics
from velikiy.findings import machine
from velikiy.stack import local_http, reaper
from velikiy.stack.plan import Plan
from velikiy.stack.supervisor import Supervisor

EDGE_TIMEOUT_S = 0.5
"""An edge that is slower acknowledges no invalidation in time either. Prometheus gives up after 5 s, so the edges are
read in parallel: many that hang must not hide all other metrics."""

MAX_EDGES_AT_ONCE = 16


class Edges:
    """The metrics of the edges, each with the label `edge`."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def collect(self) -> Iterator[Metric]:
        plan = Plan.load(self.home)  # now: a running stack may get further edges
        up = GaugeMetricFamily("velikiy_edge_up", "1 if the edge answers at its control listener.", labels=["edge"])
        families: dict[str, Metric] = {}
        with ThreadPoolExecutor(max_workers=MAX_EDGES_AT_ONCE) as pool:
            texts = list(pool.map(_metrics_at, plan.control_ports if plan else []))
        for number, text in enumerate(texts, 1):
            name = f"edge{number}"
            up.add_metric([name], 1 if text else 0)
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "edge": name}, sample.value)
        yield up
        yield from families.values()


def _metrics_at(port: int) -> str:
    """Return the metrics of the edge at this control listener, or an empty string if it does not answer."""
    try:
        return local_http.get(f"http://127.0.0.1:{port}/metrics", timeout=EDGE_TIMEOUT_S)
    except local_http.UNANSWERED:
        return ""


class Processes:
    """The processes of the stack as supervisor sees them."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def collect(self) -> Iterator[Metric]:
        plan = Plan.load(self.home)
        up = GaugeMetricFamily(
            "velikiy_process_up", "1 if the process runs, 0 also while it ends again and again.", labels=["process"]
        )
        age = GaugeMetricFamily("velikiy_process_uptime_seconds", "Time since the last start.", labels=["process"])
        memory = GaugeMetricFamily(
            "velikiy_process_memory_bytes", "Memory of the process and its children (PSS).", labels=["process"]
        )
        starts = CounterMetricFamily("velikiy_process_starts", "Starts of the process.", labels=["process"])
        for process in Supervisor(plan).processes() if plan else []:
            name, pid = process["name"], process["pid"]
            count, moments = reaper.starts(self.home / "run" / f"{name}.spawned")
            # A process that cannot start has a process id most of the time: the reaper waits under it for the next try.
            up.add_metric([name], 1 if pid and not reaper.crash_loop(count, moments) else 0)
            age.add_metric([name], time.time() - process["start"] if pid else 0)
            memory.add_metric([name], machine.memory_of(pid) if pid else 0)
            starts.add_metric([name], count)
        yield from (up, age, memory, starts)


def main() -> None:
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    logs.configure_service("info")
    target = CollectorRegistry()
    plan = Plan.load(home)
    if plan is None:
        logs.cannot_start(f"there is no stack in {home}")
    for collector in (metrics.Collector(plan.metrics_folder), Edges(home), Processes(home)):
        target.register(collector)
    _, thread = start_http_server(port, "127.0.0.1", target)
    thread.join()


if __name__ == "__main__":
    main()
