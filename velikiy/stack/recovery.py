"""Point-in-time recovery of the stack's own PostgreSQL: an archive of its log of changes (WAL), base backups of its
cluster, and a cluster that is made of both.

The archive is the folder WAL_ARCHIVE: `wal/` has the files of the log, `base/` the base backups.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from velikiy.stack import Refusal, cluster
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import Plan

BASE_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z")
NAME_FORMAT = "%Y%m%dT%H%M%SZ"

FIRST_FILE = re.compile(r"^START WAL LOCATION: \S+ \(file ([0-9A-F]{24})\)$", re.MULTILINE)

UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9._/+-]")
"""Characters that the shell or PostgreSQL would interpret in the command that archives a file."""

SET_UP = """
DELETE FROM caches;

DO $$
BEGIN
    EXECUTE format('ALTER ROLE postgres PASSWORD %L',
        rtrim(pg_read_file(current_setting('velikiy.secrets') || '/postgres_password'), E'\\n'));
END
$$;

"""
"""In single-user mode, a semicolon before an empty line ends a statement."""

REASONS = {
    "recovery ended before configured recovery target was reached": "the log ends before that time. Omit --to for the"
    " last change",
    "requested recovery stop point is before consistent recovery point": "the base backup ended after that time",
}
"""Messages of PostgreSQL in other words."""


def check_archive(folder: Path) -> None:
    """Create the folders of the archive.

    Raises:
        Refusal: The folder cannot be used.
    """
    if UNSAFE_CHARACTERS.search(str(folder)) or not folder.is_absolute():
        raise Refusal(
            f"WAL_ARCHIVE={folder} cannot be used. Give an absolute path of letters, digits and the characters ._/+-"
        )
    try:
        for part in (folder / "wal", folder / "base"):
            part.mkdir(mode=0o700, exist_ok=True)
            (part / ".probe").touch()
            (part / ".probe").unlink()
    except OSError as error:
        raise Refusal(
            f"WAL_ARCHIVE={folder} cannot be used: {error.strerror}. Create the folder, and make the user of the"
            " services its owner (chown velikiy)"
        ) from None


def server_options(plan: Plan) -> list[str]:
    """Return the options with which PostgreSQL archives its log."""
    if not plan.wal_archive:
        return []
    command = f"sh {plan.sockets}/archive-wal {plan.wal_archive}/wal %p %f"
    # Without a timeout, a quiet database would keep its last changes to itself until 16 MB are full.
    return ["-c", "archive_mode=on", "-c", f"archive_command={command}", "-c", "archive_timeout=60s"]


def make_base(plan: Plan, keep: int | None) -> None:
    """Make a base backup of the cluster that runs, then delete all but the newest, and the log before them.

    Raises:
        Refusal
    """
    with _alone(_archive(plan) / "base") as folder:
        _make_base(plan, folder, keep)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Keep other base backups away from the folder: a timer and a person may begin at the same time.

    Raises:
        Refusal: Another one is being made.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise Refusal(f"{folder} does not exist. Run ./run up, which creates it (docs/backup.md).") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"Another base backup is being made in {folder}. Wait for its end.") from None
        yield folder
    finally:
        os.close(descriptor)


def _make_base(plan: Plan, folder: Path, keep: int | None) -> None:
    """Raises: Refusal"""
    new = folder / ".part"
    shutil.rmtree(new, ignore_errors=True)
    programs = cluster.binaries(plan.cluster)
    command = [
        *[str(programs / "pg_basebackup"), "--pgdata", str(new), "--host", str(plan.sockets), "--username=postgres"],
        *["--checkpoint=fast", "--wal-method=stream", "--no-password", "--manifest-checksums=SHA256"],
    ]
    try:
        with step(f"copying the cluster to {folder}"):
            _run(command, {"PGPASSWORD": plan.secret("postgres_password")})
            _run([str(programs / "pg_verifybackup"), str(new)], {})
            # The name is the time of its end: it can be recovered to any later time.
            new.rename(new.with_name(datetime.now(UTC).strftime(NAME_FORMAT)))
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if keep:
        _delete_old(folder.parent, programs, keep)


def _delete_old(archive: Path, programs: Path, keep: int) -> None:
    *_, oldest = bases(archive)[-keep:][:1]
    for base in bases(archive)[:-keep]:
        shutil.rmtree(base)
        report(f"deleted {base}")
    first = FIRST_FILE.search((oldest / "backup_label").read_text())
    if first:
        _run([str(programs / "pg_archivecleanup"), str(archive / "wal"), first[1]], {})


def bases(archive: Path) -> list[Path]:
    """Return the base backups, the oldest first."""
    folder = archive / "base"
    return sorted(base for base in folder.iterdir() if BASE_NAME.fullmatch(base.name)) if folder.is_dir() else []


def recover(plan: Plan, until: datetime | None) -> None:
    """Replace the cluster of a stopped stack by a base backup with the log up to this time, or all of it.

    Raises:
        Refusal: Nothing was changed.
    """
    archive = _archive(plan)
    base = _choose_base(archive, until)
    programs = cluster.binaries(base)
    new = plan.home / "postgres.new"
    previous = plan.home / f"postgres.before-{datetime.now(UTC).strftime(NAME_FORMAT)}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        with step(f"copying the base backup {base.name}"):
            shutil.copytree(base, new, symlinks=True)
            (new / "backup_manifest").unlink(missing_ok=True)
            (new / "recovery.signal").touch()
        with step(f"recovering the state of {until.isoformat(' ', 'seconds') if until else 'the last change'}"):
            _replay(plan, programs, new, until)
            _set_up(plan, programs, new)
        _exchange(plan.cluster, new, previous)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    report(f"recovered; start the stack with {command('up', home=plan.home)}")
    if previous.exists():
        report(f"The cluster of before is in {previous}. Delete it when you have checked the rows.")


def _exchange(present: Path, new: Path, previous: Path) -> None:
    """Put the new cluster in the place of the present one, which becomes the previous one; both or none."""
    had_one = present.exists()
    if had_one:
        present.rename(previous)
    try:
        new.rename(present)
    except BaseException:  # such as Ctrl-C
        if had_one and not present.exists():
            previous.rename(present)
        raise


def check_cluster(plan: Plan) -> None:
    """Refuse to start with a new, empty cluster in the place of one that a recovery has moved away.

    Raises:
        Refusal
    """
    if not plan.cluster.exists() and (left := sorted(plan.home.glob("postgres.before-*"))):
        raise Refusal(
            f"{plan.cluster} is missing, because a recovery was interrupted. Put the cluster of before back:"
            f" {shlex.join(['mv', str(left[-1]), str(plan.cluster)])} - and start again, or recover again."
        )


def _choose_base(archive: Path, until: datetime | None) -> Path:
    """Raises: Refusal"""
    known = bases(archive)
    fitting = [base for base in known if until is None or _end_of(base) <= until]
    if not fitting:
        names = ", ".join(base.name for base in known) or "none"
        raise Refusal(f"There is no base backup in {archive / 'base'} that ended before that time. It has: {names}.")
    return fitting[-1]


def _end_of(base: Path) -> datetime:
    return datetime.strptime(base.name, NAME_FORMAT).replace(tzinfo=UTC)


def _replay(plan: Plan, programs: Path, new: Path, until: datetime | None) -> None:
    """Run PostgreSQL until it has replayed the log.

    Raises:
        Refusal
    """
    log = plan.logs / "recovery.log"
    # In a folder that no other user may enter, and not the folder of the stack: no client connects before `_set_up`.
    with tempfile.TemporaryDirectory(prefix="velikiy-") as sockets, log.open("wb") as output:
        command = [
            *[str(programs / "postgres"), "-D", str(new), "-c", "listen_addresses="],
            *["-c", f"unix_socket_directories={sockets}", "-c", f"config_file={plan.sockets / 'postgresql.conf'}"],
            *_recovery_options(plan, until),
            *server_options(plan),
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as server:
            try:
                # The state alone is that of the copied cluster until the recovery begins.
                while (new / "recovery.signal").exists() or _state(programs, new) != "in production":
                    if server.poll() is not None:
                        raise Refusal(f"PostgreSQL could not recover: {_reason(log)}. The whole log is in {log}.")
                    time.sleep(0.2)
            finally:
                if server.poll() is None:
                    server.send_signal(signal.SIGINT)


def _recovery_options(plan: Plan, until: datetime | None) -> list[str]:
    wal, last = Path(plan.wal_archive) / "wal", plan.cluster / "pg_wal"
    # The cluster that is replaced has the last changes, which were not archived yet.
    command = f'cp "{wal}/%f" "%p" 2> /dev/null || cp "{last}/%f" "%p" 2> /dev/null'
    options = ["-c", f"restore_command={command}", "-c", "recovery_target_action=promote"]
    if until:
        options += ["-c", f"recovery_target_time={until.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00"]
    return options


def _state(programs: Path, new: Path) -> str:
    shown = subprocess.run(
        [str(programs / "pg_controldata"), str(new)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"^Database cluster state: +(.*)$", shown, re.MULTILINE)
    return found[1] if found else ""


def _set_up(plan: Plan, programs: Path, new: Path) -> None:
    """Forget the caches, and give the superuser the password of this stack.

    The recovered table `caches` names the epochs and the Redis of then, which may hold rows of after that time. Without
    its rows no cache is used before it has registered again, empty.
    """
    options = ["-c", f"config_file={plan.sockets / 'postgresql.conf'}", "-c", "exit_on_error=on", *server_options(plan)]
    options += ["-c", f"velikiy.secrets={plan.secrets_folder}"]
    _run([str(programs / "postgres"), "--single", "-j", "-D", str(new), *options, "velikiy"], {}, SET_UP)


def _reason(log: Path) -> str:
    fatal = re.findall(r"(?:FATAL|PANIC):\s+(.*)", log.read_text(errors="replace"))
    reason = fatal[-1] if fatal else "no reason was given"
    return REASONS.get(reason, reason)


def _archive(plan: Plan) -> Path:
    """Raises: Refusal"""
    if not plan.wal_archive:
        raise Refusal("WAL_ARCHIVE is not set. Set it to a folder, and run ./run up (docs/backup.md).")
    return Path(plan.wal_archive)


def _run(command: list[str], environment: dict[str, str], given: str = "") -> None:
    """Raises: Refusal"""
    done = subprocess.run(
        command,
        input=given,
        env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason was given"]
        raise Refusal(f"{Path(command[0]).name} failed: {lines[-1]}.")
