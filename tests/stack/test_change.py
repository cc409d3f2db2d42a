"""Changes that fail, changes that are killed, and the ways back: the stack serves as before."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import requests

from testkit.machine import port_in_use, root_only, small_disk
from testkit.stack import ROOT, Stack, clean_environment, run, running, wait_until
from testkit.steady_load import SteadyLoad
from tests.stack.test_rolling import BUSY_S, NEWEST, change, checkout, up
from velikiy.settings import StackSettings
from velikiy.stack.options import Remembered, remember, spelled

pytestmark = pytest.mark.exclusive


def migration(body: str, *attributes: str, after: str = NEWEST, revision: str = "0098_next") -> str:
    lines = [
        "from alembic import op",
        f"revision, down_revision = {revision!r}, {after!r}",
        *attributes,
        "def upgrade():",
        f"    {body}",
    ]
    return "\n".join(lines) + "\n"


EXPANDS = f"usable_from = {NEWEST!r}"


def remembered(
    given: dict[str, Any], earlier: Remembered, settings: StackSettings | None = None, *, forget: bool = False
) -> Remembered:
    from velikiy.stack.plan import Plan

    plan = Plan("", "127.0.0.1", 80, 1, 2, False, True, True, options=earlier)
    return remember(given, settings or StackSettings(), plan, forget=forget)


class TestOptions:
    def test_option_counts_until_another_value_is_given_or_it_is_forgotten(self) -> None:
        first = remembered({"edges": 3, "monitoring": True, "port": None}, {})
        assert spelled(first) == "--edges 3 --monitoring"
        assert remembered({}, first) == first
        assert spelled(remembered({"edges": 2, "monitoring": False}, first)) == "--edges 2"
        assert remembered({}, first, forget=True) == {}

    def test_setting_that_changes_later_wins_over_a_remembered_option(self) -> None:
        first = remembered({"edges": 3}, {}, StackSettings(edges=2))
        assert remembered({}, first, StackSettings(edges=2)) == first
        assert remembered({}, first, StackSettings(edges=4)) == {}
        assert remembered({}, first) == {}

    def test_stack_of_an_earlier_release_keeps_its_size_and_port(self) -> None:
        from velikiy.stack.plan import Plan

        plan = Plan("", "127.0.0.1", 9000, 2, 3, False, True, True, monitoring=True)
        found = remember({}, StackSettings(), plan, forget=False)
        assert spelled(found) == "--port 9000 --edges 2 --apps 3 --monitoring"


@pytest.mark.long
def test_plain_up_keeps_the_options_of_the_last_up_also_after_down() -> None:
    with running("--edges", "2", "--apps", "1") as stack:
        urls = stack.edges
        run("down", "--data", str(stack.data))
        again = up(ROOT, stack)
        assert again.returncode == 0, again.stderr
        forget = f"{ROOT / 'run'} up --defaults --data {stack.data}"
        assert f"--edges 2 --apps 1    ({forget} forgets these options)" in again.stderr
        stack.refresh()
        assert (stack.edges, len(stack.apps)) == (urls, 1)
        changed = up(ROOT, stack, "--defaults", "--port", stack.port)
        assert changed.returncode == 0, changed.stderr
        stack.refresh()
        assert (len(stack.edges), len(stack.apps)) == (1, 2)


@pytest.fixture(scope="module")
def serving() -> Iterator[Stack]:
    """A stack that serves through every change of this module."""
    with running() as stack:
        yield stack


def state(stack: Stack) -> tuple[object, ...]:
    """Return what a change that has failed must not have changed."""
    files = [stack.data / "stack.json", *(stack.data / "secrets").rglob("*"), *(stack.data / "run").glob("*.conf")]
    contents = {str(file): file.read_bytes() for file in files if file.is_file() and file.name != "supervisord.conf"}
    return contents, stack.sql("SELECT version_num FROM velikiy_version"), (stack.data / "versions/unfinished").exists()


class Failure(NamedTuple):
    file: str
    old: str
    new: str
    reason: str
    goes_back: bool = False
    """Some programs were replaced before the failure."""

    stops: bool = False
    """The stack was stopped before the failure."""


APPEND = ""
FAILURES = {
    "syntax": Failure("velikiy/http/routes.py", APPEND, "\ndef broken(:\n", "The code cannot run: "),
    "import": Failure("velikiy/http/routes.py", APPEND, "\nimport a_module_that_does_not_exist\n", "cannot start"),
    "reads": Failure(
        "velikiy/http/routes.py",
        "return responses.of_read(self.repository.get(row_id",
        "raise KeyError(row_id)  # noqa\n        return responses.of_read(self.repository.get(row_id",
        "GET /users/1 fails",
    ),
    "lua": Failure("edge/lua/read.lua", APPEND, "\nthis is not lua\n", "cannot start"),
    "nginx": Failure("edge/conf/site.conf", APPEND, "\nnonsense on;\n", "unknown directive"),
    "migration": Failure("migrations/versions/0098_next.py", APPEND, "", "division by zero"),
    "relay": Failure("velikiy/relay/listener.py", APPEND, "\nraise SystemExit(1)\n", "relay did not start", True),
    "stopped": Failure("velikiy/relay/listener.py", APPEND, "\nraise SystemExit(1)\n", "not healthy", True, True),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", FAILURES)
def test_change_that_fails_leaves_the_stack_as_it_was(serving: Stack, kind: str) -> None:
    failure = FAILURES[kind]
    before, pids = state(serving), serving.pids()
    with checkout() as broken, SteadyLoad(serving.edges).running() as load:
        file = broken / failure.file
        if kind == "migration":
            file.write_text(migration("op.execute('CREATE TABLE half ()'); op.execute('SELECT 1/0')", EXPANDS))
        elif failure.old:
            change(file, failure.old, failure.new)
        else:
            file.write_text(file.read_text() + failure.new)
        if failure.stops:
            change(broken / "velikiy/stack/plan.py", "COMPATIBILITY = ", "COMPATIBILITY = 1")
        refused = up(broken, serving)
    assert refused.returncode == 1, refused.stderr
    assert "Traceback" not in refused.stderr.splitlines()[-1]
    assert failure.reason in refused.stderr
    assert refused.stderr.strip().endswith(("The stack still runs as before.", "Nothing was changed."))
    assert state(serving) == before
    assert serving.healthy()
    if not failure.stops:
        assert load.failures == []
    if not failure.goes_back:
        assert serving.pids() == pids
    assert serving.sql("SELECT to_regclass('half')") == [(None,)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ((), {"EDGE_TTL": "soon"}, "EDGE_TTL='soon' is not allowed"),
        ((), {"APPS": "99"}, "APPS='99' is not allowed"),
        (("--bind", "203.0.113.7"), {"AUTH": "off"}, "This machine has no address 203.0.113.7"),
        (("--edges", "2"), {}, "is in use by another program"),
        (("--port", "{taken}"), {}, "is in use by another program"),
        ((), {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"}, "DATABASE_URL cannot be used"),
    ],
)
def test_options_and_settings_that_cannot_be_used_leave_the_stack_as_it_was(
    serving: Stack, options: tuple[str, ...], settings: dict[str, str], reason: str
) -> None:
    before, pids = state(serving), serving.pids()
    taken = int(serving.port) + 1
    with port_in_use(taken):
        refused = up(ROOT, serving, *(option.format(taken=taken) for option in options), **settings)
    assert refused.returncode == 1, refused.stderr
    assert reason in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (state(serving), serving.pids()) == (before, pids)
    assert serving.healthy()


@pytest.mark.long
@root_only
def test_change_on_a_full_disk_leaves_the_stack_as_it_was() -> None:
    with small_disk(700) as disk, running(data=disk.folder / "data") as stack:
        before, pids = state(stack), stack.pids()
        with disk.filled():
            refused = up(ROOT, stack, EDGE_TTL="7")
            assert refused.returncode == 1
            assert "MB left" in refused.stderr
        assert (state(stack), stack.pids()) == (before, pids)
        assert stack.healthy()


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "goes_on"),
    [
        ("checking the new", "up"),
        ("replacing relay", "rollback"),
        ("replacing app1", "up"),
        ("replacing edge1", "rollback"),
    ],
)
def test_launcher_that_is_killed_leaves_a_stack_that_serves_and_the_next_command_carries_on(
    serving: Stack, moment: str, goes_on: str
) -> None:
    with SteadyLoad(serving.edges).running() as load:
        launcher = subprocess.Popen(
            [ROOT / "run", "up", "--detach", "--data", str(serving.data)],
            env=clean_environment(EDGE_TTL="9"),
            stderr=subprocess.PIPE,
        )
        assert launcher.stderr
        seen = b""
        while moment.encode() not in seen:
            more = os.read(launcher.stderr.fileno(), 1000)
            assert more, seen.decode()
            seen += more
        launcher.kill()
        launcher.wait()
        done = load.done["GET"]
        wait_until(lambda: load.done["GET"] > done + 50, within=BUSY_S)
        if goes_on == "up":
            carried_on = up(ROOT, serving, EDGE_TTL="9")
            assert carried_on.returncode == 0, carried_on.stderr
            assert edge_ttl(serving) == "9"
        back = run("rollback", "--data", str(serving.data))
        assert back.returncode == 0, back.stderr
    assert load.failures == []
    assert edge_ttl(serving) == "5"
    assert serving.healthy()


def edge_ttl(stack: Stack) -> str:
    return (stack.data / "run" / "edge1").read_text().split("EDGE_TTL=")[1].split()[0]


@pytest.mark.long
def test_rollback_returns_to_the_code_and_the_settings_before_and_again_to_the_newer(serving: Stack) -> None:
    def alive() -> str:
        return str(requests.get(f"{serving.app}/livez", timeout=30).json()["status"])

    with checkout() as newer, SteadyLoad(serving.edges).running() as load:
        change(newer / "velikiy" / "http" / "health.py", '"alive"', '"newer"')
        (newer / "migrations/versions/0098_next.py").write_text(
            migration("op.execute('ALTER TABLE users ADD COLUMN phone text')", EXPANDS)
        )
        assert up(newer, serving, EDGE_TTL="7").returncode == 0
        assert (alive(), edge_ttl(serving)) == ("newer", "7")
        for expected in (("alive", "5"), ("newer", "7"), ("alive", "5")):
            back = run("rollback", "--data", str(serving.data))
            assert back.returncode == 0, back.stderr
            assert (alive(), edge_ttl(serving)) == expected
    assert load.failures == []
    # The code before goes on with a database that newer code has only expanded.
    again = up(ROOT, serving, REDIS_TTL="99")
    assert again.returncode == 0, again.stderr
    assert up(ROOT, serving).returncode == 0
    serving.sql(f"ALTER TABLE users DROP COLUMN phone; UPDATE velikiy_version SET version_num = '{NEWEST}'")


@pytest.mark.long
def test_rollback_is_refused_where_the_database_is_newer_than_that_code_can_use(serving: Stack) -> None:
    with checkout() as newer:
        (newer / "migrations/versions/0098_next.py").write_text(migration("pass"))
        upgraded = up(newer, serving)
        assert upgraded.returncode == 0, upgraded.stderr
        assert "stopping the stack, because the migration 0098_next changes tables that the running" in upgraded.stderr
        pids = serving.pids()
        refused = run("rollback", "--data", str(serving.data))
        assert refused.returncode == 1
        assert "has the revision 0098_next and works with code since 0098_next" in refused.stderr
        assert "restore a backup" in refused.stderr
        assert serving.pids() == pids
        assert serving.healthy()
    serving.sql("UPDATE velikiy_version SET version_num = %s, oldest_code = '0007_idempotency_owner'", NEWEST)
    assert up(ROOT, serving).returncode == 0


@pytest.mark.long
def test_migration_behind_a_long_transaction_fails_no_request(serving: Stack) -> None:
    with checkout() as newer, SteadyLoad(serving.edges).running() as load:
        (newer / "migrations/versions/0098_next.py").write_text(
            migration("op.execute('ALTER TABLE users ADD COLUMN phone text')", EXPANDS)
        )
        with psycopg.connect(serving.postgres) as report:
            report.execute("SELECT count(*) FROM users")
            before = lock_timeouts(serving)
            upgrade = subprocess.Popen(
                [newer / "run", "up", "--detach", "--data", str(serving.data)],
                env=clean_environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            # Several attempts at the lock, however long the machine takes until the first.
            wait_until(lambda: lock_timeouts(serving) >= before + 4 or upgrade.poll() is not None, within=240)
            assert upgrade.poll() is None
        _, output = upgrade.communicate(timeout=240)
        assert upgrade.returncode == 0, output
    assert load.failures == []
    assert serving.sql("SELECT version_num FROM velikiy_version") == [("0098_next",)]
    assert run("rollback", "--data", str(serving.data)).returncode == 0
    serving.sql(f"ALTER TABLE users DROP COLUMN phone; UPDATE velikiy_version SET version_num = '{NEWEST}'")


def lock_timeouts(stack: Stack) -> int:
    """Return how often a statement has given up a lock."""
    return (stack.data / "logs" / "postgres.log").read_text().count("canceling statement due to lock timeout")


@pytest.mark.long
def test_changed_port_moves_the_edges_and_restarts_no_other_program(serving: Stack) -> None:
    before, port = serving.pids(), int(serving.port)
    for options in (("--port", str(port + 1), "--edges", "2"), ("--port", str(port), "--edges", "1")):
        moved = up(ROOT, serving, *options)
        assert moved.returncode == 0, moved.stderr
        serving.refresh()
        assert serving.port == options[1]
        assert serving.healthy()
    after = serving.pids()
    assert {name: pid for name, pid in after.items() if not name.startswith("edge")} == {
        name: pid for name, pid in before.items() if not name.startswith("edge")
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["", "app", "app2", "edge1", "relay", "metrics", "redis"])
def test_restart_under_load_fails_no_request(serving: Stack, name: str) -> None:
    workers = children(serving)
    with SteadyLoad(serving.edges).running() as load:
        wait_until(lambda: load.done["GET"] > 20, within=BUSY_S)
        restarted = run("restart", *([name] if name else []), "--data", str(serving.data))
        assert restarted.returncode == 0, restarted.stderr
        done = load.done["GET"]
        wait_until(lambda: load.done["GET"] > done + 20, within=BUSY_S)
    assert load.failures == []
    now = children(serving)
    expected = {it for it in workers if (name or it) in (it, it.rstrip("12")) and (name or it != "postgres")}
    if not name:
        expected.discard("redis")
    assert {it for it in workers if workers[it] != now[it]} == expected


def children(stack: Stack) -> dict[str, object]:
    """Return what differs after a restart: the workers of apps and edges, and the process ids of other programs."""
    from testkit.stack import children_of

    pids = stack.pids()
    return {name: set(children_of(pid)) if name[:3] in ("app", "edg") else pid for name, pid in pids.items()}


@pytest.mark.long
def test_restart_of_postgres_is_over_within_seconds_and_loses_no_row(serving: Stack) -> None:
    before = serving.pids()["postgres"]
    created = requests.post(f"{serving.edge}/users", json={"name": "R", "email": "r@example.com"}, timeout=30)
    restarted = run("restart", "postgres", "--data", str(serving.data))
    assert restarted.returncode == 0, restarted.stderr
    assert serving.pids()["postgres"] != before
    location = serving.edge + created.headers["Location"]
    assert requests.get(location, timeout=30).json()["name"] == "R"
    requests.delete(location, timeout=30)


def test_restart_and_rollback_say_what_to_do_where_they_cannot_work(stack: Stack, tmp_path: Path) -> None:
    unknown = run("restart", "nginx", "--data", str(stack.data))
    assert unknown.returncode == 1
    assert "There is no program 'nginx'. Choose from: postgres, redis, metrics, relay, app1" in unknown.stderr
    first = run("rollback", "--data", str(stack.data))
    assert first.returncode == 1
    assert "No earlier version of the stack" in first.stderr
    for command in ("restart", "rollback"):
        nothing = run(command, "--data", f"/tmp/velikiy-no-stack-{os.getpid()}")
        assert nothing.returncode == 1
        assert "There is no stack in" in nothing.stderr
