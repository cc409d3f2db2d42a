"""`./run up` with newer code: programs are replaced one after the other, and no request fails."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import requests
from psycopg.conninfo import make_conninfo

from testkit.databases import superuser_dsn
from testkit.stack import EDGE_SECRET, ROOT, Stack, children_of, folder, run, run_in, running, status_of, wait_until
from testkit.steady_load import SteadyLoad
from velikiy.signatures import HEADER, Signer

pytestmark = pytest.mark.exclusive

BUSY_S = 120
"""A bound for what takes a second on a machine with nothing else to do. A change that hangs takes longer."""

NEWEST = max(file.stem for file in (ROOT / "migrations" / "versions").glob("0*.py"))
MIGRATION = f"""
revision = "0099_newer"
down_revision = "{NEWEST}"


def upgrade() -> None:
    pass
"""


@contextmanager
def checkout() -> Iterator[Path]:
    """Copy the checkout, so that a test can change the code."""
    with folder() as temporary:
        copy = temporary / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "*_cache", "__pycache__"))
        yield copy


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def up(root: Path, stack: Stack, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return run_in(root, "up", "--detach", "--data", str(stack.data), *options, **environment)


def is_changed(stack: Stack, text: str) -> bool:
    try:
        return all(text in requests.get(f"{url}/livez", timeout=30).text for url in (*stack.apps, *stack.edges))
    except requests.RequestException:
        return False


def become_a_version_with_one_role(stack: Stack) -> None:
    """Leave the database and the secrets of the running stack as earlier versions made them."""
    with psycopg.connect(make_conninfo(superuser_dsn(stack), dbname="velikiy"), autocommit=True) as connection:
        for statement in (
            "REASSIGN OWNED BY velikiy_owner TO velikiy",
            "DROP OWNED BY velikiy_owner",
            "DROP ROLE velikiy_owner",
        ):
            connection.execute(statement)
    for name in ("owner_password", "migration_database_url"):
        (stack.data / "secrets" / name).unlink()


@pytest.mark.parametrize("apps", [pytest.param(1, marks=pytest.mark.long), 2])
def test_up_with_newer_code_under_load_fails_no_request_and_restarts_no_data_server(apps: int) -> None:
    with checkout() as newer, running("--apps", str(apps)) as stack:
        become_a_version_with_one_role(stack)
        before = stack.pids()
        change(newer / "velikiy" / "http" / "health.py", '"alive"', '"newer"')
        change(
            newer / "edge" / "conf" / "site.conf", "location = /.edge {", "location = /.edge {\n add_header Newer yes;"
        )
        with SteadyLoad(stack.edges).running() as load:
            wait_until(lambda: load.done["GET"] > 100, within=BUSY_S)
            upgraded = up(newer, stack)
            assert upgraded.returncode == 0, upgraded.stderr
            done = load.done["GET"]
            wait_until(lambda: load.done["GET"] > done + 100, within=BUSY_S)
        assert load.failures == []
        assert is_changed(stack, "newer")
        signed, _ = Signer(EDGE_SECRET).sign_request("GET", "/.edge")
        assert requests.get(f"{stack.edge}/.edge", headers={HEADER: signed}, timeout=30).headers["Newer"] == "yes"
        after = stack.pids()
        assert (after["postgres"], after["redis"]) == (before["postgres"], before["redis"])
        stack.refresh()
        owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert stack.sql(owners) == [("velikiy_owner",)]
        # A killed process comes back as the newer version. Its workers outlive it for a moment.
        os.kill(after["app1"], signal.SIGKILL)
        wait_until(lambda: stack.pids().get("app1", after["app1"]) != after["app1"])
        wait_until(lambda: is_changed(stack, "newer"))


@pytest.fixture(scope="module")
def rolled() -> Iterator[Stack]:
    with running() as stack:
        yield stack


@pytest.mark.long
def test_number_of_apps_and_edges_changes_under_load_without_a_failed_request(rolled: Stack) -> None:
    with SteadyLoad(rolled.edges).running() as load:
        for apps, edges in (("3", "2"), ("1", "1"), ("2", "1")):
            changed = up(ROOT, rolled, "--apps", apps, "--edges", edges)
            assert changed.returncode == 0, changed.stderr
            rolled.refresh()
            assert (len(rolled.apps), len(rolled.edges)) == (int(apps), int(edges))
            assert (
                len(rolled.pids()) == int(apps) + int(edges) + 4
            )  # PostgreSQL, Redis, the relay and the scrape target
    assert load.failures == []


def test_changed_setting_replaces_the_programs_that_read_it_and_no_other(rolled: Stack) -> None:
    before = rolled.pids()
    workers = set(children_of(before["app1"]))
    changed = up(ROOT, rolled, EDGE_WORKERS="3", LOG_LEVEL="Debug")
    assert changed.returncode == 0, changed.stderr
    with psycopg.connect(rolled.postgres) as connection:
        assert connection.execute("SHOW log_min_messages").fetchone() == ("debug1",)
    assert "replacing edge1" in changed.stderr
    assert rolled.pids() == before | {"relay": rolled.pids()["relay"]}
    assert len(children_of(before["edge1"])) == 3 + 1  # one accepts no clients
    assert not workers & set(children_of(before["app1"]))
    back = up(ROOT, rolled)
    assert back.returncode == 0, back.stderr


def edges_choose_all_apps(stack: Stack) -> bool:
    """Return whether no edge passes an app by, as after it has left: the edges look for it once a second."""
    ports = json.loads((stack.data / "stack.json").read_text())["control_ports"]
    texts = (requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text for port in ports)
    return all('velikiy_edge_apps{state="unavailable"} 0\n' in text for text in texts)


def test_stop_of_one_of_two_apps_under_load_fails_no_request(rolled: Stack) -> None:
    with SteadyLoad(rolled.edges).running() as load:
        for name in ("app1", "app2"):
            stopped = rolled.pids()[name]
            os.kill(stopped, signal.SIGTERM)
            wait_until(lambda stopped=stopped, name=name: rolled.pids().get(name, stopped) != stopped)  # type: ignore[misc]
            url = rolled.apps[int(name[-1]) - 1]
            wait_until(lambda url=url: status_of(f"{url}/livez") == 200)  # type: ignore[misc]
            wait_until(lambda: edges_choose_all_apps(rolled), within=BUSY_S)
    assert load.failures == []


def test_version_that_cannot_start_is_refused_and_the_stack_serves_as_before(rolled: Stack) -> None:
    before = rolled.pids()
    with checkout() as broken:
        routes = broken / "velikiy" / "http" / "routes.py"
        routes.write_text(routes.read_text() + "\nimport a_module_that_does_not_exist\n")
        refused = up(broken, rolled)
    assert refused.returncode == 1
    assert "a_module_that_does_not_exist" in refused.stderr
    assert refused.stderr.strip().endswith("The stack still runs as before.")
    assert rolled.pids() == before
    assert rolled.healthy()


def test_version_that_starts_only_by_itself_is_replaced_by_the_version_before(rolled: Stack) -> None:
    with checkout() as broken:
        change(
            broken / "velikiy" / "server" / "handover.py",
            "    if worker.age <=",
            "    assert not _predecessors\n    if worker.age <=",
        )
        refused = up(broken, rolled)
        assert refused.returncode == 1
        assert "app1 did not start" in refused.stderr
        wait_until(lambda: status_of(f"{rolled.app}/livez") == 200)
    assert rolled.healthy()
    again = up(ROOT, rolled)
    assert again.returncode == 0, again.stderr
    assert rolled.healthy()


def test_older_code_than_the_database_is_refused_before_anything_stops(rolled: Stack) -> None:
    with checkout() as newer:
        (newer / "migrations" / "versions" / "0099_newer.py").write_text(MIGRATION)
        upgraded = up(newer, rolled)
        assert upgraded.returncode == 0, upgraded.stderr
    before = rolled.pids()
    for options in ((), ("--port", str(int(rolled.port) + 100))):  # also where the whole stack would have to stop
        refused = up(ROOT, rolled, *options)
        assert refused.returncode == 1
        assert "This code is older than the database, which has the revision 0099_newer" in refused.stderr
    assert rolled.pids() == before
    assert rolled.healthy()
    wait_until(lambda: run("status", "--data", str(rolled.data)).returncode == 0, within=10)
    rolled.sql("UPDATE velikiy_version SET version_num = '0001_baseline'")
