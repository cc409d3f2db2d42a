"""Logs: JSON, joined by the id of the request, and without personal data."""

import json
import os
import re
import shutil
import signal
from urllib.parse import quote

import requests

from testkit.stack import Stack, running, wait_until

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
        for name in ("app2", "relay"):
            os.kill(stack.pids()[name], signal.SIGINT)
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
