"""Point-in-time recovery: an archive of the log of changes, base backups, and clusters made of both."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import requests

from testkit.databases import superuser_dsn
from testkit.stack import Stack, folder, refused, run, running, wait_until
from velikiy.stack import recovery

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def archive() -> Iterator[Path]:
    with folder() as temporary:
        archive = temporary / "archive"
        archive.mkdir()
        with suppress(LookupError, PermissionError):  # not root: the services run as this user
            shutil.chown(archive, "velikiy", "velikiy")
        yield archive


def names(stack: Stack) -> list[str]:
    """Return the names of all users through every edge, which agree."""
    shown = [[user["name"] for user in requests.get(f"{edge}/users", timeout=5).json()] for edge in stack.edges]
    assert all(it == shown[0] for it in shown)
    return shown[0]


def create(stack: Stack, name: str) -> None:
    response = requests.post(f"{stack.edge}/users", json={"name": name, "email": f"{name}@example.com"}, timeout=5)
    assert response.status_code == 201


def of_stack(command: str, stack: Stack, archive: Path, *options: str) -> None:
    done = run(command, "--data", str(stack.data), *options, WAL_ARCHIVE=str(archive))
    assert done.returncode == 0, done.stderr


def up(stack: Stack, archive: Path) -> None:
    of_stack("up", stack, archive, "--detach", "--edges", "2", "--port", stack.port)


def moment() -> str:
    """Return this moment, before and after which commits differ."""
    time.sleep(0.01)  # a time of commit has microseconds
    now = datetime.now(UTC).isoformat()
    time.sleep(0.01)
    return now


def test_cluster_goes_back_to_a_moment_and_forward_to_the_last_change(archive: Path) -> None:
    with running("--edges", "2", WAL_ARCHIVE=str(archive)) as stack:
        before_any_base = moment()
        of_stack("base-backup", stack, archive)
        time.sleep(1)  # the name of a base backup has seconds
        create(stack, "before")
        good = moment()
        stack.sql("DELETE FROM users")
        create(stack, "after")
        assert names(stack) == ["after"]
        [epoch] = stack.sql("SELECT epoch FROM caches WHERE name = 'redis'")

        assert "The stack is running" in refused("recover", "--data", str(stack.data), WAL_ARCHIVE=str(archive))
        of_stack("down", stack, archive)
        for time_, sentence in (
            (before_any_base, "There is no base backup"),
            ("2126-01-01T00:00:00Z", "the log ends before that time"),
            ("yesterday", "is no time"),
        ):
            message = run("recover", "--data", str(stack.data), "--to", time_, WAL_ARCHIVE=str(archive)).stderr
            assert sentence in message
        of_stack("recover", stack, archive, "--to", good)
        up(stack, archive)
        assert names(stack) == ["Alice", "Bob", "Charlie", "before"]
        assert stack.sql("SELECT epoch FROM caches WHERE name = 'redis'") != [epoch]
        create(stack, "later")  # on the new timeline
        assert names(stack) == ["Alice", "Bob", "Charlie", "before", "later"]

        # A crash before the last changes are archived: the cluster that is replaced still has them.
        of_stack("base-backup", stack, archive, "--keep", "1")
        [base] = recovery.bases(archive)
        create(stack, "last")
        stack.supervisor.stop()
        of_stack("recover", stack, archive)
        up(stack, archive)
        assert names(stack)[-2:] == ["later", "last"]
        assert base.exists()
        assert len(list(stack.data.glob("postgres.before-*"))) == 2


def test_archive_keeps_complete_files_only_and_refuses_another_file_of_the_same_name(
    stack: Stack, tmp_path: Path
) -> None:
    script = stack.root / "deploy" / "postgres" / "archive-wal"
    source, target = tmp_path / "source", tmp_path / "wal"
    target.mkdir()
    for content, code in ((b"one", 0), (b"one", 0), (b"two", 1)):
        source.write_bytes(content)
        assert subprocess.run([script, target, source, "0001"], check=False).returncode == code
    assert [file.name for file in target.iterdir()] == ["0001"]
    assert (target / "0001").read_bytes() == b"one"


def test_full_file_of_the_log_is_archived_and_an_archive_that_is_away_is_tried_again(archive: Path) -> None:
    with (
        running(WAL_ARCHIVE=str(archive)) as stack,
        psycopg.connect(superuser_dsn(stack), autocommit=True) as superuser,
    ):
        away = archive.with_name("away")
        archive.rename(away)
        superuser.execute("SELECT pg_switch_wal()")
        failed = "SELECT failed_count > 0 FROM pg_stat_archiver"
        wait_until(lambda: superuser.execute(failed).fetchone() == (True,), within=60)
        create(stack, "meanwhile")  # the service goes on
        away.rename(archive)
        wait_until(lambda: list((archive / "wal").glob("0*")), within=120)
