"""Metrics as Prometheus reads them."""

import requests
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from testkit.stack import Stack
from velikiy.stack.plan import Plan


class Scrape:
    """One answer of a scrape target."""

    def __init__(self, url: str) -> None:
        response = requests.get(url, timeout=10)
        assert response.status_code == 200, response.text
        self.families = list(text_string_to_metric_families(response.text))

    @property
    def samples(self) -> list[Sample]:
        return [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of this name with these labels."""
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )


def target_of(stack: Stack) -> str:
    plan = Plan.load(stack.data)
    assert plan is not None
    return f"http://127.0.0.1:{plan.metrics_port}/metrics"


def scrape(stack: Stack) -> Scrape:
    return Scrape(target_of(stack))
