"""`./run status` names what is wrong, since when, and what to do. Each test breaks one part of one shared stack."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
import requests
from psycopg.conninfo import make_conninfo
from redis import Redis

from testkit.databases import redis_server
from testkit.outages import hanging
from testkit.stack import ROOT, Stack, children_of, clean_environment, folder, run, running, wait_until
from velikiy.coherence import CachePath, RedisTier
from velikiy.coherence.locks import EVERYTHING, PATHS, lock_id
from velikiy.findings import Finding, caches, configuration, machine, merged
from velikiy.findings.postgres import hazards, why_away
from velikiy.postgres import Connection
from velikiy.server.watch import RELAY_RESTART_S
from velikiy.stack.status import Status, look
from velikiy.stack.status_report import text

SOON_S = 3.0


@pytest.fixture(scope="module")
def breakable() -> Iterator[Stack]:
    with running(EDGE_TTL="7") as stack:
        yield stack


@pytest.fixture(autouse=True)
def _whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "breakable" in request.fixturenames:
        stack = request.getfixturevalue("breakable")
        wait_until(lambda: status(stack).ready, what="everything works again")


def status(stack: Stack) -> Status:
    return look(stack.supervisor.plan)


def finding(stack: Stack, name: str) -> Finding | None:
    return next((it for it in status(stack).findings if it.name == name), None)


def await_finding(stack: Stack, name: str, *, within: float = SOON_S) -> Finding:
    found = wait_until(lambda: finding(stack, name), within=within, what=f"status names {name}")
    assert found is not None
    return found


def readiness(url: str) -> list[str]:
    state = requests.get(f"{url}/readyz", timeout=5).json()
    return [it["name"] for it in state.get("findings", [])]


@contextmanager
def stopped(stack: Stack, name: str) -> Iterator[None]:
    stack.supervisor.rpc.stopProcess(name)
    try:
        yield
    finally:
        stack.supervisor.rpc.startProcess(name)


class TestWhatIsWrong:
    def test_whole_stack_is_ready_and_shows_its_parts(self, breakable: Stack) -> None:
        wait_until(lambda: status(breakable).ready)
        completed = run("status", "--data", str(breakable.data))
        assert completed.returncode == 0, completed.stdout
        assert completed.stdout.startswith("ready\n")
        for part in (
            "restarts",
            "cache redis: registered",
            "cache edge1: registered, lease",
            "setting EDGE_TTL=7 (default 5)",
        ):
            assert part in completed.stdout

    def test_program_that_ends_again_and_again_is_named_with_its_restarts(self, breakable: Stack) -> None:
        script = breakable.data / "run" / "app1"
        good = script.read_text()
        script.write_text(good.replace("-m gunicorn", "-m no_such_module"))
        try:
            breakable.supervisor.rpc.signalProcess("app1", "KILL")
            found = await_finding(breakable, "process.crash_loop", within=SOON_S + 1)
            assert found.what.startswith("app1 ends again and again")
            assert "./run logs app1" in found.advice
            assert found.since is not None
            assert time.time() - found.since < 10
            state = json.loads(run("status", "--json", "--data", str(breakable.data)).stdout)
            assert (state["ready"], state["serves"]) == (False, True)
            [process] = [it for it in state["processes"] if it["name"] == "app1"]
            assert process["restarts"] >= 3
            wait_until(lambda: '"event": "process.crash_loop"' in breakable.log("app1"), within=SOON_S)
        finally:
            script.write_text(good)
            # The finding ends when the starts are old. The next tests need not wait for that.
            wait_until(lambda: finding(breakable, "process.silent") is None, within=10)
            (breakable.data / "run" / "app1.spawned").write_text("1\n")

    def test_workers_that_end_again_and_again_are_named_while_their_master_goes_on(self, breakable: Stack) -> None:
        master = breakable.pids()["app1"]
        for _ in range(3):
            workers = children_of(master)
            worker = next(iter(workers))
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda worker=worker: worker not in children_of(master))  # type: ignore[misc]
        found = await_finding(breakable, "process.workers_end")
        assert "Workers of app1 end again and again" in found.what
        (breakable.data / "run" / "app1.workers.spawned").unlink()

    def test_stopped_relay_is_named_and_so_is_a_fenced_redis(self, breakable: Stack) -> None:
        with stopped(breakable, "relay"):
            await_finding(breakable, "relay.away")
            await_finding(breakable, "process.down")
            within = SOON_S + RELAY_RESTART_S
            wait_until(lambda: '"relay.away"' in breakable.log("app1"), within=within, what="the log of an app says so")
            assert "relay.away" in readiness(breakable.edge)
            breakable.sql("UPDATE caches SET fenced_at = clock_timestamp(), excluded = true WHERE name = 'redis'")
            found = await_finding(breakable, "redis.fenced")
            assert found.since is not None
            assert abs(found.since - time.time()) < 10
            assert requests.get(f"{breakable.edge}/readyz", timeout=5).json()["status"] == "degraded"
            completed = run("status", "--data", str(breakable.data))
            assert completed.returncode == 1
            assert completed.stdout.startswith("something is wrong, and requests are answered\n")
            assert "WRONG    Redis is out of use" in completed.stdout
            assert f"logs --data {breakable.data} relay" in completed.stdout, "the advice can be pasted"
            breakable.sql("DELETE FROM caches WHERE name = 'redis'")
            await_finding(breakable, "redis.row_missing")
            assert "redis.row_missing" in readiness(breakable.edge)

    def test_edge_without_a_lease_is_named_with_the_moment_of_the_loss(self, breakable: Stack) -> None:
        breakable.sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''refused''; END'"
        )
        breakable.sql(
            "CREATE TRIGGER refuse BEFORE UPDATE OR INSERT ON caches FOR EACH ROW WHEN (NEW.kind = 'edge')"
            " EXECUTE FUNCTION refuse()"
        )
        try:
            found = await_finding(breakable, "edge.no_lease", within=2.4 + SOON_S)
            assert found.where == "edge1"
            assert found.since is not None
            assert time.time() - found.since < 10
            assert "edge.no_lease" in readiness(breakable.edge)
        finally:
            breakable.sql("DROP FUNCTION refuse CASCADE")

    def test_foreign_lock_of_a_path_is_named_with_its_session(self, breakable: Stack) -> None:
        with psycopg.connect(breakable.postgres, application_name="a person's psql") as foreign:
            foreign.execute("SELECT pg_advisory_lock(%s, %s)", (PATHS, lock_id(CachePath("/users", ""))))
            found = await_finding(breakable, "locks.foreign")
            assert "/users" in found.what
            assert "a person's psql" in found.what
            assert f"pg_terminate_backend({foreign.info.backend_pid})" in found.advice
            assert "locks.foreign" in readiness(breakable.edge)
            wait_until(lambda: '"locks.foreign"' in breakable.log("relay"), within=SOON_S, what="the log says so")
            foreign.execute("SELECT pg_advisory_unlock_all(), pg_advisory_lock(7)")  # a number of another program
            wait_until(lambda: status(breakable).ready, within=SOON_S)

    def test_session_that_locks_a_table_is_named(self, breakable: Stack) -> None:
        with psycopg.connect(breakable.postgres, application_name="a long ALTER") as foreign:
            foreign.execute("LOCK TABLE users")
            found = await_finding(breakable, "locks.blocking")
            assert "a long ALTER" in found.what
            assert "has locked the table users" in found.what
            line = wait_until(
                lambda: [it for it in breakable.log("relay").splitlines() if "has locked the table users" in it],
                within=SOON_S,
            )[-1]
            logged = json.loads(line)
            assert str(foreign.info.backend_pid) in logged["what"]
            assert abs(datetime.fromisoformat(logged["since"]).timestamp() - time.time()) < 30

    def test_session_that_lets_writers_of_a_row_wait_is_named(self, breakable: Stack) -> None:
        with psycopg.connect(breakable.postgres, application_name="a forgotten psql") as foreign:
            foreign.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
            finished = threading.Event()

            def write() -> None:
                while not finished.is_set():
                    requests.put(f"{breakable.edge}/users/1", json={"name": "A"}, timeout=10)

            with ThreadPoolExecutor(1) as pool:
                writer = pool.submit(write)
                try:
                    wait_until(lambda: "a forgotten psql" in breakable.log("relay"), within=2 * SOON_S)
                finally:
                    finished.set()
                writer.result()

    @pytest.mark.parametrize(
        ("server", "name"), [("postgres", "postgres.silent"), ("redis", "redis.unusable"), ("app1", "process.silent")]
    )
    def test_status_answers_within_two_seconds_while_a_server_hangs(
        self, breakable: Stack, server: str, name: str
    ) -> None:
        with hanging(breakable, server):
            began = time.monotonic()
            found = status(breakable)
            assert time.monotonic() - began < 2
            assert name in [it.name for it in found.findings]
            assert not found.ready
            assert text(found)


class TestDoctor:
    def doctor(self, stack: Stack, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PYTHONPATH": str(ROOT), "SECRETS_DIR": str(stack.data / "secrets"), **environment}
        variables = clean_environment(**given)
        return subprocess.run(
            [sys.executable, "-P", "-m", "velikiy", "doctor"],
            cwd=cwd,
            env={name: value for name, value in variables.items() if name != "VELIKIY_CACHE"},  # not under `./run`
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def test_doctor_finds_nothing_wrong_with_a_whole_stack(self, breakable: Stack, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("EDGE_TLL=3\n")
        examined = self.doctor(breakable, tmp_path)
        assert examined.returncode == 0, examined.stdout + examined.stderr
        assert "EDGE_TLL in .env is no setting, so it has no effect.\n  Did you mean EDGE_TTL?" in examined.stdout
        assert "hint: EDGE_TTL=5: an edge requests an unchanged response again after 5 s." in examined.stdout
        assert examined.stdout.endswith("no problems, 1 warning\n")
        assert "hint:" not in self.doctor(breakable, tmp_path, EDGE_TTL="3600").stdout

    def test_doctor_names_locks_other_stacks_and_open_secrets_with_commands_to_paste(
        self, breakable: Stack, tmp_path: Path
    ) -> None:
        with (
            folder() as opened,
            psycopg.connect(breakable.postgres, application_name="velikiy relay", autocommit=True),
            psycopg.connect(breakable.postgres) as foreign,
        ):
            foreign.execute("SELECT pg_advisory_lock(%s, %s)", (PATHS, lock_id(EVERYTHING)))
            pid = foreign.info.backend_pid
            secrets = shutil.copytree(breakable.data / "secrets", opened / "secrets")
            shutil.copy(breakable.data / "stack.json", opened)
            secrets.chmod(0o755)
            (secrets / "edge_secret").chmod(0o644)
            examined = self.doctor(breakable, tmp_path, SECRETS_DIR=str(secrets))
        assert examined.returncode == 1, examined.stdout + examined.stderr
        assert "for a write to every path: no read is cached." in examined.stdout
        assert f'./run psql -c "SELECT pg_terminate_backend({pid})"' in examined.stdout
        assert "2 relays" in examined.stdout
        assert f"chmod go-rwx {secrets}/edge_secret" in examined.stdout

    def test_doctor_examines_the_machine_also_with_settings_that_are_refused(
        self, breakable: Stack, tmp_path: Path
    ) -> None:
        examined = self.doctor(breakable, tmp_path, REDIS_TTL="soon")
        assert examined.returncode == 1
        assert "REDIS_TTL='soon' is not allowed" in examined.stdout
        assert "ok       limits" in examined.stdout


def test_redis_whose_user_may_not_empty_it_is_named_with_the_missing_command() -> None:
    with redis_server() as port, Redis(port=port) as admin:
        admin.execute_command("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all", "-flushdb")
        tier = RedisTier(f"redis://weak:secret@127.0.0.1:{port}/0", lambda: None, ttl=60, timeout=1)
        assert tier.lacking_rights() == ["FLUSHDB"]
        row = caches.Row("redis", "", "1", time.time(), True, 0.0, 0.0)
        [found] = caches.redis(tier, caches.Table(row, [], [], {}))
        assert (found.name, found.wrong) == ("redis.refused", True)
        assert "may not run FLUSHDB" in found.what
        assert "+flushdb" in found.advice
        admin.execute_command("ACL", "SETUSER", "weak", "+flushdb")
        assert tier.lacking_rights() == []


@pytest.mark.parametrize(
    ("spoil", "mend", "reason"),
    [
        ("ACL SETUSER weak -hset", "ACL SETUSER weak +hset", "does not permit its user the commands"),
        ("ACL SETUSER weak resetkeys ~other:*", "ACL SETUSER weak ~*", "does not permit its user the commands"),
        ("ACL SETUSER weak resetpass", "ACL SETUSER weak >secret", "refuses the user or the password"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "is a replica that accepts no writes"),
    ],
)
def test_redis_that_answers_and_refuses_is_named_with_the_reason_until_it_is_mended(
    spoil: str, mend: str, reason: str
) -> None:
    with redis_server() as port, Redis(port=port) as admin:
        admin.execute_command("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all")
        tier = RedisTier(f"redis://weak:secret@127.0.0.1:{port}/0", lambda: None, ttl=60, timeout=1)
        known = caches.Table(caches.Row("redis", str(tier.identify()), "1", None, False, 0.0, 0.0), [], [], {})
        assert caches.redis(tier, known) == []
        admin.execute_command(*spoil.split())
        [found] = caches.redis(tier, known)
        assert found.name == "redis.unusable"
        assert reason in found.what
        admin.execute_command(*mend.split())
        wait_until(lambda: "unusable" not in str(caches.redis(tier, known)))


def test_redis_that_may_not_evict_is_named_when_it_is_full() -> None:
    with redis_server() as port, Redis(port=port) as admin:
        tier = RedisTier(f"redis://127.0.0.1:{port}/0", lambda: None, ttl=60, timeout=1)
        known = caches.Table(caches.Row("redis", str(tier.identify()), "1", None, False, 0.0, 0.0), [], [], {})
        admin.config_set("maxmemory-policy", "noeviction")
        assert caches.redis(tier, known) == []
        admin.config_set("maxmemory", "100000")
        assert [it.name for it in caches.redis(tier, known)] == ["redis.full"]


def test_look_at_redis_compares_its_clock_without_a_further_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server() as port, Redis(port=port) as admin:
        tier = RedisTier(f"redis://127.0.0.1:{port}/0", lambda: None, ttl=60, timeout=1)
        known = caches.Table(caches.Row("redis", str(tier.identify()), "1", None, False, 0.0, 0.0), [], [], {})
        assert caches.redis(tier, known) == []
        opened = int(admin.info("stats")["total_connections_received"])
        ahead = time.time() + 60
        monkeypatch.setattr("velikiy.coherence.redis_tier.time.time", lambda: ahead)
        assert [it.name for it in caches.redis(tier, known)] == ["clock.differs"]
        # One to find out which server it is now, one for the rights of its user, and one for a trial.
        assert int(admin.info("stats")["total_connections_received"]) <= opened + 3


def test_postgresql_that_takes_no_writes_is_named_and_so_is_a_refusal(breakable: Stack) -> None:
    read_only = make_conninfo(breakable.postgres, options="-c default_transaction_read_only=on")
    assert why_away(read_only).name == "postgres.standby"
    found = why_away(make_conninfo(breakable.postgres, dbname="no_such_database"))
    assert found.name == "postgres.refuses"
    assert 'database "no_such_database" does not exist' in found.what


def test_clock_that_differs_from_that_of_postgresql_is_named(breakable: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = time.time() + 60
    monkeypatch.setattr("velikiy.findings.postgres.time.time", lambda: ahead)
    with Connection.connect(breakable.postgres, autocommit=True) as connection:
        found = [it.name for it in hazards(connection, ["users"])]
    monkeypatch.undo()
    assert "clock.differs" in found


@pytest.mark.parametrize(("seconds", "direction"), [(3600, "ahead of"), (-3600, "behind"), (0, "")])
def test_edge_reports_its_clock_and_a_difference_is_named(seconds: int, direction: str) -> None:
    check, found = caches.edge(f"held; clock={time.time() + seconds:.3f}")
    assert check == "ok"
    assert [it.name for it in found] == ["clock.differs"] * bool(seconds)
    assert direction in str(found)


def test_each_disk_of_the_data_folder_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL's log may lie on a disk of its own, to which a link leads."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "pg_wal").symlink_to("/dev/shm")
    monkeypatch.setattr(machine, "free_bytes", lambda _: 0)
    found = machine.disks([tmp_path, tmp_path / "logs", tmp_path / "pg_wal", tmp_path / "missing"])
    assert [str(it.what).split(" has ")[0] for it in found] == [f"The disk of {tmp_path}", "The disk of /dev/shm"]


def test_findings_are_shown_once_and_consequences_of_a_missing_postgresql_not_at_all() -> None:
    down = Finding("postgres.silent", "It is silent.", "Look.")
    warning = Finding("disk.low", "It is full.", "Clean.", wrong=False)
    assert merged([warning, caches.no_lease(), down, down]) == [down, warning]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("EDGE_TLL", "Did you mean EDGE_TTL?"), ("REDIS_TIME_OUT", "Did you mean REDIS_TIMEOUT?"), ("FOO", "Remove it.")],
)
def test_unknown_name_in_env_is_reported_with_a_suggestion(name: str, advice: str) -> None:
    [found] = configuration.unknown_names([name, "EDGE_TTL", "COMPOSE_PROJECT_NAME", "TZ"])
    assert name in found.what
    assert found.advice.startswith(advice)


def test_operations_md_explains_every_finding() -> None:
    names = set(
        re.findall(
            r'"((?:process|supervisor|edge|postgres|redis|relay|locks|clock|disk|memory|limits|settings|secrets|stack)'
            r'\.[a-z_]+)"',
            "".join(file.read_text() for file in (ROOT / "velikiy/findings").glob("*.py")),
        )
    )
    assert len(names) > 30
    explained = set(re.findall(r"`([a-z]+\.[a-z_]+)`", (ROOT / "docs/operations.md").read_text()))
    assert names <= explained
