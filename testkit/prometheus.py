"""A Prometheus for tests. It has the rules of deploy/prometheus/rules.yaml, in which each time is shorter."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from testkit.stack import ROOT, free_ports, wait_until

SPEED = 30
"""The times of the rules are divided by this number: a window of 2 minutes becomes 4 seconds, which has two
readings of the metrics. A reading takes a second while the machine is busy."""

UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000}


def _shorter(time: str) -> str:
    number, unit = re.fullmatch(r"(\d+)([smh])", time).groups()  # type: ignore[union-attr]
    return f"{int(number) * UNITS_MS[unit] // SPEED}ms"


def faster_rules() -> dict[str, Any]:
    """Return the rules with shorter windows, offsets and waiting times. Nothing else is changed."""
    rules: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = re.sub(r"(\[|\boffset )(\w+)", lambda found: found[1] + _shorter(found[2]), rule["expr"])
        if "for" in rule:
            rule["for"] = _shorter(rule["for"])
    return rules


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def firing(self) -> set[str]:
        answer = requests.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        return {it["labels"]["alertname"] for it in answer["data"]["alerts"] if it["state"] == "firing"}


@contextmanager
def fast_prometheus(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Run a Prometheus that reads these targets (host:port) each 2 s."""
    port = free_ports(1)
    (folder / "rules.yaml").write_text(json.dumps(faster_rules()))  # JSON is YAML
    configuration = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "velikiy", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(configuration))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *["prometheus", f"--config.file={folder / 'prometheus.yaml'}"],
                *[f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
            ],
            stdout=log,
            stderr=log,
        )
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_until(lambda: _is_ready(prometheus, len(targets)), within=60, what=(folder / "log").read_text())
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _is_ready(prometheus: Prometheus, targets: int) -> bool:
    try:
        return len(prometheus.query("up == 1")) == targets
    except requests.RequestException:
        return False
