"""Logs: JSON, joined by the id of the request, and without personal data."""

import json
import os
import re
import shutil
import signal
import subprocess
from typing import Any
from urllib.parse import quote

import requests

from testkit.stack import ROOT, Stack, clean_environment, run, running, wait_until
from velikiy.stack.log_lines import LEVELS

NAME, EMAIL = "Rumpelstilzchen", "rumpel.stilzchen@example.com"


def test_request_is_found_in_the_logs_of_edge_and_app_by_its_id(stack: Stack) -> None:
    response = requests.get(f"{stack.edge}/users?limit=7", timeout=5)
    request_id = response.headers["X-Request-Id"]

    def found(prefix: str) -> list[dict[str, object]]:
        lines = [line for log in stack.data.glob(f"logs/{prefix}*.log") for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines if request_id in line]

    [edge] = wait_until(lambda: found("edge"))
    [app] = wait_until(lambda: found("app"))
    assert (edge["method"], edge["path"], edge["status"]) == ("GET", "/users", 200)
    assert (app["event"], app["route"], app["status"]) == ("request", "/users", 200)


def lines_of(stack: Stack, *names: str) -> list[dict[str, object]]:
    """Return the lines of the logs, all of which must be JSON."""
    return [json.loads(line) for name in names for line in stack.log(name).splitlines()]


def test_every_log_line_of_apps_and_relay_is_json_also_after_kills_and_failed_starts() -> None:
    with running(LOG_LEVEL="debug") as stack:
        requests.get(f"{stack.app}/users", timeout=5)
        for name in ("postgres", "redis", "app1", "relay"):
            killed = stack.pids()[name]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda name=name, killed=killed: stack.pids().get(name, killed) != killed)  # type: ignore[misc]
        # A process that is interrupted while Python itself starts has no log yet.
        wait_until(stack.healthy, within=30)
        started = stack.log("relay").rindex("relay.disconnected")
        wait_until(lambda: "relay.listening" in stack.log("relay")[started:], within=30)
        listened = stack.log("relay").count("relay.listening")
        for name in ("app2", "relay"):
            os.kill(stack.pids()[name], signal.SIGINT)
        wait_until(lambda: stack.log("relay").count("relay.listening") > listened, within=30)
        # Bad settings, and a file of the settings that is missing.
        secret = stack.data / "secrets" / "app" / "database_url"
        address = secret.read_text()
        secret.unlink()
        for name in ("app1", "relay"):
            os.kill(stack.pids()[name], signal.SIGKILL)
            wait_until(lambda name=name: "DATABASE_URL is not set" in stack.log(name))  # type: ignore[misc]
        secret.write_text(address)
        shutil.chown(secret, stack.data.stat().st_uid, stack.data.stat().st_gid)
        wait_until(stack.healthy, within=30)
        for line in lines_of(stack, "app1", "app2", "relay"):
            assert "event" in line, line
        assert any(line["event"] == "cannot_start" for line in lines_of(stack, "relay"))
        lost = [line["reason"] for line in lines_of(stack, "relay") if line["event"] == "relay.disconnected"]
        assert all(lost)
        assert len(lost) < 10  # one line for each reason, not for each attempt


def shown(stack: Stack, *arguments: str) -> list[dict[str, Any]]:
    """Return the lines of `./run logs --json`."""
    completed = run("logs", "--json", *arguments, "--data", str(stack.data))
    assert completed.returncode == 0, completed.stderr
    return [json.loads(line) for line in completed.stdout.splitlines()]


def test_every_log_file_contains_json_only(stack: Stack) -> None:
    logs = {file.name: file.read_text() for file in (stack.data / "logs").iterdir()}
    assert {"postgres.log", "redis.log", "edge1.log", "app1.log", "supervisord.log"} <= logs.keys()
    for name, text in logs.items():
        for line in text.splitlines():
            assert isinstance(json.loads(line), dict), f"{name}: {line}"


