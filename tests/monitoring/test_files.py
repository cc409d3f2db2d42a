"""The rules of Prometheus, the runbook and the dashboard fit each other and the metrics."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.stack import ROOT, folder
from velikiy import metrics

PROMETHEUS = ROOT / "deploy/prometheus"
RULES = (PROMETHEUS / "rules.yaml").read_text()
CASES = (PROMETHEUS / "rules_test.yaml").read_text()
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
ALERTS = re.findall(r"- alert: (\w+)", RULES)


def known_metrics() -> set[str]:
    """Return the name of each sample that a process of the stack can report."""
    names = {"up"}
    for family in metrics.registry.collect():
        names |= {family.name + suffix for suffix in _suffixes(family.type)}
    target = (ROOT / "velikiy/stack/scrape_target.py").read_text()
    for kind, name in re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(\w+)"', target):
        names |= {name + suffix for suffix in _suffixes(kind.lower())}
    edge = (ROOT / "edge/lua/metrics.lua").read_text()
    for name in re.findall(r"^    (\w+) = \"|gauge\(lines, \"(\w+)\"", edge, re.MULTILINE):
        plain = "velikiy_edge_" + "".join(name)
        names |= {
            plain + suffix for suffix in (_suffixes("histogram") if plain.endswith("duration_seconds") else ("",))
        }
    return names


def _suffixes(kind: str) -> tuple[str, ...]:
    return {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[kind]


def queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def promtool(*arguments: str) -> None:
    try:
        completed = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no promtool; on Debian ./run test installs it with the package prometheus")
    assert completed.returncode == 0, completed.stdout + completed.stderr


def test_each_alert_fires_for_its_input_and_not_in_a_healthy_stack() -> None:
    promtool("test", "rules", str(PROMETHEUS / "rules_test.yaml"))
    firing = re.findall(r"alertname: (\w+)\n +eval_time: \w+\n +exp_alerts:", CASES)
    assert set(firing) == set(ALERTS)
    assert set(re.findall(r"\{alertname: (\w+), eval_time: 30m\}", CASES)) == set(ALERTS)


@pytest.mark.parametrize("name", ["native.yaml", "docker.yaml"])
def test_prometheus_accepts_the_configuration(name: str) -> None:
    with folder() as path:
        text = (PROMETHEUS / name).read_text().replace("${METRICS_PORT}", "9105")
        (path / name).write_text(text.replace("/etc/prometheus/rules.yaml", str(PROMETHEUS / "rules.yaml")))
        (path / "rules.yaml").write_text(RULES)
        promtool("check", "config", str(path / name))


def test_each_alert_has_a_page_with_steps_and_each_page_an_alert() -> None:
    pages = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    assert list(pages) == ALERTS
    assert re.findall(r"runbook_url: docs/runbook\.md#(\w+)", RULES) == [name.lower() for name in ALERTS]
    for name, page in pages.items():
        assert re.search(r"^1\. ", page, re.MULTILINE), f"{name} has no step"
        for link in re.findall(r"\]\(#(\w+)\)", page):
            assert link in [alert.lower() for alert in ALERTS], link


def test_each_command_and_setting_of_the_runbook_exists() -> None:
    reference = (ROOT / "docs/command-line.md").read_text()
    settings = (ROOT / ".env.example").read_text() + (ROOT / "edge/start").read_text()
    for command in re.findall(r"`\./run (\w+)", RUNBOOK):
        assert f"### ./run {command}\n" in reference, command
    for name in re.findall(r"`([A-Z]{3,}_[A-Z_]+)`", RUNBOOK):
        assert name in settings, name


def test_each_command_in_the_advice_of_a_finding_exists_and_can_be_pasted() -> None:
    reference = (ROOT / "docs/command-line.md").read_text()
    text = "".join(file.read_text() for file in (ROOT / "velikiy/findings").glob("*.py"))
    named = set(re.findall(r"(?<!`)\./run ((?:velikiy )?[a-z][a-z-]+)", text))
    assert {"up", "down", "psql", "velikiy migrate"} <= named
    for command in sorted(named):
        assert f"### ./run {command}\n" in reference, command
    assert "Run velikiy" not in text, "./run is missing"


def test_each_query_of_the_rules_and_the_dashboard_names_metrics_that_exist() -> None:
    known = known_metrics()
    assert len(known) > 60
    for text in (RULES, CASES, *(expression for _, expression in queries()), RUNBOOK):
        for name in re.findall(r"\b(velikiy_\w+)\b", text):
            assert name in known, name


def test_each_metric_is_documented() -> None:
    text = (ROOT / "docs/monitoring.md").read_text()
    for name in known_metrics() - {"up"}:
        plain = re.sub("_(bucket|sum|count)$", "", name) if "seconds_" in name else name
        assert f"`{plain}`" in text, name


def test_each_panel_of_the_dashboard_has_a_title_a_unit_and_a_query_that_prometheus_parses() -> None:
    with folder() as path:
        rules = ["groups:", "  - name: dashboard", "    rules:"]
        for number, (_, expression) in enumerate(queries()):
            plain = json.dumps(expression.replace("$__rate_interval", "5m"))
            rules += [f"      - record: panel:{number}", f"        expr: {plain}"]
        (path / "queries.yaml").write_text("\n".join(rules))
        promtool("check", "rules", str(path / "queries.yaml"))
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(panels) > 15
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels:
        assert panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_rules_and_dashboard_stand_in_files_that_the_documents_name() -> None:
    text = (ROOT / "docs/monitoring.md").read_text()
    for file in ("deploy/prometheus/rules.yaml", "deploy/grafana/dashboard.json", "docs/runbook.md"):
        assert Path(file).name in text, file


def test_each_alert_fires_in_the_test_with_a_real_prometheus() -> None:
    text = (ROOT / "tests/monitoring/test_live.py").read_text()
    fired = {
        name
        for names in re.findall(r'firing\((.*?)\)|"(\w+)" in own\.firing', text, re.DOTALL)
        for name in re.findall(r"\bVelikiy\w+", " ".join(names))
    }
    assert fired == set(ALERTS)