def test_lines_of_all_processes_have_the_same_fields_and_are_in_the_order_of_time(stack: Stack) -> None:
    for process in ("postgres", "redis", "edge1", "app1", "relay", "supervisor"):
        assert process in {line["process"] for line in shown(stack, process, "-n", "50")}
    lines = shown(stack, "-n", "5000")
    for line in lines:
        assert line["time"].endswith("Z")
        assert line["level"] in LEVELS
        assert line["message"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_request_is_found_in_the_logs_of_edge_app_and_postgres(stack: Stack) -> None:
    body = {"name": NAME, "email": EMAIL}
    created = requests.post(f"{stack.edge}/users", json=body, timeout=5)
    try:
        refused = requests.post(f"{stack.edge}/users", json=body, headers={"X-Request-Id": "order-77"}, timeout=5)
        assert refused.status_code == 409
    finally:
        requests.delete(stack.edge + created.headers["Location"], timeout=5)
    request_id = refused.headers["X-Request-Id"]
    processes = {"postgres", "app", "edge"}
    # An edge writes its lines each second.
    wait_until(lambda: {line["process"].rstrip("12") for line in shown(stack, "--request", request_id)} == processes)
    by_process = {line["process"].rstrip("12"): line for line in shown(stack, "--request", "order-77")}
    assert by_process["edge"]["message"].startswith("POST /users 409")
    assert by_process["app"]["request_id"] == request_id
    assert by_process["postgres"]["message"].startswith("duplicate key value violates unique constraint")
    assert by_process["postgres"]["pid"] == by_process["app"]["postgres_pid"]


def test_restart_of_a_killed_process_is_in_the_log_of_its_name(stack: Stack) -> None:
    killed = stack.pids()["relay"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: stack.pids().get("relay", killed) != killed)
    lines = [line["message"] for line in shown(stack, "relay") if line["process"] == "supervisor"]
    assert "exited: relay (terminated by SIGKILL; not expected)" in lines
    assert any(line.startswith("spawned: 'relay' with pid") for line in lines[lines.index(lines[-1]) - 3 :])


def test_logs_refuse_a_wrong_moment_with_an_example(stack: Stack) -> None:
    completed = run("logs", "--since", "soon", "--data", str(stack.data))
    assert completed.returncode == 2
    assert "10m" in completed.stderr


def test_logs_of_containers_are_read_from_the_standard_input() -> None:
    lines = (
        'app-1       | {"time":"2026-07-01T10:00:00Z","event":"cache.fenced","level":"warning"}\n'
        "redis-1     | 1:M 01 Jul 2026 10:00:00.500 # Memory is low\n"
        "postgres-1  | 2026-07-01T10:00:00.800Z 2026-07-01 10:00:00.750 UTC [12] LOG:  checkpoint starting: time\n"
    )
    completed = subprocess.run(
        [f"{ROOT}/run", "logs", "-", "--level", "warning", "--json"],
        env=clean_environment(),
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [(line["process"], line["message"]) for line in found] == [
        ("app-1", "cache.fenced"),
        ("redis-1", "Memory is low"),
    ]


def test_output_of_logs_may_be_cut_off(stack: Stack) -> None:
    command = f"{ROOT}/run logs -n 5000 --data {stack.data} | head -1; exit ${{PIPESTATUS[0]}}"
    completed = subprocess.run(
        ["bash", "-c", command], env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    assert len(completed.stdout.splitlines()) == 1


def test_app_logs_no_id_of_a_client_that_has_another_form(stack: Stack) -> None:
    headers = {"X-Request-Id": "app-logs-ids", "Client-Request-Id": "anna@example.com", "traceparent": '00-"}'}
    assert requests.get(f"{stack.app}/health", headers=headers, timeout=5).status_code == 200
    [line] = wait_until(lambda: [line for line in stack.log("app1").splitlines() if '"app-logs-ids"' in line])
    assert (json.loads(line)["client_request_id"], json.loads(line)["traceparent"]) == ("?", "?")


def test_no_log_contains_personal_data(stack: Stack) -> None:
    body = {"name": NAME, "email": EMAIL}
    created = requests.post(f"{stack.edge}/users", json=body, timeout=5)
    try:
        url = stack.edge + created.headers["Location"]
        requests.get(url, timeout=5)
        requests.post(f"{stack.edge}/users", json=body, timeout=5)  # a conflict: PostgreSQL logs an error
        requests.put(url, json={"name": NAME * 50, "email": NAME}, timeout=5)
        kind = {"Content-Type": "application/json"}
        requests.post(f"{stack.edge}/users", data=json.dumps(body) + "}", headers=kind, timeout=5)
        requests.get(f"{stack.edge}/users/{quote(EMAIL)}", timeout=5)
        requests.get(f"{stack.edge}/users", params={"q": EMAIL}, timeout=5)
        for method in ("GET", "PUT", "POST", "DELETE"):
            for address in (NAME.lower(), f"{NAME.lower()}/7", f"{NAME.lower()}/count", f"{NAME.lower()}/batch"):
                requests.request(method, f"{stack.edge}/{address}", timeout=5)
        last = requests.get(f"{stack.edge}/{EMAIL}", timeout=5).headers["X-Request-Id"]
        wait_until(lambda: last in stack.log("edge1") and any(last in stack.log(app) for app in ("app1", "app2")))
    finally:
        requests.delete(stack.edge + created.headers["Location"], timeout=5)
    for log in (stack.data / "logs").iterdir():
        text = log.read_text().lower()
        for secret in ("rumpel", "stilzchen"):
            assert secret not in text, f"{log.name}: {re.findall(f'.*{secret}.*', text)}"


def test_no_log_contains_a_password(stack: Stack) -> None:
    passwords = [file.read_text().strip() for file in stack.data.glob("secrets/*_password")]
    assert len(passwords) == 4
    for log in (stack.data / "logs").iterdir():
        assert not [password for password in passwords if password in log.read_text()], log.name
